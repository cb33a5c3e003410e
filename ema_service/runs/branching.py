"""Branching: what of another run's snapshot a run goes on from, and when it cannot.

Knows layouts, averages and counters of two runs. Does not know how a snapshot is read, or how a run goes back to one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_client.errors import AverageNotFound, InvalidRequest, LayoutMismatch, listed
from ema_client.protocol import RunConfig, SnapshotInfo
from ema_service.runs.run import Run
from ema_service.shadows import Average, Descent

__all__ = ["check_averages", "check_branch", "check_state", "descent_of_branch"]


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


def check_averages(config: RunConfig, snapshot: SnapshotInfo) -> None:
    """Raises AverageNotFound where another run's snapshot lacks an average that a run of this configuration has."""
    missing = [average.name for average in config.averages if average.name not in snapshot.averages]
    if missing:
        raise AverageNotFound(
            f"snapshot {snapshot.name!r} of run {snapshot.run!r} has no average {missing[0]!r}; it has "
            f"{', '.join(snapshot.averages)}"
        )


def check_state(info: SnapshotInfo) -> None:
    """Raises InvalidRequest for a snapshot that no run was ever at."""
    if info.target is not None:
        raise InvalidRequest(
            f"snapshot {info.name!r} of run {info.run!r} is an average that was worked out afterwards ({info.target}): "
            "no run was ever at it",
            hint="rewind to a snapshot of the run; what was worked out can be pulled, and begin another run",
        )


def descent_of_branch(averages: Sequence[Average]) -> Descent:
    """Of the version that follows another run's snapshot. averages: of the snapshot."""
    counter = max(0, *(average.num_updates for average in averages))
    return Descent(counter, before=max(counter, 1))
