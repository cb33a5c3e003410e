"""A run: its life cycle, and what an update does or does not.

Knows runs in this process. Does not know HTTP, files or the registry.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    InvalidRequest,
    NonFinite,
    RunDegraded,
    RunNotFound,
    StaleStep,
    StepConflict,
    StorageFailed,
    Superseded,
    WeightsExist,
)
from ema_client.protocol import AverageConfig
from ema_service.runs import Run

if TYPE_CHECKING:
    from ema_service.memory import Memory
    from ema_service.runs.ledger import Ledger
    from ema_service.shadows import Setup
    from tests.conftest import LitEmaOracle
    from tests.service.conftest import LocalRun

Model = Callable[[int], dict[str, Tensor]]
MakeRun = Callable[..., "LocalRun"]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value), name


def with_nan(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    spoiled = tensors[name].clone()
    spoiled.view(-1)[-1] = float("nan")
    return {**tensors, name: spoiled}


# --- life cycle -----------------------------------------------------------------------------------------------------


def test_run_awaits_its_weights(local_run: MakeRun, model: Model) -> None:
    """A new run says awaiting_weights and does nothing before its initial weights."""
    run = local_run(model(0), begun=False)

    assert (run.info.status, run.info.version, run.info.num_updates, run.info.step) == (
        "awaiting_weights",
        None,
        0,
        None,
    )
    for act in (
        lambda: run.push(1, model(1)),
        lambda: run.run.ledger.admit(1),
        lambda: run.set_decay(0.5),
        run.reset_num_updates,
    ):
        with pytest.raises(AwaitingWeights):
            act()


def test_initial_weights_are_the_first_shadow(local_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """The initial weights, bf16 and fp16 widened, are the first shadow of every average; version 1.0."""
    run = local_run(model(0), averages=(AverageConfig("a"), AverageConfig("b", decay=0.1)))

    for average in ("a", "b", None):
        assert_equal(run.shadows(average), litema(model(0)).shadow)
    assert (run.info.status, run.info.version, run.info.effective_decay) == ("ready", "1.0", None)


def test_initial_weights_twice(local_run: MakeRun, model: Model) -> None:
    """The same initial weights again change nothing; others, or the same after an update, are refused."""
    run = local_run(model(0))
    state = run.state
    run.begin(model(0))
    assert run.state is state
    with pytest.raises(WeightsExist):
        run.begin(model(1))
    run.push(1, model(1))
    with pytest.raises(WeightsExist, match=r"1\.1"):
        run.begin(model(0))


def test_counter_and_step_can_be_carried_on(local_run: MakeRun, model: Model) -> None:
    """An EMA that began elsewhere goes on with its counter and its step."""
    run = local_run(model(0), begun=False)
    run.begin(model(0), num_updates=500, step=1000)
    assert (run.info.num_updates, run.info.step) == (500, 1000)

    with pytest.raises(StaleStep):
        run.push(1000, model(1))
    result = run.push(1001, model(1))
    assert result.num_updates == 501
    assert result.effective_decay == torch.div(502, torch.tensor(511.0)).item()


def test_counter_without_counting_is_refused(local_run: MakeRun, model: Model) -> None:
    """num_updates makes no sense where use_num_updates is off."""
    run = local_run(model(0), begun=False, use_num_updates=False)

    with pytest.raises(InvalidRequest, match="num_updates"):
        run.begin(model(0), num_updates=5)
    assert run.info.status == "awaiting_weights"


@pytest.mark.parametrize("name", ["wide", "conv.weight", "scalar", "emb", "half"])
def test_initial_weights_with_nan_are_refused(name: str, local_run: MakeRun, model: Model) -> None:
    """NaN in the initial weights is refused by the tensor's name, and the run goes on waiting."""
    run = local_run(model(0), begun=False)

    with pytest.raises(NonFinite, match=name):
        run.begin(with_nan(model(0), name))
    assert run.info.status == "awaiting_weights"


# --- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("counting", [True, False])
def test_updates_are_litemas(
    decay: float, counting: bool, local_run: MakeRun, model: Model, litema: type[LitEmaOracle]
) -> None:
    """Every dtype and shape, step by step, equals an in-process LitEma to the bit (bf16, fp16: float32 shadow)."""
    run = local_run(model(0), decay=decay, use_num_updates=counting)
    oracle = litema(model(0), decay, counting)
    for step in range(1, 30):
        oracle.update(model(step))
        result = run.push(step * 3, model(step))
        assert result.num_updates == oracle.num_updates.item() == run.info.num_updates
        assert_equal(run.shadows(), oracle.shadow)
        if step == 20:
            run.reset_num_updates()
            oracle.num_updates.fill_(0 if counting else -1)


def test_several_averages_of_one_push(local_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """One push feeds all averages, each with its own schedule and decay; the run's decay is the default."""
    averages = (
        AverageConfig("slow"),
        AverageConfig("fast", decay=0.3),
        AverageConfig("flat", schedule="constant", decay=0.75),
        AverageConfig("none", schedule="constant", decay=0.0),
    )
    run = local_run(model(0), decay=0.99, averages=averages)
    oracles = {
        "slow": litema(model(0), 0.99),
        "fast": litema(model(0), 0.3),
        "flat": litema(model(0), 0.75, use_num_updates=False),
        "none": litema(model(0), 0.0, use_num_updates=False),
    }
    for step in range(1, 8):
        run.push(step, model(step))
        for name, oracle in oracles.items():
            oracle.update(model(step))
            assert_equal(run.shadows(name), oracle.shadow)

    assert_equal(run.shadows(), oracles["slow"].shadow)
    assert [(a.name, a.schedule, a.decay) for a in run.info.averages] == [
        ("slow", "litema", 0.99),
        ("fast", "litema", 0.3),
        ("flat", "constant", 0.75),
        ("none", "constant", 0.0),
    ]
    assert run.info.bytes == 4 * run.run.layout.shadow_bytes


def test_copied_tensors(local_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """Every average holds their newest value, from the first weights on and after gaps; the others are averaged."""
    averages = (AverageConfig("slow"), AverageConfig("fast", decay=0.3))
    run = local_run(model(0), averages=averages, copied=("conv.weight", "emb"))
    oracles = {"slow": litema(model(0), 0.9999), "fast": litema(model(0), 0.3)}
    newest = model(0)
    for step in (1, 2, 7):
        for name, oracle in oracles.items():
            expected = {**oracle.shadow, "conv.weight": newest["conv.weight"], "emb": newest["emb"].float()}
            assert_equal(run.shadows(name), expected)
        newest = model(step)
        run.push(step, newest)
        for oracle in oracles.values():
            oracle.update(newest)

    assert run.info.copied == 2
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        run.push(8, with_nan(model(8), "conv.weight"))


def test_unknown_average_is_named(local_run: MakeRun, model: Model) -> None:
    """Asking for an average the run has not is refused with those it has."""
    run = local_run(model(0), averages=(AverageConfig("a"), AverageConfig("b")))

    with pytest.raises(AverageNotFound, match="'c'; it has a, b"):
        run.shadows("c")


def test_gap_of_steps(local_run: MakeRun, model: Model) -> None:
    """With decay_per step an update stands for the steps since the last one: their decays' product, their count."""
    run = local_run(model(0), decay=0.9, decay_per="step")
    results = [run.push(step, model(step)) for step in (5, 6, 16, 116)]

    assert [result.num_updates for result in results] == [1, 2, 12, 112]
    gaps = [range(1, 2), range(2, 3), range(3, 13), range(13, 113)]
    for result, steps in zip(results, gaps, strict=True):
        expected = math.prod(min(0.9, (1 + i) / (10 + i)) for i in steps)
        assert result.effective_decay == pytest.approx(expected, rel=1e-6)


def test_gap_counts_from_the_initial_step(local_run: MakeRun, model: Model) -> None:
    """With decay_per step the first update stands for the steps since the initial weights, if their step was given."""
    run = local_run(model(0), begun=False, decay=0.9, decay_per="step", use_num_updates=False)
    run.begin(model(0), step=100)
    result = run.push(110, model(1))

    assert result.effective_decay == pytest.approx(0.9**10)
    assert result.num_updates == -1
    expected = model(0)["wide"] - (1 - 0.9**10) * (model(0)["wide"] - model(1)["wide"])
    assert torch.allclose(run.shadows()["wide"], expected)


def test_gap_per_update_does_not_count(local_run: MakeRun, model: Model) -> None:
    """With decay_per update, LitEma's meaning, the distance between steps does not matter."""
    run = local_run(model(0), decay=0.9)

    assert [run.push(step, model(step)).num_updates for step in (5, 1000, 1001)] == [1, 2, 3]


# --- exactly once ---------------------------------------------------------------------------------------------------


def test_step_again_with_the_same_bytes(local_run: MakeRun, model: Model) -> None:
    """The latest step again with the same bytes is answered as before and not applied."""
    run = local_run(model(0))
    first = run.push(4, model(4))
    state = run.state
    again = run.push(4, model(4))

    assert (first.applied, again.applied) == (True, False)
    assert (again.num_updates, again.version, again.effective_decay) == (1, "1.1", first.effective_decay)
    assert run.state is state


def test_step_again_with_other_bytes(local_run: MakeRun, model: Model) -> None:
    """The latest step with other bytes is a conflict, an older step is stale; neither changes anything."""
    run = local_run(model(0))
    run.push(3, model(3))
    run.push(4, model(4))
    state = run.state

    with pytest.raises(StepConflict, match="step 4"):
        run.push(4, model(5))
    with pytest.raises(StaleStep, match="step 3"):
        run.push(3, model(3))
    with pytest.raises(StaleStep):
        run.run.ledger.admit(0)
    assert run.state is state


def test_update_is_refused_before_its_body(local_run: MakeRun, model: Model) -> None:
    """admit() and begin() refuse what cannot be applied, before a body is read, and let the latest step through."""
    run = local_run(model(0))
    run.push(4, model(4))
    run.run.ledger.admit(4)
    run.run.ledger.admit(5)

    with pytest.raises(StaleStep):
        run.run.begin(3, run.staged(model(3)))


def test_dropped_update_leaves_no_trace(local_run: MakeRun, model: Model) -> None:
    """An update that was worked through and never committed has changed nothing."""
    run = local_run(model(0), averages=(AverageConfig("a"), AverageConfig("b")))
    run.push(1, model(1))
    state, before = run.state, {name: value.clone() for name, value in run.shadows().items()}
    update = run.run.begin(2, run.staged(model(2)))
    update.preparation.finish()
    del update

    assert run.state is state
    assert_equal(run.shadows(), before)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda run, model: run.push(7, model(7)),
        lambda run, _: run.set_decay(0.5),
        lambda run, _: run.reset_num_updates(),
    ],
    ids=["another update", "another decay", "a reset"],
)
def test_update_of_a_state_that_passed(meddle: Callable[..., object], local_run: MakeRun, model: Model) -> None:
    """Where the run changed while an update was received, it is not applied to a state it was not computed from."""
    run = local_run(model(0))
    update = run.run.begin(9, run.staged(model(9)))
    meddle(run, model)
    state = run.state

    with pytest.raises(Superseded):
        run.run.commit(update)
    assert run.state is state
    assert run.push(9, model(9)).applied


def test_one_step_raced(local_run: MakeRun, model: Model) -> None:
    """Eight threads commit one step begun on one state: one applies, the others are answered as repeated."""
    run = local_run(model(0))
    for step in range(1, 20):
        updates = [run.run.begin(step, run.staged(model(step))) for _ in range(8)]
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(run.run.commit, updates))

        assert sorted(result.applied for result in results) == [False] * 7 + [True]
    assert run.info.version == "1.19"


def test_steps_applied_are_remembered(local_run: MakeRun, model: Model) -> None:
    """status_of() knows the steps that were applied."""
    run = local_run(model(0))
    run.push(3, model(3))
    run.push(9, model(9))

    states = [run.run.ledger.status_of(step).state for step in (3, 4, 9, 10)]
    assert states == ["applied", "unknown", "applied", "unknown"]


def test_steps_up_to_the_largest(local_run: MakeRun, model: Model) -> None:
    """Step 0 and step 2**63 - 1 are steps like others, also where the gap between them counts."""
    run = local_run(model(0), decay_per="step", decay=0.5)
    run.push(0, model(1))
    result = run.push(2**63 - 1, model(2))

    assert result.effective_decay == pytest.approx(0.0, abs=1e-30)
    for name, value in run.shadows().items():
        assert torch.allclose(value, model(2)[name].to(value.dtype))


@pytest.mark.parametrize("counter", [2**63 - 1, 2**63 - 2, 2**63 - 5, 2**63 - 11])
def test_counter_at_its_end(counter: int, local_run: MakeRun, model: Model) -> None:
    """A counter carried on from the largest number the protocol allows still averages, with a decay in 0..1."""
    run = local_run(model(0), begun=False)
    run.begin(model(0), num_updates=counter)
    try:
        result = run.push(1, model(1))
    except InvalidRequest:
        return
    assert result.effective_decay is not None
    assert 0.0 <= result.effective_decay <= 1.0


# --- all or nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wide", "conv.weight", "scalar", "emb", "half"])
def test_nan_leaves_the_state_untouched(name: str, local_run: MakeRun, model: Model) -> None:
    """An update with one NaN is refused by the tensor's name; the state is the same object, its bytes as they were."""
    run = local_run(model(0), averages=(AverageConfig("a"), AverageConfig("b", decay=0.5)))
    run.push(1, model(1))
    state = run.state
    before = {average: {n: v.clone() for n, v in run.shadows(average).items()} for average in ("a", "b")}

    with pytest.raises(NonFinite, match=name):
        run.push(2, with_nan(model(2), name))

    assert run.state is state
    for average, shadows in before.items():
        assert_equal(run.shadows(average), shadows)
    assert run.push(2, model(2)).applied


def test_nan_where_it_is_allowed(local_run: MakeRun, model: Model) -> None:
    """With non_finite allow, NaN goes into the shadow, as in LitEma."""
    run = local_run(model(0), non_finite="allow")
    run.push(1, with_nan(model(1), "half"))

    shadow = run.shadows()["half"]
    assert shadow[-1].isnan()
    assert shadow[:-1].isfinite().all()


def test_readers_keep_their_version(local_run: MakeRun, model: Model) -> None:
    """A state held while a hundred updates pass, in memory that is reused, stays what it was."""
    run = local_run(model(0))
    run.push(1, model(1))
    held = run.shadows()
    before = {name: value.clone() for name, value in held.items()}
    for step in range(2, 102):
        run.push(step, model(step))

    assert_equal(held, before)


# --- changing the decay, the counter, the end -----------------------------------------------------------------------


def test_decay_from_the_next_update_on(local_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """set_decay changes one average, by default the first, and only from the next update on."""
    averages = (AverageConfig("a"), AverageConfig("b"))
    run = local_run(model(0), decay=0.9, use_num_updates=False, averages=averages)
    first, second = litema(model(0), 0.9, use_num_updates=False), litema(model(0), 0.9, use_num_updates=False)
    run.set_decay(0.25)
    run.set_decay(0.5, "b")
    first.decay.fill_(0.25)
    second.decay.fill_(0.5)
    assert run.info.decay == 0.25
    assert_equal(run.shadows("a"), first.shadow)
    run.push(1, model(1))
    first.update(model(1))
    second.update(model(1))

    assert_equal(run.shadows("a"), first.shadow)
    assert_equal(run.shadows("b"), second.shadow)
    assert [average.decay for average in run.info.averages] == [0.25, 0.5]


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf")])
def test_impossible_decay_is_refused(decay: float, local_run: MakeRun, model: Model) -> None:
    """A decay outside [0, 1] is refused and the state stays."""
    run = local_run(model(0))
    state = run.state

    with pytest.raises(InvalidRequest, match="decay"):
        run.set_decay(decay)
    with pytest.raises(AverageNotFound):
        run.set_decay(0.5, "none")
    assert run.state is state


def test_reset_keeps_the_mode(local_run: MakeRun, model: Model) -> None:
    """reset_num_updates sets a counter that is on to 0; one that is off stays off, where LitEma would switch it on."""
    counting, fixed = local_run(model(0)), local_run(model(0), use_num_updates=False)
    for run, expected in ((counting, 0), (fixed, -1)):
        run.push(1, model(1))
        run.reset_num_updates()
        assert run.info.num_updates == expected

    assert counting.push(2, model(2)).effective_decay == torch.div(2, torch.tensor(11.0)).item()
    assert fixed.push(2, model(2)).effective_decay == torch.tensor(0.9999).item()


def test_retired_run_takes_nothing(local_run: MakeRun, model: Model) -> None:
    """A deleted run takes neither updates nor readers, also an update that was under way."""
    run = local_run(model(0))
    update = run.run.begin(1, run.staged(model(1)))
    run.run.retire(lambda: None)

    for act in (lambda: run.run.commit(update), run.run.ready_state, lambda: run.begin(model(0))):
        with pytest.raises(RunNotFound):
            act()


def test_write_that_is_not_kept_changes_nothing(local_run: MakeRun, model: Model) -> None:
    """A trainer's number, and an average more, count once they outlive the server; else nothing changed."""
    run = local_run(model(0))
    state, setup = run.state, run.run.ledger.setup

    def full(_: object) -> None:
        raise StorageFailed("no space left", retry_after=1.0)

    def one_more(ledger: Ledger) -> Setup | None:
        return ledger.succession.with_average(AverageConfig("more"), "life", None)

    for write in (lambda: run.run.attach(full), lambda: run.run.change_averages(one_more, full)):
        with pytest.raises(StorageFailed):
            write()
        assert (run.run.ledger.writer, run.run.ledger.setup, run.state) == (0, setup, state)
    assert run.run.attach(lambda _: None) == 1


def test_run_that_cannot_be_forgotten_goes_on(local_run: MakeRun, model: Model) -> None:
    """A deletion that fails has changed nothing; one that comes second finds no run."""
    run = local_run(model(0))

    def full() -> None:
        raise StorageFailed("the disk is full")

    with pytest.raises(StorageFailed):
        run.run.retire(full)
    assert run.push(1, model(1)).applied
    run.run.retire(lambda: None)
    with pytest.raises(RunNotFound):
        run.run.retire(full)


def test_degraded_run_says_why(local_run: MakeRun, model: Model) -> None:
    """A run whose state cannot be read is degraded, refuses everything, and says why."""
    run = local_run(model(0), begun=False)
    run.run.restore(None, (), 0, "its checkpoint cannot be read")

    assert run.info.status == "degraded"
    for act in (lambda: run.push(1, model(1)), lambda: run.begin(model(0)), run.run.ready_state):
        with pytest.raises(RunDegraded, match="its checkpoint cannot be read"):
            act()


def test_listeners_hear_of_each_change(local_run: MakeRun, model: Model) -> None:
    """A listener is called after each change of state and not for what changed nothing."""
    run = local_run(model(0))
    heard: list[str] = []
    with run.run.changes.heard_by(lambda: heard.append(str(run.version))):
        run.push(1, model(1))
        run.push(1, model(1))
        run.set_decay(0.5)
        run.push(2, model(2))
    run.push(3, model(3))

    assert heard == ["1.1", "1.1", "1.2"]


def test_state_is_read_without_waiting(local_run: MakeRun, model: Model) -> None:
    """While someone changes the run, under its lock, its state and its info can be read."""
    run = local_run(model(0))
    seen: list[str | None] = []

    def read(_: int) -> None:
        reader = threading.Thread(target=lambda: seen.append(run.run.info().version))
        reader.start()
        reader.join(10)

    run.run.attach(read)

    assert seen == ["1.0"]


class EachIsKept:
    """A keeper that is never asked for anything."""

    every = True
    durable_step: int | None = None
    trouble: str | None = None


def test_commit_on_the_event_loop(local_run: MakeRun, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it waits for nothing: no disk, no device, nobody else who changes the run, and little to average."""
    run = local_run({"w": torch.zeros(1000)}).run
    kept = Run(run.config, run.layout, memory, EachIsKept(), created_at=1.0)  # type: ignore[arg-type]

    assert run.quick
    assert not kept.quick
    held: list[bool] = []
    run.attach(lambda _: held.append(run.quick))
    assert held == [False]
    with monkeypatch.context() as change:
        change.setattr(memory, "on_host", False)
        assert not run.quick
    assert not local_run({"w": torch.zeros(300_000)}).run.quick
    assert run.quick
