"""Whether a run has room: what runs take of the host's memory at rest, and what a push takes on top.

Asked when a run is created, so that a server that has taken a run can also take the run's updates. What is read, and
what several pushes take at once, is refused as it comes (memory.Budget).

Knows layouts and numbers. Does not know runs' states, or where memory lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ema_client.errors import Overloaded
from ema_service.memory import Layout
from ema_service.memory.arena import buffer_bytes
from ema_service.runs.measurements import MOST_BYTES

__all__ = ["Needs", "check_room"]

#: Of the objects that a layout is made of: 400 bytes of the layout and 350 of the configuration, measured.
_BYTES_PER_TENSOR = 1024
#: Seconds after which a creation may be asked for again: somebody has to delete a run first.
_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of host memory. resident: of the run at rest. push: of one push, on top."""

    resident: int
    push: int

    @classmethod
    def of(
        cls, layout: Layout, averages: int, *, on_host: bool, in_files: bool, ring: int = 0, measured: bool = False
    ) -> Needs:
        """in_files: whether versions lie in memory files, of which a run always has the next version's, too.

        ring: how many averages a snapshot of the ring has: while one is written, those of an older version are held.
        measured: whether the run has a history.
        """
        about = _BYTES_PER_TENSOR * len(layout.params) + (MOST_BYTES if measured else 0)
        if in_files:
            return cls(about + (2 * averages + ring) * buffer_bytes(layout), 0 if on_host else layout.param_bytes)
        if on_host:
            version = buffer_bytes(layout) + (averages - 1) * layout.shadow_bytes
            return cls(about + version + ring * layout.shadow_bytes, version)
        return cls(about, layout.param_bytes)


def check_room(others: Iterable[Needs], new: Needs, limit: int) -> None:
    """Raises Overloaded where a new run, and then one push, would not fit beside the others."""
    runs = list(others)
    taken = sum(each.resident for each in runs)
    push = max(each.push for each in [*runs, new])
    if taken + new.resident + push > limit:
        raise Overloaded(
            f"the run takes {new.resident} bytes of memory, and a push {push} more; "
            f"{len(runs)} runs take {taken} of the {limit} that there are",
            hint="delete runs that nobody needs any more, or start the server with a larger --memory-limit",
            retry_after=_RETRY_SECONDS,
        )
