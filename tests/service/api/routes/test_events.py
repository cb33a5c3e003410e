"""What watchers are told: each event of a real server, what slow readers miss, how a stream ends.

Knows server-sent events as text, and plain HTTP. Does not know our client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from ema_client.protocol import AverageConfig, RunEvent, SnapshotInfo, from_json
from ema_service.api.context import Context
from ema_service.api.routes.events import HEARTBEAT_SECONDS, Look, changes, stream
from ema_service.metrics import Metrics
from ema_service.settings import Settings
from tests.waiting import wait_until

W = {"w": torch.ones(2)}
PATIENCE = 30.0


class Events:
    """An open stream of events: ``next()`` waits for one and gives its fields, ``rest()`` reads to the end."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()
        self.comments = 0

    def next(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for line in self._lines:
            if not line and "data" in fields:
                return fields | {"data": json.loads(fields["data"])}
            name, _, value = line.partition(": ")
            self.comments += line.startswith(":")
            fields |= {name: value} if name else {}
        raise EOFError

    def rest(self) -> list[dict[str, Any]]:
        found = []
        while True:
            try:
                found.append(self.next())
            except EOFError:
                return found


@contextlib.contextmanager
def events(server: Any, run: str, **headers: str) -> Iterator[Events]:
    with server.http() as http, http.stream("GET", f"/v1/runs/{run}/events", headers=headers) as response:
        yield Events(response.raise_for_status())


def test_each_change_is_told(server: Any, plain_run: Callable[..., Any]) -> None:
    """First the present version; then each update, decay, reset and snapshot by its kind, with the run as it stands."""
    run = plain_run(server, W, averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    with events(server, run.name) as told:
        first = told.next()
        assert (first["event"], first["id"], first["data"]["step"]) == ("version", "1.0", None)

        run.push(3, W)
        second = told.next()
        assert second["data"] == {
            "kind": "version",
            "run": run.name,
            "version": "1.1",
            "step": 3,
            "num_updates": 1,
            "average": "slow",
            "decay": 0.9999,
            "effective_decay": pytest.approx(2 / 11),
            "snapshot": None,
        }

        run.http.patch(run.path, json={"decay": 0.25, "average": "fast"}).raise_for_status()
        decay = told.next()
        assert (decay["event"], decay["data"]["average"], decay["data"]["decay"]) == ("decay_changed", "fast", 0.25)

        run.http.post(f"{run.path}/reset-num-updates").raise_for_status()
        reset = told.next()
        assert (reset["event"], reset["data"]["num_updates"]) == ("num_updates_reset", 0)

        made = run.http.put(f"{run.path}/snapshots/best").json()
        created = told.next()
        assert (created["event"], created["data"]["snapshot"]) == ("snapshot_created", made)

        run.http.delete(f"{run.path}/snapshots/best").raise_for_status()
        assert told.next()["event"] == "snapshot_deleted"


def test_headers_keep_proxies_out_of_it(server: Any, plain_run: Callable[..., Any]) -> None:
    """The answer is an event stream that nobody may cache, change or gather up; it opens with a comment."""
    run = plain_run(server, W)
    with events(server, run.name) as told:
        told.next()
        headers = told.response.headers
        assert headers["content-type"].startswith("text/event-stream")
        assert "no-cache" in headers["cache-control"]
        assert headers["x-accel-buffering"] == "no"
        assert told.comments == 1


@pytest.mark.parametrize("last", ["1.0", "1.2", "7.7", "nonsense"])
def test_there_is_no_backlog(server: Any, plain_run: Callable[..., Any], last: str) -> None:
    """Whatever Last-Event-ID says, the first event is the present version, and older ones are not repeated."""
    run = plain_run(server, W)
    for step in (1, 2, 3):
        run.push(step, W)
    run.http.put(f"{run.path}/snapshots/old").raise_for_status()
    with events(server, run.name, **{"Last-Event-ID": last}) as told:
        assert told.next()["id"] == "1.3"
        run.push(4, W)
        assert told.next()["id"] == "1.4"


def test_a_run_without_weights_is_silent_until_they_come(server: Any, plain_run: Callable[..., Any]) -> None:
    """Watching may begin before the initial weights: they are the first version."""
    run = plain_run(server)
    run.create(W).raise_for_status()
    with events(server, run.name) as told:
        run.begin(W).raise_for_status()
        assert told.next()["id"] == "1.0"


def test_deletion_is_the_last_event(server: Any, plain_run: Callable[..., Any]) -> None:
    """Where the run is deleted, its watchers are told, and the stream ends as HTTP ends an answer."""
    run = plain_run(server, W)
    with events(server, run.name) as told:
        told.next()
        before = time.monotonic()
        run.http.delete(run.path).raise_for_status()
        assert [event["event"] for event in told.rest()] == ["run_deleted"]
        assert time.monotonic() - before < HEARTBEAT_SECONDS - 5, "nobody was woken"


def test_no_such_run(server: Any) -> None:
    """An unknown run is a problem, not an empty stream."""
    with server.http() as http:
        answer = http.get("/v1/runs/nobody/events")
        assert (answer.status_code, answer.json()["code"]) == (404, "run_not_found")


def test_a_stopping_server_ends_its_streams(start_server: Callable[..., Any], plain_run: Callable[..., Any]) -> None:
    """SIGTERM ends streams and long polls at once and whole, and the server is gone long before its period of grace."""
    server = start_server(memory=True)
    run = plain_run(server, W)
    with events(server, run.name) as told, socket.create_connection(_address(server), timeout=PATIENCE) as poll:
        told.next()
        poll.sendall(f"GET {run.path}/weights?min_step=9&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: _metric(server, "ema_watchers") == 1)
        before = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - before < 15
        assert told.rest() == []
        assert b"step_not_reached" in poll.makefile("rb").read()
    assert "ERROR" not in server.log


def test_a_slow_reader_is_told_of_the_newest(start_server: Callable[..., Any], plain_run: Callable[..., Any]) -> None:
    """A watcher that does not read for 1,500 versions was sent a part of them, and then reads up to the newest."""
    server = start_server(memory=True)
    run = plain_run(server, {"w": torch.ones(1)})
    # A Unix socket, as the kernel keeps 200 KB for one and megabytes for TCP.
    with socket.socket(socket.AF_UNIX) as slow:
        slow.settimeout(PATIENCE)
        slow.connect(server.uds.removeprefix("unix://"))
        slow.sendall(f"GET {run.path}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: _metric(server, "ema_watchers") == 1)
        for step in range(1, 1501):
            run.push(step, {"w": torch.ones(1)})
        assert _metric(server, 'ema_events_total{kind="version"}') < 1400
        read = b""
        while b'"version": "1.1500"' not in read:
            read += slow.recv(1 << 20)
        assert read.count(b"event: version") < 1400


def test_watchers_and_events_are_counted(start_server: Callable[..., Any], plain_run: Callable[..., Any]) -> None:
    """Open streams and events sent show in the metrics; a watcher that went away is not counted any more."""
    server = start_server(memory=True)
    run = plain_run(server, W)
    with events(server, run.name) as told:
        told.next()
        run.push(1, W)
        told.next()
        assert _metric(server, "ema_watchers") == 1
        assert _metric(server, 'ema_events_total{kind="version"}') == 2
    wait_until(lambda: _metric(server, "ema_watchers") == 0)


def test_watchers_are_limited(start_server: Callable[..., Any], plain_run: Callable[..., Any]) -> None:
    """Of many that come at once as many as may watch do; the others are told when to come again, and counted. Whoever
    leaves makes room."""
    server = start_server("--max-watchers", "3", memory=True)
    run = plain_run(server, W)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(_address(server), timeout=PATIENCE)) for _ in range(12)]
        for sock in sockets:
            sock.sendall(f"GET {run.path}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        statuses = [sock.makefile("rb").readline().split()[1] for sock in sockets]
        assert sorted(statuses) == [b"200"] * 3 + [b"503"] * 9
        assert _metric(server, 'ema_errors_total{code="overloaded"}') == 9

        answer = run.http.get(f"{run.path}/events")
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) > 1
        assert "max_watchers" in answer.json()["detail"]
        sockets[statuses.index(b"200")].close()
        wait_until(lambda: _metric(server, "ema_watchers") == 2)
        with events(server, run.name) as told:
            assert told.next()["event"] == "version"


def test_who_waits_leaves_room_for_who_does_not(
    start_server: Callable[..., Any], plain_run: Callable[..., Any]
) -> None:
    """Streams of events and reads that wait for a step keep three quarters of the connections at most: a trainer
    goes on pushing. A wait that was given up makes room at once, though its time is not over."""
    server = start_server("--max-connections", "16", memory=True)
    run = plain_run(server, W)
    requests = [f"GET {run.path}/events", *[f"HEAD {run.path}/weights?min_step=9&wait=60"] * 20]
    with contextlib.ExitStack() as stack:
        waiting: list[socket.socket] = []
        for request in requests:
            sock = stack.enter_context(socket.create_connection(_address(server), timeout=0.3))
            sock.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            with contextlib.suppress(TimeoutError):
                if b" 503 " in sock.recv(100):
                    break
            waiting.append(sock)
        assert len(waiting) == 12
        refused = run.http.get(f"{run.path}/weights", params={"min_step": 9, "wait": 60})
        assert (refused.status_code, refused.json()["code"], refused.headers["Retry-After"]) == (503, "overloaded", "1")
        assert run.http.get(f"{run.path}/weights", params={"wait": 60}).status_code == 200
        waiting.pop().close()
        wait_until(lambda: run.http.head(f"{run.path}/weights?min_step=9&wait=0").status_code != 503)
        run.push(9, W).raise_for_status()
        assert all(b" 200 " in sock.recv(100) for sock in waiting[1:])


def test_silence_is_broken_by_comments(local_server: Callable[..., Any]) -> None:
    """A stream on which nothing happens says something now and then, and goes on with events after it."""
    server = local_server(memory=True)
    run = server.create("r", W)
    run.begin(W)

    async def watch() -> list[bytes]:
        context = Context(Settings(data_dir=None), server.registry, Metrics())
        told: AsyncIterator[bytes] = stream(context, run.run, None, heartbeat=0.05)
        async with asyncio.timeout(PATIENCE):
            heard = [await anext(told) for _ in range(4)]
            run.push(1, W)
            while heard[-1].startswith(b":"):
                heard.append(await anext(told))
        return heard

    heard = asyncio.run(watch())
    assert [line[:1] for line in heard[:4]] == [b":", b"e", b":", b":"]
    assert heard[-1].startswith(b"event: version")


def test_averages_are_told(server: Any, plain_run: Callable[..., Any]) -> None:
    """An average that is added or removed is told of by its name, and nothing else is; so is another of its name."""
    run = plain_run(server, W)
    with events(server, run.name) as told:
        told.next()
        average = {"name": "fast", "schedule": "constant", "decay": 0.5}
        run.http.post(f"{run.path}/averages", json=average).raise_for_status()
        added = told.next()["data"]
        assert (added["kind"], added["average"], added["decay"]) == ("average_added", "fast", 0.5)
        assert (added["effective_decay"], added["version"]) == (None, "1.0")
        run.push(1, W)
        assert told.next()["data"]["kind"] == "version"
        run.http.delete(f"{run.path}/averages/ema").raise_for_status()
        removed = told.next()["data"]
        assert (removed["kind"], removed["average"], removed["decay"]) == ("average_removed", "ema", 0.9999)
        run.push(2, W)
        version = told.next()["data"]
        assert (version["kind"], version["average"], version["decay"]) == ("version", "fast", 0.5)


def test_another_average_of_the_name_is_told(local_run: Callable[..., Any]) -> None:
    """An average that was removed, and added again under its name between two looks, is told of as both."""
    run = local_run(W, averages=(AverageConfig("slow"), AverageConfig("fast")))
    ledger = run.run.ledger
    before = Look(run.version, ledger.succession.averages(run.version))
    run.run.change_averages(lambda it: it.succession.without_average(it.version, "fast", None), lambda _: None)
    run.run.change_averages(lambda it: it.succession.with_average(AverageConfig("fast"), "x", None), lambda _: None)
    now = Look(run.version, ledger.succession.averages(run.version))

    told = [(event.kind, event.average) for event in changes(run.run, before, now)]
    assert told == [("average_removed", "fast"), ("average_added", "fast")]


def test_changes_are_differences(local_run: Callable[..., Any]) -> None:
    """What happened between two looks is told once however often it happened, and in a fixed order."""
    run = local_run(W)
    before = Look(run.version)
    assert list(changes(run.run, before, before)) == []

    run.push(1, W)
    run.push(2, W)
    run.set_decay(0.5)
    run.reset_num_updates()
    told = list(changes(run.run, before, Look(run.version)))
    # The counter did not fall between the two looks: from 0 by two updates and a reset to 0.
    assert [(event.kind, event.version) for event in told] == [("version", "1.2"), ("decay_changed", "1.2")]
    assert [event.kind for event in changes(run.run, Look(), before)] == ["version"]


def test_a_moved_snapshot_is_no_news(local_run: Callable[..., Any]) -> None:
    """Where a snapshot's files lie is told to nobody; another snapshot by the same name is, as one gone and one new."""
    run = local_run(W)
    taken = SnapshotInfo("r", "s", "1.0", None, 0, ("ema",), bytes=8, created_at=1.0)
    before = Look(run.version, snapshots={"s": taken})
    moved = Look(run.version, snapshots={"s": replace(taken, stored="store")})
    again = Look(run.version, snapshots={"s": replace(taken, created_at=2.0)})

    assert list(changes(run.run, before, moved)) == []
    told = [(event.kind, event.snapshot) for event in changes(run.run, moved, again)]
    assert told == [("snapshot_deleted", moved.snapshots["s"]), ("snapshot_created", again.snapshots["s"])]


def test_an_event_is_the_protocols(server: Any, plain_run: Callable[..., Any]) -> None:
    """The data of an event, with a snapshot in it, is read back by the protocol's own dataclass."""
    run = plain_run(server, W)
    with events(server, run.name) as told:
        told.next()
        run.http.put(f"{run.path}/snapshots/one").raise_for_status()
        event = from_json(RunEvent, told.next()["data"])
    assert event.snapshot is not None
    assert (event.kind, event.snapshot.name, event.snapshot.version) == ("snapshot_created", "one", "1.0")


@pytest.mark.parametrize(("scope", "status"), [("pull", 200), ("push", 403)])
def test_watching_wants_the_scope_pull(
    start_server: Callable[..., Any], tmp_path: Any, scope: str, status: int
) -> None:
    """A token that may read may watch; one that may only push may not."""
    from ema_service.tokens import create_token

    tokens = tmp_path / "tokens"
    trainer = create_token(tokens, ["push"], "*")
    token = create_token(tokens, [scope], "*")
    server = start_server("--token-file", str(tokens), memory=True)
    with server.http() as http:
        layout = [{"name": "w", "shape": [2], "dtype": "F32"}]
        headers = {"Authorization": f"Bearer {trainer}"}
        http.post("/v1/runs", json={"run": "r", "layout": layout}, headers=headers).raise_for_status()
        with http.stream("GET", "/v1/runs/r/events", headers={"Authorization": f"Bearer {token}"}) as answer:
            assert answer.status_code == status


def _address(server: Any) -> tuple[str, int]:
    address = urlsplit(server.url)
    return address.hostname or "", address.port or 0


def _metric(server: Any, name: str) -> float:
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == name), 0.0)
