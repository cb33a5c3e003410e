"""Lanes at work: several threads carry the stretches of one body, each over a connection of its own.

A lane that breaks off gives its stretch back and goes on over a new connection, once; a lane that is refused, or breaks
twice in a row, ends, and the others carry its stretch. While one lane is left the body goes on. The number of lanes may
change in the course of a body.

Knows: threads, and which faults end one lane or all. Does not know: connections, what carrying a stretch means, how
many lanes pay (pace).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ema_client.errors import ConnectionLost, EmaError
from ema_client.http.pace import Pace
from ema_client.http.stretches import Stretch, Stretches

__all__ = ["Carry", "LanesEnded", "Moved", "carry_all"]

#: Called by a lane with the number of bytes that it has just carried; negative where bytes have to be carried again.
#: Raises LanesEnded where nobody wants the rest.
Moved = Callable[[int], None]
#: Carries a stretch, and calls ``moved`` on the way. Raises EmaError where the stretch did not come.
Carry = Callable[[Stretch, Moved], None]

#: A lane that breaks off so often in a row ends.
_BREAKS = 2


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
) -> None:
    """Carry every stretch of the queue; the calling thread is the first lane.

    first: a stretch that lane number 0 has taken already. moved: told of all bytes, by the lanes' threads.
    alone: whether a fault is one of the stretch, or of the connection, alone.

    Raises the error of a lane that the others need not go on after, at once; where all lanes have ended and stretches
    are left, the error of the last one: the call may then be repeated with the same queue. No lane is at work any more
    when the call ends, whatever is raised.
    """
    lanes = _Lanes(stretches, carry, pace, moved, alone)
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
    """The lanes of one body."""

    def __init__(
        self, stretches: Stretches, carry: Carry, pace: Pace, moved: Moved, alone: Callable[[EmaError], bool]
    ) -> None:
        self._stretches = stretches
        self._carry = carry
        self._pace = pace
        self._told = moved
        self._alone = alone
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        #: The native numbers of the threads of the lanes at work, by the lanes' numbers.
        self._at_work: dict[int, int] = {}
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
        """End all lanes, each at the next bytes that it carries."""
        with self._lock:
            if not self._stopped:
                self._fault = fault
            self._stopped = True

    def join(self) -> None:
        """Wait until no lane is at work but the calling one."""
        while True:
            with self._lock:
                if not self._threads:
                    return
                thread = self._threads.pop()
            thread.join()

    def check(self) -> None:
        """Raises what ended the lanes, where stretches are left."""
        if self._stopped or not self._stretches.whole:
            raise self._fault or ConnectionLost("all connections ended before the whole had come")

    def _next(self, lane: int) -> Stretch | None:
        lanes = self._pace.lanes
        # In one step with the lane's end: of two lanes that rely on each other, or see one too many, one goes.
        with self._lock:
            if self._stopped:
                return None
            surplus = len(self._at_work) > max(1, lanes)
            taken = None if surplus else self._stretches.take(lane, lanes)
            if taken is None:
                self._stretches.leaves(lane)
                del self._at_work[lane]
                self._retired += not surplus
            return taken

    def _carry_one(self, lane: int, stretch: Stretch) -> None:
        carried = 0

        def moved(count: int) -> None:
            nonlocal carried
            carried += count
            self._moved(count)

        try:
            self._carry(stretch, moved)
        except BaseException:
            again = carried - self._stretches.broke(lane)
            if again and not self._stopped:
                self._told(-again)
            raise
        self._stretches.came(lane)

    def _moved(self, count: int) -> None:
        if self._stopped:
            raise LanesEnded
        self._pace.moved(count)
        self._told(count)
        if len(self._at_work) + self._retired < self._pace.lanes:
            self._widen()

    def _broke(self, fault: EmaError) -> None:
        """One lane's fault: of the lane alone, or of all."""
        if not self._alone(fault):
            self.stop(fault)
        with self._lock:
            self._fault = self._fault or fault

    def _widen(self) -> None:
        """Begin as many lanes as are missing, while there are stretches for them."""
        begun: list[threading.Thread] = []
        with self._lock:
            missing = self._pace.lanes - len(self._at_work) - self._retired
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
        with self._lock:
            self._at_work[lane] = threading.get_native_id()
            if all(self._at_work.values()):
                self._pace.at_work(frozenset(self._at_work.values()))

    def _leave(self, lane: int) -> None:
        self._stretches.leaves(lane)
        with self._lock:
            self._at_work.pop(lane, None)
            if self._at_work and all(self._at_work.values()):
                self._pace.at_work(frozenset(self._at_work.values()))
