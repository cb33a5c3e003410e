"""The stretches of one body: which were begun, and which have come.

Knows ranges of bytes. Does not know what the bytes are, whose they are, or what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ema_client.errors import StepConflict

__all__ = ["Bounds"]


@dataclass(slots=True)
class Bounds:
    """The bounds of the stretches of a body of ``size`` bytes.

    begun: by the first byte, of each stretch that was begun. come: likewise, of those that are whole. left: bytes that
    have not come.
    """

    size: int
    begun: dict[int, int] = field(default_factory=dict)
    come: dict[int, int] = field(default_factory=dict)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.size

    @property
    def whole(self) -> bool:
        return self.left == 0

    def begin(self, start: int, stop: int, what: str) -> None:
        """A stretch begins, perhaps once more. what: the body, in words.

        Raises StepConflict where the stretch overlaps another that was begun.
        """
        for begun, end in self.begun.items():
            if start < end and begun < stop and (begun, end) != (start, stop):
                raise StepConflict(
                    f"stretch {start}-{stop} of {what} overlaps {begun}-{end}, which was begun",
                    hint="send a stretch again with the same bounds, or the whole step in another group",
                )
        self.begun[start] = stop

    def forget(self, start: int) -> None:
        """The stretch that begins at ``start`` is not received any more, and nothing of it is kept."""
        self.begun.pop(start, None)

    def came(self, start: int, stop: int) -> None:
        """A stretch that was begun is whole; told once for each."""
        self.come[start] = stop
        self.left -= stop - start

    def missing(self) -> tuple[str, ...]:
        """What has not come, for people to read."""
        missing, reached = [], 0
        for start, stop in [*sorted(self.come.items()), (self.size, self.size)]:
            if start > reached:
                missing.append(f"{reached} to {start}")
            reached = stop
        return tuple(missing)
