"""What a replica is told of a run's version, and the version that it makes of that: the same, under the same ETag.

Pure. Knows the facts of a version and of a run's averages. Does not know weights, HTTP, or who is a replica of whom.
"""

from __future__ import annotations

from ema_client.protocol import RunConfig, RunVersion, VersionAverage
from ema_service.runs.run import Run
from ema_service.shadows import Average, Member, Setup, State, Version

__all__ = ["setup_of", "told", "version_of"]


def told(run: Run, state: State | None) -> RunVersion:
    """What a replica is told of a run at ``state``."""
    version, ledger = state.version if state else None, run.ledger
    averages = tuple(
        VersionAverage(
            config=each.member.config,
            lineage=each.member.lineage,
            decay=each.decay,
            effective_decay=each.effective_decay,
            num_updates=each.num_updates,
            has_weights=version is not None and version.find(each.member) is not None,
        )
        for each in ledger.succession.averages(version)
    )
    return RunVersion(
        run=run.config.run,
        created_at=run.created_at,
        averages=averages,
        version=str(version) if version else None,
        lineage=version.lineage if version else None,
        step=version.step if version else None,
        num_updates=version.num_updates if version else ledger.succession.counter_at_start,
        updated_at=version.updated_at if version else run.created_at,
        writer=ledger.writer,
        ended_at=ledger.ended,
        fault=ledger.fault,
        shard=run.shard,
    )


def setup_of(said: RunVersion, created: RunConfig) -> Setup:
    """Which averages the run has by now. created: with which configuration it was created."""
    return Setup(created, tuple(Member(each.config, each.lineage) for each in said.averages))


def version_of(said: RunVersion) -> Version | None:
    """The version that is told of; None before the initial weights. Of the averages, those that have weights."""
    if said.version is None:
        return None
    averages = tuple(
        Average(Member(each.config, each.lineage), each.decay, each.effective_decay, each.num_updates)
        for each in said.averages
        if each.has_weights
    )
    epoch, n = map(int, said.version.split("."))
    lineage = said.lineage or ""
    return Version(lineage, epoch, n, said.step, said.num_updates, b"", averages, said.updated_at)
