"""Versions of a run: the facts of a version, its bytes, and the plan of the next.

Plain values, all immutable. Knows names and numbers. Does not know how a version is decided on (runs/ledger), computed
(passes) or kept (persistence), and never reads the memory that a state refers to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ema_client.protocol import AverageConfig, RunConfig, WeightsInfo
from ema_service.averaging.profiles import gamma_of, sigma_rel_of

if TYPE_CHECKING:
    from ema_service.averaging.schedules import Retention
    from ema_service.memory import Arena

__all__ = ["Average", "Descent", "Member", "Plan", "Setup", "State", "Version", "gamma_of_average", "schedule_told"]

#: A trainer that repeats a write does so within seconds; so many other writes are not made meanwhile.
_REMEMBERED_KEYS = 16
#: Versions of earlier epochs are as if they had not led to a version that has so many between.
_REMEMBERED_EPOCHS = 256


@dataclass(frozen=True, slots=True)
class Member:
    """An average that a run is set up to have, with weights or before its first.

    lineage: tells apart two averages of one name, the first of which was removed; empty where the run was created with
    the average.
    """

    config: AverageConfig
    lineage: str = ""

    @property
    def name(self) -> str:
        """The average's name."""
        return self.config.name

    def is_same(self, other: Member) -> bool:
        """Whether both are one average. Asked at each update, and answered without a look at the schedules."""
        return self is other or (self.lineage == other.lineage and self.config.name == other.config.name)


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """Which averages a run is to have: those it was created with, without those removed, with those added since.

    created: the configuration that the run was created with. members: the averages, in order. keys: of the latest
    writes that added or removed one. config: the run's configuration as it is by now.

    A version has the averages of the setup that have weights; an average that was added has none before the next
    update.
    """

    created: RunConfig
    members: tuple[Member, ...]
    keys: tuple[str, ...] = ()
    config: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        averages = tuple(member.config for member in self.members)
        object.__setattr__(self, "config", replace(self.created, averages=averages))

    @classmethod
    def of(cls, created: RunConfig) -> Setup:
        """The setup that a run is created with."""
        return cls(created, tuple(Member(average) for average in created.averages))

    def find(self, name: str) -> Member | None:
        """The average of this name, None where the run has none."""
        return next((member for member in self.members if member.name == name), None)

    def made_by(self, key: str | None) -> bool:
        """Whether the write of this key led to the setup."""
        return key is not None and key in self.keys

    def with_one_more(self, average: AverageConfig, lineage: str, key: str | None) -> Setup:
        """The setup with one more average, the last."""
        return self.followed_by((*self.members, Member(average, lineage)), key)

    def without(self, name: str, key: str | None) -> Setup:
        """The setup without the average of this name."""
        return self.followed_by(tuple(each for each in self.members if each.name != name), key)

    def followed_by(self, members: tuple[Member, ...], key: str | None) -> Setup:
        """The setup with other averages, as the write of this key makes it."""
        return Setup(self.created, members, _remembered(self.keys, key))


@dataclass(frozen=True, slots=True)
class Average:
    """One average in one version.

    decay: the largest one. effective_decay: of the latest update, None before the first. num_updates: the counter that
    the average's schedule goes by, -1 where it does not count.
    """

    member: Member
    decay: float
    effective_decay: float | None
    num_updates: int

    @property
    def name(self) -> str:
        """The average's name."""
        return self.member.name


@dataclass(frozen=True, slots=True)
class Descent:
    """Which versions of a run led to a version, from the beginning of its averages on.

    Versions that a rewind went back over did not, nor did those before the counters were reset.

    counter: of the averages at the beginning. before: updates until then; the weights that a run begins with count as
    one. earlier: by epoch, the first and the last n of the versions before the version's own epoch. first: the n at
    which the version's own epoch goes on from there.
    """

    counter: int = 0
    before: int = 1
    earlier: tuple[tuple[int, int, int], ...] = ()
    first: int = 0

    def updates(self, of: Version, epoch: int, n: int, counter: int) -> int | None:
        """How many updates since the beginning led to version epoch.n; None where that did not lead to ``of``.

        counter: the averages' in that version, which a reset of the counters leaves the name of.
        """
        passed = 0
        for each, first, last in (*self.earlier, (of.epoch, self.first, of.n)):
            if each == epoch and first <= n <= last:
                passed += n - first
                return passed if passed or counter == self.counter else None
            passed += last - first
        return None

    def followed(self, epoch: int, n: int, first: int) -> Descent:
        """The descent of a version in a later epoch that goes on from version epoch.n, with this n ``first``."""
        earlier = (*self.earlier, (epoch, self.first, n))
        return replace(self, earlier=earlier[-_REMEMBERED_EPOCHS:], first=first)


@dataclass(frozen=True, slots=True)
class Version:
    """The facts of a version; ``str()`` is the version's name, "epoch.n".

    lineage: tells apart two versions of one name: a run that was deleted and created again has another lineage. n:
    updates applied in this epoch. step: the trainer's, None where no step is known. num_updates: LitEma's counter, -1
    where the counter is off. digest: of the parameters pushed (averaging.Digest); empty after a rewind. updated_at:
    seconds since 1970-01-01 UTC, for people to read. keys: of the latest writes other than updates that led here, by
    which a write that comes again is known; they live and die with the version. averages: those that have weights.
    descent: the versions before.
    """

    lineage: str
    epoch: int
    n: int
    step: int | None
    num_updates: int
    digest: bytes
    averages: tuple[Average, ...]
    updated_at: float
    keys: tuple[str, ...] = ()
    descent: Descent = Descent()

    def __str__(self) -> str:
        return f"{self.epoch}.{self.n}"

    def updates(self, counter: int) -> int:
        """How many updates led to the version since its averages began. counter: theirs."""
        return self.descent.updates(self, self.epoch, self.n, counter) or 0

    def made_by(self, key: str | None) -> bool:
        """Whether the write of this key led to the version."""
        return key is not None and key in self.keys

    def keyed(self, key: str | None) -> Version:
        """The version as what the write of this key makes; the oldest of many keys is forgotten."""
        return replace(self, keys=_remembered(self.keys, key))

    def find(self, member: Member) -> Average | None:
        """An average in this version, None where it has no weights yet."""
        for average in self.averages:
            if member is average.member or member.is_same(average.member):
                return average
        return None

    def weights_info(self, config: RunConfig, average: Average) -> WeightsInfo:
        """The WeightsInfo of one average in this version, which a reader gets beside the weights. config: the run's."""
        return WeightsInfo(
            run=config.run,
            average=average.name,
            version=str(self),
            step=self.step,
            num_updates=average.num_updates,
            decay=average.decay,
            **schedule_told(average.member.config),
        )


def _remembered(keys: tuple[str, ...], key: str | None) -> tuple[str, ...]:
    """The keys with one more; the oldest of many is forgotten."""
    return keys if key is None else (*keys, key)[-_REMEMBERED_KEYS:]


def schedule_told(config: AverageConfig) -> dict[str, Any]:
    """What is told of an average's schedule: its name and fields, of a power average both sigma_rel and gamma."""
    fields: dict[str, Any] = {"schedule": config.schedule, **config.schedule_fields()}
    if config.schedule == "power":
        gamma = gamma_of_average(config)
        fields |= {"sigma_rel": config.sigma_rel or sigma_rel_of(gamma), "gamma": gamma}
    return fields


def gamma_of_average(average: AverageConfig) -> float:
    """The gamma of a power average, which may be given by its sigma_rel."""
    return gamma_of(average.sigma_rel) if average.sigma_rel is not None else average.gamma or 0.0


@dataclass(frozen=True, slots=True)
class State:
    """A version with its bytes: one arena for each average, in the order of the averages. Never changed."""

    version: Version
    arenas: tuple[Arena, ...]

    def at(self, member: Member) -> tuple[Average, Arena] | None:
        """An average of this version and its arena, None where the average has no weights yet."""
        pairs = zip(self.version.averages, self.arenas, strict=True)
        return next((pair for pair in pairs if member.is_same(pair[0].member)), None)

    def only(self, members: Collection[Member]) -> State:
        """The same version, without averages that are none of ``members``."""
        pairs = [pair for pair in zip(self.version.averages, self.arenas, strict=True) if pair[0].member in members]
        averages = tuple(average for average, _ in pairs)
        return State(replace(self.version, averages=averages), tuple(arena for _, arena in pairs))


@dataclass(frozen=True, slots=True)
class Plan:
    """What an update is to make of a version, decided before the update's parameters arrive.

    base: the version that the update applies to. step: the trainer's. gap: how many updates it counts for. averages:
    those of the base as they are before the update, and those that begin with the update, in the order of the version
    to come. retentions: one for each; none where the step was applied before, and only the digest of the parameters is
    needed.
    """

    base: Version
    step: int
    gap: int
    averages: tuple[Average, ...]
    retentions: tuple[Retention, ...]
