"""Synthesis against dense least squares, against profiles from loops over updates, and against tracked averages.

Knows profiles and linear algebra. Does not know how the weights are found, tensors or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_service.averaging.profiles import TargetRefused, decays_of, elementwise, gamma_of, power_decay, sigma_rel_of
from ema_service.averaging.synthesis import (
    MAX_ERROR,
    MAX_ROUNDING,
    ROUNDING,
    SnapshotBasis,
    Synthesis,
    TrackedAverage,
    approximate,
    check,
    soup,
)
from ema_service.averaging.targets import ConstantDecay, ConstantHalfLife, SigmaRel, Target, Window

Floats = npt.NDArray[np.float64]
Decay = Callable[[Any, Any], Any]

DAMPING = 1e-5
PAIR, TRIPLE = (0.05, 0.10), (0.015, 0.03, 0.25)
#: A short run, for what is worked out in decimals.
UPDATES = 300
REGULAR = tuple(range(50, UPDATES + 1, 50))
IRREGULAR = (9, 40, 41, 170, 171, 173, 296, 300)
#: A longer one.
LONG = 1600
EVERY_100 = tuple(range(100, LONG + 1, 100))
TARGETS: list[Target] = [
    *(SigmaRel(width) for width in (0.015, 0.02, 0.05, 0.1, 0.15, 0.25)),
    ConstantDecay(0.98),
    ConstantHalfLife(60.0),
    Window(100, 250),
    Window(20, 300),
]


def synthesise(
    snapshots: SnapshotBasis, target: Target, at: int | None = None, dtype: str = "F32", max_error: float = MAX_ERROR
) -> Synthesis:
    """What is found for a target, if it is near enough."""
    found = approximate(snapshots, target, at=at, dtype=dtype)
    check(found, snapshots, target, at=at, dtype=dtype, max_error=max_error)
    return found


def litema(cap: float) -> Decay:
    return lambda n, gap: math.prod(min(cap, (1 + i) / (10 + i)) for i in range(n + 1, n + gap + 1))


@dataclass(frozen=True)
class Run:
    """A run with its averages, and their profiles from a loop over the updates."""

    counters: npt.NDArray[np.int64]
    averages: list[TrackedAverage]

    def __post_init__(self) -> None:
        times = {time for average in self.averages for time in average.times}
        if not times <= set(self.counters.tolist()):
            raise ValueError("a time without an update")

    @property
    def snapshots(self) -> SnapshotBasis:
        return SnapshotBasis(self.counters, self.averages)

    def profile(self, average: TrackedAverage, time: int) -> Floats:
        return by_loop(average.decays, int(np.searchsorted(self.counters, time)) + 1)

    def target(self, target: Target, at: int) -> Floats:
        """The target's profile, from a loop over updates or over single steps."""
        upto = self.counters[self.counters <= at]
        if isinstance(target, Window):
            inside = [range(max(low, target.first), min(high, target.last)) for low, high in self._spans(upto)]
            wished = np.array([len(steps) for steps in inside]) / (target.last - target.first)
        else:
            wished = by_loop(decays_of(elementwise(recursion_of(target)), upto, start=self._start(target)), len(upto))
        return np.concatenate((wished, np.zeros(len(self.counters) - len(upto))))

    def _spans(self, upto: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        return list(zip([0, *upto[:-1].tolist()], upto.tolist(), strict=True))

    def _start(self, target: Target) -> int:
        return 0 if isinstance(target, SigmaRel) else int(self.counters[0])

    def found(self, synthesis: Synthesis) -> Floats:
        """The profile of the weighted snapshots."""
        times = self.snapshots.times
        terms = [
            weight * padded(self.profile(average, times[k]), len(self.counters))
            for average, row in zip(self.averages, synthesis.weights, strict=True)
            for k, weight in enumerate(row)
            if weight != 0.0
        ]
        return np.sum(terms, axis=0)


def by_loop(decays: Floats, updates: int) -> Floats:
    profile = np.zeros(updates)
    for i, decay in enumerate(decays[:updates]):
        profile[:i] *= decay
        profile[i] = 1.0 - decay
    return profile


def padded(profile: Floats, updates: int) -> Floats:
    return np.concatenate((profile, np.zeros(updates - len(profile))))


def recursion_of(target: Target) -> Decay:
    if isinstance(target, SigmaRel):
        return lambda n, gap: (n / (n + gap)) ** (gamma_of(target.sigma_rel) + 1)
    decay = target.decay if isinstance(target, ConstantDecay) else 0.5 ** (1 / target.updates)  # type: ignore[attr-defined]
    return lambda _, gap: decay**gap


def power_run(widths: Sequence[float], times: tuple[int, ...], counters: npt.NDArray[np.int64]) -> Run:
    return Run(counters, [TrackedAverage(decays_of(power_decay(gamma_of(w)), counters), times) for w in widths])


def litema_run(caps: Sequence[float], times: tuple[int, ...], counters: npt.NDArray[np.int64]) -> Run:
    """Averages that begin as copies of the weights the run began with."""
    counters = np.concatenate(([0], counters))
    return Run(counters, [TrackedAverage(decays_of(elementwise(litema(cap)), counters), times) for cap in caps])


def steady(updates: int = UPDATES) -> npt.NDArray[np.int64]:
    return np.arange(1, updates + 1)


def long_run(widths: Sequence[float]) -> Run:
    return power_run(widths, EVERY_100, steady(LONG))


def skipping() -> npt.NDArray[np.int64]:
    """Updates that stand for one to seven steps, with one at each of the times of either kind."""
    steps = np.cumsum(np.random.default_rng(3).integers(1, 8, UPDATES))
    return np.union1d(steps[steps < UPDATES], [*REGULAR, *IRREGULAR])


RUNS: dict[str, Callable[[], Run]] = {
    "two, regular": lambda: power_run(PAIR, REGULAR, steady()),
    "three, regular": lambda: power_run(TRIPLE, REGULAR, steady()),
    "two, irregular": lambda: power_run(PAIR, IRREGULAR, skipping()),
    "three, irregular": lambda: power_run(TRIPLE, IRREGULAR, skipping()),
    "two of litema": lambda: litema_run((0.95, 0.995), REGULAR, steady()),
    "three of litema, irregular": lambda: litema_run((0.9, 0.97, 0.995), IRREGULAR, skipping()),
    "late": lambda: late_run(),
    "one": lambda: power_run((0.1,), REGULAR, steady()),
    "four": lambda: power_run((0.02, 0.05, 0.1, 0.2), REGULAR, steady()),
}


def late_run() -> Run:
    """One average from the start to the end, one that was removed, one that began in the middle of an interval."""
    counters = steady()
    wide, early = (decays_of(power_decay(gamma_of(width)), counters) for width in (0.25, 0.03))
    late = decays_of(power_decay(gamma_of(0.1)), counters, start=120)
    return Run(
        counters, [TrackedAverage(wide, REGULAR), TrackedAverage(early, REGULAR[:4]), TrackedAverage(late, REGULAR[2:])]
    )


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]()


# --- weights --------------------------------------------------------------------------------------------------------


class Dense:
    """The weights by one dense least squares over all updates and snapshots, with a constraint for each interval.

    In decimals of 60 digits, from the same decays: short intervals make the equations nearly singular. A coefficient,
    of which damping keeps the squares small, is what of an average's shadow at t_k goes into the sum: the weights of
    its snapshots from t_k on, each times what the average retains in between.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        times = run.snapshots.times
        self.ends = [int(end) for end in np.searchsorted(run.counters, times) + 1]
        self.keys = [(j, k) for j, one in enumerate(run.averages) for k, time in enumerate(times) if time in one.times]
        decays = [[Decimal(float(decay)) for decay in average.decays] for average in run.averages]
        profiles = [profile_in_decimals(decays[j], self.ends[k], len(run.counters)) for j, k in self.keys]
        self.columns = np.stack(profiles, axis=1)
        self.normal = self.columns.T @ self.columns
        self.masses = self.by_interval(self.columns)
        self.passing = np.full((len(self.keys), len(self.keys)), Decimal(0))
        for row, (j, k) in enumerate(self.keys):
            for column, (other, later) in enumerate(self.keys):
                if other == j and later >= k:
                    between = decays[j][self.ends[k] : self.ends[later]]
                    self.passing[row, column] = math.prod(between, start=Decimal(1))

    def by_interval(self, rows: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
        return np.add.reduceat(rows, [0, *self.ends[:-1]])

    def weights(self, target: Target, damping: float) -> Floats:
        wished = target_in_decimals(target, self.run.counters)
        cost = Decimal(damping) ** 2 * (wished @ wished)
        normal = self.normal + cost * (self.passing.T @ self.passing)
        nothing = np.full((len(self.masses), len(self.masses)), Decimal(0))
        system = np.block([[normal, self.masses.T], [self.masses, nothing]])
        solution = eliminated(system, np.concatenate((self.columns.T @ wished, self.by_interval(wished))))
        found = np.zeros((len(self.run.averages), len(self.ends)))
        for (j, k), weight in zip(self.keys, solution, strict=False):
            found[j, k] = weight
        return found


def profile_in_decimals(decays: Sequence[Decimal], updates: int, length: int) -> npt.NDArray[np.object_]:
    profile = np.full(length, Decimal(0))
    for i, decay in enumerate(decays[:updates]):
        profile[:i] *= decay
        profile[i] = 1 - decay
    return profile


def target_in_decimals(target: Target, counters: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
    spans = [(int(low), int(high)) for low, high in pairwise([min(0, counters[0]), *counters])]
    if isinstance(target, Window):
        inside = [len(range(max(low, target.first), min(high, target.last))) for low, high in spans]
        return np.array([Decimal(steps) / (target.last - target.first) for steps in inside])
    if isinstance(target, SigmaRel):
        exponent = Decimal(gamma_of(target.sigma_rel)) + 1
        decays = [(Decimal(low) / high) ** exponent if low else Decimal(0) for low, high in spans]
    else:
        decay = Decimal(target.decay) if isinstance(target, ConstantDecay) else Decimal(2) ** (-1 / Decimal(60))
        decays = [Decimal(0), *(decay ** (high - low) for low, high in spans[1:])]
    return profile_in_decimals(decays, len(counters), len(counters))


def eliminated(system: npt.NDArray[np.object_], right: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """The solution of a linear system, by elimination with pivots."""
    rows = np.concatenate((system, right[:, None]), axis=1)
    for k in range(len(rows)):
        pivot = k + int(np.argmax(np.abs(rows[k:, k])))
        rows[[k, pivot]] = rows[[pivot, k]]
        rows[k, k:] /= rows[k, k]
        rows[k + 1 :, k:] -= np.outer(rows[k + 1 :, k], rows[k, k:])
    solution = rows[:, -1]
    for k in reversed(range(len(rows) - 1)):
        solution[k] -= rows[k, k + 1 : -1] @ solution[k + 1 :]
    return solution


@pytest.fixture(scope="module")
def exact(run: Run) -> Dense:
    with localcontext(prec=60):
        return Dense(run)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_weights_are_the_dense_solution(run: Run, exact: Dense, target: Target) -> None:
    """Interval by interval gives the weights of one large least squares, to 1e-10, and they sum to 1."""
    with localcontext(prec=60):
        expected = exact.weights(target, DAMPING)

    found = run.snapshots.solve(target, UPDATES, DAMPING)

    if found.error > 1e-9:  # not one that is tracked
        np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-10)
    assert math.fsum(found.weights.flat) == pytest.approx(1.0, abs=1e-12)
    assert found.amplification == pytest.approx(math.sqrt(math.fsum(found.weights.ravel() ** 2)))


@pytest.mark.parametrize("damping", [DAMPING, 1e-2])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_error_is_the_true_one(run: Run, target: Target, damping: float) -> None:
    """The reported error is that of the weighted snapshots' profile, summed update by update, to 1 %."""
    wished = run.target(target, UPDATES)

    found = run.snapshots.solve(target, UPDATES, damping)

    true = np.linalg.norm(run.found(found) - wished) / np.linalg.norm(wished)
    assert found.error == pytest.approx(true, rel=0.01, abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, -1])
def test_intervals_have_the_targets_mass(run: Run, k: int) -> None:
    """Between any two times the weighted snapshots weigh what the target does, and after the target's time nothing."""
    at = run.snapshots.times[k]
    found = run.found(run.snapshots.solve(SigmaRel(0.12), at, DAMPING)) - run.target(SigmaRel(0.12), at)

    ends = np.searchsorted(run.counters, run.snapshots.times) + 1
    assert np.abs(np.add.reduceat(found, [0, *ends[:-1]])).max() < 1e-13


@given(
    gaps=st.lists(st.integers(1, 2) | st.integers(1, 60), min_size=12, max_size=120),
    widths=st.lists(st.floats(0.01, 0.28), min_size=1, max_size=4, unique=True),
    width=st.floats(0.01, 0.28),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_updates_any_times(gaps: list[int], widths: list[float], width: float, data: st.DataObject) -> None:
    """Whatever was pushed and kept: the weights sum to 1, and the error is true."""
    counters = np.cumsum(gaps)
    times = data.draw(st.lists(st.sampled_from(counters.tolist()), min_size=1, max_size=8, unique=True))
    run = power_run(widths, tuple(sorted(times)), counters)
    wished = run.target(SigmaRel(width), max(times))

    found = run.snapshots.solve(SigmaRel(width), max(times), DAMPING)

    size = np.abs(found.weights).sum()
    true = np.linalg.norm(run.found(found) - wished) / np.linalg.norm(wished)
    assert math.fsum(found.weights.flat) == pytest.approx(1.0, abs=1e-13 * size + 1e-12)
    assert found.error == pytest.approx(true, rel=0.01, abs=1e-10)


@pytest.mark.parametrize("widths", [PAIR, TRIPLE])
@pytest.mark.parametrize("target", [*(SigmaRel(w) for w in (0.02, 0.06, 0.15)), ConstantDecay(0.996)], ids=str)
def test_neighbouring_updates_taken_together(widths: tuple[float, ...], target: Target) -> None:
    """With 50 groups an interval instead of 100 updates: the same error to 1 %, and the sums of intervals are exact."""
    run = long_run(widths)
    fine, grouped = run.snapshots, SnapshotBasis(run.counters, run.averages, single=50)
    expected = fine.solve(target, LONG, DAMPING)

    found = grouped.solve(target, LONG, DAMPING)

    wished = run.target(target, LONG)
    true = np.linalg.norm(run.found(found) - wished) / np.linalg.norm(wished)
    assert found.error == pytest.approx(true, rel=0.01)
    assert true == pytest.approx(expected.error, rel=0.01)
    assert math.fsum(found.weights.flat) == pytest.approx(1.0, abs=1e-12)
    assert grouped.solve(SigmaRel(widths[0]), LONG, DAMPING).weights[0, -1] == 1.0


@pytest.mark.parametrize("updates", [1, 7, 24, 25, 26, 49, 50, 51, 99])
def test_groups_hold_every_update_once(updates: int) -> None:
    """Whatever number of updates an interval has, all of the target is seen: one average gives itself back."""
    counters = np.arange(1, 100)
    average = TrackedAverage(decays_of(power_decay(3.0), counters), tuple(sorted({updates, 99})))
    snapshots = SnapshotBasis(counters, [average], single=25)

    found = snapshots.solve(SigmaRel(sigma_rel_of(3.0)), 99, DAMPING)

    assert found.error < 1e-12
    assert found.weights[0, -1] == 1.0


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [PAIR, TRIPLE])
@pytest.mark.parametrize("at", [100, 600, LONG])
def test_tracked_average_gives_itself_back(widths: tuple[float, ...], at: int) -> None:
    """A tracked width is its own snapshot with the weight 1, all others 0, at each of the times."""
    snapshots = long_run(widths).snapshots
    for j, width in enumerate(widths):
        expected = np.zeros((len(widths), len(EVERY_100)))
        expected[j, EVERY_100.index(at)] = 1.0

        found = synthesise(snapshots, SigmaRel(width), at=at)

        np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-12)
        assert found.error < 1e-10


def test_tracked_constant_decay_gives_itself_back() -> None:
    """The same holds for another schedule that is a target."""
    counters = np.arange(0, LONG + 1)
    decays = [
        decays_of(elementwise(recursion_of(target)), counters)
        for target in (ConstantDecay(0.99), ConstantHalfLife(30.0))
    ]
    snapshots = SnapshotBasis(counters, [TrackedAverage(each, EVERY_100) for each in decays])

    assert synthesise(snapshots, ConstantDecay(0.99)).weights[0, -1] == 1.0
    assert synthesise(snapshots, ConstantHalfLife(30.0)).weights[1, -1] == 1.0


@pytest.mark.parametrize("target", [SigmaRel(0.1), SigmaRel(0.06), ConstantDecay(0.98), Window(800, 1600)], ids=str)
def test_sum_of_snapshots_is_the_tracked_average(target: Target) -> None:
    """With parameters that wander: the weighted shadows are what tracking would have given, as near as the profiles."""
    run = long_run(TRIPLE)
    parameters = np.cumsum(np.random.default_rng(1).standard_normal((LONG, 50)), axis=0)
    found = synthesise(run.snapshots, target)

    summed = np.zeros(50)
    for average, row in zip(run.averages, found.weights, strict=True):
        shadow = np.zeros(50)
        for i, decay in enumerate(average.decays):
            shadow = decay * shadow + (1 - decay) * parameters[i]
            if i + 1 in EVERY_100:
                summed += row[EVERY_100.index(i + 1)] * shadow
    tracked = run.target(target, LONG) @ parameters

    moved = np.linalg.norm(tracked - parameters[-1])
    assert np.linalg.norm(summed - tracked) < 2 * found.error * moved < 0.03 * moved


@pytest.mark.parametrize(("widths", "limit"), [(PAIR, 3.6e-2), (TRIPLE, 2.9e-3)])
def test_window_between_snapshots(widths: tuple[float, ...], limit: float) -> None:
    """The later half of all updates, out of 16 times."""
    found = synthesise(long_run(widths).snapshots, Window(800, 1600))

    assert 0.5 * limit < found.error < limit


@pytest.mark.parametrize("edges", [(500, 900), (200, 300), (100, 1600), (1500, 1600)])
def test_window_anywhere(edges: tuple[int, int]) -> None:
    """A window that ended long ago takes no later snapshot."""
    snapshots = long_run(TRIPLE).snapshots

    found = synthesise(snapshots, Window(*edges), max_error=0.06)

    assert not found.weights[:, [time > edges[1] for time in snapshots.times]].any()


def test_initial_weights_as_a_snapshot() -> None:
    """A decay too long for the run to forget its first weights is had where those were kept, and refused otherwise."""
    counters = np.arange(0, LONG + 1)
    averages = [TrackedAverage(decays_of(power_decay(gamma_of(width)), counters), EVERY_100) for width in TRIPLE]
    target = ConstantDecay(0.998)

    with pytest.raises(TargetRefused, match=r"decay 0\.998 would have an error of 0\.\d+, above 0\.05"):
        synthesise(SnapshotBasis(counters, averages), target)

    began = [TrackedAverage(average.decays, (0, *EVERY_100)) for average in averages]
    assert synthesise(SnapshotBasis(counters, began), target).error < 0.01


def test_damping_bounds_the_weights_of_averages_that_agree() -> None:
    """Two averages of nearly one length: no large weights against each other come of what they differ in."""
    snapshots = long_run((0.1, 0.1 + 1e-9)).snapshots

    assert snapshots.solve(SigmaRel(0.15), LONG, 1e-20).amplification > 1e6
    assert snapshots.solve(SigmaRel(0.15), LONG, DAMPING).amplification < 2.0


# --- refusals -------------------------------------------------------------------------------------------------------


def test_time_without_snapshot_is_refused_with_its_neighbours() -> None:
    """The message names both sides; before the first and after the last there is one."""
    snapshots = long_run(TRIPLE).snapshots

    with pytest.raises(TargetRefused, match="no snapshot at 250: the nearest are at 200 and 300") as refused:
        synthesise(snapshots, SigmaRel(0.1), at=250)
    assert refused.value.nearest == (200, 300)

    with pytest.raises(TargetRefused) as refused:
        synthesise(snapshots, SigmaRel(0.1), at=10**6)
    assert refused.value.nearest == (LONG,)


@pytest.mark.parametrize(
    "target",
    [SigmaRel(0.003), SigmaRel(0.28), ConstantDecay(0.5), ConstantHalfLife(1000.0), Window(151, 1490)],
    ids=str,
)
def test_too_large_an_error_is_refused_with_the_nearest(target: Target) -> None:
    """The message has the error and the limit; the nearest target is of the same kind, and accepted."""
    snapshots = long_run(PAIR).snapshots

    with pytest.raises(TargetRefused, match=r"would have an error of .*, above 0\.04; the nearest") as refused:
        synthesise(snapshots, target, max_error=0.04)

    nearest: Any = refused.value.nearest
    assert refused.value.reason == "error"
    assert type(nearest) is type(target)
    assert str(nearest) in str(refused.value)
    assert synthesise(snapshots, nearest, max_error=0.04).error <= 0.04
    assert synthesise(snapshots, target, max_error=math.inf).error > 0.04


def test_too_much_rounding_is_refused_with_the_nearest() -> None:
    """A short average out of two long ones takes large weights, which magnify what bf16 has rounded away."""
    snapshots = long_run(PAIR).snapshots

    with pytest.raises(TargetRefused, match=r"norm 12.*rounding error of 0\.02.* in BF16, above 0\.01") as refused:
        synthesise(snapshots, SigmaRel(0.015), dtype="BF16", max_error=1.0)

    nearest: Any = refused.value.nearest
    assert refused.value.reason == "rounding"
    assert synthesise(snapshots, nearest, dtype="BF16", max_error=1.0).rounding("BF16") <= MAX_ROUNDING
    assert synthesise(snapshots, SigmaRel(0.015), dtype="F32", max_error=1.0).rounding("F32") < 1e-6


def test_window_beyond_the_newest_is_refused() -> None:
    """Updates that nothing holds yet."""
    with pytest.raises(TargetRefused, match="window 600:1601 ends after the newest snapshot, 1600"):
        synthesise(long_run(PAIR).snapshots, Window(600, 1601))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SigmaRel(0.29),
        lambda: ConstantDecay(1.0),
        lambda: ConstantDecay(0.0),
        lambda: ConstantDecay(math.nan),
        lambda: ConstantHalfLife(0.0),
        lambda: ConstantHalfLife(math.inf),
        lambda: Window(5, 5),
        lambda: Window(-1, 5),
    ],
)
def test_targets_that_are_none(make: Callable[[], Target]) -> None:
    """What describes no average is refused when it is made."""
    with pytest.raises(TargetRefused):
        make()


def test_arrays_that_contradict_each_other() -> None:
    """No snapshots, snapshots without an update, decays of another run, an average without a beginning."""
    counters = np.arange(1, 11)
    decays = np.concatenate(([0.0], np.full(9, 0.5)))
    for average in (
        TrackedAverage(decays, ()),
        TrackedAverage(decays, (11,)),
        TrackedAverage(decays, (0,)),
        TrackedAverage(decays[:9], (5,)),
        TrackedAverage(np.full(10, 0.5), (5,)),
    ):
        with pytest.raises(ValueError, match="must"):
            SnapshotBasis(counters, [average])


def test_no_average_spans_an_interval() -> None:
    """An average that ended before another began, with updates between them that neither knows."""
    counters = np.arange(1, 101)
    first = TrackedAverage(decays_of(power_decay(5.0), counters), (20, 40))
    second = TrackedAverage(decays_of(power_decay(5.0), counters, start=50), (80, 100))
    lonely = TrackedAverage(first.decays, (100,))
    snapshots = SnapshotBasis(counters, [first, second])

    assert math.fsum(synthesise(snapshots, SigmaRel(0.1), max_error=math.inf).weights.flat) == pytest.approx(1.0)
    with pytest.raises(TargetRefused, match="no average has snapshots at both ends of the interval up to 100"):
        synthesise(SnapshotBasis(counters, [lonely, TrackedAverage(second.decays, (80,))]), SigmaRel(0.1))


# --- soups, rounding ------------------------------------------------------------------------------------------------


def test_soup() -> None:
    """Given weights are the weights, made to sum to 1 where they were written in decimals."""
    third = soup([0.333333, 0.333333, 0.333334])

    assert soup([1.5, -0.5]).weights.tolist() == [1.5, -0.5]
    assert soup([1.5, -0.5]).amplification == pytest.approx(math.sqrt(2.5))
    assert (third.error, math.fsum(third.weights)) == (0.0, pytest.approx(1.0, abs=1e-15))


@pytest.mark.parametrize("weights", [[0.5, 0.6], [], [math.nan, 1.0], [math.inf, -math.inf], [1.0, -1.0], [2.0, 2.0]])
def test_soup_that_sums_to_something_else(weights: list[float]) -> None:
    """Refused, with what the same proportions would be, where that exists."""
    with pytest.raises(TargetRefused, match="must sum to 1") as refused:
        soup(weights)

    nearest: Any = refused.value.nearest
    if nearest is not None:
        assert soup(nearest).weights == pytest.approx(np.array(weights) / sum(weights))


@pytest.mark.parametrize(("dtype", "bits"), [("F64", 53), ("F32", 24), ("F16", 11), ("BF16", 8)])
def test_rounding_is_what_a_format_rounds(dtype: str, bits: int) -> None:
    """The constants against normal values rounded to so many bits."""
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.longdouble)
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
    off = float(np.sqrt(np.mean((rounded - values) ** 2) / np.mean(values**2)))

    assert ROUNDING[dtype] == pytest.approx(off, rel=0.1)
