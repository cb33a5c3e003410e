"""Who watches a run at a gateway is told what every host has, and costs the hosts nothing however many they are.

Knows events as a reader of the stream sees them. Does not know how hosts decide: here each server applies what it is
sent, so that a test has one host ahead of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import Overloaded, RunNotFound
from ema_client.protocol import EventKind, RunEvent, SnapshotInfo
from ema_service.cluster.gateway.hosts import Hosts
from ema_service.cluster.gateway.merging import Merging
from ema_service.cluster.gateway.watching import Watches
from ema_service.cluster.token import ClusterToken
from ema_service.tokens import create_token
from tests.conftest import PlainRun, ServerProcess
from tests.service.cluster.plain_hosts import PlainHosts, pushed
from tests.service.cluster.processes.coordinating import TOKEN
from tests.service.cluster.servers import cut
from tests.service.cluster.watchers import told
from tests.waiting import wait_until

#: Seconds in which a thousand evaluators are told, on two cores that others use too.
TOLD_SECONDS = 2.0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[PlainHosts]:
    started: list[ServerProcess] = []

    def start() -> ServerProcess:
        folder = tmp_path_factory.mktemp("host")
        started.append(server_class(folder, data_dir=folder / "data").start())
        return started[-1]

    found = PlainHosts(tmp_path_factory.mktemp("cluster"), start, 3)
    yield found
    found.end()
    for server in started:
        server.kill()


@pytest.fixture
def shards(hosts: PlainHosts, run_name: str, model: Callable[[int], dict[str, Tensor]]) -> list[PlainRun]:
    return hosts.runs(run_name, model(0), decay=0.5)


class Stream:
    """A stream of events that a thread reads. events: those that came so far; status: of the answer."""

    def __init__(self, url: str, run: str, **headers: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.ended = threading.Event()
        self._http = httpx.Client(base_url=url, timeout=30, headers=headers)
        self._answer = self._http.send(self._http.build_request("GET", f"/v1/runs/{run}/events"), stream=True)
        self.status = self._answer.status_code
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(httpx.HTTPError, httpx.StreamError, RuntimeError):
            for line in self._answer.iter_lines():
                if line.startswith("data:"):
                    self.events.append(json.loads(line[5:]))
        self.ended.set()

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def steps(self) -> list[int | None]:
        return [event["step"] for event in self.told("version")]

    def close(self) -> None:
        """End the stream, whose thread reads on in silence otherwise."""
        with contextlib.suppress(OSError):
            self._answer.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._answer.close()
        self._http.close()
        self._thread.join(10)


@pytest.fixture
def stream(hosts: PlainHosts) -> Iterator[Callable[..., Stream]]:
    with ExitStack() as opened:

        def make(run: str, **headers: str) -> Stream:
            made = Stream(hosts.url, run, **headers)
            opened.callback(made.close)
            return made

        yield make


# --- what is told ----------------------------------------------------------------------------------------------------


def test_a_version_is_told_once_every_host_has_it(
    shards: list[PlainRun], stream: Callable[..., Stream], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """Not while the last host is behind, and then at once; whoever comes later begins with the version as it is."""
    watcher = stream(shards[0].name)
    wait_until(lambda: watcher.steps() == [None], "the first version")
    parts = cut(model(1), 3)
    for place in (0, 1):
        shards[place].push(1, parts[place]).raise_for_status()
    time.sleep(0.5)
    assert watcher.steps() == [None]
    shards[2].push(1, parts[2]).raise_for_status()
    wait_until(lambda: watcher.steps() == [None, 1], "the version that all hosts have")
    later = stream(shards[0].name)
    wait_until(lambda: later.steps() == [1], "the version as it is")
    assert watcher.events[-1] == later.events[0]


def test_a_change_is_told_once_every_host_made_it(shards: list[PlainRun], stream: Callable[..., Stream]) -> None:
    """And with a deletion on all hosts the stream ends."""
    watcher = stream(shards[0].name)
    wait_until(lambda: watcher.events, "the first version")
    for run in shards[:2]:
        run.http.patch(run.path, json={"decay": 0.25}).raise_for_status()
    time.sleep(0.3)
    assert watcher.told("decay_changed") == []
    shards[2].http.patch(shards[2].path, json={"decay": 0.25}).raise_for_status()
    wait_until(lambda: watcher.told("decay_changed"), "the decay that all hosts have")
    assert watcher.told("decay_changed")[0]["decay"] == 0.25
    later = stream(shards[0].name)
    wait_until(lambda: later.events, "the version as it is")
    assert later.events[0]["decay"] == 0.25
    for run in shards:
        run.http.delete(run.path).raise_for_status()
    wait_until(watcher.ended.is_set, "the end")
    assert watcher.events[-1]["kind"] == "run_deleted"


def test_our_client_watches_and_waits(
    hosts: PlainHosts, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """EmaClient.watch(), and a pull of a step to come, as at one server."""
    with EmaClient(hosts.url) as client:
        events = client.watch(shards[0].name, timeout=20)
        assert next(events).step is None
        pushed(shards, model(1), 1)
        assert next(events).step == 1
        events.close()
        pushing = threading.Timer(0.3, pushed, (shards, model(2), 2))
        pushing.start()
        assert client.pull(shards[0].name, min_step=2, wait=20).info.step == 2
        pushing.join()


def test_a_step_that_does_not_come(hosts: PlainHosts, shards: list[PlainRun]) -> None:
    """Is answered as by a server, after the time that was given; and a wait that is no number is refused."""
    began = time.monotonic()
    answer = hosts.gateway.get(f"{shards[0].path}/weights", params={"min_step": 9, "wait": 0.4})
    assert (answer.status_code, answer.json()["code"]) == (409, "step_not_reached")
    assert 0.4 <= time.monotonic() - began < 5
    for wrong in ({"min_step": "x", "wait": 1}, {"min_step": 1, "wait": "long"}, {"min_step": 1, "wait": 1e9}):
        refused = hosts.gateway.get(f"{shards[0].path}/weights", params=wrong)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request"), wrong


def test_a_run_that_is_not_there(hosts: PlainHosts) -> None:
    """Is said so, and not watched."""
    answer = hosts.gateway.get("/v1/runs/nobody/events")
    assert (answer.status_code, answer.json()["code"]) == (404, "run_not_found")
    with EmaClient(hosts.url) as client, pytest.raises(RunNotFound):
        next(client.watch("nobody"))


def test_each_watcher_is_judged_by_a_host(tmp_path: Path, server_class: type[ServerProcess]) -> None:
    """Also one who would ride along on the stream of somebody else."""
    tokens = tmp_path / "tokens"
    token = create_token(tokens, ["pull", "push", "train"], "*")
    number = iter(range(3))

    def start() -> ServerProcess:
        folder = tmp_path / f"host-{next(number)}"
        folder.mkdir()
        return server_class(folder, ("--token-file", str(tokens)), data_dir=folder / "data").start()

    found = PlainHosts(tmp_path, start, 2)
    given = {"Authorization": f"Bearer {token}"}
    try:
        for server, part in zip(found.servers, cut({"w": torch.ones(4, 2)}, 2), strict=True):
            with server.http() as http:
                http.headers.update(given)
                run = PlainRun(http, "r")
                run.create(part).raise_for_status()
                run.begin(part).raise_for_status()
        watcher = Stream(found.url, "r", **given)
        wait_until(lambda: watcher.events, "the first version")
        for wrong in ({}, {"Authorization": "Bearer other"}):
            refused = Stream(found.url, "r", **wrong)
            assert refused.status == 401
            refused.close()
        watcher.close()
    finally:
        found.end()
        for server in found.servers:
            server.kill()


# --- many ------------------------------------------------------------------------------------------------------------


def _watchers_at(server: ServerProcess) -> int:
    """How many streams of events are open at a host."""
    with server.http() as http:
        return int(float(re.findall(r"^ema_watchers (\S+)$", http.get("/metrics").text, re.MULTILINE)[0]))


def test_a_thousand_evaluators(
    hosts: PlainHosts, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """All are told within two seconds, over one stream a host."""
    seen: list[int] = []

    def act() -> None:
        seen.extend(_watchers_at(server) for server in hosts.servers)
        pushed(shards, model(1), 1)

    wait_until(lambda: not any(map(_watchers_at, hosts.servers)), "the watchers of other tests to be gone")
    when = asyncio.run(told(hosts.url, shards[0].name, 1000, act))
    assert len(when) == 1000
    assert max(when) < TOLD_SECONDS
    assert seen == [1, 1, 1]


def test_beyond_the_most_nobody_waits(hosts: PlainHosts, shards: list[PlainRun]) -> None:
    """One more is told to come again, and has a place once another has left."""

    async def come() -> None:
        found = Hosts([hosts.coordinator_url], ClusterToken(TOKEN))
        watches = Watches(found, 1)
        try:
            async with watches.watching(shards[0].name, {}):
                with pytest.raises(Overloaded):
                    await watches.watching(shards[0].name, {}).__aenter__()
            async with watches.watching(shards[0].name, {}) as watch:
                assert not await watch.reached(5, 0.05)
        finally:
            watches.end()
            await found.close()

    asyncio.run(come())


def test_many_who_come_at_once_are_one_question_to_the_coordinator() -> None:
    """However many they are, where the map is yet to be asked for."""
    asked: list[str] = []

    class Coordinator(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps({"shards": [{"place": 0, "address": "http://127.0.0.1:9"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    async def come(url: str) -> None:
        found = Hosts([url], ClusterToken(TOKEN))
        await asyncio.gather(*(found.all() for _ in range(100)))
        await found.close()

    with ThreadingHTTPServer(("127.0.0.1", 0), Coordinator) as coordinator:
        threading.Thread(target=coordinator.serve_forever).start()
        try:
            asyncio.run(come(f"http://127.0.0.1:{coordinator.server_port}"))
        finally:
            coordinator.shutdown()
    assert len(asked) == 1


# --- what makes an event of the whole run ----------------------------------------------------------------------------


def version(step: int, epoch: int = 1) -> RunEvent:
    return RunEvent("version", "r", f"{epoch}.{step}", step, step, "ema", 0.5, 0.5)


def of_kind(kind: EventKind, step: int = 1, decay: float = 0.5) -> RunEvent:
    return RunEvent(kind, "r", f"1.{step}", step, 0, "ema", decay, 0.5)


def test_hosts_that_are_never_at_one_version_at_once() -> None:
    """Each is told of the newest only; what all have, or a later one, is told all the same."""
    merging = Merging(2)
    assert merging.hear(0, version(1)) is None
    assert merging.hear(1, version(2)) == version(1)
    assert merging.hear(0, version(3)) == version(2)
    assert merging.hear(1, version(4)) == version(3)
    assert merging.hear(0, version(3)) is None
    assert merging.hear(0, version(10)) == version(4)


def test_an_epoch_that_began_counts_more_than_its_updates() -> None:
    """A run that went back has a smaller number, and a later version."""
    merging = Merging(2)
    merging.hear(0, version(9))
    merging.hear(1, version(9))
    assert merging.hear(0, version(2, epoch=2)) is None
    assert merging.hear(1, version(2, epoch=2)) == version(2, epoch=2)


def test_a_change_that_a_host_told_nobody() -> None:
    """A host that was away tells nothing of what happened before its stream: nobody waits for that."""
    merging = Merging(2)
    assert merging.hear(0, of_kind("decay_changed", decay=0.25)) is None
    merging.begin(1)
    assert merging.hear(0, of_kind("decay_changed", decay=0.25)) == of_kind("decay_changed", decay=0.25)


def test_two_changes_are_not_taken_for_one() -> None:
    """Each is told by itself, in whatever order hosts tell them."""
    merging = Merging(2)
    for decay in (0.25, 0.75):
        assert merging.hear(0, of_kind("decay_changed", decay=decay)) is None
    told = [merging.hear(1, of_kind("decay_changed", decay=decay)) for decay in (0.25, 0.75)]
    assert [each and each.decay for each in told] == [0.25, 0.75]


def test_what_hosts_told_alone_is_forgotten() -> None:
    """Changes that one host told as one with others do not stay for ever."""
    merging = Merging(2)
    for number in range(200):
        merging.hear(0, of_kind("num_updates_reset", number))
    assert merging.hear(1, of_kind("num_updates_reset", 1)) is None
    assert merging.hear(1, of_kind("num_updates_reset", 199)) is not None


def test_newcomers_are_told_of_a_reset() -> None:
    """With the version that was there before it."""
    merging = Merging(1)
    merging.hear(0, version(7))
    merging.hear(0, of_kind("num_updates_reset", 7))
    assert merging.version
    assert merging.version.num_updates == 0


def test_a_snapshot_is_told_with_the_bytes_of_all_hosts() -> None:
    """Once every host has it."""
    merging = Merging(2)
    told = []
    for place, nbytes in ((0, 100), (1, 23)):
        info = SnapshotInfo("r", "best", "1.1", 1, 1, ("ema",), nbytes, 5.0 + place)
        told.append(merging.hear(place, replace(of_kind("snapshot_created"), snapshot=info)))
    assert told[0] is None
    assert told[1]
    assert told[1].snapshot
    assert told[1].snapshot.bytes == 123
