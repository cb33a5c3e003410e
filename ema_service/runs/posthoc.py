"""Averages after the fact: of which stored weights of a run an average of another length is the sum, and how exactly.

Knows a run's ring, snapshots and state, and how the averages' counters moved from one to the next. Does not know how
weights are found (averaging.synthesis), files, or HTTP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ema_client.errors import InvalidRequest, SynthesisRefused, VersionGone, listed
from ema_client.protocol import Posthoc, ProfileInfo, ProfileSource, RunConfig, SnapshotInfo, WeightsInfo
from ema_service.averaging import (
    ConstantDecay,
    ConstantHalfLife,
    SigmaRel,
    SnapshotBasis,
    Synthesis,
    Target,
    TargetRefused,
    TrackedAverage,
    approximate,
    check,
)
from ema_service.averaging.profiles import Counters, decays_of, gamma_of, power_decay
from ema_service.averaging.strides import Strides
from ema_service.averaging.synthesis import accepted
from ema_service.persistence import RingSnapshot, Snapshots, StoredRing
from ema_service.runs.recipes import GivenRecipes, GivenSource, Recipe, Source
from ema_service.runs.run import Run
from ema_service.shadows import Descent, State, Version

__all__ = ["Synthesiser", "with_posthoc"]

#: Most updates that are looked at one by one; of more, so many are spread as the updates were.
_MOST_UPDATES = 1 << 21
#: Smaller weights, as a share of the largest, are left out.
_NO_WEIGHT = 1e-12
#: What stands before the colon of a time that says what it is. No name has a colon.
_SNAPSHOT, _COUNTER = "snapshot", "counter"
#: Results that are remembered: of the parts of one download, and of a sweep.
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class _Node:
    """A time at which averages are stored. passed: updates since the averages began. of: as of a Source."""

    passed: int
    time: int
    averages: tuple[str, ...]
    of: RingSnapshot | SnapshotInfo | None


@dataclass(frozen=True, slots=True)
class _Stock:
    """What is stored up to the last node, the time that is asked for. version, step: of that."""

    nodes: tuple[_Node, ...]
    descent: Descent
    version: str
    step: int | None


def with_posthoc(config: RunConfig) -> RunConfig:
    """The configuration with the averages that post-hoc averages are made of, behind its own. Raises InvalidRequest."""
    if config.posthoc is None:
        return config
    if config.posthoc.fault:
        raise InvalidRequest(f"posthoc: {config.posthoc.fault}")
    more = tuple(average for average in config.posthoc.averages if average not in config.averages)
    return replace(config, averages=(*config.averages, *more))


class Synthesiser:
    """Finds recipes for one run. Thread-safe. Methods take up to a second: call them off the event loop."""

    def __init__(self, run: Run, posthoc: Posthoc, ring: StoredRing, snapshots: Snapshots) -> None:
        self._run = run
        self._posthoc = posthoc
        self._names = tuple(average.name for average in posthoc.averages)
        self.ring = ring
        self.snapshots = snapshots
        self._found: OrderedDict[object, Synthesis] = OrderedDict()

    # at: a snapshot's name, or the counter of one of the ring, or of now, as a sweep asks in turns; None: now. Where
    # digits alone may be either, "snapshot:NAME" and "counter:N" say which.

    def recipes(
        self, targets: Sequence[Target], at: str | None, max_error: float, state: State | None = None
    ) -> list[Recipe]:
        """How to work out averages, all of one state of the run, by default of the present one.

        Raises SynthesisRefused, with numbers and the nearest that can be had; AwaitingWeights, RunNotFound,
        RunDegraded, SnapshotDamaged.
        """
        state, recipes = state or self._run.ready_state(), []
        for target in targets:
            recipe, refused = self._recipe(state, target, at, max_error)
            if refused is not None:
                raise SynthesisRefused(refused)
            recipes.append(recipe)
        return recipes

    def given(self, found: GivenRecipes, state: State) -> list[Recipe]:
        """Recipes as another host of the run has found them. state: of their version.

        Raises VersionGone where the state is another run's or of another version, or this host lacks a source;
        SnapshotNotFound, InvalidRequest.
        """
        if (found.lineage, found.version) != (state.version.lineage, str(state.version)):
            raise VersionGone(
                f"the recipe is of version {found.version} of run {self._run.config.run!r}, or of another run of the "
                f"name, and not of version {state.version}",
                retry_after=0.0,
            )
        leading = {each.version: each for each in self.ring.shelf.leading_to(state.version).snapshots}
        sources = [self._source(each, leading) for each in found.sources]
        recipes = []
        for target, weights, error, amplification in zip(
            found.targets, found.weights, found.errors, found.amplifications, strict=True
        ):
            info = replace(self._told(target, found.of, found.step, found.time), profile_error=error)
            info = replace(info, amplification=amplification)
            kept = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]
            synthesis = Synthesis(np.array(weights), error, amplification)
            ours, theirs = tuple(source for source, _ in kept), tuple(weight for _, weight in kept)
            recipes.append(Recipe(info, state, target, synthesis, ours, theirs, sources[-1]))
        return recipes

    def dry_run(self, target: Target, at: str | None, max_error: float) -> ProfileInfo:
        """What recipes() would give, or why it would not. Raises as recipes(), but not for error and rounding."""
        recipe, refused = self._recipe(self._run.ready_state(), target, at, max_error)
        sources = zip(recipe.sources, recipe.weights, strict=True)
        return ProfileInfo(
            run=recipe.info.run,
            version=recipe.info.version,
            target=str(target),
            num_updates=recipe.info.num_updates,
            error=recipe.synthesis.error,
            amplification=recipe.synthesis.amplification,
            refused=refused,
            sources=tuple(ProfileSource(each.time, each.average, w, each.of is None) for each, w in sources if w),
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _source(self, given: GivenSource, leading: Mapping[str, RingSnapshot]) -> Source:
        """What this host has of a source. Raises VersionGone, SnapshotNotFound, InvalidRequest."""
        if given.average not in self._names:
            raise InvalidRequest(f"recipe: {given.average!r} is none of the averages that the ring is made of")
        if given.kind == _SNAPSHOT:
            return Source(given.average, given.time, self.snapshots.find(given.name, given.created_at))
        if given.kind == "now":
            return Source(given.average, given.time, None)
        if given.name not in leading:
            raise VersionGone(
                f"this host's ring of run {self._run.config.run!r} has no snapshot of version {given.name}",
                retry_after=0.1,
            )
        return Source(given.average, given.time, leading[given.name])

    def _recipe(self, state: State, target: Target, at: str | None, max_error: float) -> tuple[Recipe, str | None]:
        """A recipe, and why it is not exact enough, or None."""
        stock = self._stock(state, at)
        last = stock.nodes[-1]
        if last.time == 0:
            raise SynthesisRefused(
                f"run {self._run.config.run!r} has no update since its averages began", hint="ask after an update"
            )
        found = self._solved(stock, target, state.version)
        sources, weights = self._sources(stock, found)
        newest = Source(self._names[0], last.time, last.of)
        told = self._told(target, stock.version, stock.step, last.time)
        info = replace(told, profile_error=found.error, amplification=found.amplification)
        return Recipe(info, state, target, found, sources, weights, newest), self._refusal(
            stock, target, found, max_error
        )

    def _solved(self, stock: _Stock, target: Target, version: Version) -> Synthesis:
        """The weights of what is stored. Raises SynthesisRefused where none give the target."""
        key = (version.lineage, str(version), stock.nodes, target)
        if (found := self._found.get(key)) is None:
            try:
                found = approximate(self._basis(stock), target, at=stock.nodes[-1].time, dtype=self._posthoc.dtype)
            except TargetRefused as refused:
                raise SynthesisRefused(f"run {self._run.config.run!r}: {refused}") from None
            self._found[key] = found
            if len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)
        return found

    def _refusal(self, stock: _Stock, target: Target, found: Synthesis, max_error: float) -> str | None:
        """Why what was found is too far from the target, and what is not; None where it is near enough."""
        dtype = self._posthoc.dtype
        if accepted(found, dtype, max_error):
            return None
        try:
            check(found, self._basis(stock), target, at=stock.nodes[-1].time, dtype=dtype, max_error=max_error)
        except TargetRefused as refused:
            return f"run {self._run.config.run!r}: {refused}"
        return None

    def _stock(self, state: State, at: str | None) -> _Stock:
        """What is stored up to a time. Raises SynthesisRefused, SnapshotNotFound."""
        version = state.version
        leading = self.ring.shelf.leading_to(version).snapshots
        ring = [_Node(_passed(version, each), each.time, each.averages, each) for each in leading]
        last = self._last(version, ring, at)
        named = (str(version), version.step) if last.of is None else (last.of.version, last.of.step)
        before = [node for node in ring if node.time < last.time]
        return _Stock((*before, last), version.descent, *named)

    def _last(self, version: Version, ring: Sequence[_Node], at: str | None) -> _Node:
        """The node that is asked for. Digits alone are a counter, where there is such a node, else a snapshot's name.

        Raises SynthesisRefused where they are both, of different times.
        """
        time = self._time(version)
        now = _Node(version.updates(time), time, self._names, None)
        if at is None:
            return now
        kind, colon, word = at.partition(":")
        if colon and kind == _SNAPSHOT:
            return self._snapshot(version, word)
        counter = word if colon and kind == _COUNTER else at
        last = next((node for node in (*ring, now) if str(node.time) == counter), None)
        if last is None:
            return self._snapshot(version, at)
        if not colon:
            self._check_not_a_name(at, last.time)
        return last

    def _check_not_a_name(self, at: str, time: int) -> None:
        """Raises SynthesisRefused where a snapshot of another time has a counter for its name."""
        for info in self.snapshots.all():
            if info.name == at and not self._is_of(info, time):
                raise SynthesisRefused(
                    f"at: {at!r} is a time of the ring of run {self._run.config.run!r} and the name of a snapshot of "
                    "another time",
                    hint=f"ask for at={_COUNTER}:{at} or at={_SNAPSHOT}:{at}",
                )

    def _is_of(self, info: SnapshotInfo, time: int) -> bool:
        return self._names[0] in info.averages and self.snapshots.counter(info, self._names[0]) == time

    def _snapshot(self, version: Version, name: str) -> _Node:
        """The node of a named snapshot."""
        known = {info.name: info for info in self.snapshots.all()}
        if name not in known:
            times = [*known, *(str(node.time) for node in self.ring.shelf.leading_to(version).snapshots)]
            raise SynthesisRefused(
                f"at: {name!r} is neither a snapshot of run {self._run.config.run!r} nor a time of its ring",
                hint=f"leave at out for the present; there are {listed(times)}" if times else "leave at out",
            )
        info = known[name]
        epoch, n = map(int, info.version.split("."))
        if missing := [average for average in self._names if average not in info.averages]:
            raise SynthesisRefused(f"at: snapshot {name!r} has no average {missing[0]!r}")
        time = self.snapshots.counter(info, self._names[0])
        passed = version.descent.updates(version, epoch, n, time)
        if passed is None:
            raise SynthesisRefused(
                f"at: snapshot {name!r} of version {info.version} did not lead to version {version}: the run was "
                "rewound, or its counters reset, since",
                hint="rewind the run to the snapshot, or ask for another time",
            )
        return _Node(passed, time, self._names, info)

    def _time(self, version: Version) -> int:
        return next(average.num_updates for average in version.averages if average.name == self._names[0])

    def _basis(self, stock: _Stock) -> SnapshotBasis:
        counters = _counters(stock, self.ring.strides())
        averages = []
        for name, width in zip(self._names, self._posthoc.sigma_rel, strict=True):
            # Of the weights that the run began with one average is stored, for all are the same then.
            times = tuple(node.time for node in stock.nodes if name in node.averages or _begins(node))
            averages.append(TrackedAverage(decays_of(power_decay(gamma_of(width)), counters), times))
        return SnapshotBasis(counters, averages)

    def _sources(self, stock: _Stock, found: Synthesis) -> tuple[tuple[Source, ...], tuple[float, ...]]:
        """The sources that have a weight, and it; the one of the time that is asked for always has one."""
        weights: dict[Source, float] = {}
        least = _NO_WEIGHT * float(np.abs(found.weights).max())
        for j, name in enumerate(self._names):
            for k, node in enumerate(stock.nodes):
                source = Source(node.averages[0] if _begins(node) else name, node.time, node.of)
                if abs(weight := float(found.weights[j, k])) > least:
                    weights[source] = weights.get(source, 0.0) + weight
        return tuple(weights), tuple(weights.values())

    def _told(self, target: Target, version: str, step: int | None, time: int) -> WeightsInfo:
        run = self._run.config.run
        told = WeightsInfo(run, "posthoc", version, step, time, 1.0, target=str(target), schedule="window")
        if isinstance(target, SigmaRel):
            return replace(told, schedule="power", sigma_rel=target.sigma_rel, gamma=gamma_of(target.sigma_rel))
        if isinstance(target, ConstantDecay):
            return replace(told, schedule="constant", decay=target.decay)
        if isinstance(target, ConstantHalfLife):
            return replace(told, schedule="half_life", half_life=target.updates, decay=2.0 ** (-1.0 / target.updates))
        return told


def _passed(version: Version, snapshot: RingSnapshot) -> int:
    """How many updates led to a snapshot, which led to ``version``."""
    return version.descent.updates(version, snapshot.epoch, snapshot.n, snapshot.time) or 0


def _begins(node: _Node) -> bool:
    return isinstance(node.of, RingSnapshot) and node.of.begin


def _counters(stock: _Stock, strides: Strides) -> Counters:
    """The averages' counter after each update up to the last node.

    strides: of the updates since the averages began. Where these don't lead from a node to the next (the run is further
    on, or came back without them), the updates in between are spread evenly.
    """
    descent = stock.descent
    noted = strides.counters(descent.counter, strides.updates)
    pieces, passed, time = [_spread(0, descent.counter, descent.before)], 0, descent.counter
    for node in stock.nodes:
        if node.time > time:
            piece = noted[passed : node.passed]
            begin = noted[passed - 1] if 0 < passed <= len(noted) else descent.counter
            exact = len(piece) == node.passed - passed > 0 and (begin, piece[-1]) == (time, node.time)
            pieces.append(piece if exact else _spread(time, node.time, node.passed - passed))
            passed, time = node.passed, node.time
    coarse = -(-sum(map(len, pieces)) // _MOST_UPDATES)
    return np.concatenate([piece[::-1][::coarse][::-1] for piece in pieces])


def _spread(low: int, high: int, count: int) -> Counters:
    kept = max(1, min(count, high - low))
    return low + (high - low) * np.arange(1, kept + 1, dtype=np.int64) // kept
