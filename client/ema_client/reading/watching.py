"""Watching a run: events from the service to a loop that may be slower than they come.

A thread reads, a mailbox keeps the newest of each kind, the loop takes. The thread prefers the service's stream of
events; where that does not come through (an older service, a proxy that holds answers back), it asks for the next step
and waits for the answer, again and again. So it does while a service has as many streams as it allows.

Knows: the text of an event stream, which events make others old, when to connect again. Does not know: sockets,
tensors, what the loop does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ema_client import protocol
from ema_client.errors import (
    ConnectionLost,
    EmaError,
    MethodNotAllowed,
    Overloaded,
    ProtocolError,
    RouteNotFound,
    RunNotFound,
    StorageDisabled,
    TransportError,
)
from ema_client.http.retry import RetryPolicy
from ema_client.protocol import EventKind, RunEvent, RunInfo, SnapshotInfo

if TYPE_CHECKING:
    from ema_client.client import EmaClient
    from ema_client.http.downloads import Stream
    from ema_client.http.transport import Transport

__all__ = ["VERSIONS", "Mailbox", "parse", "watch"]

_log = logging.getLogger(__name__)

#: What most watchers want to know.
VERSIONS: tuple[EventKind, ...] = ("version",)

EVENTS = "text/event-stream"
#: The service says something at once. Silence for so many seconds means that something between keeps it back.
FIRST_WORD = 10.0
#: How long one question for the next step is held, in seconds; snapshots are looked for once in that time.
POLL_WAIT = 10.0
#: Between two questions that are answered without waiting, in seconds.
POLL_PAUSE = 0.5
#: A service that is away is looked for at least this often.
_AWAY = RetryPolicy(attempts=sys.maxsize, base=0.25, cap=10.0)


def watch(
    transport: Transport, client: EmaClient, run: str, kinds: frozenset[EventKind], timeout: float | None
) -> Iterator[RunEvent]:
    """The iterator of EmaClient.watch(): starts its thread with the first step, ends it when it is closed."""
    mailbox = Mailbox(kinds)
    reader = _Reader(transport, client, run, mailbox)
    thread = threading.Thread(target=reader.read, name=f"ema-watch-{run}", daemon=True)
    thread.start()
    try:
        while event := mailbox.take(timeout):
            yield event
    finally:
        reader.stop()


class Mailbox:
    """What was delivered and not taken: the newest of each kind, and of each snapshot, in the order of delivery."""

    def __init__(self, kinds: frozenset[EventKind]) -> None:
        self.kinds = kinds
        self._events: dict[tuple[str, str], RunEvent] = {}
        self._told: set[SnapshotInfo] = set()
        self._version: str | None = None
        self._closed = False
        self._fault: EmaError | None = None
        self._moved = threading.Condition()

    def deliver(self, event: RunEvent) -> None:
        """Put an event in, unless nobody wants it or it was delivered before (over an earlier connection)."""
        with self._moved:
            if event.kind in self.kinds and self._is_news(event):
                key: tuple[str, str] = (event.kind, event.average)
                if event.snapshot:
                    # That a snapshot was deleted is all there is to say of one that was made.
                    key = ("snapshot", event.snapshot.name)
                self._events.pop(key, None)
                self._events[key] = event
                self._moved.notify()

    def close(self, fault: EmaError | None = None) -> None:
        """Nothing more will come; ``fault`` says why, if that is not as it should be."""
        with self._moved:
            self._closed, self._fault = True, fault
            self._moved.notify()

    def take(self, timeout: float | None) -> RunEvent | None:
        """The next event; None at the end and after ``timeout`` seconds. Raises the fault that ended it."""
        with self._moved:
            self._moved.wait_for(lambda: self._events or self._closed, timeout)
            if self._events:
                return self._events.pop(next(iter(self._events)))
            if self._fault:
                raise self._fault
            return None

    def _is_news(self, event: RunEvent) -> bool:
        if event.kind == "version":
            news, self._version = event.version != self._version, event.version
            return news
        if event.kind == "snapshot_created" and event.snapshot:
            news = event.snapshot not in self._told
            self._told.add(event.snapshot)
            return news
        return True


class _Reader:
    """Reads the events of one run on a thread of its own until the run is gone, or stop() is called."""

    def __init__(self, transport: Transport, client: EmaClient, run: str, mailbox: Mailbox) -> None:
        self._transport = transport
        self._client = client
        self._run = run
        self._mailbox = mailbox
        self._stopped = threading.Event()
        self._stream: Stream | None = None
        self._streams = True
        #: No stream is asked for before: the service had no room for one. On the monotonic clock.
        self._full_until = 0.0
        self._failures = 0
        #: What was seen last: the run's latest event, and when asking, the run and its snapshots.
        self._latest: RunEvent | None = None
        self._info: RunInfo | None = None
        self._snapshots: dict[str, SnapshotInfo] | None = None

    def stop(self) -> None:
        """End the reading, from another thread."""
        self._stopped.set()
        if stream := self._stream:
            stream.close()

    def read(self) -> None:
        """Deliver events until there are no more."""
        try:
            while not self._stopped.is_set():
                try:
                    self._read_on()
                except (TransportError, ProtocolError) as fault:
                    self._wait_out(fault)
            self._mailbox.close()
        except RunNotFound:
            if self._latest and self._latest.kind != "run_deleted":
                self._deliver(replace(self._latest, kind="run_deleted", snapshot=None))
            self._mailbox.close()
        except EmaError as fault:
            # After stop() nobody listens, and the client may be closed by now.
            self._mailbox.close(fault)

    def _read_on(self) -> None:
        self._look_for_snapshots()
        if not self._streams or time.monotonic() < self._full_until:
            self._ask()
            return
        try:
            stream = self._open()
        except (RouteNotFound, MethodNotAllowed, ProtocolError) as fault:
            _log.info("run %s: no events come through, asking instead: %s", self._run, fault.detail)
            self._streams = False
            return
        except Overloaded as full:
            _log.info("run %s: asking for a while, %s", self._run, full.detail)
            # Not all who were refused at once come back at once.
            self._full_until = time.monotonic() + (full.retry_after or 0.0) + random.uniform(0.1, 1.0)
            return
        try:
            self._follow(stream)
        finally:
            self._stream = None

    def _deliver(self, event: RunEvent) -> None:
        self._failures = 0
        self._latest = event
        self._mailbox.deliver(event)

    # --- a stream of events -----------------------------------------------------------------------------------------

    def _open(self) -> Stream:
        path = protocol.events_path(self._run)
        try:
            stream = self._transport.stream(path, accept=EVENTS, patience=FIRST_WORD)
        except ConnectionLost as lost:
            if isinstance(lost.__cause__, TimeoutError):
                raise ProtocolError(lost.detail) from None
            raise
        self._stream = stream
        kind = stream.headers.get("content-type", "")
        if self._stopped.is_set() or not kind.startswith(EVENTS):
            stream.discard()
            raise ProtocolError(f"{stream.url} answered {kind or 'without a content type'}")
        return stream

    def _follow(self, stream: Stream) -> None:
        """Deliver what the service says, until it ends. Raises RunNotFound where that is because the run is deleted."""
        # What the stream tells is not to be told again as a difference when asking goes on after it.
        self._info = None
        # Once more, for those between the first look and the beginning of the stream.
        self._look_for_snapshots()
        for data in parse(stream.lines()):
            event = _event(stream.url, data)
            self._deliver(event)
            if event.kind == "run_deleted":
                raise RunNotFound(f"run {self._run!r} was deleted")
        # The service is being stopped, or a proxy has had enough of a long answer.
        _log.info("run %s: %s ended, connecting again", self._run, stream.url)
        self._stopped.wait(random.uniform(0.1, 1.0))

    # --- questions --------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Deliver what is new, then wait until the run has another step, or for a while."""
        info = self._client.run(self._run)
        for event in _differences(self._info, info):
            self._deliver(event)
        self._info = info
        query = {"min_step": 0 if info.step is None else info.step + 1, "wait": POLL_WAIT}
        status = self._transport.head(protocol.weights_path(self._run), query=query, patience=POLL_WAIT)
        if status != 200:
            self._stopped.wait(POLL_PAUSE)

    def _look_for_snapshots(self) -> None:
        """Deliver the snapshots that were made while nobody told us."""
        if "snapshot_created" not in self._mailbox.kinds:
            return
        info = self._client.run(self._run)
        with contextlib.suppress(StorageDisabled):
            now = {snapshot.name: snapshot for snapshot in self._client.snapshots(self._run)}
            for snapshot in now.values():
                if self._snapshots is not None and self._snapshots.get(snapshot.name) != snapshot:
                    self._deliver(_event_of("snapshot_created", info, snapshot))
            self._snapshots = now

    def _wait_out(self, fault: EmaError) -> None:
        if self._stopped.is_set():
            return
        if self._failures == 0:
            _log.warning("watching run %s: %s; trying again until it works", self._run, fault.detail)
        pause = _AWAY.delay(self._failures, ConnectionLost(fault.detail), random.random)
        self._failures += 1
        # What answers after this may be another service than before.
        self._streams = True
        self._stopped.wait(pause)


def parse(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of an event stream; one that is not finished is dropped, as the standard says."""
    data: list[str] = []
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def _event(url: str, data: str) -> RunEvent:
    try:
        return protocol.from_json(RunEvent, json.loads(data))
    except ValueError as fault:
        raise ProtocolError(f"{url} sent an event that is none: {fault}") from None


def _differences(old: RunInfo | None, new: RunInfo) -> Iterator[RunEvent]:
    """What a stream of events would have told between two answers to ``GET /v1/runs/{run}``."""
    if new.version is not None and (old is None or old.version != new.version):
        yield _event_of("version", new)
    for was, average in zip(old.averages if old else (), new.averages, strict=False):
        if was.decay != average.decay:
            event = _event_of("decay_changed", new)
            yield replace(event, average=average.name, decay=average.decay, effective_decay=average.effective_decay)
    if old and new.num_updates < old.num_updates:
        yield _event_of("num_updates_reset", new)


def _event_of(kind: EventKind, info: RunInfo, snapshot: SnapshotInfo | None = None) -> RunEvent:
    return RunEvent(
        kind=kind,
        run=info.run,
        version=info.version,
        step=info.step,
        num_updates=info.num_updates,
        average=info.averages[0].name,
        decay=info.decay,
        effective_decay=info.effective_decay,
        snapshot=snapshot,
    )
