"""The shadows of one run: its current state, and the preparing of the next beside it.

An update is prepared in memory of its own (the push's, and a new arena for each further average), so the current state
is whole for its readers at every moment, and a preparation that fails has changed nothing. Committing is one
assignment.

Knows arenas, passes and states. Does not know locks, steps, writers (runs/ledger), files, or who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ema_service.memory import Arena, Layout, Memory, Staged
from ema_service.shadows.passes import Feed, Pass, pass_over
from ema_service.shadows.results import Sink
from ema_service.shadows.state import Plan, State

__all__ = ["Preparation", "Prepared", "Shadows"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Bytes of a version that is not the run's yet: whole, beside the current one, no reader's concern.

    digest: of the parameters it was made of. arenas: one for each average; none where only the digest was asked for.
    """

    digest: bytes
    arenas: tuple[Arena, ...]


class Preparation:
    """The preparing of one version, while its parameters arrive. Owned by one push."""

    def __init__(self, work: Pass, arenas: tuple[Arena, ...]) -> None:
        self._work: Pass | None = work
        self._arenas = arenas

    def advance(self, received: int) -> None:
        """Average what has come: the first ``received`` bytes of the parameters. Thread-safe, but in order."""
        self._running.advance(received)

    def finish(self) -> Prepared:
        """Average the rest. Raises NonFinite; SegmentUnusable where shared memory was withdrawn meanwhile."""
        return Prepared(self._running.finish(), self._arenas)

    def drop(self) -> None:
        """Let go of everything that was prepared; the current state never knew of it."""
        self._work, self._arenas = None, ()

    @property
    def _running(self) -> Pass:
        if self._work is None:
            raise RuntimeError("this preparation was dropped")
        return self._work


class Shadows:
    """The bytes of one run on this host. Readers take ``state`` without a lock and have one version, whole.

    check: whether NaN and Inf in an update are refused. prepare() and cast() touch nothing of the run; commit() is
    called by whoever holds the run's lock.
    """

    def __init__(self, layout: Layout, memory: Memory, *, check: bool) -> None:
        self.state: State | None = None
        self._layout = layout
        self._memory = memory
        self._check = check

    @property
    def on_host(self) -> bool:
        """Whether the shadows lie in memory of the host."""
        return self._memory.on_host

    @property
    def device(self) -> str:
        return str(self._memory.device)

    def prepare(self, plan: Plan, base: State, staged: Staged, sinks: Mapping[str, Sink]) -> Preparation:
        """Begin to prepare the version that the plan makes of ``base``, the state that it was made for.

        staged: the push's memory; it becomes the arena of the last average. sinks: by the average's name, told of the
        results as they become final. Of a plan without retentions only the digest is worked out.
        """
        if not plan.retentions:
            return Preparation(pass_over(staged, (), check=False), ())
        arenas = (*(self._memory.new_arena(self._layout) for _ in plan.retentions[1:]), staged.arena)
        feeds = [
            Feed(out, shadow, retention.weight, sinks.get(average.name))
            for out, shadow, retention, average in zip(
                arenas, base.arenas, plan.retentions, base.version.averages, strict=True
            )
        ]
        return Preparation(pass_over(staged, feeds, check=self._check), arenas)

    def cast(self, staged: Staged, averages: int) -> Preparation:
        """Begin to prepare the first version: the parameters themselves are the shadow of every average."""
        work = pass_over(staged, [Feed(staged.arena, None, 0.0)], check=self._check)
        return Preparation(work, (staged.arena,) * averages)

    def commit(self, state: State | None) -> None:
        """Make ``state``, of prepared bytes or of those that are there, the current one; None: there is none."""
        self.state = state
