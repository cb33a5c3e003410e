"""Watching a run from Python: what a loop is given, what it need not see, and what it lives through.

Knows the service, and servers that misbehave. Does not know how events travel.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ema_client import EmaClient, RetryPolicy
from ema_client.errors import RunNotFound, StepNotReached, Unauthorized
from ema_client.http.transport import Transport
from ema_client.protocol import AverageInfo, RunEvent, RunInfo, events_path, to_json
from ema_client.reading.watching import Pauses, Questions, watch
from tests.waiting import wait_until

STATE = {"w": torch.arange(3.0)}
PATIENCE = 30.0


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    client.create_run(run_name, STATE)
    return run_name


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """However a watch ends, so does its thread."""
    yield
    deadline = time.monotonic() + PATIENCE
    while any(thread.name.startswith("ema-watch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def an_event(kind: str = "version", n: int = 1, **fields: Any) -> RunEvent:
    return RunEvent(kind, "r", f"1.{n}", n, n, "ema", 0.5, 0.5, **fields)  # type: ignore[arg-type]


def test_each_version_as_it_comes(client: EmaClient, run: str) -> None:
    """The present version first, then one for each push, with step, counter and decay."""
    watch = client.watch(run, timeout=PATIENCE)
    first = next(watch)
    assert (first.version, first.step, first.effective_decay) == ("1.0", None, None)
    for step in (5, 6):
        result = client.push(run, STATE, step=step)
        event = next(watch)
        assert (event.version, event.step, event.num_updates) == (result.version, step, result.num_updates)
        assert event.effective_decay == result.effective_decay
    watch.close()  # type: ignore[attr-defined]


def test_a_slow_loop_gets_the_newest(client: EmaClient, run: str) -> None:
    """Versions that came while the loop was busy are one event, of the newest."""
    watch = client.watch(run, timeout=PATIENCE)
    seen = [next(watch).version]
    for _ in range(50):
        client.push(run, STATE)
    last = client.run(run).version
    while seen[-1] != last:
        time.sleep(0.3)
        seen.append(next(watch).version)
    assert len(seen) < 10
    assert len(set(seen)) == len(seen)


@pytest.mark.one_server("the metric of its watchers")
def test_kinds_are_chosen(client: EmaClient, run: str) -> None:
    """Snapshots alone, or decays and resets: what was not asked for is not given, what was there before neither."""
    client.snapshot(run, "before")
    snapshots = client.watch(run, kinds=["snapshot_created"], timeout=PATIENCE)
    steering = client.watch(run, kinds=["decay_changed", "num_updates_reset"], timeout=PATIENCE)
    taken: list[RunEvent] = []
    threads = [threading.Thread(target=lambda w=w: taken.append(next(w))) for w in (snapshots, steering)]
    for thread in threads:
        thread.start()
    wait_until(lambda: _watchers(client) >= 2)
    client.push(run, STATE)
    client.snapshot(run, "after")
    client.set_decay(run, 0.5)
    for thread in threads:
        thread.join(PATIENCE)
    assert {event.kind: event.snapshot and event.snapshot.name for event in taken} == {
        "snapshot_created": "after",
        "decay_changed": None,
    }
    client.reset_num_updates(run)
    assert next(steering).kind == "num_updates_reset"


def test_a_timeout_ends_the_loop(client: EmaClient, run: str) -> None:
    """Without news for as long as was said, the iteration ends as any loop does."""
    assert [event.version for event in client.watch(run, timeout=0.5)] == ["1.0"]


def test_deletion_ends_the_loop(client: EmaClient, run: str) -> None:
    """The deletion of the run ends the iteration; who asked for it is told."""
    watch = client.watch(run, kinds=["version", "run_deleted"], timeout=PATIENCE)
    next(watch)
    client.delete_run(run)
    assert [event.kind for event in watch] == ["run_deleted"]


def test_unknown_runs_raise_at_once(client: EmaClient) -> None:
    """Not in the loop but where watch() is called."""
    with pytest.raises(RunNotFound):
        client.watch("nobody")


def test_a_restart_of_the_service_is_waited_out(
    start_server: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The loop goes on with the service that comes back, told once of each version; a snapshot made meanwhile is not
    missed."""
    server = start_server()
    port = server.url.rsplit(":", 1)[1]
    server.arguments = ("--port", port)
    with EmaClient(server.url, retry=RetryPolicy(attempts=1)) as client:
        client.create_run("r", STATE)
        watch = client.watch("r", kinds=["version", "snapshot_created"], timeout=PATIENCE)
        assert next(watch).version == "1.0"
        server.stop()
        # Long enough for the watcher to see that nothing listens.
        wait_until(lambda: "trying again" in caplog.text)
        server.start()
        with EmaClient(server.url) as other:
            other.snapshot("r", "meanwhile")
            other.push("r", STATE, step=9)
        told = {event.kind: event for event in (next(watch), next(watch))}
        assert told["version"].step == 9
        assert told["snapshot_created"].snapshot.name == "meanwhile"  # type: ignore[union-attr]


def test_deletion_while_nobody_listened(scripted: Callable[..., Any]) -> None:
    """A run that is gone when the watcher comes back ends the loop like one that is deleted before its eyes."""
    event = to_json(an_event())

    def script(peer: Any) -> None:
        while request := peer.request():
            if request.target.endswith("/events"):
                peer.send(_event_stream(event))
                return
            peer.answer(200, _info())

    gone = _problem("run_not_found")
    with EmaClient(scripted(script, script, gone).url) as client:
        watch = client.watch("r", kinds=["version", "run_deleted"], timeout=PATIENCE)
        assert [told.kind for told in watch] == ["version", "run_deleted"]


@pytest.mark.parametrize("how", ["no route", "no method", "another type", "silence", "not HTTP"])
def test_without_events_it_asks(
    scripted: Callable[..., Any], server: Any, run: str, client: EmaClient, how: str
) -> None:
    """Where events do not come through, versions, snapshots and decays are asked for, and long polls make it prompt."""
    answers: dict[str, Callable[[Any], None]] = {
        "no route": lambda peer: peer.problem(404, "route_not_found"),
        "no method": lambda peer: peer.problem(405, "method_not_allowed"),
        "another type": lambda peer: peer.answer(200, b"<html>", "text/html"),
        "silence": lambda _: time.sleep(1.0),
        "not HTTP": lambda peer: peer.send(b"220 smtp ready\r\n"),
    }
    proxy = _proxy(scripted, server.url, answers[how])
    kinds = frozenset({"version", "snapshot_created", "decay_changed"})
    with EmaClient(proxy.url) as asking, contextlib.closing(Transport(proxy.url)) as transport:
        questions = Questions(
            run=run,
            info=lambda: asking.run(run),
            snapshots=lambda: asking.snapshots(run),
            stream=lambda wait: transport.stream(events_path(run), accept="text/event-stream", patience=wait),
            reached=lambda step, wait: _reached(asking, run, step, wait),
        )
        events = watch(questions, kinds, PATIENCE, pauses=Pauses(first_word=0.3))  # type: ignore[arg-type]
        assert next(events).version == "1.0"
        wait_until(lambda: any("min_step" in target for target in proxy.targets))
        before = time.monotonic()
        client.push(run, STATE)
        assert next(events).version == "1.1"
        assert time.monotonic() - before < 5, "the question for the next step was not held"
        client.set_decay(run, 0.5)
        client.snapshot(run, "one")
        client.push(run, STATE)
        assert {next(events).kind for _ in range(3)} == {"version", "snapshot_created", "decay_changed"}
        events.close()  # type: ignore[attr-defined]
        # Wakes the thread from its last question.
        client.push(run, STATE)


def _reached(client: EmaClient, run: str, step: int, wait: float) -> bool:
    try:
        client.pull(run, min_step=step, wait=wait)
    except StepNotReached:
        return False
    return True


def test_without_room_it_asks_until_there_is(
    scripted: Callable[..., Any], server: Any, run: str, client: EmaClient
) -> None:
    """A service with as many watchers as it allows is asked meanwhile, and for a stream again when it said. What either
    told is not told again by the other."""
    halved = to_json(an_event("decay_changed"))
    left: list[Callable[[Any], None]] = [
        lambda peer: peer.problem(503, "overloaded", Retry_After="0"),
        lambda peer: peer.send(_event_stream(halved)),
        lambda peer: peer.problem(503, "overloaded", Retry_After="60"),
    ]
    proxy = _proxy(scripted, server.url, lambda peer: left.pop(0)(peer))
    with EmaClient(proxy.url) as watching_client:
        watch = watching_client.watch(run, kinds=["version", "decay_changed"], timeout=PATIENCE)
        assert next(watch).version == "1.0"
        wait_until(lambda: any("min_step" in target for target in proxy.targets))
        time.sleep(1.1)  # until it may ask for a stream again
        client.set_decay(run, 0.5)
        client.push(run, STATE)
        assert {next(watch).kind for _ in range(2)} == {"version", "decay_changed"}
        wait_until(lambda: not left)
        client.push(run, STATE)
        while (event := next(watch)).version != "1.2":
            assert event.kind == "version"
        watch.close()  # type: ignore[attr-defined]
        # Wakes the thread from its last question.
        client.push(run, STATE)
    assert len([target for target in proxy.targets if target.endswith("/events")]) == 3


def test_a_refusal_is_raised(scripted: Callable[..., Any]) -> None:
    """What cannot be waited out, such as a token that was withdrawn, ends the loop with its error."""

    def script(peer: Any) -> None:
        peer.request()
        peer.answer(200, _info())

    with EmaClient(scripted(script, _problem("unauthorized")).url) as client:
        watch = client.watch("r", timeout=PATIENCE)
        with pytest.raises(Unauthorized):
            next(watch)


def test_closing_the_iterator_ends_a_stream_at_once(client: EmaClient, run: str) -> None:
    """Leaving the loop closes the connection though the service has nothing to say."""
    for _ in client.watch(run):
        break
    before = time.monotonic()
    wait_until(lambda: not any(thread.name == f"ema-watch-{run}" for thread in threading.enumerate()))
    assert time.monotonic() - before < 5


def _event_stream(*events: dict[str, Any]) -> bytes:
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body


def _problem(code: str) -> Callable[[Any], None]:
    status = {"run_not_found": 404, "unauthorized": 401}[code]

    def script(peer: Any) -> None:
        while peer.request():
            peer.problem(status, code)

    return script


def _info() -> dict[str, Any]:
    average = AverageInfo("ema", "litema", 0.5, None)
    words = ("r", "ready", 0.5, 0, None, True, "update", None, "1.0", None, "memory", "refuse", (average,))
    return to_json(RunInfo(*words, 1, 3, 12, "cpu", "F32", 1.0, 1.0))


def _proxy(scripted: Callable[..., Any], url: str, events: Callable[[Any], None]) -> Any:
    """A way to the service on which requests for events are answered by ``events``; ``targets`` are those that came."""
    import httpx

    targets: list[str] = []

    def script(peer: Any) -> None:
        while request := peer.request():
            targets.append(request.target)
            if request.target.endswith("/events"):
                events(peer)
                return
            with httpx.Client(base_url=url, timeout=PATIENCE) as http:
                answer = http.request(request.method, request.target)
            body = b"" if request.method == "HEAD" else answer.content
            head = [f"HTTP/1.1 {answer.status_code} Relayed"]
            head += [f"{name}: {value}" for name, value in answer.headers.items()]
            peer.send("\r\n".join(head).encode() + b"\r\n\r\n" + body)

    proxy = scripted(script)
    proxy.targets = targets
    return proxy


def _watchers(client: EmaClient) -> float:
    import httpx

    lines = httpx.get(f"{client.url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("ema_watchers "))
