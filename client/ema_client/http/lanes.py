"""Lanes at work: several threads carry the stretches of one body, each over a connection of its own.

A lane that breaks off gives its stretch back and goes on over a new connection, once; a lane that is refused, or breaks
twice in a row, ends, and the others carry its stretch. While one lane is left the body goes on. The number of lanes may
change in the course of a body.

A lane for which nothing is left waits for the others, and helps one that is late (stretches): the late one is
cancelled, and its stretch carried again. One that has carried all and waits for the answer is not: both have the
stretch then, and the one that is second to bring it is cancelled.

Knows: threads, and which faults end one lane or all. Does not know: connections, what carrying a stretch means, how
many lanes pay (pace), when a lane is late (stretches).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ema_client.errors import ConnectionLost, EmaError
from ema_client.http.cancelling import Cancellation
from ema_client.http.pace import Pace
from ema_client.http.stretches import Stretch, Stretches

__all__ = ["Carry", "LanesEnded", "Moved", "carry_all"]

#: Called by a lane with the number of bytes that it has just carried; negative where bytes have to be carried again.
#: Raises LanesEnded where nobody wants the rest, ConnectionLost where another lane has it.
Moved = Callable[[int], None]
#: Carries a stretch, and calls ``moved`` on the way. Raises EmaError where the stretch did not come.
Carry = Callable[[Stretch, Moved], None]

#: A lane that breaks off so often in a row ends.
_BREAKS = 2
#: Seconds between two looks of a lane without work at whether another one is late.
_LOOK_SECONDS = 0.1


class LanesEnded(Exception):
    """The body is given up, for the fault of another lane or of the caller: this lane stops where it is."""


def carry_all(
    stretches: Stretches,
    carry: Carry,
    pace: Pace,
    *,
    first: Stretch | None = None,
    moved: Moved = lambda _: None,
    alone: Callable[[EmaError], bool] = lambda fault: fault.retryable,
    helped: bool = True,
) -> None:
    """Carry every stretch of the queue; the calling thread is the first lane.

    first: a stretch that lane number 0 has taken already. moved: told of all bytes, by the lanes' threads.
    alone: whether a fault is one of the stretch, or of the connection, alone. helped: whether a lane that is late is
    helped by one without work; False where carrying waits for something other than the connection.

    Raises the error of a lane that the others need not go on after, at once; where all lanes have ended and stretches
    are left, the error of the last one: the call may then be repeated with the same queue. No lane is at work any more
    when the call ends, whatever is raised.
    """
    lanes = _Lanes(stretches, carry, pace, moved, alone, helped=helped)
    try:
        lanes.work(0, first)
        lanes.join()
    except BaseException:
        # Ctrl-C on the calling thread.
        lanes.stop(None)
        lanes.join()
        raise
    lanes.check()
    pace.ends(alike=stretches.alike)


class _Lanes:
    """The lanes of one body.

    More than a dozen attributes: what is carried and how (six of them given), and the lanes by what they do.
    """

    def __init__(
        self,
        stretches: Stretches,
        carry: Carry,
        pace: Pace,
        moved: Moved,
        alone: Callable[[EmaError], bool],
        *,
        helped: bool,
    ) -> None:
        self._stretches = stretches
        self._carry = carry
        self._pace = pace
        self._told = moved
        self._alone = alone
        self._helped = helped
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        #: The native numbers of the threads of the lanes at work, by the lanes' numbers.
        self._at_work: dict[int, int] = {}
        #: Lanes without work, which wait until another one is late.
        self._waiting: set[int] = set()
        #: What ends the stretch that a lane carries, by the lanes' numbers.
        self._carrying: dict[int, Cancellation] = {}
        #: Lanes that ever began, and those of them that ended early: too slow for what was left, or refused.
        self._count = self._retired = 0
        #: The first fault of a lane, or the one that ends all.
        self._fault: BaseException | None = None
        self._stopped = False

    def work(self, lane: int, has: Stretch | None = None) -> None:
        """Be lane number ``lane`` until nothing is left for the lane. has: a stretch that the lane has taken."""
        self._enter(lane)
        if lane == 0:
            self._count = 1
            self._widen()
        breaks = 0
        try:
            while stretch := has or self._next(lane):
                has = None
                try:
                    self._carry_one(lane, stretch)
                    breaks = 0
                except EmaError as fault:
                    breaks += 1
                    self._broke(fault)
                    if not isinstance(fault, ConnectionLost) or breaks >= _BREAKS:
                        self._retired += 1
                        break
        except LanesEnded:
            pass
        except Exception as fault:  # noqa: BLE001 - raised by check(), on the thread of the caller
            self.stop(fault)
        finally:
            self._leave(lane)

    def stop(self, fault: BaseException | None) -> None:
        """End all lanes, at once but for those whose connection is being opened."""
        with self._change:
            if not self._stopped:
                self._fault = fault
            self._stopped = True
            for cancellation in self._carrying.values():
                cancellation.cancel()
            self._change.notify_all()

    def join(self) -> None:
        """Wait until no lane is at work but the calling one."""
        while True:
            with self._change:
                if not self._threads:
                    return
                thread = self._threads.pop()
            thread.join()

    def check(self) -> None:
        """Raises what ended the lanes, where stretches are left."""
        if self._stopped or not self._stretches.whole:
            raise self._fault or ConnectionLost("all connections ended before the whole had come")

    def _next(self, lane: int) -> Stretch | None:
        """The next stretch of a lane, for which the lane may have to wait; None where the lane ends."""
        # In one step with the lane's end: of two lanes that rely on each other, or see one too many, one goes.
        with self._change:
            while not self._stopped:
                lanes = self._pace.lanes
                others = len(self._at_work.keys() - {lane})
                if others >= max(1, lanes):
                    break
                if taken := self._stretches.take(lane, lanes) or self._help(lane):
                    self._begins(lane)
                    return taken
                self._rests(lane)
                if not (self._helped and others):
                    self._retired += 1
                    break
                self._change.wait(_LOOK_SECONDS)
            self._ends(lane)
            return None

    def _help(self, lane: int) -> Stretch | None:
        """Have what a lane that is late has carried again; by lane number ``lane``, for which nothing is left, where
        the late one is not cancelled. Under the lock."""
        late = self._stretches.late(lane) if self._helped else None
        if late is None or late not in self._carrying:
            return None
        shared = self._stretches.abandon(late, lane)
        if shared is None:
            # The stretch is in the queue once nothing of the late lane touches the stretch's memory any more.
            self._carrying[late].cancel()
        return shared

    def _begins(self, lane: int) -> None:
        """A lane works on, or again. Under the lock."""
        if lane in self._waiting:
            self._waiting.remove(lane)
            self._at_work[lane] = threading.get_native_id()
            self._tell_pace()

    def _rests(self, lane: int) -> None:
        """A lane waits, if it did not before. Under the lock."""
        self._stretches.leaves(lane)
        if self._at_work.pop(lane, None) is not None:
            self._waiting.add(lane)
            self._tell_pace()

    def _ends(self, lane: int) -> None:
        """A lane ends. Under the lock."""
        self._stretches.leaves(lane)
        self._at_work.pop(lane, None)
        self._waiting.discard(lane)
        self._tell_pace()
        self._change.notify_all()

    def _carry_one(self, lane: int, stretch: Stretch) -> None:
        """Carry a stretch, or what another lane brings meanwhile. Raises what the lane ended for, where it was not
        cancelled, and no other lane has the stretch."""

        def moved(count: int) -> None:
            if self._stopped:
                raise LanesEnded
            cancellation.check()
            self._stretches.moved(lane, count)
            self._moved(count)

        with Cancellation() as cancellation:
            if not self._registers(lane, cancellation):
                return
            try:
                self._carry(stretch, moved)
            except BaseException as fault:
                spare, in_vain = self._stretches.broke(lane)
                self._carried_for_nothing(in_vain)
                if not (isinstance(fault, EmaError) and (spare or cancellation.cancelled)):
                    raise
            else:
                self._came(lane)
            finally:
                with self._change:
                    del self._carrying[lane]
                    self._change.notify_all()

    def _registers(self, lane: int, cancellation: Cancellation) -> bool:
        """Have ``cancellation`` end what the lane is about to carry; False where another lane has just brought it."""
        with self._change:
            if self._stopped:
                raise LanesEnded
            if has := self._stretches.has(lane):
                self._carrying[lane] = cancellation
            return has

    def _came(self, lane: int) -> None:
        with self._change:
            others, in_vain = self._stretches.came(lane)
            for each in others:
                if cancellation := self._carrying.get(each):
                    cancellation.cancel()
        self._carried_for_nothing(in_vain)

    def _carried_for_nothing(self, count: int) -> None:
        if count and not self._stopped:
            self._told(-count)

    def _moved(self, count: int) -> None:
        self._pace.moved(count)
        self._told(count)
        if len(self._at_work) + len(self._waiting) + self._retired < self._pace.lanes:
            self._widen()

    def _broke(self, fault: EmaError) -> None:
        """One lane's fault: of the lane alone, or of all."""
        if not self._alone(fault):
            self.stop(fault)
        with self._change:
            self._fault = self._fault or fault

    def _widen(self) -> None:
        """Begin as many lanes as are missing, while there are stretches for them."""
        begun: list[threading.Thread] = []
        with self._change:
            missing = self._pace.lanes - len(self._at_work) - len(self._waiting) - self._retired
            if self._stopped or missing <= 0 or not self._stretches.queued:
                return
            for _ in range(missing):
                lane, self._count = self._count, self._count + 1
                thread = threading.Thread(target=self.work, args=(lane,), name=f"ema lane {lane}", daemon=True)
                self._at_work[lane] = 0
                begun.append(thread)
            self._threads += begun
            # Under the lock: join() must not meet a thread that has not begun.
            for thread in begun:
                thread.start()

    def _enter(self, lane: int) -> None:
        with self._change:
            self._at_work[lane] = threading.get_native_id()
            self._tell_pace()

    def _leave(self, lane: int) -> None:
        with self._change:
            if lane in self._at_work or lane in self._waiting:
                self._ends(lane)

    def _tell_pace(self) -> None:
        """Under the lock."""
        if self._at_work and all(self._at_work.values()):
            self._pace.at_work(frozenset(self._at_work.values()))
