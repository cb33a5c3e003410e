"""The background publisher of a trainer: takes updates, has a thread send them, and waits where the trainer must wait.

An update is sent once or, where the service may come back, again with the same step and bytes until the service has
applied the update. An update that the service refuses is counted and logged, and the next flush() raises the refusal. A
service that stays away through a round of tries makes the publisher *stuck*: the tries go on in longer pauses, and
nobody waits meanwhile.

Knows which process and which thread may call what, and the end of a publisher. Does not know tensors, HTTP, how a body
came about, or what follows a failed try (sender, rounds).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ema_client.errors import EmaError, UpdatesPending, UsageError
from ema_client.forks import Home
from ema_client.http.body import Body
from ema_client.training.at_exit import PROGRAM, ProgramEnd
from ema_client.training.queue import UpdateQueue
from ema_client.training.rounds import SendPolicy
from ema_client.training.sender import Sender
from ema_client.training.tally import Stats, Tally
from ema_client.training.updates import Update

__all__ = ["EXIT_SECONDS", "Publisher"]

#: How long the end of the program may wait for updates that are on their way, for all publishers together.
EXIT_SECONDS = 30.0

_log = logging.getLogger("ema_client")


class Publisher:
    """Sends updates in order, in a thread of its own, which begins with the first update.

    room() and submit() are for the trainer's thread alone. A forked process has no publisher: calls there raise
    UsageError, and the end of the fork waits for nothing.

    Args:
        send, fate: of an update, and of what became of it, see Sender.
        policy: how long to go on with an update.
        leave: tells the service, in a single try, that the training is over. Raises EmaError.
        name: of the run and the service, for logs.
        program: waits for the publisher at the end of the program.
    """

    def __init__(
        self,
        send: Callable[[int | None, Body], bool],
        policy: SendPolicy,
        *,
        name: str,
        fate: Callable[[int | None], bool | None] = lambda _: True,
        leave: Callable[[], object] = lambda: None,
        program: ProgramEnd = PROGRAM,
    ) -> None:
        self._name = name
        self._program = program
        self._home = Home()
        self._queue = UpdateQueue()
        self._tally = Tally(name)
        self._sender = Sender(send, fate, policy, self._queue, self._tally, name=name)
        self._leave = leave
        self._has_left = False
        self._dropped = False
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
        hint = "update and read the EMA in the process that made it, or make another with resume=True"
        self._home.check(self._name, hint)
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
        """Take an update, for which room() has found room."""
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

    def settle(self) -> None:
        """Return once no update is pending or, without raising, once the service counts as away."""
        if not (self._is_fork or self.stuck):
            self._queue.wait_until_empty(None)

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
        self._dropped = True
        self._end(abandon=False)

    def end_with_program(self, began: float) -> None:
        """flush() until EXIT_SECONDS after ``began`` (time.monotonic), without raising, then close()."""
        if self._is_fork:
            return
        pending, _ = self._queue.wait_until_empty(max(0.0, began + EXIT_SECONDS - time.monotonic()))
        if pending:
            _log.error("%s: the program ends with %d updates not applied", self._name, pending)
        else:
            self.leave()
        self.close()

    def leave(self) -> None:
        """Tell the service that the training is over, unless updates are pending. Without raising: nothing depends on
        it."""
        if self._is_fork or self._has_left or self.pending or self.stuck:
            return
        self._has_left = True
        try:
            self._leave()
        except EmaError as fault:
            _log.debug("%s was not told that the training is over: %s", self._name, fault)

    def close(self) -> None:
        """Give up what is pending, and end the thread. Call flush() first where nothing may be lost."""
        if not self._is_fork:
            self._end(abandon=True)

    @property
    def _is_fork(self) -> bool:
        return not self._home.is_here

    def _end(self, *, abandon: bool) -> None:
        self._queue.end(abandon=abandon)
        if self.thread is None:
            self._at_end()

    def _run(self) -> None:
        try:
            self._sender.run()
            if self._dropped:  # nobody else is there to say it
                self.leave()
        finally:
            self._program.forget(self)
            self._at_end()


def _nothing() -> None:
    pass
