"""Bodies come in whatever pieces the network makes of them, over both ways of receiving.

``filling`` is the server as it runs, ``tls`` the same with a certificate; ``stock`` is the same application under
uvicorn's own h11 protocol, where bodies take ``request.stream()``. Each test runs over all three.

Knows raw HTTP/1.1 over sockets. Does not know which path a body takes inside.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from ema_service.api import create_app
from ema_service.api.transfer.lending import LendingProtocol
from ema_service.api.transfer.uvicorn_fit import uvicorn_fits
from ema_service.settings import Settings
from ema_service.shadows.passes import Pass
from tests.waiting import wait_until

STOCK = """
import sys, uvicorn
from ema_service.api import create_app
from ema_service.settings import Settings
uvicorn.run(create_app(Settings(data_dir=None)), port=int(sys.argv[1]), http="h11", ws="none", log_level="warning")
"""
LAYOUT = [{"name": "w", "shape": [3, 2], "dtype": "F32"}, {"name": "b", "shape": [2], "dtype": "F32"}]


def body_of(value: float, *, order: str = "bw") -> bytes:
    """A push of the layout with one value everywhere; ``order`` of its two tensors."""
    sizes, offset, table = {"w": ([3, 2], 24), "b": ([2], 8)}, 0, {}
    for name in order:
        shape, size = sizes[name]
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", value) * 8


class Raw:
    """One connection, spoken to byte by byte."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if parts.scheme == "https":
            self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=parts.hostname)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.002)  # so that the server most often sees two pieces; right either way
            self.socket.sendall(piece)

    def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        status = int(self.file.readline().split()[1])
        length = 0
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, self.file.read(length)

    def closed(self) -> bool:
        return self.file.read(1) == b""


def put(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [f"PUT {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def tls_url(tmp_path_factory, server_class, certificate) -> Iterator[str]:
    """A server that speaks TLS; Python's clients trust its authority, which SSL_CERT_FILE names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate.authority))
        running = server_class(tmp_path_factory.mktemp("tls-server"), certificate.flags).start()
        assert running.url.startswith("https://")
        yield running.url
        assert running.stop() == 0
        assert "Traceback" not in running.log


@pytest.fixture(scope="module", params=["filling", "tls", "stock"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "stock":
        yield request.getfixturevalue("tls_url") if request.param == "tls" else request.getfixturevalue("server").url
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", STOCK, str(port)])
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(30)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").status_code == 200
    return False


@pytest.fixture
def run(url: str, run_name: str) -> str:
    """The path of a fresh run at decay 0: its shadow is what was pushed last."""
    config = {"run": run_name, "layout": LAYOUT, "decay": 0.0, "use_num_updates": False}
    assert httpx.post(f"{url}/v1/runs", json=config).status_code == 201
    assert httpx.put(f"{url}/v1/runs/{run_name}/weights", content=body_of(1.0)).status_code == 200
    return f"/v1/runs/{run_name}"


def shadow(url: str, run: str) -> set[float]:
    """The values in the run's shadow."""
    data = httpx.get(f"{url}{run}/weights").content[-32:]
    return set(struct.unpack("<8f", data))


def staging(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(text.split("\nema_staging_bytes ")[1].split()[0])


def test_a_body_may_be_cut_anywhere(url, run):
    """One cut at each byte from the end of the headers to the end of the body; each update is applied."""
    whole = put(f"{run}/updates/1", body_of(2.0))
    first = whole.index(b"\r\n\r\n") - 2
    for step, cut in enumerate(range(first, len(whole) + 1), start=1):
        value = float(step)
        message = put(f"{run}/updates/{step}", body_of(value))
        cut += len(message) - len(whole)
        with Raw(url) as raw:
            raw.send(message[:cut], message[cut:])
            status, answer = raw.answer()
        assert (status, json.loads(answer)["applied"]) == (200, True), (cut, answer)
    assert shadow(url, run) == {value}


def test_a_body_may_come_byte_by_byte(url, run):
    """The smallest pieces there are."""
    message = put(f"{run}/updates/1", body_of(3.0))
    with Raw(url) as raw:
        raw.send(*(message[i : i + 1] for i in range(len(message))))
        assert raw.answer()[0] == 200
    assert shadow(url, run) == {3.0}


def test_one_connection_takes_a_mixture(url, run):
    """Pushes, repeats, refusals and reads follow each other on one connection, each answered as if it were alone."""
    bad = body_of(float("nan"))
    with Raw(url) as raw:
        exchanges = [
            (put(f"{run}/updates/1", body_of(2.0)), 200),
            (put(f"{run}/updates/1", body_of(2.0)), 200),
            (put(f"{run}/updates/1", body_of(4.0)), 409),
            (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
            (put(f"{run}/updates/2", body_of(5.0)[:-4]), 422),
            (put(f"{run}/updates/2", body_of(5.0) + b"more"), 422),
            (put(f"{run}/updates/2", b"\0" * 300), 422),
            (put(f"{run}/updates/2", bad), 422),
            (put(f"{run}/updates/2", body_of(6.0, order="wb")), 200),
            (put(f"{run}/updates/1", body_of(2.0)), 409),
            (put(f"{run}/updates/3", body_of(7.0)), 200),
        ]
        for message, status in exchanges:
            raw.send(message)
            assert raw.answer()[0] == status, message
    assert shadow(url, run) == {7.0}


def test_requests_sent_ahead_are_answered_in_order(url, run):
    """Two pushes and a read in one piece: each body belongs to its own request."""
    with Raw(url) as raw:
        raw.send(
            put(f"{run}/updates/1", body_of(2.0))
            + put(f"{run}/updates/2", body_of(3.0))
            + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        steps = [json.loads(raw.answer()[1])["step"] for _ in range(2)]
        assert steps == [1, 2]
        assert json.loads(raw.answer()[1]) == {"status": "alive"}
    assert shadow(url, run) == {3.0}


def test_a_request_may_follow_in_the_piece_that_ends_a_body(url, run):
    """What stands behind the last byte of a body is the next request, not part of the body."""
    message = put(f"{run}/updates/1", body_of(2.0))
    with Raw(url) as raw:
        raw.send(message[:-20], message[-20:] + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.answer()[0] == 200
        assert json.loads(raw.answer()[1]) == {"status": "alive"}


def test_expect_100_continue(url, run):
    """The sender is told to go on where the push is wanted, and gets the refusal instead where it is not."""
    body = body_of(2.0)
    with Raw(url) as raw:
        raw.send(put(f"{run}/updates/1", b"", "Expect: 100-continue", length=len(body)))
        assert raw.answer()[0] == 100
        raw.send(body)
        assert raw.answer()[0] == 200
    with Raw(url) as raw:
        raw.send(put(f"{run}/updates/0", b"", "Expect: 100-continue", length=len(body)))
        status, answer = raw.answer()
    assert (status, json.loads(answer)["code"]) == (409, "stale_step")


@pytest.mark.parametrize(
    "sent", ["nothing", "one byte", "half the header", "the header", "half the data", "all but one"]
)
def test_a_sender_that_goes_away_changes_nothing(url, run, sent):
    """However much of a push came before the connection broke: the run is as it was and the staging is free again."""
    body = body_of(8.0)
    header = len(body) - 32
    count = {
        "nothing": 0,
        "one byte": 1,
        "half the header": header // 2,
        "the header": header,
        "half the data": header + 16,
        "all but one": len(body) - 1,
    }[sent]
    with Raw(url) as raw:
        raw.send(put(f"{run}/updates/1", body[:count], length=len(body)))
        wait_until(lambda: staging(url) > 0)
    wait_until(lambda: staging(url) == 0)
    assert shadow(url, run) == {1.0}
    assert httpx.put(f"{url}{run}/updates/1", content=body).json()["applied"]


def test_a_refused_body_is_read_to_its_end(url, run):
    """A sender that does not look up from sending still gets its answer, and the connection stays usable."""
    surplus = 3_000_000
    with Raw(url) as raw:
        raw.send(put(f"{run}/updates/1", body_of(2.0) + b"x" * surplus))
        status, answer = raw.answer()
        assert (status, json.loads(answer)["code"]) == (413, "body_too_large")
        raw.send(put(f"{run}/updates/1", body_of(2.0)))
        assert raw.answer()[0] == 200


def test_chunked_bodies_are_taken(url, run):
    """A body of unannounced length is received as well, and checked as strictly."""

    def chunks(body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    assert httpx.put(f"{url}{run}/updates/1", content=chunks(body_of(2.0))).status_code == 200
    assert httpx.put(f"{url}{run}/updates/2", content=chunks(body_of(3.0)[:-1])).status_code == 422
    assert httpx.put(f"{url}{run}/updates/2", content=chunks(body_of(3.0) + b"x")).status_code == 422
    assert shadow(url, run) == {2.0}


# --- bodies so long that a thread reads them

#: float32 in a long push: 3 MiB.
LONG = 3 << 18
LONG_LAYOUT = [{"name": "b", "shape": [5], "dtype": "F32"}, {"name": "w", "shape": [LONG - 5], "dtype": "F32"}]


def long_body(value: float) -> bytes:
    header = json.dumps(
        {
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]},
            "w": {"dtype": "F32", "shape": [LONG - 5], "data_offsets": [20, 4 * LONG]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", value) * LONG


@pytest.fixture
def long_run(url: str, run_name: str) -> str:
    """As ``run``, of 3 MiB."""
    config = {"run": run_name, "layout": LONG_LAYOUT, "decay": 0.0, "use_num_updates": False}
    assert httpx.post(f"{url}/v1/runs", json=config).status_code == 201
    assert httpx.put(f"{url}/v1/runs/{run_name}/weights", content=long_body(1.0)).status_code == 200
    return f"/v1/runs/{run_name}"


def long_shadow(url: str, run: str) -> set[float]:
    data = httpx.get(f"{url}{run}/weights").content[-4 * LONG :]
    return set(array.array("f", data))


def test_a_long_body_may_come_in_any_pieces(url, long_run):
    """At once, in pieces that end anywhere, and with pauses in which its thread goes back and another takes over."""
    header = len(long_body(0.0)) - 4 * LONG
    cuts = [(), (3,), (8,), (header - 1,), (header,), (header + 1, header + 70_001), (100_003, 1_500_001), (3 << 20,)]
    for step, places in enumerate(cuts, start=1):
        message = put(f"{long_run}/updates/{step}", long_body(float(step)))
        before = len(message) - len(long_body(0.0))
        with Raw(url) as raw:
            start = 0
            for place in places:
                raw.send(message[start : before + place])
                start = before + place
                time.sleep(0.06)  # longer than a thread waits
            raw.send(message[start:])
            status, answer = raw.answer()
            assert (status, json.loads(answer)["applied"]) == (200, True), (places, answer)
            raw.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.answer()[0] == 200
        assert long_shadow(url, long_run) == {float(step)}


def test_what_follows_a_long_body_is_the_next_request(url, long_run):
    """The thread takes the body and not a byte more, however much has come."""
    with Raw(url) as raw:
        raw.send(
            put(f"{long_run}/updates/1", long_body(2.0))
            + put(f"{long_run}/updates/2", long_body(3.0))
            + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        assert [json.loads(raw.answer()[1])["step"] for _ in range(2)] == [1, 2]
        assert json.loads(raw.answer()[1]) == {"status": "alive"}
    assert long_shadow(url, long_run) == {3.0}


def test_a_wrong_long_body_is_refused_and_read_to_its_end(url, long_run):
    """What is wrong in it is found on the thread; the sender reads why, and the connection stays usable."""
    good = long_body(2.0)
    other = good.replace(b'"w"', b'"v"', 1)
    with Raw(url) as raw:
        for body, status, code in [
            (other, 422, "layout_mismatch"),
            (good[:-4] + struct.pack("<f", float("nan")), 422, "non_finite"),
            (good[:-4], 422, "malformed_body"),
            (b"\xff" * len(good), 422, "malformed_body"),
        ]:
            raw.send(put(f"{long_run}/updates/1", body))
            answered, answer = raw.answer()
            assert (answered, json.loads(answer)["code"]) == (status, code)
        raw.send(put(f"{long_run}/updates/1", good))
        assert raw.answer()[0] == 200
    assert long_shadow(url, long_run) == {2.0}


@pytest.mark.parametrize("reset", [False, True])
def test_a_sender_that_goes_away_within_a_long_body(url, long_run, reset):
    """By a closed connection as by a reset one: the run is as it was, the staging is free, the step can come again."""
    body = long_body(8.0)
    with Raw(url) as raw:
        raw.send(put(f"{long_run}/updates/1", body[: 2 << 20], length=len(body)))
        wait_until(lambda: staging(url) > 0)
        if reset:
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: staging(url) == 0)
    assert long_shadow(url, long_run) == {1.0}
    assert httpx.put(f"{url}{long_run}/updates/1", content=body).json()["applied"]


def test_more_long_bodies_than_threads(url, run_name):
    """Each is received, whoever reads it; and those who stand still in the middle keep nobody's thread."""
    count = 3 * (os.cpu_count() or 1) + 1
    runs = [f"{run_name}-{k}" for k in range(count)]
    for name in runs:
        httpx.post(f"{url}/v1/runs", json={"run": name, "layout": LONG_LAYOUT, "decay": 0.0}).raise_for_status()
        httpx.put(f"{url}/v1/runs/{name}/weights", content=long_body(1.0)).raise_for_status()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Raw(url)) for _ in runs]
        messages = [put(f"/v1/runs/{name}/updates/1", long_body(2.0 + k)) for k, name in enumerate(runs)]
        for raw, message in zip(connections, messages, strict=True):
            raw.send(message[: 1 << 20])
        for raw, message in reversed(list(zip(connections, messages, strict=True))):
            raw.send(message[1 << 20 :])
            assert raw.answer()[0] == 200
    assert [long_shadow(url, f"/v1/runs/{name}") for name in runs] == [{2.0 + k} for k in range(count)]


def test_long_bodies_are_read_and_averaged_on_a_thread(running_app, monkeypatch):
    """The event loop reads nothing of what comes fast; the thread that reads it averages it, and is free afterwards."""
    app, url = running_app
    reading, averaging = [], []
    readv, advance = os.readv, Pass.advance

    def watched_readv(*arguments):
        reading.append(threading.current_thread().name)
        return readv(*arguments)

    def watched_advance(*arguments):
        averaging.append(threading.current_thread().name)
        return advance(*arguments)

    with httpx.Client(base_url=url, timeout=30) as http:
        http.post("/v1/runs", json={"run": "long", "layout": LONG_LAYOUT})
        http.put("/v1/runs/long/weights", content=long_body(1.0)).raise_for_status()
        monkeypatch.setattr(os, "readv", watched_readv)
        monkeypatch.setattr(Pass, "advance", watched_advance)
        message = put("/v1/runs/long/updates/1", long_body(2.0))
        with Raw(url) as raw:
            raw.send(message[: 2 << 20])
            wait_until(lambda: reading)
            wait_until(
                lambda: app.state.context.workers.receivers.free == os.cpu_count()
            )  # though the body is not over
            raw.send(message[2 << 20 :])
            assert raw.answer()[0] == 200
    assert reading
    assert {name.rstrip("0123456789") for name in reading} == {"ema-receive_"}
    assert sum(name.startswith("ema-receive_") for name in averaging) >= 2


def test_a_server_told_to_stop_finishes_the_push_in_hand(start_server):
    """SIGTERM in the middle of a body: the rest is received and answered, then the server ends with 0."""
    server = start_server()
    config = {"run": "last", "layout": LAYOUT, "decay": 0.0, "use_num_updates": False}
    with server.http() as http:
        http.post("/v1/runs", json=config)
        http.put("/v1/runs/last/weights", content=body_of(1.0))
    message = put("/v1/runs/last/updates/1", body_of(2.0))
    with Raw(server.url) as raw:
        raw.send(message[:-10])
        wait_until(lambda: staging(server.url) > 0)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        raw.send(message[-10:])
        assert raw.answer()[0] == 200
        assert raw.closed()
    assert server.process.wait(30) == 0
    server.start()
    assert shadow(server.url, "/v1/runs/last") == {2.0}


@pytest.fixture
def running_app() -> Iterator[tuple[FastAPI, str]]:
    """An application and its address, under the server's own protocol in this process."""
    app = create_app(Settings(data_dir=None))
    config = uvicorn.Config(app, port=0, http=LendingProtocol, ws="none", lifespan="on", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def test_bodies_of_known_length_do_not_take_the_slow_path(running_app, monkeypatch):
    """Under the server's own protocol a push is received though streaming is broken; only a chunked one needs that."""
    monkeypatch.setattr("ema_service.api.transfer.filling._stream", None)
    _, url = running_app
    with httpx.Client(base_url=url) as http:
        http.post("/v1/runs", json={"run": "r", "layout": LAYOUT})
        assert http.put("/v1/runs/r/weights", content=body_of(1.0)).status_code == 200
        assert http.put("/v1/runs/r/updates/1", content=body_of(2.0)).status_code == 200
        message = put("/v1/runs/r/updates/2", body_of(3.0))
        with Raw(url) as raw:
            raw.send(message[:-20], message[-20:])
            assert raw.answer()[0] == 200


def test_an_unknown_uvicorn_means_the_slow_path_and_a_warning(monkeypatch, caplog):
    """Where uvicorn is not what the fast path relies on, the server starts with its own protocol and says so."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from ema_service.api import server as module

    assert uvicorn_fits()
    assert module.http_protocol() is LendingProtocol
    monkeypatch.delattr(HttpToolsProtocol, "on_message_complete")
    assert module.http_protocol() is HttpToolsProtocol
    assert "the slow way" in caplog.text
