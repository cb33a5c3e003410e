"""The work of the sending thread: each update in turn, tried until it is applied, refused or given up.

A rank of a sharded trainer sends a part of each update. A part that arrived is kept until the service says that the
whole update is applied, and sent again where the service has lost the part; the next update's part is sent meanwhile.
While the service is away ranks leave updates out, each by itself: a part of an update that other ranks skipped counts
as skipped too.

Knows: what to do after each try, by the policy, and what the queue and the tally are told of it. Does not know:
threads' beginnings, tensors, HTTP, or how an update came about.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ema_client.errors import EmaError, StaleStep, StepNotReached
from ema_client.http.body import Body
from ema_client.training.queue import SILENCE_SECONDS, UpdateQueue
from ema_client.training.rounds import Again, Refused, SendPolicy, Stuck
from ema_client.training.tally import Tally
from ema_client.training.updates import Update

__all__ = ["Sender"]

_log = logging.getLogger("ema_client")

#: Seconds from a part's arrival to the first question what became of the update; each further pause is twice as long.
_FIRST_LOOK, _LONGEST_PAUSE = 0.01, 0.25
#: Seconds that other ranks' parts may take before the trainer waits no more for room, and before a flush() ends.
_ROOM_SECONDS, _FLUSH_SECONDS = 10.0, 60.0
#: Where an update took so many seconds, the service was away, or near enough for some rank to have left updates out.
_AWAY_SECONDS = SILENCE_SECONDS / 2
#: Seconds that the model's own memory stays lent to a part that arrived, once the model needs the memory back.
_LENT_SECONDS = 5.0


@dataclass(slots=True)
class _Awaiting:
    """An update of which this rank's part is there, and others are awaited. since: by time.monotonic()."""

    update: Update
    since: float = field(default_factory=time.monotonic)


class Sender:
    """Sends the updates of a queue, in order.

    Args:
        send: makes a single try to send an update, given step and body, and says whether the update is applied; if not,
            other ranks' parts are awaited. Without a step: initial weights given anew. Raises EmaError.
        fate: what became of a step of which a part was sent: True, applied; False, other ranks' parts are awaited;
            None, the part is not there any more. Raises EmaError.
        policy: how long to go on with an update.
        queue: where updates come from.
        tally: counts what becomes of the updates.
        name: of the run and the service, for logs.
    """

    def __init__(
        self,
        send: Callable[[int | None, Body], bool],
        fate: Callable[[int | None], bool | None],
        policy: SendPolicy,
        queue: UpdateQueue,
        tally: Tally,
        *,
        name: str,
    ) -> None:
        self._send = send
        self._fate = fate
        self._policy = policy
        self._queue = queue
        self._tally = tally
        self._name = name
        #: The first updates of the queue, sent and not known to be applied.
        self._awaiting: list[_Awaiting] = []
        self._pause = _FIRST_LOOK
        #: By step of the updates that are not removed: when the first try began; and when the service was away last.
        self._begun: dict[int | None, float] = {}
        self._away = float("-inf")

    def run(self) -> None:
        """Send updates until the queue ends; updates that are left then are given up. For a thread of its own."""
        try:
            while not self._queue.over:
                update = self._queue.unsent(len(self._awaiting), self._pause if self._awaiting else None)
                if update is not None:
                    update.ready()
                    self._deliver(update)
                else:
                    self._look()
        except BaseException as fault:
            # No error of the service, but a defect, of this client or of the device: nobody may wait for this thread.
            what = f"the sender of {self._name} ended: {type(fault).__name__}: {fault}"
            self._queue.break_down(
                EmaError(what, hint="go on with a new RemoteEma and resume=True; please report this")
            )
            raise
        finally:
            self._give_up_all()

    def _deliver(self, update: Update, *, again: bool = False) -> None:
        """Try to send an update until the update is there, refused or given up. again: a part that was there before,
        and may have been applied, and others after it, while nobody could say so."""
        attempt, began = 0, time.monotonic()
        self._begun.setdefault(update.step, began)
        body = replace(update.body, moved=_Progress(self._queue.moves))
        self._queue.moves()
        while isinstance(error := self._try(update.step, body), EmaError):
            if again and isinstance(error, StaleStep):
                if self._ask(update.step):
                    self._applied(update)
                    return
                if self._may_be_skipped(update):
                    self._left_out(update)
                    return
            elapsed = time.monotonic() - began
            match self._policy.after(attempt, error, elapsed=elapsed, rounds=self._queue.rounds, random=random.random):
                case Refused():
                    self._refused(update, error)
                    return
                case Again(pause):
                    attempt += 1
                case Stuck(pause):
                    if self._queue.get_stuck(error, after_round=True):
                        _log.error("%s: %s cannot be sent, and is tried again: %s", self._name, update.what, error)
                    attempt, began = 0, time.monotonic()
            if not self._queue.pause(update, pause):
                self._given_up(update, error)
                return
        self._applied(update) if error else self._await(update)

    def _try(self, step: int | None, body: Body) -> EmaError | bool:
        """Whether the update is applied, or why it is not there.

        Earlier parts are seen to first: a service that lost one, and was sent this one, would go past the lost one.
        """
        if self._awaiting:
            self._look()
        try:
            return self._send(step, body)
        except EmaError as error:
            return error

    # --- a part that arrived ----------------------------------------------------------------------------------------

    def _await(self, update: Update) -> None:
        self._awaiting.append(_Awaiting(update))
        self._pause = _FIRST_LOOK
        self._queue.rests()

    def _look(self) -> None:
        """Ask what became of the updates whose parts are there; where one is lost send all again, in order."""
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        awaiting, self._awaiting = self._awaiting, []
        fates = [self._ask(each.update.step) for each in awaiting]
        for each, fate in zip(awaiting, fates, strict=True):
            if fate:
                self._applied(each.update)
            elif None in fates:
                self._deliver(each.update, again=True)
            else:
                self._wait_on(each)

    def _ask(self, step: int | None) -> bool | None:
        """The fate of a step. Where nobody can say, the part is sent again, which asks as well."""
        try:
            return self._fate(step)
        except EmaError:
            return None

    def _wait_on(self, each: _Awaiting) -> None:
        """Go on waiting for other ranks' parts, unless nobody does any more."""
        waited = time.monotonic() - each.since
        late = StepNotReached(
            f"{self._name}: {each.update.what} is not complete: other ranks' parts did not come within {waited:.0f} s",
            hint="see the other ranks' messages",
        )
        if self._queue.gives_up(each.update) and not (each.update.borrowed and waited < _LENT_SECONDS):
            self._given_up(each.update, late)
            return
        if each.update.step is None and waited > _FLUSH_SECONDS:
            # Some rank does not give any: the run has its first ones, and updates must not wait for ever.
            self._refused(each.update, late)
            return
        if waited > _ROOM_SECONDS and self._queue.get_stuck(late, after_round=waited > _FLUSH_SECONDS):
            _log.error("%s", late)
        self._awaiting.append(each)

    def _may_be_skipped(self, update: Update) -> bool:
        """Whether another rank may have left an update out, for the service was away when this rank began with it."""
        return self._begun[update.step] - self._away < SILENCE_SECONDS

    # An update is counted before its removal: flush() returns with the removal of the last update.

    def _applied(self, update: Update) -> None:
        now = time.monotonic()
        if now - self._begun.get(update.step, now) > _AWAY_SECONDS:  # of initial weights two may be under way
            self._away = now
        self._tally.sent(was_stuck=self._queue.get_through(), counted=update.step is not None)
        self._remove(update)

    def _refused(self, update: Update, error: EmaError) -> None:
        self._queue.get_through()
        self._tally.failed(update.step, error)
        self._remove(update)

    def _left_out(self, update: Update) -> None:
        self._queue.get_through()
        _log.warning("%s: %s was left out: other ranks skipped it, as the service was away", self._name, update.what)
        self._tally.given_up()
        self._remove(update)

    def _given_up(self, update: Update, error: EmaError) -> None:
        if self._queue.get_stuck(error, after_round=False):
            _log.error("%s: %s was given up: %s", self._name, update.what, error)
        self._tally.given_up()
        self._remove(update)

    def _remove(self, update: Update) -> None:
        self._begun.pop(update.step, None)
        self._queue.remove(update)

    def _give_up_all(self) -> None:
        if pending := self._queue.pending:
            _log.error("%s: %d updates were not sent", self._name, pending)
        for update in self._queue.left():
            self._tally.given_up()
            self._remove(update)


class _Progress:
    """Calls ``moves`` when more bytes went out than in any try before: what a network swallows anew is no progress."""

    def __init__(self, moves: Callable[[], None]) -> None:
        self._moves = moves
        self._most = 0

    def __call__(self, sent: int) -> None:
        if sent > self._most:
            self._most = sent
            self._moves()
