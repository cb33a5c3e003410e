"""The background sender of a trainer: one thread, at most one update on its way and one that waits.

Each update that was taken is sent once or, where the service may come back, again with the same step and bytes until
it is applied. What can never be applied is counted, logged, kept, and raised by the next flush(). A service that stays
away through all tries of the retry policy makes the publisher *stuck*: it goes on trying in longer pauses, and nobody
waits for it meanwhile.

Knows threads, the order of updates, when to try again. Does not know tensors, HTTP, or how a body came about.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from ema_client.errors import EmaError, UpdatesPending, UsageError
from ema_client.http.body import Body
from ema_client.http.retry import RetryPolicy

__all__ = ["EXIT_SECONDS", "Publisher", "Stats", "Update"]

#: Updates that may be in the publisher's hands: one on its way, one that waits. Each holds memory of the model's size.
SLOTS = 2
#: How long the end of the program may wait for updates that are still on their way, for all publishers together.
EXIT_SECONDS = 30.0
#: How long a thread is given that has nothing more to do at the end of the program.
LAST_SECONDS = 1.0
#: Pauses between two rounds of tries while the service stays away, in seconds: the first, and the longest.
STUCK_PAUSE = 2.0
LONGEST_STUCK_PAUSE = 30.0
#: A round of tries ends after so many seconds, whatever the policy says: a try may hang for as long as a timeout.
ROUND_SECONDS = 15.0

_log = logging.getLogger("ema_client")


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of the updates so far.

    sent: applied by the service. skipped: not sent, as the publisher was busy or the service away. failed: refused by
    the service, as are updates with NaN.
    """

    sent: int = 0
    skipped: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """One update on its way.

    body: owned by the publisher until ``done`` is called; its memory must not change before. ready: waits, in the
    sending thread, until the body's bytes are there. done: gives the memory back. borrowed: the memory is the model's
    own, and recall() must not return before it is done with.
    """

    step: int
    body: Body
    ready: Callable[[], None]
    done: Callable[[], None]
    borrowed: bool = False


class Publisher:
    """Sends updates in order, in a thread of its own that begins with the first one.

    room() and submit() are for one thread, the trainer's. A process forked off has no publisher: its calls raise
    UsageError and its end waits for nothing.

    Args:
        send: sends one update, once; raises EmaError.
        retry: how often and how soon to try again before the service counts as away.
        name: of the run and where it is, for logs.
    """

    def __init__(self, send: Callable[[int, Body], object], retry: RetryPolicy, *, name: str) -> None:
        self._send = send
        self._retry = retry
        self._name = name
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        #: In order; the first one is being sent.
        self._updates: deque[Update] = deque()
        self._stats = Stats()
        self._stuck: EmaError | None = None
        self._stuck_rounds = 0
        self._skips_since = 0
        self._failure: EmaError | None = None
        self._failed_since = 0
        self._failed_in_a_row = 0
        self._dead: EmaError | None = None
        self._hurry = False
        self._recalled = False
        self._ending = False
        self._abandoned = False
        self._at_end: Callable[[], None] = _nothing

    @property
    def stats(self) -> Stats:
        return self._stats

    @property
    def pending(self) -> int:
        """Updates taken and not yet applied, refused or given up."""
        return len(self._updates)

    @property
    def stuck(self) -> bool:
        """Whether a round of tries came to nothing and the service has not answered since."""
        return self._stuck is not None

    def check_usable(self) -> None:
        """Raises UsageError after the end, and in a process forked off."""
        # Without the lock: in a forked process it may be held for ever.
        if os.getpid() != self._pid:
            raise UsageError(
                f"{self._name} belongs to process {self._pid} and this is a fork of it",
                hint="update and read the EMA in the process that made it, or make another with resume=True",
            )
        if self._ending:
            raise UsageError(f"{self._name} is closed", hint="make a new RemoteEma with resume=True")

    def room(self, *, wait: bool) -> bool:
        """Whether an update can be taken now. If not, it is counted as skipped.

        wait: wait for room. Where the service is away there is no waiting.
        """
        self.check_usable()
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._free or self.stuck or self._dead is not None)
            if not self._free:
                self._skip()
            return self._free

    def submit(self, update: Update) -> None:
        """Take an update. room() must have said that there is some."""
        self.check_usable()
        with self._changed:
            self._updates.append(update)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"ema {self._name}", daemon=True)
                _watch(self, self._thread)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> None:
        """Return once all updates taken are applied; raise what went wrong since the last flush, the first of it.

        Raises UpdatesPending where that takes longer than ``timeout`` seconds; the error of the last try where the
        service is away and a round of tries came to nothing. What is pending stays so and is still tried.
        """
        self.check_usable()
        with self._changed:
            self._wait_until_sent(timeout)
            self._raise_failure()
            if self._updates:
                if self._stuck is not None:
                    raise self._stuck
                raise UpdatesPending(f"{len(self._updates)} updates of {self._name} are not applied after {timeout} s")

    def recall(self) -> None:
        """Return once no borrowed memory is in use: all of it sent, or given up where a try failed."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._recalled = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: not any(update.borrowed for update in self._updates))
            finally:
                self._recalled = False

    def at_end(self, call: Callable[[], None]) -> None:
        """``call`` once nothing more will be sent."""
        self._at_end = call

    def finish(self) -> None:
        """Send what is pending, then end the thread; no more updates are taken. Does not wait: the garbage collector
        calls it, in any thread."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._updates:
                _log.warning("%s was dropped without close(); %d updates are on their way", self._name, self.pending)
            self._end()

    def end_with_program(self, deadline: float) -> None:
        """flush() until ``deadline`` (time.monotonic), without raising, then close()."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._wait_until_sent(max(0.0, deadline - time.monotonic()))
            if self._updates:
                _log.error("%s: the program ends with %d updates not applied", self._name, len(self._updates))
        self.close()

    def close(self) -> None:
        """Give up what is pending, and end the thread. flush() comes first where it shall not be lost."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._abandoned = True
            self._end()

    def _end(self) -> None:
        self._ending = True
        if self._thread is None:
            self._at_end()
        self._changed.notify_all()

    # --- the trainer's thread, with the lock ------------------------------------------------------------------------

    @property
    def _free(self) -> bool:
        return len(self._updates) < SLOTS and self._dead is None

    def _skip(self) -> None:
        self._stats = replace(self._stats, skipped=self._stats.skipped + 1)
        self._skips_since += 1
        if _worth_a_line(self._skips_since):
            trouble = self._dead or self._stuck
            why = str(trouble) if trouble else "earlier ones are still on their way"
            _log.warning("%s: %d updates skipped in a row; %s", self._name, self._skips_since, why)

    def _wait_until_sent(self, timeout: float | None) -> None:
        rounds = self._stuck_rounds
        self._hurry = bool(self._updates)
        self._changed.notify_all()
        self._changed.wait_for(lambda: not self._updates or (self.stuck and self._stuck_rounds > rounds), timeout)

    def _raise_failure(self) -> None:
        if self._dead is not None:
            raise self._dead
        failure, self._failure = self._failure, None
        more, self._failed_since = self._failed_since - 1, 0
        if failure is not None:
            if more:
                failure.add_note(f"{more} updates failed after it; see the log")
            raise failure

    # --- the sender's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (update := self._next()) is not None:
                update.ready()
                self._deliver(update)
        except BaseException as fault:
            # No error of the service, but a defect, of ours or of the device: nobody may wait for this thread.
            what = f"the sender of {self._name} ended: {type(fault).__name__}: {fault}"
            self._dead = EmaError(what, hint="go on with a new RemoteEma and resume=True; please report this")
            raise
        finally:
            _unwatch(self)
            with self._changed:
                self._lose_all()
            self._at_end()

    def _next(self) -> Update | None:
        with self._changed:
            self._changed.wait_for(lambda: self._updates or self._ending)
            return None if self._abandoned or not self._updates else self._updates[0]

    def _deliver(self, update: Update) -> None:
        attempt, began = 0, time.monotonic()
        while True:
            trouble = self._try(update)
            if trouble is None:
                return self._delivered()
            if not trouble.retryable:
                return self._refused(update, trouble)
            pause = self._retry.delay(attempt, trouble, random.random)
            attempt += 1
            if pause is None or time.monotonic() - began > ROUND_SECONDS:
                pause, attempt, began = self._away(update, trouble), 0, time.monotonic()
            if not self._pause(update, pause):
                return self._given_up(update, trouble)

    def _try(self, update: Update) -> EmaError | None:
        try:
            self._send(update.step, update.body)
        except EmaError as error:
            return error
        return None

    def _delivered(self) -> None:
        with self._changed:
            if self.stuck:
                _log.warning("%s: updates are applied again; %d were skipped", self._name, self._skips_since)
            self._stuck, self._stuck_rounds, self._skips_since, self._failed_in_a_row = None, 0, 0, 0
            self._stats = replace(self._stats, sent=self._stats.sent + 1)
            self._drop_first()

    def _refused(self, update: Update, error: EmaError) -> None:
        error.add_note(f"update of step {update.step}, {self._name}")
        with self._changed:
            self._failed_in_a_row += 1
            if _worth_a_line(self._failed_in_a_row):
                _log.error("%s: step %d failed: %s", self._name, update.step, error)
            # The first one is raised, the others are counted: a training that nobody watches must not grow by them.
            self._failure = self._failure or error
            self._failed_since += 1
            self._stuck, self._stuck_rounds = None, 0
            self._stats = replace(self._stats, failed=self._stats.failed + 1)
            self._drop_first()

    def _given_up(self, update: Update, error: EmaError) -> None:
        with self._changed:
            if not self.stuck:
                _log.error("%s: step %d was given up: %s", self._name, update.step, error)
            self._stuck = error
            self._drop()

    def _away(self, update: Update, error: EmaError) -> float:
        """A round of tries came to nothing. Returns how long to pause."""
        with self._changed:
            if not self.stuck:
                _log.error("%s: step %d cannot be sent, and is tried again: %s", self._name, update.step, error)
            self._stuck = error
            self._stuck_rounds += 1
            self._hurry = False
            self._changed.notify_all()
            return min(LONGEST_STUCK_PAUSE, STUCK_PAUSE * 2.0 ** min(self._stuck_rounds - 1, 10)) * random.random()

    def _pause(self, update: Update, seconds: float) -> bool:
        """False where the update must not be tried again. flush() cuts short a pause between rounds."""
        with self._changed:
            stuck = self.stuck
            self._changed.wait_for(lambda: self._hopeless(update) or (stuck and self._hurry), seconds)
            return not self._hopeless(update)

    def _hopeless(self, update: Update) -> bool:
        recalled = self._recalled and update.borrowed
        return self._abandoned or recalled or (self._ending and self.stuck)

    def _lose_all(self) -> None:
        if self._updates:
            _log.error("%s: %d updates were not sent", self._name, len(self._updates))
        while self._updates:
            self._drop()
        self._changed.notify_all()

    def _drop(self) -> None:
        self._stats = replace(self._stats, skipped=self._stats.skipped + 1)
        self._drop_first()

    def _drop_first(self) -> None:
        self._updates.popleft().done()
        if not self._updates:
            self._hurry = False
        self._changed.notify_all()


def _nothing() -> None:
    pass


def _worth_a_line(count: int) -> bool:
    """1, 2, 4, 8 and so on: a log that says it all in few lines."""
    return count & (count - 1) == 0


# --- the end of the program -----------------------------------------------------------------------------------------

_running: set[Publisher] = set()
#: Those of ended publishers too, as long as they live.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_running_lock = threading.Lock()


def _watch(publisher: Publisher, thread: threading.Thread) -> None:
    with _running_lock:
        _threads.add(thread)
        if not _running:
            # Anew, so that it runs before what was registered meanwhile, such as the closing of the connections.
            atexit.unregister(_flush_all)
            atexit.register(_flush_all)
        _running.add(publisher)


def _unwatch(publisher: Publisher) -> None:
    with _running_lock:
        _running.discard(publisher)


def _flush_all() -> None:
    """At the end of the program: wait for what is pending, at most EXIT_SECONDS and not for a service that is away."""
    deadline = time.monotonic() + EXIT_SECONDS
    for publisher in list(_running):
        # Whoever presses Ctrl-C once more at the end wants the end.
        with contextlib.suppress(KeyboardInterrupt):
            publisher.end_with_program(deadline)
    # A thread that frees a tensor while the interpreter ends crashes it. One that hangs in a socket is left.
    for thread in list(_threads):
        thread.join(LAST_SECONDS)


def _forget_after_fork() -> None:
    global _running_lock
    _running.clear()
    _threads.clear()
    _running_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
