"""The work of the sending thread: each update in turn, tried until it is applied, refused or given up.

Knows: what to do after each try, by the policy, and what the queue and the tally are told of it. Does not know:
threads' beginnings, tensors, HTTP, or how an update came about.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace

from ema_client.errors import EmaError
from ema_client.http.body import Body
from ema_client.training.queue import UpdateQueue
from ema_client.training.rounds import Again, Refused, SendPolicy, Stuck
from ema_client.training.tally import Tally
from ema_client.training.updates import Update

__all__ = ["Sender"]

_log = logging.getLogger("ema_client")


class Sender:
    """Sends the updates of a queue, in order.

    Args:
        send: makes a single try to send an update, given step and body; raises EmaError.
        policy: how long to go on with an update.
        queue: where updates come from.
        tally: counts what becomes of the updates.
        name: of the run and the service, for logs.
    """

    def __init__(
        self,
        send: Callable[[int, Body], object],
        policy: SendPolicy,
        queue: UpdateQueue,
        tally: Tally,
        *,
        name: str,
    ) -> None:
        self._send = send
        self._policy = policy
        self._queue = queue
        self._tally = tally
        self._name = name

    def run(self) -> None:
        """Send updates until the queue ends; updates that are left then are given up. For a thread of its own."""
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
            self._give_up_all()

    def _deliver(self, update: Update) -> None:
        """Try to send an update until the update is applied, refused or given up."""
        attempt, began = 0, time.monotonic()
        body = replace(update.body, moved=_Progress(self._queue.moves))
        self._queue.moves()
        while (error := self._try(update.step, body)) is not None:
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

    def _try(self, step: int, body: Body) -> EmaError | None:
        try:
            self._send(step, body)
        except EmaError as error:
            return error
        return None

    # An update is counted before its removal: flush() returns with the removal of the last update.

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

    def _give_up_all(self) -> None:
        if pending := self._queue.pending:
            _log.error("%s: %d updates were not sent", self._name, pending)
        while self._queue.pending:
            self._tally.given_up()
            self._queue.remove_first()


class _Progress:
    """Calls ``moves`` when more bytes went out than in any try before: what a network swallows anew is no progress."""

    def __init__(self, moves: Callable[[], None]) -> None:
        self._moves = moves
        self._most = 0

    def __call__(self, sent: int) -> None:
        if sent > self._most:
            self._most = sent
            self._moves()
