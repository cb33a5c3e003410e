"""The coordinator's HTTP: what it refuses and how, and what it says of itself where nothing works.

Knows the routes of a running coordinator. Does not know shards (test_hosts).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from ema_service.cluster import Arrival, Ask, Change, Record, Report, Term, coordinator, encode
from ema_service.cluster.hosting.link import Link
from ema_service.cluster.serving import listening_socket
from ema_service.cluster.token import ClusterToken
from tests.service.cluster.hosts import Hosts
from tests.service.cluster.processes.coordinating import TOKEN
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    started = Hosts(tmp_path_factory.mktemp("coordinator"))
    started.coordinate()
    yield started
    started.end()


ARRIVAL, REPORT = encode(Arrival(0, 2, "a")), encode(Report(0, Record()))
SHARD = "/v1/runs/none/shards"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "detail"),
    [
        ("GET", "/nothing", "", 404, "route_not_found", "no route /nothing"),
        ("PUT", SHARD, "", 405, "method_not_allowed", "PUT"),
        ("GET", SHARD, "", 404, "run_not_found", "no shard of a run 'none'"),
        ("POST", "/v1/runs/none/changes", encode(Change("k", "c")), 404, "run_not_found", "'none'"),
        ("POST", "/v1/replicas", ARRIVAL, 404, "run_not_found", "'-directory'"),
        ("POST", "/v1/replicas", REPORT, 422, "invalid_request", "got 'report'"),
        ("POST", "/v1/runs/none/changes", REPORT, 422, "invalid_request", "got 'report'"),
        ("POST", f"{SHARD}/0/reports", REPORT, 404, "run_not_found", "'none'"),
        ("POST", f"{SHARD}/0/reports", encode(Ask(0, Term())), 422, "invalid_request", "got 'ask'"),
        ("POST", f"{SHARD}/0/reports", "", 422, "invalid_request", "not JSON"),
        ("POST", f"{SHARD}/1/reports", REPORT, 422, "invalid_request", "the path names shard 1, the message shard 0"),
        ("POST", f"{SHARD}/1/link", ARRIVAL, 422, "invalid_request", "the path names shard 1, the message shard 0"),
        ("POST", f"{SHARD}/x/link", ARRIVAL, 422, "invalid_request", "the path names shard x, the message shard 0"),
        ("POST", f"{SHARD}/2/link", encode(Arrival(2, 2, "a")), 422, "invalid_request", "places are counted from 0"),
        ("POST", f"{SHARD}/0/link", REPORT, 422, "invalid_request", "expected an object with one member: arrival"),
    ],
)
def test_mistake_is_a_problem(
    hosts: Hosts, method: str, path: str, body: str, status: int, code: str, detail: str
) -> None:
    """Every refusal is a problem that names what is wrong."""
    answer = hosts.ask(method, path, content=body)

    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert detail in answer.json()["detail"]


def test_who_was_replaced_is_not_heard(hosts: Hosts) -> None:
    """A process of a host with a smaller number than the latest's is refused, whatever it says; so is no number."""

    def said(path: str, body: str, number: str) -> tuple[int, str]:
        headers = {"Ema-Host-Number": number, "Authorization": f"Bearer {TOKEN}"}
        answer = hosts.ask("POST", f"/v1/runs/numbered/shards/7{path}", content=body, headers=headers)
        return answer.status_code, answer.json()["code"]

    report = encode(Report(7, Record()))
    assert said("/reports", report, "5") == (404, "run_not_found")
    assert said("/reports", report, "4") == (409, "fenced")
    assert said("/link", encode(Arrival(7, 8, "a")), "4") == (409, "fenced")
    assert said("/reports", report, "5") == (404, "run_not_found")
    assert said("/reports", report, "five") == (422, "invalid_request")


def test_message_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message beyond the limit is refused before it is whole in memory."""
    monkeypatch.setattr(coordinator, "_MOST_BYTES", 1000)
    app = coordinator.create_coordinator(ClusterToken(TOKEN), lambda: None)
    headers = {"Authorization": f"Bearer {TOKEN}"}

    async def ask(size: int) -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://c", headers=headers
        ) as client:
            return await client.post(f"{SHARD}/0/reports", content=b" " * size)

    answer = asyncio.run(ask(1001))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert asyncio.run(ask(1000)).status_code == 422


def test_answers_are_sent_at_once() -> None:
    """A connection that is accepted does not hold small answers back for an acknowledgement (TCP_NODELAY)."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        sock = listening_socket("127.0.0.1", 0)
        async with await asyncio.start_server(look, sock=sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            nodelay = await found
            writer.close()
            await writer.wait_closed()
        return nodelay

    assert asyncio.run(accepted())


def test_message_is_sent_at_once() -> None:
    """A report's head and body are one write, so that the coordinator is woken once."""
    heard: list[bytes] = []

    def answer(sock: socket.socket) -> None:
        connection, _ = sock.accept()
        with connection:
            heard.append(connection.recv(1 << 16))
            connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    with listening_socket("127.0.0.1", 0) as sock:
        sock.listen()
        server = threading.Thread(target=answer, args=(sock,))
        server.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        link = Link(url, "r", lambda: Arrival(0, 2, "a"), ClusterToken(TOKEN), lambda _: None)
        link.start()
        server.join(30)
        link.close()

    assert heard[0].endswith(ARRIVAL.encode())


def test_link_is_closed_while_it_connects() -> None:
    """A link that is closed between two looks ends at the first word that it hears."""

    def talk(sock: socket.socket) -> None:
        connection, _ = sock.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                connection.sendall(encode(Ask(0, Term())).encode() + b"\n")
                time.sleep(0.01)

    def arrival() -> Arrival:
        if not link._stopped.is_set():
            closing.start()
            wait_until(link._stopped.is_set)
        return Arrival(0, 2, "a")

    with listening_socket("127.0.0.1", 0) as sock:
        sock.listen()
        threading.Thread(target=talk, args=(sock,), daemon=True).start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        link = Link(url, "r", arrival, ClusterToken(TOKEN), lambda _: None)
        closing = threading.Thread(target=link.close, daemon=True)
        link.start()
        wait_until(lambda: not any(thread.is_alive() for thread in link._threads), "the link to end", 10)


def test_address_in_use(hosts: Hosts) -> None:
    """A coordinator does not share the port of another."""
    with pytest.raises(OSError, match="in use"):
        listening_socket("127.0.0.1", hosts.ports[0])


def test_wrong_token_is_told_and_not_shown(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    """A shard with another token says in its log that the coordinator refuses it, once, and neither token."""
    caplog.set_level(logging.DEBUG)
    other = "another-token-of-the-tests"
    tries: list[Arrival] = []

    def arrival() -> Arrival:
        tries.append(Arrival(0, 2, "a"))
        return tries[-1]

    link = Link(f"http://127.0.0.1:{hosts.ports[0]}", "r", arrival, ClusterToken(other), lambda _: None)
    link.start()
    wait_until(lambda: len(tries) > 5, "some tries")
    link.close()

    assert "no coordinator at" in caplog.text
    assert "401 this coordinator wants the cluster's token" in caplog.text
    assert caplog.text.count("401") == 1
    assert other not in caplog.text
    assert TOKEN not in caplog.text + hosts.log()


def test_silent_coordinator_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A coordinator that accepts connections and never answers is tried again, and closing waits for nothing."""
    monkeypatch.setattr("ema_service.cluster.hosting.link._SILENCE", 0.1)
    with listening_socket("127.0.0.1", 0) as sock:
        sock.listen()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        link = Link(url, "r", lambda: Arrival(0, 2, "a"), ClusterToken(TOKEN), lambda _: None)
        link.start()
        wait_until(lambda: "TimeoutError" in caplog.text, "the coordinator to be given up")
        link.close()


def test_who_comes_early_is_served() -> None:
    """A shard that connects before the coordinator's loop runs waits, and is not refused."""
    with listening_socket("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        connection.close()
