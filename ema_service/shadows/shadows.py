"""The shadows of one run: the current state, and the next version, prepared beside it.

An update is prepared in memory of its own (the push's, and a new arena for each further average), so readers find the
current state whole at every moment, and a preparation that fails has changed nothing. Committing is one assignment.

Knows arenas, passes and states. Does not know locks, steps, writers (runs/ledger), files, or who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ema_service.memory import Arena, Layout, Memory, Staged
from ema_service.shadows.passes import Feed, Pass, Stretch, pass_over
from ema_service.shadows.results import Sink
from ema_service.shadows.state import Plan, State

__all__ = ["Preparation", "Prepared", "Shadows"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The bytes of a version that is not the run's yet: whole, beside the current version, no reader's concern.

    digest: of the parameters that made the version. arenas: one for each average; a single one for all where the
    parameters themselves are the shadow; none where only the digest was wanted. seconds: that averaging took. sums: of
    the first average, by tensor: the sums of squares of (shadow - parameters), parameters and shadow, (tensors, 3);
    NaN where a tensor was not measured, None where none was.
    """

    digest: bytes
    arenas: tuple[Arena, ...]
    seconds: float = field(default=0.0, compare=False)
    sums: npt.NDArray[np.float64] | None = field(default=None, compare=False)


class Preparation:
    """A version being prepared while its parameters arrive. Owned by one push."""

    def __init__(self, work: Pass, arenas: tuple[Arena, ...]) -> None:
        self._work: Pass | None = work
        self._arenas = arenas

    def advance(self, received: int) -> None:
        """Average the parameters that have arrived, the first ``received`` bytes.

        Callable from any thread, with growing counts. Raises Overloaded where the device has no memory for the work.
        """
        self._running.advance(received)

    def stretch(self, start: int, stop: int) -> Stretch:
        """The work on one stretch of parameters that do not arrive as one body. As Pass.stretch()."""
        return self._running.stretch(start, stop)

    def block(self, start: int, beside: Stretch | None = None) -> Stretch:
        """The work on one block of parameters that arrive in any order. As Pass.block()."""
        return self._running.block(start, beside)

    def forget(self, start: int) -> None:
        """The parameters of a block come once more. As Pass.forget()."""
        self._running.forget(start)

    def finish(self) -> Prepared:
        """Average the rest and return the prepared version.

        Raises NonFinite, Overloaded; SegmentUnusable where a client withdrew its shared memory meanwhile.
        """
        work = self._running
        digest = work.finish()
        return Prepared(digest, self._arenas, work.seconds, work.squares())

    def drop(self) -> None:
        """Let go of the memory of everything prepared. The current state stays as it was."""
        self._work, self._arenas = None, ()

    @property
    def _running(self) -> Pass:
        if self._work is None:
            raise RuntimeError("this preparation was dropped")
        return self._work


class Shadows:
    """The bytes of one run on this host. Readers take ``state`` without a lock and have one version, whole.

    prepare() and cast() change nothing that readers see; commit() is called by the holder of the run's lock. check:
    whether NaN and Inf in an update are refused.
    """

    def __init__(self, layout: Layout, memory: Memory, *, check: bool) -> None:
        self.state: State | None = None
        self._layout = layout
        self._memory = memory
        self._check = check

    @property
    def on_host(self) -> bool:
        """Whether the shadows lie in host memory."""
        return self._memory.on_host

    @property
    def device(self) -> str:
        """The name of the device that the shadows lie on, as torch writes it."""
        return str(self._memory.device)

    def prepare(
        self, plan: Plan, base: State, staged: Staged, sinks: Mapping[str, Sink], *, measure: bool = False
    ) -> Preparation:
        """Begin to prepare the version that ``plan`` makes of ``base``, the state that was planned for.

        staged: the push's memory, which becomes the arena of the last average. sinks: by name of the average, told how
        far results are final. An average that ``base`` does not have becomes the parameters. For a plan without
        retentions only the digest of the parameters is worked out. measure: whether the first average is measured
        (Prepared.sums).
        """
        if not plan.retentions:
            return Preparation(pass_over(staged, (), check=False), ())
        arenas = (*(self._memory.new_arena(self._layout) for _ in plan.retentions[1:]), staged.arena)
        feeds = []
        for out, average, retention in zip(arenas, plan.averages, plan.retentions, strict=True):
            before = None if retention.copies else base.at(average.member)
            shadow = before[1] if before else None
            feeds.append(Feed(out, shadow, retention.weight, sinks.get(average.name)))
        return Preparation(pass_over(staged, feeds, check=self._check, measure=measure), arenas)

    def cast(self, staged: Staged, sink: Sink | None = None) -> Preparation:
        """Begin to prepare the first version, in which the parameters themselves are the shadow of every average: one
        arena for all.

        sink: told how far that shadow is final.
        """
        work = pass_over(staged, [Feed(staged.arena, None, 0.0, sink)], check=self._check)
        return Preparation(work, (staged.arena,))

    def commit(self, state: State | None) -> None:
        """Make ``state`` the current one: prepared bytes, or the current bytes under another version; None: none."""
        self.state = state
