"""The queue between a trainer's thread and the thread that sends its updates.

The trainer's thread waits for as long as the sending makes progress. A service that takes no byte, and answers nothing,
counts as away after ten seconds, however long the sender's own try may last.

Knows: how many updates there may be, and what each of the two threads waits for. Does not know: sending, counting,
logging, or how an update came about.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ema_client.errors import ConnectionLost, EmaError
from ema_client.training.rounds import gives_up
from ema_client.training.updates import Update

__all__ = ["SILENCE_SECONDS", "SLOTS", "UpdateQueue"]

#: Without progress for so long, and for as long as the service may work on the body, the service counts as away.
SILENCE_SECONDS = 10.0

#: Updates in the queue: the first is on its way, the second waits. Each holds memory of the model's size.
SLOTS = 2


class UpdateQueue:
    """Updates in order, the first of them being sent, or sent and awaiting other ranks' parts. Thread-safe; one thread
    puts, one sends, any may end the queue.

    More than twenty methods, each for one of those threads.

    silence: seconds without progress after which the service counts as away.

    More than twenty methods: what each of the two threads does and asks, the same few fields under one lock.

    The lock is reentrant, as the garbage collector may call end() in the middle of any other method.
    """

    def __init__(self, *, silence: float = SILENCE_SECONDS) -> None:
        self._silence = silence
        #: When the sending of the first update made progress last (time.monotonic); None before it began.
        self._moved: float | None = None
        self._changed = threading.Condition()
        self._updates: deque[Update] = deque()
        self._stuck: EmaError | None = None
        self._rounds = 0
        self._broken: EmaError | None = None
        #: A flush() waits: the pause between two rounds is cut short.
        self._hurried = False
        self._recalled = False
        self._ending = False
        self._abandoned = False

    @property
    def pending(self) -> int:
        """Updates put and not removed."""
        return len(self._updates)

    @property
    def stuck(self) -> EmaError | None:
        """The error of the latest round of tries, where a round came to nothing and no update went through since."""
        return self._stuck

    @property
    def rounds(self) -> int:
        """How many rounds in a row came to nothing."""
        return self._rounds

    @property
    def broken(self) -> EmaError | None:
        """Why the sending thread ended by itself; None while all is well."""
        return self._broken

    @property
    def ending(self) -> bool:
        """Whether end() was called. Takes no lock, so a forked process may ask."""
        return self._ending

    # --- the trainer's thread ---------------------------------------------------------------------------------------

    def has_room(self, *, wait: bool) -> bool:
        """Whether an update can be put. wait: wait for room, unless the service is away."""
        with self._changed:
            if wait:
                self._wait(lambda: self._free or self._stuck is not None or self._broken is not None)
            return self._free

    def put(self, update: Update) -> None:
        """Add an update, for which has_room() has found room."""
        with self._changed:
            self._updates.append(update)
            self._changed.notify_all()

    def wait_until_empty(self, timeout: float | None) -> tuple[int, EmaError | None]:
        """Wait until all updates are removed, a round of tries came to nothing, or ``timeout`` seconds have passed.

        Returns ``pending`` and ``stuck`` of that moment.
        """
        with self._changed:
            before = self._rounds
            self._hurried = bool(self._updates)
            self._changed.notify_all()
            self._wait(
                lambda: not self._updates or (self._stuck is not None and self._rounds > before),
                timeout,
                since=time.monotonic(),
            )
            return len(self._updates), self._stuck

    def recall(self) -> None:
        """Return once no update with borrowed memory is left; a failed try of such an update is its last."""
        with self._changed:
            self._recalled = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: not any(update.borrowed for update in self._updates))
            finally:
                self._recalled = False

    def end(self, *, abandon: bool) -> None:
        """Let the sending thread end: after the pending updates or, to ``abandon`` them, before."""
        with self._changed:
            self._ending = True
            self._abandoned = self._abandoned or abandon
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool], timeout: float | None = None, *, since: float = 0.0) -> None:
        """Wait until ``done``, or for ``timeout`` seconds; without progress from ``since`` on the queue gets stuck."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not done() and (now := time.monotonic()) < end:
            silent = float("inf") if self._moved is None else max(self._moved, since) + self._patience
            if now >= silent:
                fault = ConnectionLost(f"the service gave no sign of life for {self._patience:.0f} seconds")
                self.get_stuck(fault, after_round=True)
                since = now
            else:
                until = min(end, silent)
                self._changed.wait(None if until == float("inf") else until - now)

    @property
    def _patience(self) -> float:
        return self._silence + (self._updates[0].body.patience if self._updates else 0.0)

    @property
    def _free(self) -> bool:
        return len(self._updates) < SLOTS and self._broken is None

    # --- the sending thread -----------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do for any update."""
        return self._abandoned or (self._ending and not self._updates)

    def unsent(self, sent: int, seconds: float | None = None) -> Update | None:
        """Wait for an update to send and return it, still in the queue; ``sent`` updates before it are sent already.

        None after ``seconds``, and where the queue is over.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._updates) > sent or self.over, seconds)
            return None if self._abandoned or len(self._updates) <= sent else self._updates[sent]

    def left(self) -> tuple[Update, ...]:
        """The updates that are not removed, in order."""
        return tuple(self._updates)

    def gives_up(self, update: Update) -> bool:
        """Whether an update that awaits other ranks' parts is given up, as pause() says it of one to be tried again."""
        with self._changed:
            return self._gives_up(update)

    def moves(self) -> None:
        """The sending makes progress: it has begun, or more bytes of the update went out than ever before."""
        begins, self._moved = self._moved is None, time.monotonic()
        if begins:
            with self._changed:
                self._changed.notify_all()

    def rests(self) -> None:
        """Nothing is being sent: what was sent awaits others."""
        self._moved = None

    def pause(self, update: Update, seconds: float) -> bool:
        """Wait before the next try of ``update``; False, at once, where the update is given up.

        A flush() cuts the pause short where the sender is stuck.
        """
        with self._changed:
            stuck = self._stuck is not None
            self._changed.wait_for(lambda: self._gives_up(update) or (stuck and self._hurried), seconds)
            return not self._gives_up(update)

    def get_stuck(self, error: EmaError, *, after_round: bool) -> bool:
        """The service counts as away; returns whether that is news.

        after_round: whether a whole round of tries came to nothing.
        """
        with self._changed:
            news, self._stuck = self._stuck is None, error
            if after_round:
                self._rounds += 1
                self._hurried = False
            self._changed.notify_all()
            return news

    def get_through(self) -> bool:
        """The service has answered; returns whether the service counted as away before."""
        with self._changed:
            was_stuck, self._stuck, self._rounds = self._stuck is not None, None, 0
            return was_stuck

    def break_down(self, error: EmaError) -> None:
        """The sending thread ends by itself: waiting ends, and nothing is taken any more."""
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def remove(self, update: Update) -> None:
        """Remove an update and give its memory back."""
        with self._changed:
            self._updates.remove(update)
            update.done()
            self._moved = None
            if not self._updates:
                self._hurried = False
            self._changed.notify_all()

    def _gives_up(self, update: Update) -> bool:
        return gives_up(
            abandoned=self._abandoned,
            ending=self._ending,
            stuck=self._stuck is not None,
            recalled=self._recalled,
            borrowed=update.borrowed,
        )
