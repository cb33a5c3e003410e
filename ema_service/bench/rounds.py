"""All operations in turn, round after round, so that whatever disturbs the machine disturbs all operations alike.

Knows the clock. Does not know what an operation does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, sleep

__all__ = ["PAUSE", "Operation", "interleave", "repeated", "timed"]

#: Seconds of rest before an operation that is counted, so that the operation before does not disturb it (torch's
#: threads spin for 0.2 s after their work, memory is given back): pushes right after a copy by two threads took a sixth
#: longer.
PAUSE = 0.5

#: A function that does one thing and returns how many seconds that took; getting ready is not counted.
Operation = Callable[[], float]


def timed(action: Callable[[], object]) -> Operation:
    """``action`` as an operation; all of its time is counted."""

    def operation() -> float:
        start = perf_counter()
        action()
        return perf_counter() - start

    return operation


def repeated(operation: Operation, times: int) -> Operation:
    """The median of the operation ``times`` times in a row: for operations of a millisecond."""
    return lambda: median(operation() for _ in range(times))


def interleave(
    operations: Mapping[str, Operation], rounds: int, *, on_step: Callable[[str], object] | None = None
) -> dict[str, tuple[float, ...]]:
    """Seconds of each operation in each round, after one round of warming up that is not counted.

    An operation that is counted starts after a rest. A single round is a look at whether everything runs, and has no
    rests. on_step: told in words what comes next.
    """
    found: dict[str, list[float]] = {name: [] for name in operations}
    for number in range(rounds + 1):
        when = f"round {number} of {rounds}" if number else "warming up"
        for name, operation in operations.items():
            if on_step:
                on_step(f"{when}: {name}")
            if number and rounds > 1:
                sleep(PAUSE)
            seconds = operation()
            if number:
                found[name].append(seconds)
    return {name: tuple(values) for name, values in found.items()}
