"""The background sender of a trainer: a queue of two updates, and the thread that sends them in order.

An update that was taken is sent once or, where the service may come back, again with the same step and bytes until the
service has applied it. An update that the service refuses is counted and logged, and the refusal is raised by the next
flush(). A service that stays away through a round of tries makes the publisher *stuck*: it goes on trying in longer
pauses, and nobody waits for it meanwhile.

Knows threads, the order of updates, what to do after each try (rounds). Does not know tensors, HTTP, or how a body came
about.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable

from ema_client.errors import EmaError, UpdatesPending, UsageError
from ema_client.http.body import Body
from ema_client.training.at_exit import PROGRAM, ProgramEnd
from ema_client.training.queue import UpdateQueue
from ema_client.training.rounds import Again, Refused, SendPolicy, Stuck
from ema_client.training.tally import Stats, Tally
from ema_client.training.updates import Update

__all__ = ["EXIT_SECONDS", "Publisher"]

#: How long the end of the program may wait for updates that are on their way, for all publishers together.
EXIT_SECONDS = 30.0

_log = logging.getLogger("ema_client")


class Publisher:
    """Sends updates in order, in a thread of its own that begins with the first update.

    room() and submit() are for one thread, the trainer's. A forked process has no publisher: its calls raise UsageError
    and its end waits for nothing.

    Args:
        send: sends one update, once, given step and body; raises EmaError.
        policy: how long to go on with an update.
        name: of the run and its service, for logs.
        program: what waits for this publisher at the end of the program.
    """

    def __init__(
        self,
        send: Callable[[int, Body], object],
        policy: SendPolicy,
        *,
        name: str,
        program: ProgramEnd = PROGRAM,
    ) -> None:
        self._send = send
        self._policy = policy
        self._name = name
        self._program = program
        self._pid = os.getpid()
        self._queue = UpdateQueue()
        self._tally = Tally(name)
        self._at_end: Callable[[], None] = _nothing
        #: The sending thread, None before the first update.
        self.thread: threading.Thread | None = None

    @property
    def stats(self) -> Stats:
        """What became of the updates so far."""
        return self._tally.stats

    @property
    def pending(self) -> int:
        """Updates taken and not yet applied, refused or given up."""
        return self._queue.pending

    @property
    def stuck(self) -> bool:
        """Whether a round of tries came to nothing and the service has not answered since."""
        return self._queue.stuck is not None

    def check_usable(self) -> None:
        """Raises UsageError after the end, and in a forked process."""
        # Without a lock: in a forked process the lock may be held for ever.
        if self._is_fork:
            raise UsageError(
                f"{self._name} belongs to process {self._pid} and this is a fork of it",
                hint="update and read the EMA in the process that made it, or make another with resume=True",
            )
        if self._queue.ending:
            raise UsageError(f"{self._name} is closed", hint="make a new RemoteEma with resume=True")

    def room(self, *, wait: bool) -> bool:
        """Whether an update can be taken now. If not, the update is counted as skipped.

        wait: wait for room, unless the service is away.
        """
        self.check_usable()
        has_room = self._queue.has_room(wait=wait)
        if not has_room:
            trouble = self._queue.broken or self._queue.stuck
            self._tally.skipped(str(trouble) if trouble else "earlier ones are still on their way")
        return has_room

    def submit(self, update: Update) -> None:
        """Take an update. room() must have said that there is room."""
        self.check_usable()
        self._queue.put(update)
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name=f"ema {self._name}", daemon=True)
            self._program.watch(self, self.thread)
            self.thread.start()

    def flush(self, timeout: float | None = None) -> None:
        """Return once all updates taken are applied; raise the first failure since the latest flush.

        Raises UpdatesPending where that takes longer than ``timeout`` seconds; the error of the latest try where the
        service is away and a round of tries came to nothing. What is pending stays pending and is tried on.
        """
        self.check_usable()
        pending, stuck = self._queue.wait_until_empty(timeout)
        if self._queue.broken is not None:
            raise self._queue.broken
        self._tally.raise_failure()
        if pending:
            raise stuck or UpdatesPending(f"{pending} updates of {self._name} are not applied after {timeout} s")

    def recall(self) -> None:
        """Return once no borrowed memory is in use: every such update is sent, or given up where a try failed."""
        if not self._is_fork:
            self._queue.recall()

    def at_end(self, call: Callable[[], None]) -> None:
        """``call`` once nothing more will be sent."""
        self._at_end = call

    def finish(self) -> None:
        """Send what is pending, then end the thread; no more updates are taken.

        Does not wait: the garbage collector calls finish(), in any thread.
        """
        if self._is_fork:
            return
        if pending := self.pending:
            _log.warning("%s was dropped without close(); %d updates are on their way", self._name, pending)
        self._end(abandon=False)

    def end_with_program(self, began: float) -> None:
        """flush() until EXIT_SECONDS after ``began`` (time.monotonic), without raising, then close()."""
        if self._is_fork:
            return
        pending, _ = self._queue.wait_until_empty(max(0.0, began + EXIT_SECONDS - time.monotonic()))
        if pending:
            _log.error("%s: the program ends with %d updates not applied", self._name, pending)
        self.close()

    def close(self) -> None:
        """Give up what is pending, and end the thread. Call flush() first where nothing may be lost."""
        if not self._is_fork:
            self._end(abandon=True)

    @property
    def _is_fork(self) -> bool:
        return os.getpid() != self._pid

    def _end(self, *, abandon: bool) -> None:
        self._queue.end(abandon=abandon)
        if self.thread is None:
            self._at_end()

    # --- the sending thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (update := self._queue.first()) is not None:
                update.ready()
                self._deliver(update)
        except BaseException as fault:
            # No error of the service, but a defect, of this client or of the device: nobody may wait for this thread.
            what = f"the sender of {self._name} ended: {type(fault).__name__}: {fault}"
            self._queue.break_down(
                EmaError(what, hint="go on with a new RemoteEma and resume=True; please report this")
            )
            raise
        finally:
            self._program.forget(self)
            self._lose_all()
            self._at_end()

    def _deliver(self, update: Update) -> None:
        """Try to send an update until it is applied, refused or given up."""
        attempt, began = 0, time.monotonic()
        while (error := self._try(update)) is not None:
            elapsed = time.monotonic() - began
            match self._policy.after(attempt, error, elapsed=elapsed, rounds=self._queue.rounds, random=random.random):
                case Refused():
                    return self._refused(update, error)
                case Again(pause):
                    attempt += 1
                case Stuck(pause):
                    if self._queue.get_stuck(error, after_round=True):
                        _log.error("%s: step %d cannot be sent, and is tried again: %s", self._name, update.step, error)
                    attempt, began = 0, time.monotonic()
            if not self._queue.pause(update, pause):
                return self._given_up(update, error)
        return self._applied()

    def _try(self, update: Update) -> EmaError | None:
        try:
            self._send(update.step, update.body)
        except EmaError as error:
            return error
        return None

    # The account comes first in each of these: flush() returns with the removal of the last update.

    def _applied(self) -> None:
        self._tally.sent(was_stuck=self._queue.get_through())
        self._queue.remove_first()

    def _refused(self, update: Update, error: EmaError) -> None:
        self._queue.get_through()
        self._tally.failed(update.step, error)
        self._queue.remove_first()

    def _given_up(self, update: Update, error: EmaError) -> None:
        if self._queue.get_stuck(error, after_round=False):
            _log.error("%s: step %d was given up: %s", self._name, update.step, error)
        self._tally.given_up()
        self._queue.remove_first()

    def _lose_all(self) -> None:
        if pending := self.pending:
            _log.error("%s: %d updates were not sent", self._name, pending)
        while self.pending:
            self._tally.given_up()
            self._queue.remove_first()


def _nothing() -> None:
    pass
