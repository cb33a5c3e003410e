"""Watching a run: a thread reads the run's events, a mailbox holds the newest, a loop takes them.

The thread prefers the service's stream of events. Where no events come through (an older service, a proxy that holds
answers back), or a service has as many streams as it allows, the thread asks for the next step and waits for the
answer, again and again.

Knows: when to open a stream, when to ask instead, when to connect again. Does not know: the client or the transport
(what is asked of the service comes as Questions), sockets, tensors, what the loop does.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ema_client.errors import (
    ConnectionLost,
    EmaError,
    GatewayFailed,
    MethodNotAllowed,
    Overloaded,
    ProtocolError,
    RouteNotFound,
    RunNotFound,
    StorageDisabled,
    TransportError,
)
from ema_client.forks import Home
from ema_client.http.downloads import Stream
from ema_client.http.retry import RetryPolicy
from ema_client.protocol import EventKind, RunEvent, RunInfo, SnapshotInfo
from ema_client.reading.events import CONTENT_TYPE, differences, event_of, parse, read_event
from ema_client.reading.mailbox import Mailbox

__all__ = ["VERSIONS", "Pauses", "Questions", "watch"]

_log = logging.getLogger(__name__)

#: What most watchers want to know.
VERSIONS: tuple[EventKind, ...] = ("version",)


@dataclass(frozen=True, slots=True)
class Questions:
    """What a watcher asks of the service about ``run``; each call may raise an EmaError.

    info: the run as it stands. snapshots: of the run. stream: opens the stream of events, whose head must come within
    the given seconds. reached: whether the run has reached a step, waiting for the step up to the given seconds.
    """

    run: str
    info: Callable[[], RunInfo]
    snapshots: Callable[[], Sequence[SnapshotInfo]]
    stream: Callable[[float], Stream]
    reached: Callable[[int, float], bool]


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long a watcher waits, in seconds.

    first_word: for the head of a stream, which the service sends at once; silence means that a proxy holds it back.
    question: for the answer to a question for the next step; snapshots are listed once in that time.
    between_questions: between two questions that are answered without waiting.
    """

    first_word: float = 10.0
    question: float = 10.0
    between_questions: float = 0.5


#: A service that is away is looked for at least every ten seconds.
_AWAY = RetryPolicy(attempts=sys.maxsize, base=0.25, cap=10.0)


def watch(
    questions: Questions, kinds: frozenset[EventKind], timeout: float | None, *, pauses: Pauses | None = None
) -> Iterator[RunEvent]:
    """The iterator of EmaClient.watch(): starts its thread with the first event asked for, ends the thread when closed.

    timeout: end after so many seconds without an event.

    Raises UsageError in a forked process, which does not have the thread.
    """
    home = Home()
    mailbox = Mailbox(kinds)
    reader = _Reader(questions, mailbox, pauses or Pauses())
    thread = threading.Thread(target=reader.read, name=f"ema-watch-{questions.run}", daemon=True)
    thread.start()
    try:
        while event := mailbox.take(timeout):
            yield event
            home.check(
                f"this watch of run {questions.run!r}", hint="watch() again in the process that needs the events"
            )
    finally:
        if home.is_here:
            reader.stop()


class _Reader:
    """Delivers the events of a run to a mailbox, on its own thread, until the run is gone or stop() is called."""

    def __init__(self, questions: Questions, mailbox: Mailbox, pauses: Pauses) -> None:
        self._questions = questions
        self._mailbox = mailbox
        self._pauses = pauses
        self._stopped = threading.Event()
        self._stream: Stream | None = None
        #: Whether streams come through, as far as is known.
        self._streams = True
        #: Until then, on the monotonic clock, no stream is asked for: the service had no room for another.
        self._full_until = 0.0
        self._failures = 0
        self._latest: RunEvent | None = None
        #: The latest answers to questions, None while a stream tells.
        self._info: RunInfo | None = None
        self._snapshots: dict[str, SnapshotInfo] | None = None

    def stop(self) -> None:
        """End read(), from another thread."""
        self._stopped.set()
        if stream := self._stream:
            stream.close()

    def read(self) -> None:
        """Deliver events until there are no more; then close the mailbox."""
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
            # Also the error of a client that was closed after stop(), when nobody listens any more.
            self._mailbox.close(fault)

    def _read_on(self) -> None:
        self._list_snapshots()
        if not self._streams or time.monotonic() < self._full_until:
            self._ask()
            return
        try:
            stream = self._open()
        except (RouteNotFound, MethodNotAllowed, ProtocolError) as fault:
            _log.info("run %s: no events come through, asking instead: %s", self._questions.run, fault.detail)
            self._streams = False
            return
        except (Overloaded, GatewayFailed) as full:
            # A gateway may fail with long answers alone; where the service is away, so are the answers to questions.
            _log.info("run %s: asking for a while, %s", self._questions.run, full.detail)
            # At random: watchers refused together must not come back together.
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
        try:
            stream = self._questions.stream(self._pauses.first_word)
        except ConnectionLost as lost:
            if isinstance(lost.__cause__, TimeoutError):
                raise ProtocolError(lost.detail) from None
            raise
        self._stream = stream
        kind = stream.headers.get("content-type", "")
        if self._stopped.is_set() or not kind.startswith(CONTENT_TYPE):
            stream.discard()
            raise ProtocolError(f"{stream.url} answered {kind or 'without a content type'}")
        return stream

    def _follow(self, stream: Stream) -> None:
        """Deliver the events of a stream until the stream ends. Raises RunNotFound after the run's deletion."""
        # A later question must not find again, as a difference, what the stream told.
        self._info = None
        # Again, for snapshots made between the first look and the beginning of the stream.
        self._list_snapshots()
        for data in parse(stream.lines()):
            event = read_event(stream.url, data)
            self._deliver(event)
            if event.kind == "run_deleted":
                raise RunNotFound(f"run {self._questions.run!r} was deleted")
        # The service is being stopped, or a proxy ended a long answer.
        _log.info("run %s: %s ended, connecting again", self._questions.run, stream.url)
        self._stopped.wait(random.uniform(0.1, 1.0))

    # --- questions --------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Deliver what is new; then wait until the run has another step, or for a while."""
        info = self._questions.info()
        for event in differences(self._info, info):
            self._deliver(event)
        self._info = info
        next_step = 0 if info.step is None else info.step + 1
        if not self._questions.reached(next_step, self._pauses.question):
            self._stopped.wait(self._pauses.between_questions)

    def _list_snapshots(self) -> None:
        """Deliver the snapshots made while no stream was open."""
        if "snapshot_created" not in self._mailbox.kinds:
            return
        info = self._questions.info()
        with contextlib.suppress(StorageDisabled):
            now = {snapshot.name: snapshot for snapshot in self._questions.snapshots()}
            for snapshot in now.values():
                if self._snapshots is not None and self._snapshots.get(snapshot.name) != snapshot:
                    self._deliver(event_of("snapshot_created", info, snapshot))
            self._snapshots = now

    def _wait_out(self, fault: EmaError) -> None:
        if self._stopped.is_set():
            return
        if self._failures == 0:
            _log.warning("watching run %s: %s; trying again until it works", self._questions.run, fault.detail)
        pause = _AWAY.delay(self._failures, ConnectionLost(fault.detail), random.random)
        self._failures += 1
        # The service that answers next may be another program, with streams.
        self._streams = True
        self._stopped.wait(pause)
