"""Memory that runs are promised while they are made, so that of several creations at once none is promised another's.

Knows what runs and claims take of the host's memory, and how many runs there may be. Does not know how a run is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ema_client.errors import TooManyRuns
from ema_client.protocol import RunConfig
from ema_service.memory import Layout, Memory
from ema_service.runs.making import Registered
from ema_service.runs.room import Needs, check_room

__all__ = ["MAX_RUNS", "Claim", "Claims"]

#: Most runs of a server. Each costs a row, its layout in memory and a line of every list, with weights or without.
MAX_RUNS = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Memory that a run is promised while it is made, or gets one more average.

    instead: the run of this name that there is by now, which the claim counts in place of; None for a new name.
    """

    name: str
    needs: Needs
    instead: Registered | None


class Claims:
    """The claims of one server. To be called under the registry's lock, but for claim_for().

    in_files: whether versions may lie in memory files. measured: whether runs have a history.
    """

    def __init__(self, memory: Memory, *, in_files: bool, measured: bool) -> None:
        self._memory = memory
        self._in_files = in_files
        self._measured = measured
        self._claims: set[Claim] = set()

    def __len__(self) -> int:
        return len(self._claims)

    def claim_for(self, config: RunConfig, layout: Layout, instead: Registered | None = None) -> Claim:
        """What a run of this configuration would claim, in place of ``instead``."""
        return Claim(config.run, self._needs(config, layout), instead)

    def add(self, claim: Claim, runs: Mapping[str, Registered]) -> None:
        """Promise memory, beside the runs that there are. Raises TooManyRuns; Overloaded where there is no room."""
        self._check_count(claim, runs)
        self._check_room(claim, runs)
        self._claims.add(claim)

    def keep(self, claim: Claim) -> None:
        """Count a claim of a run that has its memory."""
        self._claims.add(claim)

    def discard(self, claim: Claim) -> None:
        """Promise nothing any more: the run counts for itself, or is not to be."""
        self._claims.discard(claim)

    def _check_count(self, claim: Claim, runs: Mapping[str, Registered]) -> None:
        """Raises TooManyRuns where a new run would be one too many."""
        coming = sum(each.name not in runs for each in self._claims)
        if claim.instead is None and len(runs) + coming >= MAX_RUNS:
            raise TooManyRuns(f"this server holds {len(runs) + coming} runs; {MAX_RUNS} are possible")

    def _check_room(self, claim: Claim, runs: Mapping[str, Registered]) -> None:
        """Raises Overloaded where memory has no room for a claim beside runs and other claims."""
        counted = {id(each.instead) for each in (claim, *self._claims)}
        there = [each for each in list(runs.values()) if id(each) not in counted]
        needs = [self._needs(each.run.config, each.run.layout) for each in there]
        check_room([*needs, *(each.needs for each in self._claims)], claim.needs, self._memory.budget.limit)

    def _needs(self, config: RunConfig, layout: Layout) -> Needs:
        return Needs.of(
            layout,
            len(config.averages),
            on_host=self._memory.on_host,
            in_files=self._in_files and config.durability == "process",
            ring=len(config.posthoc.sigma_rel) if config.posthoc else 0,
            measured=self._measured,
        )
