"""The ledger by itself: random lives of a run against a plain list of what should be, without bytes, files or a server.

Knows steps, writers, counters and decays. Does not know memory, threads or HTTP.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ema_client.errors import (
    AverageExists,
    AverageNotFound,
    AwaitingWeights,
    EmaError,
    Fenced,
    InvalidRequest,
    LastAverage,
    Overloaded,
    RunDegraded,
    RunNotFound,
    StaleStep,
    StepConflict,
    Superseded,
    TooManyAverages,
    WeightsExist,
)
from ema_client.protocol import MAX_AVERAGES, MAX_STEP, AverageConfig, RunConfig, SnapshotInfo, TensorSpec
from ema_service.averaging import average_into
from ema_service.runs.ledger import Ledger
from ema_service.shadows.state import Descent, Version

LAYOUT = (TensorSpec("w", (1,), "F32"),)
TWO = (AverageConfig("slow"), AverageConfig("fast", decay=0.5))


def config(**given: object) -> RunConfig:
    return RunConfig("r", LAYOUT, averages=TWO, **given)  # type: ignore[arg-type]


def begun(**given: object) -> Ledger:
    """A ledger with its initial weights, of step 0."""
    ledger = Ledger(config(**given))
    ledger.commit(ledger.succession.first("life", b"first", 1.0, num_updates=None, step=0))
    return ledger


def update(ledger: Ledger, step: int, digest: bytes | None = None, writer: int | None = None) -> bool:
    """What a run does with a push: the answer is whether it was applied."""
    ledger.admit(step, writer)
    plan = ledger.succession.plan(step, ledger.readable())
    applied = ledger.judge(plan, digest or b"%d" % step, writer)
    if applied:
        ledger.commit(ledger.succession.following(plan, digest or b"%d" % step, float(step)))
    return applied


def snapshot_of(version: Version) -> SnapshotInfo:
    names = tuple(average.name for average in version.averages)
    return SnapshotInfo("r", "s", str(version), version.step, version.num_updates, names, 0, 0.0)


@dataclass
class Past:
    """What the run should be, kept as the list of its applied steps. ``before``: of epochs that were rewound away."""

    steps: list[int] = field(default_factory=list)
    counter: int = 0
    epoch: int = 1
    writer: int = 0


class Life(RuleBasedStateMachine):
    """Any order of pushes, repeats, conflicts, resets, attachments, snapshots and rewinds."""

    @initialize(per_step=st.booleans(), counting=st.booleans())
    def begin(self, per_step: bool, counting: bool) -> None:
        self.per_step, self.counting = per_step, counting
        self.ledger = begun(decay_per="step" if per_step else "update", use_num_updates=counting)
        self.past = Past(counter=0 if counting else -1)
        self.snapshots: list[tuple[Version, Past]] = []

    def next_step(self, gap: int) -> int:
        return (self.past.steps[-1] if self.past.steps else 0) + gap

    @rule(gap=st.integers(1, 10**6))
    def push(self, gap: int) -> None:
        step = self.next_step(gap)
        assert update(self.ledger, step, writer=self.past.writer or None)
        self.past.steps.append(step)
        if self.counting:
            self.past.counter += gap if self.per_step else 1

    @precondition(lambda self: self.past.steps)
    @rule()
    def push_again(self) -> None:
        """The latest step with the same digest changes nothing; with another digest it is a conflict."""
        latest = self.ledger.readable()
        assert not update(self.ledger, self.past.steps[-1], latest.digest, self.past.writer or None)
        with pytest.raises(StepConflict):
            update(self.ledger, self.past.steps[-1], b"other", self.past.writer or None)
        assert self.ledger.readable() is latest

    @rule(back=st.integers(1, 5))
    def push_the_past(self, back: int) -> None:
        step = self.next_step(0) - back
        if step >= 0:
            with pytest.raises(StaleStep):
                update(self.ledger, step, writer=self.past.writer or None)

    @rule(gap=st.integers(1, 3))
    def race(self, gap: int) -> None:
        """Of two updates begun on one version the second to come is not applied."""
        writer = self.past.writer or None
        base = self.ledger.readable()
        plan = self.ledger.succession.plan(self.next_step(gap + 1), base)
        self.push(gap)
        with pytest.raises(Superseded):
            self.ledger.judge(plan, b"late", writer)

    @rule()
    def attach(self) -> None:
        number = self.ledger.next_writer()
        self.ledger.attach(number)
        before, self.past.writer = self.past.writer, number
        step = self.next_step(1)
        for stranger in {before or None, None}:
            with pytest.raises(Fenced):
                self.ledger.admit(step, stranger)
        with pytest.raises(InvalidRequest):
            self.ledger.admit(step, number + 1)

    @rule()
    def reset(self) -> None:
        self.ledger.commit(self.ledger.succession.with_counter_reset(self.ledger.writable()))
        self.past.counter = 0 if self.counting else -1

    @rule(decay=st.floats(0.0, 1.0))
    def steer(self, decay: float) -> None:
        succession = self.ledger.succession
        self.ledger.commit(succession.with_decay(self.ledger.writable(), decay, "fast"))
        slow, fast = self.ledger.readable().averages
        assert (slow.decay, fast.decay) == (0.9999, decay)

    @rule()
    def keep(self) -> None:
        self.snapshots.append((self.ledger.readable(), replace(self.past, steps=list(self.past.steps))))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        version, past = data.draw(st.sampled_from(self.snapshots))
        to = self.ledger.rewound(snapshot_of(version), version.averages, Descent(), "another", 5.0)
        self.ledger.judge_rewind(to)
        self.ledger.commit(to)
        self.past = Past(list(past.steps), past.counter, self.past.epoch + 1, self.past.writer)
        with pytest.raises(Superseded):
            self.ledger.judge_rewind(to)

    @invariant()
    def is_as_it_should_be(self) -> None:
        version = self.ledger.readable()
        assert version.epoch == self.past.epoch
        assert version.num_updates == self.past.counter
        assert version.step == (self.past.steps[-1] if self.past.steps else 0)
        assert version.lineage == "life"
        for step in self.past.steps[-5:]:
            assert self.ledger.status_of(step).state == "applied"
        assert self.ledger.status_of(self.next_step(1)).state == "unknown"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# --- gaps and decays ------------------------------------------------------------------------------------------------


@given(gaps=st.lists(st.integers(1, 200), min_size=1, max_size=20), decay=st.sampled_from([0.9, 0.999, 0.9999]))
def test_gaps_are_exact(gaps: list[int], decay: float) -> None:
    """With decay_per="step" an update over a gap retains what single steps would have: the product of their decays."""
    ledger = begun(decay=decay, decay_per="step")
    step = 0
    for gap in gaps:
        steps = range(step + 1, step + gap + 1)
        step += gap
        update(ledger, step)
        each = [min(decay, (1 + n) / (10 + n)) for n in steps]
        found = ledger.readable().averages[0].effective_decay
        assert found == pytest.approx(math.prod(each), rel=1e-6)


EVERY = (
    AverageConfig("litema"),
    AverageConfig("constant", "constant", 0.99),
    AverageConfig("half-life", "half_life", half_life=300.0),
    AverageConfig("power", "power", sigma_rel=0.1),
    AverageConfig("uniform", "power", gamma=0.0),
    AverageConfig("inverse-gamma", "inverse_gamma"),
    AverageConfig("late", "inverse_gamma", start=50),
    AverageConfig("late-litema", "litema", 0.99, start=50),
)


@given(gaps=st.lists(st.integers(1, 60), min_size=1, max_size=8), counting=st.booleans())
def test_gaps_are_exact_for_every_schedule(gaps: list[int], counting: bool) -> None:
    """Decays over gaps multiply to those of single steps, of schedules that count also where the run does not."""
    wide, single = (
        Ledger(RunConfig("r", LAYOUT, averages=EVERY, decay_per="step", use_num_updates=counting)) for _ in range(2)
    )
    for ledger in (wide, single):
        ledger.commit(ledger.succession.first("life", b"first", 1.0, num_updates=None, step=0))
    step = 0
    for gap in gaps:
        product = [1.0] * len(EVERY)
        for each in range(step + 1, step + gap + 1):
            update(single, each)
            product = [p * (a.effective_decay or 0.0) for p, a in zip(product, single.readable().averages, strict=True)]
        step += gap
        update(wide, step)
        for average, expected in zip(wide.readable().averages, product, strict=True):
            assert average.effective_decay == pytest.approx(expected, rel=1e-6 * gap, abs=1e-12), average.name
            counts = counting or average.name not in ("litema", "constant")
            assert average.num_updates == (step if counts else -1)
        assert wide.readable().num_updates == (step if counting else -1)


@pytest.mark.parametrize("updates", [1000, pytest.param(8000, marks=pytest.mark.soak)])
def test_shadows_of_every_schedule_against_float64(updates: int) -> None:
    """After thousands of updates a float32 shadow of parameters as models have is within 2e-6 of a loop in float64."""
    generator = torch.Generator().manual_seed(1)
    ledger = Ledger(RunConfig("r", LAYOUT, averages=EVERY))
    ledger.commit(ledger.succession.first("life", b"first", 1.0, num_updates=None, step=0))
    walk = 0.1 * torch.randn(64, generator=generator, dtype=torch.float64)
    shadows = [walk.float().clone() for _ in EVERY]
    exact = [walk.float().double() for _ in EVERY]
    for step in range(1, updates + 1):
        walk = walk + 0.01 * (0.1 * torch.randn(64, generator=generator, dtype=torch.float64) - walk)
        param = walk.float()
        plan = ledger.succession.plan(step, ledger.readable())
        ledger.commit(ledger.succession.following(plan, b"%d" % step, 1.0))
        for number, retention in enumerate(plan.retentions):
            out = torch.empty_like(param)
            if retention.copies:
                out.copy_(param)
            else:
                average_into(out, shadows[number], param, retention.weight)
            shadows[number] = out
            exact[number] = exact[number] + retention.weight * (param.double() - exact[number])
    for config, shadow, expected in zip(EVERY, shadows, exact, strict=True):
        assert (shadow.double() - expected).abs().max() <= 2e-6, config.name


def test_reset_begins_every_schedule_anew() -> None:
    """After a reset the next update is the first: a power average copies it; what does not count stays off."""
    ledger = Ledger(RunConfig("r", LAYOUT, averages=EVERY, use_num_updates=False))
    ledger.commit(ledger.succession.first("life", b"first", 1.0, num_updates=None, step=0))
    for step in range(1, 100):
        update(ledger, step)
    ledger.commit(ledger.succession.with_counter_reset(ledger.writable()))
    plan = ledger.succession.plan(100, ledger.readable())

    assert [a.num_updates for a in ledger.readable().averages] == [-1, -1, 0, 0, 0, 0, 0, 0]
    assert [r.copies for r in plan.retentions] == [False, False, False, True, True, False, False, True]


def test_a_rewind_takes_counters_along() -> None:
    """Each average goes on from the counter that it had in the snapshot."""
    ledger = Ledger(RunConfig("r", LAYOUT, averages=EVERY, decay_per="step"))
    ledger.commit(ledger.succession.first("life", b"first", 1.0, num_updates=None, step=0))
    update(ledger, 7)
    past = ledger.readable()
    following = ledger.succession.plan(20, past).retentions
    update(ledger, 9)
    ledger.commit(ledger.rewound(snapshot_of(past), past.averages, Descent(), "other", 1.0))

    assert ledger.succession.plan(20, ledger.readable()).retentions == following


@pytest.mark.parametrize("name", ["half-life", "power", "uniform"])
def test_schedules_without_a_decay_refuse_one(name: str) -> None:
    """The decay of such an average cannot be set: what was wrong is said with its schedule."""
    ledger = Ledger(RunConfig("r", LAYOUT, averages=EVERY))
    version = ledger.succession.first("life", b"first", 1.0, num_updates=None, step=0)
    with pytest.raises(InvalidRequest, match="takes no decay"):
        ledger.succession.with_decay(version, 0.5, name)
    assert ledger.succession.with_decay(version, 0.5, "inverse-gamma").averages[5].decay == 0.5


def test_counter_stays_within_its_range() -> None:
    """A gap that would carry the counter beyond what SQLite holds stops there."""
    ledger = begun(decay_per="step")
    update(ledger, MAX_STEP)
    assert ledger.readable().num_updates == MAX_STEP


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decay_outside_its_range(decay: float) -> None:
    """A decay that is none is refused."""
    ledger = begun()
    with pytest.raises(InvalidRequest):
        ledger.succession.with_decay(ledger.readable(), decay, None)


def test_unknown_average() -> None:
    """An average that the run does not have is refused with the names it has."""
    with pytest.raises(AverageNotFound, match="slow, fast"):
        begun().succession.member("none")


# --- other averages -------------------------------------------------------------------------------------------------

LATE = AverageConfig("late", "power", sigma_rel=0.1)


@pytest.mark.parametrize("counting", [True, False])
@pytest.mark.parametrize("average", [AverageConfig("late"), LATE, AverageConfig("late", "constant", 0.5, start=2)])
def test_late_average_begins_with_an_update(average: AverageConfig, counting: bool) -> None:
    """Whatever its schedule, the first update copies and is not counted; from there it has the decays of an average
    that began with initial weights."""
    ledger, other = (
        begun(use_num_updates=counting),
        Ledger(RunConfig("r", LAYOUT, averages=(average,), use_num_updates=counting)),
    )
    other.commit(other.succession.first("life", b"first", 1.0, num_updates=None, step=0))
    assert update(ledger, 1)
    setup = ledger.succession.with_average(average, "lineage", None)
    assert setup
    ledger.change_averages(setup)
    plan = ledger.succession.plan(2, ledger.readable())
    assert [average.name for average in plan.averages] == ["slow", "fast", "late"]
    assert [retention.copies for retention in plan.retentions] == [False, False, True]
    assert update(ledger, 2)
    for step in range(1, 12):
        ours, theirs = (each.readable().averages[-1] for each in (ledger, other))
        assert (ours.num_updates, ours.effective_decay) == (theirs.num_updates, theirs.effective_decay)
        assert update(ledger, step + 2)
        assert update(other, step)
    assert ledger.readable().n == 13


def test_order_of_averages() -> None:
    """Versions have the averages in the order of the setup, also where an earlier one begins later."""
    ledger = begun()
    version = ledger.readable()
    ledger.commit(replace(version, averages=version.averages[1:]))
    assert [average.name for average in ledger.succession.averages(ledger.readable())] == ["slow", "fast"]
    assert update(ledger, 1)
    assert [average.name for average in ledger.readable().averages] == ["slow", "fast"]
    assert [average.num_updates for average in ledger.readable().averages] == [0, 1]


def test_which_averages_there_may_be() -> None:
    """Sixteen at most, one at least, one with weights at least, and one of each name."""
    ledger = begun()
    for number in range(MAX_AVERAGES - 2):
        setup = ledger.succession.with_average(AverageConfig(f"a{number}"), str(number), None)
        assert setup
        ledger.change_averages(setup)
    succession = ledger.succession
    with pytest.raises(TooManyAverages):
        succession.with_average(LATE, "x", None)
    assert succession.with_average(AverageConfig("a3"), "x", None) is None
    with pytest.raises(AverageExists):
        succession.with_average(AverageConfig("a3", decay=0.5), "x", None)
    with pytest.raises(AverageNotFound):
        succession.without_average(ledger.version, "none", None)
    ledger.change_averages(succession.without_average(ledger.version, "slow", None))
    with pytest.raises(LastAverage, match="a0, a1"):
        ledger.succession.without_average(ledger.version, "fast", None)
    assert len(ledger.succession.without_average(None, "fast", None).members) == MAX_AVERAGES - 2
    with pytest.raises(LastAverage, match="only average"):
        Ledger(RunConfig("r", LAYOUT)).succession.without_average(None, "ema", None)


def test_keys_of_changes() -> None:
    """The setup remembers the latest keys, and whoever has none is no other."""
    ledger = begun()
    for number in range(20):
        name = "late"
        setup = ledger.succession.with_average(AverageConfig(name), str(number), f"add-{number}")
        assert setup
        ledger.change_averages(setup)
        ledger.change_averages(ledger.succession.without_average(ledger.version, name, None))
    assert [number for number in range(20) if ledger.setup.made_by(f"add-{number}")] == list(range(4, 20))
    assert not ledger.setup.made_by(None)


# --- what all hosts of a run agree on -------------------------------------------------------------------------------


def following(ledger: Ledger, step: int, digest: bytes = b"any", now: float = 1.0) -> Version:
    """The version that an update of this step makes."""
    return ledger.succession.following(ledger.succession.plan(step, ledger.readable()), digest, now)


def test_outcome_is_the_same_on_each_host() -> None:
    """Clocks and digests of slices, which each host has its own of, are no part of an outcome."""
    here, there = begun(), Ledger(config())
    there.commit(there.succession.first("life", b"another slice", 9.0, num_updates=None, step=0))

    assert here.outcome() == there.outcome()
    assert here.outcome(following(here, 1)) == there.outcome(following(there, 1, b"other", 7.0))
    assert here.outcome(writer=1) == there.outcome(writer=1)


def test_outcome_tells_what_differs() -> None:
    """Another base, step, counter, decay, key, lineage, version or writer is another outcome."""
    ledger, gaps, life, ahead, attached = begun(), begun(decay_per="step"), Ledger(config()), begun(), begun()
    update(ahead, 1)
    attached.attach(1)
    life.commit(life.succession.first("another", b"first", 1.0, num_updates=None, step=0))
    succession, version = ledger.succession, ledger.readable()
    outcomes = [
        ledger.outcome(),
        attached.outcome(),
        ledger.outcome(following(ledger, 1)),
        ledger.outcome(following(ledger, 2)),
        gaps.outcome(following(gaps, 2)),
        life.outcome(following(life, 2)),
        ahead.outcome(following(ahead, 2)),
        ledger.outcome(succession.with_decay(version, 0.25, "slow")),
        ledger.outcome(succession.with_decay(version, 0.25, "fast")),
        ledger.outcome(succession.with_decay(version, 0.25, "fast").keyed("key")),
        ledger.outcome(succession.with_counter_reset(following(ledger, 2))),
        ledger.outcome(replace(following(ledger, 2), epoch=2)),
        ledger.outcome(replace(following(ledger, 2), num_updates=7)),
        ahead.outcome(following(ledger, 2)),
        Ledger(config()).outcome(),
    ]

    assert len(set(outcomes)) == len(outcomes)


# --- the first version ----------------------------------------------------------------------------------------------


def test_nothing_before_the_initial_weights() -> None:
    """A run without weights has nothing to read, and takes no update."""
    ledger = Ledger(config())
    for act in (ledger.readable, ledger.writable, lambda: ledger.admit(1)):
        with pytest.raises(AwaitingWeights):
            act()
    assert ledger.judge_first(b"any")


def test_initial_weights_twice() -> None:
    """The same weights again change nothing; others, or the same after an update, are refused."""
    ledger = begun()
    assert not ledger.judge_first(b"first")
    with pytest.raises(WeightsExist):
        ledger.judge_first(b"other")
    update(ledger, 1)
    with pytest.raises(WeightsExist):
        ledger.judge_first(b"first")


def test_initial_weights_are_of_a_step() -> None:
    """An update of the step that the initial weights are of is stale: it would be counted twice."""
    with pytest.raises(StaleStep, match="initial weights"):
        update(begun(), 0)


def test_initial_weights_anew() -> None:
    """Others take the place of the version they name, in a new epoch with its step, counter, decays and keys; once."""
    ledger = begun()
    ledger.commit(ledger.succession.with_decay(ledger.readable(), 0.5, None).keyed("key"))
    base = ledger.admit_anew()
    assert not ledger.judge_anew(base, "9.9", b"first")
    assert ledger.judge_anew(base, "1.0", b"second")
    ledger.commit(ledger.anew(base, "other", b"second", 2.0))
    expected = replace(base, lineage="other", epoch=2, digest=b"second", updated_at=2.0)
    assert ledger.readable() == expected
    assert not ledger.judge_anew(ledger.admit_anew(), "1.0", b"second")
    with pytest.raises(WeightsExist, match=r"2\.0, not 1\.0"):
        ledger.judge_anew(ledger.admit_anew(), "1.0", b"third")
    assert update(ledger, 1)
    with pytest.raises(WeightsExist):
        ledger.admit_anew()


def test_initial_weights_anew_of_a_run_that_changed() -> None:
    """A decay that was changed while the weights came is not lost: they have to come again."""
    ledger = begun()
    base = ledger.admit_anew()
    ledger.commit(ledger.succession.with_decay(base, 0.5, None))
    with pytest.raises(Superseded):
        ledger.judge_anew(base, "1.0", b"second")


def test_initial_weights_anew_are_for_who_trains() -> None:
    """Not for a trainer that was replaced, nor after a rewind, whose weights are a snapshot's."""
    ledger = begun()
    ledger.attach(1)
    for writer in (None, 2):
        with pytest.raises((Fenced, InvalidRequest)):
            ledger.admit_anew(writer)
    ledger.commit(ledger.rewound(snapshot_of(ledger.readable()), ledger.readable().averages, Descent(), "new", 1.0))
    with pytest.raises(WeightsExist, match="which initial weights did not make"):
        ledger.admit_anew(1)


def test_counter_where_nothing_counts() -> None:
    """A counter cannot be carried on by a run that counts nothing."""
    succession = Ledger(config(use_num_updates=False)).succession
    with pytest.raises(InvalidRequest, match="num_updates"):
        succession.first("life", b"", 1.0, num_updates=7, step=None)


# --- degraded, deleted, restored ------------------------------------------------------------------------------------


def test_degraded_run_takes_nothing_until_someone_decides() -> None:
    """A fault refuses every write and keeps what can be read; a rewind or an acceptance ends it."""
    whole = begun()
    ledger = Ledger(config())
    ledger.restore(whole.readable(), (), 7, "its checkpoint is damaged")
    with pytest.raises(RunDegraded, match=r"damaged .version 1\.0 can be read"):
        ledger.admit(1)
    assert ledger.acceptable() is ledger.readable()
    to = ledger.rewound(snapshot_of(whole.readable()), whole.readable().averages, Descent(), "new", 1.0)

    assert to.epoch == 8, "epochs up to 7 may have been read by someone"
    ledger.commit(to)
    ledger.recover()
    assert update(ledger, 1)
    with pytest.raises(InvalidRequest, match="not degraded"):
        ledger.acceptable()


def test_degraded_run_that_mends_by_itself() -> None:
    """Whoever comes before is to come again, with whatever they want; after that an operator is asked for."""
    ledger, mending = Ledger(config()), [True]
    ledger.restore(None, (), 3, "its files are gone")
    ledger.expect_mending(lambda: mending[0])
    asked: list[Callable[[], object]] = [ledger.readable, lambda: ledger.admit(1), lambda: ledger.judge_first(b"")]
    for ask in asked:
        with pytest.raises(Overloaded, match="its files are gone"):
            ask()
    mending[0] = False
    for ask in asked:
        with pytest.raises(RunDegraded):
            ask()


def test_degraded_run_without_a_version() -> None:
    """Where nothing is left to read, that is what is said; a rewind begins another lineage."""
    ledger, source = Ledger(config()), begun().readable()
    ledger.restore(None, (), 3, "its files are gone")
    for act in (ledger.readable, ledger.acceptable, lambda: ledger.judge_first(b"")):
        with pytest.raises(RunDegraded):
            act()
    assert (v := ledger.rewound(snapshot_of(source), source.averages, Descent(), "new", 1.0)).lineage == "new"
    assert v.epoch == 4
    after = ledger.rewound(snapshot_of(source), source.averages, Descent(), "new", 1.0, 5)
    assert after.epoch == 6, "epochs up to 5 were of snapshots"


def test_deleted_run_takes_nothing() -> None:
    """After a deletion every question has one answer."""
    ledger = begun()
    plan = ledger.succession.plan(1, ledger.readable())
    to = ledger.rewound(snapshot_of(ledger.readable()), ledger.readable().averages, Descent(), "new", 1.0)
    ledger.retire()
    for act in (
        ledger.readable,
        ledger.writable,
        ledger.next_writer,
        lambda: ledger.admit(1),
        lambda: ledger.judge(plan, b""),
        lambda: ledger.judge_first(b""),
        lambda: ledger.judge_rewind(to),
    ):
        with pytest.raises(RunNotFound):
            act()


def test_restored_steps_are_known() -> None:
    """Steps that storage told of are applied, those in between are not known."""
    before = begun()
    for step in (3, 9):
        update(before, step)
    ledger = Ledger(config(), writer=4)
    ledger.restore(before.readable(), (3,), 1, None)

    assert [ledger.status_of(step).state for step in (3, 4, 9)] == ["applied", "unknown", "applied"]
    assert update(ledger, 10, writer=4)


def test_questions_change_nothing() -> None:
    """Whatever is asked and refused, the ledger answers as before."""
    ledger = begun()
    version = ledger.readable()
    plan = ledger.succession.plan(5, version)
    for question in (
        lambda: ledger.admit(5),
        lambda: ledger.judge(plan, b"x"),
        lambda: ledger.admit(0),
        lambda: ledger.admit(5, 9),
        lambda: ledger.next_writer(),
        lambda: ledger.judge_first(b"x"),
        lambda: ledger.admit_anew(),
        lambda: ledger.judge_anew(version, "1.0", b"x"),
    ):
        with contextlib.suppress(EmaError):
            question()
    assert (ledger.readable(), ledger.writer, ledger.fault) == (version, 0, None)
