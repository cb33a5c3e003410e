"""Branching: what of another run's snapshot a run goes on from, and when it cannot.

Knows layouts, averages and counters of two runs. Does not know how a snapshot is read, or how a run goes back to one.
"""

from __future__ import annotations

from ema_client.errors import AverageNotFound, InvalidRequest, LayoutMismatch, listed
from ema_client.protocol import RunConfig, SnapshotInfo
from ema_service.memory import Arena
from ema_service.runs.run import Run
from ema_service.shadows import Average

__all__ = ["branched", "check_branch"]

_Snapshot = tuple[SnapshotInfo, tuple[Average, ...], tuple[Arena, ...]]


def check_branch(run: Run, source: Run) -> None:
    """Raises where ``run`` cannot go on from any snapshot of ``source``: LayoutMismatch, naming tensors, for shadows of
    other names, shapes or dtypes; InvalidRequest where one run counts its updates and the other does not."""
    ours, theirs = set(run.layout.shadows), set(source.layout.shadows)
    if ours != theirs:
        names = listed(repr(name) for name in sorted({entry.spec.name for entry in ours ^ theirs}))
        raise LayoutMismatch(
            f"run {run.config.run!r} and run {source.config.run!r} do not hold the same tensors: {names}",
            hint="branch into a run whose tensors have the same names and shapes",
        )
    counts = run.config.use_num_updates, source.config.use_num_updates
    if counts[0] != counts[1]:
        raise InvalidRequest(
            f"run {run.config.run!r} has use_num_updates={counts[0]}, run {source.config.run!r} {counts[1]}: a counter "
            "that begins anew would wash the average out",
        )


def branched(
    config: RunConfig, info: SnapshotInfo, averages: tuple[Average, ...], arenas: tuple[Arena, ...]
) -> _Snapshot:
    """Of another run's snapshot the averages that a run of this configuration has, in its order.

    Raises AverageNotFound for an average that the snapshot does not have.
    """
    found = {average.name: (average, arena) for average, arena in zip(averages, arenas, strict=True)}
    wanted = [average.name for average in config.averages]
    if missing := [name for name in wanted if name not in found]:
        raise AverageNotFound(
            f"snapshot {info.name!r} of run {info.run!r} has no average {missing[0]!r}; it has {', '.join(found)}"
        )
    return info, tuple(found[name][0] for name in wanted), tuple(found[name][1] for name in wanted)
