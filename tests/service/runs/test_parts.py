"""Parts of an update, put together without a socket.

Knows bodies as the safetensors library writes them. Does not know HTTP (tests/service/api/routes/test_parts.py).
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import (
    EmaError,
    InvalidRequest,
    LayoutMismatch,
    MalformedBody,
    NonFinite,
    Overloaded,
    RunNotFound,
    StaleStep,
    StepConflict,
    Superseded,
)
from ema_client.protocol import RunConfig, TensorSpec, UpdateResult
from ema_client.wire import Box
from ema_service.bodies import UpdateBody
from ema_service.memory import Layout, Memory, Staged, Staging
from ema_service.runs import Run, Terms
from ema_service.tensors import TORCH_DTYPES
from tests.service.runs.gatherer import Gatherer, Slices, part_body, rows, shadow_bytes

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun

MakeRun = Callable[..., "LocalRun"]


@pytest.fixture
def gatherer(local_run: MakeRun, model: Callable[[int], dict[str, Tensor]]) -> Gatherer:
    return Gatherer(local_run(model(0)).run)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the garbage collector: what goes, goes with the last reference."""
    gc.disable()
    yield
    gc.enable()


# --- the same as unsharded ------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TensorSpec, ...]:
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4))
    return tuple(TensorSpec(f"t{i}", tuple(s), draw(st.sampled_from(list(TORCH_DTYPES)))) for i, s in enumerate(shapes))


def split(draw: st.DrawFn, box: Box) -> list[Box]:
    """A box as it is, or cut in two somewhere, each again."""
    axes = [axis for axis, (start, stop) in enumerate(box) if stop - start > 1]
    if not axes or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    start, stop = box[axis]
    cut = draw(st.integers(start + 1, stop - 1))
    halves = [(*box[:axis], bounds, *box[axis + 1 :]) for bounds in ((start, cut), (cut, stop))]
    return split(draw, halves[0]) + split(draw, halves[1])


@st.composite
def partitions(draw: st.DrawFn, specs: tuple[TensorSpec, ...]) -> list[dict[str, list[Box]]]:
    """A model cut up anyhow and dealt to a few parts, some of which may be empty."""
    parts: list[dict[str, list[Box]]] = [{} for _ in range(draw(st.integers(1, 4)))]
    for spec in specs:
        if 0 in spec.shape:
            continue
        for box in split(draw, tuple((0, size) for size in spec.shape)):
            parts[draw(st.integers(0, len(parts) - 1))].setdefault(spec.name, []).append(box)
    return parts


def values(specs: tuple[TensorSpec, ...], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.shape, generator=random).to(TORCH_DTYPES[s.dtype]) for s in specs}


@given(st.data())
def test_any_partition_equals_the_whole(data: st.DataObject) -> None:
    """Any layout cut anyhow, its parts in any order, broken off and repeated, equals the unsharded push to the bit."""
    specs = data.draw(layouts())
    first, second = values(specs, 0), values(specs, 1)
    runs = []
    for _ in range(2):
        memory = Memory("cpu")
        runs.append(Run(RunConfig("r", specs, non_finite="allow"), Layout(specs), memory, created_at=1.0))
    parts, staging = Gatherer(runs[0]), Staging(Memory("cpu"), 1 << 24)

    dealt = data.draw(partitions(specs))
    for step, tensors in ((None, first), (1, second)):
        order = data.draw(st.permutations(range(len(dealt))))
        for position, index in enumerate(order):
            body = part_body(tensors, dealt[index])
            if data.draw(st.booleans()):
                interrupted = parts.open(step, index, len(dealt))
                interrupted.feed(body[: data.draw(st.integers(0, len(body)))])
                parts.parts.give_up(interrupted)
            outcome = parts.send(step, index, len(dealt), body, piece=data.draw(st.integers(1, 200)))
            assert (outcome == "staged") == (position < len(order) - 1)
            repeated = data.draw(st.sampled_from(order[: position + 1]))
            again = parts.send(step, repeated, len(dealt), part_body(tensors, dealt[repeated]))
            assert again == ("staged" if position < len(order) - 1 else "applied")

    whole = part_body(first, {s.name: [tuple((0, n) for n in s.shape)] for s in specs if 0 not in s.shape})
    other = Gatherer(runs[1])
    other.send(None, 0, 1, whole)
    staged = staging.reserve(runs[1].layout)
    update = runs[1].begin(1, staged)
    body = UpdateBody(staged)
    body.feed(save(second))
    body.finish()
    runs[1].commit(update)
    assert shadow_bytes(runs[0]) == shadow_bytes(runs[1])
    assert runs[0].ready_state().version.digest == runs[1].ready_state().version.digest
    assert parts.staging.bytes_in_use == 0


@pytest.mark.parametrize("box", [((0, 40), (100, 200)), ((3, 5), (0, 200_000)), ((0, 40), (5, 6))])
def test_large_slices(box: Box, local_run: MakeRun) -> None:
    """Slices of every sort, larger than one piece, land where they belong: columns, wide rows, single columns."""
    before, after = torch.zeros(40, 200_000), torch.randn(40, 200_000)
    (a, b), (c, d) = box
    rest = [((0, a), (0, 200_000)), ((b, 40), (0, 200_000)), ((a, b), (0, c)), ((a, b), (d, 200_000))]
    run = local_run({"w": before}, decay=0.5, use_num_updates=False)
    parts = Gatherer(run.run, 1 << 28)
    parts.send(1, 0, 2, part_body({"w": after}, {"w": [box]}), piece=1_000_003)
    parts.send(1, 1, 2, part_body({"w": after}, {"w": [b for b in rest if all(x < y for x, y in b)]}))

    assert torch.equal(run.shadows()["w"], before - 0.5 * (before - after))


# --- exactly once ---------------------------------------------------------------------------------------------------


def test_update_waits_for_its_last_part(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """Until the last part is there nothing of the run has changed, one staging is held, and the parts are reported."""
    before = shadow_bytes(gatherer.run)
    for index in (2, 0, 3):
        assert gatherer.send(1, index, 4, part_body(model(1), rows(model(1), index, 4))) == "staged"
    assert gatherer.parts.staged(1) == (0, 2, 3)
    assert shadow_bytes(gatherer.run) == before
    held = gatherer.staging.bytes_in_use
    result = gatherer.send(1, 1, 4, part_body(model(1), rows(model(1), 1, 4)))

    assert (result.applied, result.step, result.num_updates) == (True, 1, 1)
    assert held == gatherer.reserve().data.nbytes + (held - gatherer.run.layout.param_bytes)
    assert gatherer.parts.staged(1) is None


def test_copied_tensors(local_run: MakeRun, model: Callable[[int], dict[str, Tensor]]) -> None:
    """Of a copied tensor the newest value is kept, also where it came in slices."""
    run = local_run(model(0), copied=("conv.weight",))
    gatherer = Gatherer(run.run)
    for index in range(2):
        gatherer.send(1, index, 2, part_body(model(1), rows(model(1), index, 2)))

    assert torch.equal(run.shadows()["conv.weight"], model(1)["conv.weight"])
    assert not torch.equal(run.shadows()["wide"], model(1)["wide"])


def test_other_bytes_are_a_conflict(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """A part sent again with other bytes is refused, before and after its update is applied, and changes nothing."""
    mine, other = (part_body(model(seed), rows(model(seed), 0, 2)) for seed in (1, 2))
    last = part_body(model(1), rows(model(1), 1, 2))
    gatherer.send(1, 0, 2, mine)
    with pytest.raises(StepConflict):
        gatherer.send(1, 0, 2, other)
    assert gatherer.send(1, 0, 2, mine) == "staged"
    assert gatherer.send(1, 1, 2, last).applied
    after = shadow_bytes(gatherer.run)
    with pytest.raises(StepConflict):
        gatherer.send(1, 0, 2, other)

    assert gatherer.send(1, 0, 2, mine) == gatherer.send(1, 1, 2, last) == "applied"
    assert (shadow_bytes(gatherer.run), gatherer.staging.bytes_in_use) == (after, 0)


@pytest.mark.parametrize("of", [1, 3])
def test_applied_step_by_another_partition(
    of: int, gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]
) -> None:
    """The same step again, cut up differently, is answered and not applied; with other bytes it is a conflict."""
    for index in range(2):
        gatherer.send(1, index, 2, part_body(model(1), rows(model(1), index, 2)))
    after = shadow_bytes(gatherer.run)
    results = [gatherer.send(1, i, of, part_body(model(1), rows(model(1), i, of))) for i in range(of)]
    assert (results[-1].applied, shadow_bytes(gatherer.run)) == (False, after)
    others = [part_body(model(2), rows(model(2), index, 5)) for index in range(5)]
    for index in range(4):
        gatherer.send(1, index, 5, others[index])
    with pytest.raises(StepConflict):
        gatherer.send(1, 4, 5, others[4])
    assert shadow_bytes(gatherer.run) == after


def test_a_part_sent_twice_at_once(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """The later of two attempts at one part wins; not a byte that the earlier one still sends goes into the update."""
    body = part_body(model(1), rows(model(1), 0, 2))
    hanging = gatherer.open(1, 0, 2)
    hanging.feed(body[:-10])
    gatherer.send(1, 0, 2, body)
    with pytest.raises(Superseded):
        hanging.feed(bytes(10))
    gatherer.parts.give_up(hanging)

    assert gatherer.send(1, 1, 2, part_body(model(1), rows(model(1), 1, 2))).applied
    expected = Gatherer(gatherer.run)
    assert expected.send(1, 0, 1, part_body(model(1), rows(model(1), 0, 1))).applied is False


def test_parts_of_two_starts_are_never_mixed(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """Parts left behind by a trainer that died are not completed by those of its successor, which replace them."""
    gatherer.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)), group="first")
    assert gatherer.send(1, 1, 2, part_body(model(2), rows(model(2), 1, 2)), group="second") == "staged"
    assert gatherer.parts.staged(1) == (1,)
    held = gatherer.staging.bytes_in_use
    assert gatherer.send(1, 0, 2, part_body(model(2), rows(model(2), 0, 2)), group="second").applied

    assert gatherer.staging.bytes_in_use == 0 < held
    single = Gatherer(gatherer.run)
    assert single.send(1, 0, 1, part_body(model(2), rows(model(2), 0, 1))).applied is False


# --- refused --------------------------------------------------------------------------------------------------------


def test_other_number_of_parts(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """Ranks that disagree on the number of parts are told so, and what is staged stays."""
    gatherer.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    with pytest.raises(StepConflict, match="2 parts, not 3"):
        gatherer.send(1, 1, 3, part_body(model(1), rows(model(1), 1, 3)))
    with pytest.raises(InvalidRequest, match="numbered from 0 to 1"):
        gatherer.send(1, 2, 2, b"")
    assert gatherer.send(1, 1, 2, part_body(model(1), rows(model(1), 1, 2))).applied


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"emb": [((0, 4), (0, 5))]}, "part 1 has elements of emb that part 0 has too"),
        ({"emb": [((4, 7), (0, 5)), ((6, 7), (0, 1))]}, "part 1 has elements of emb twice"),
        ({"emb": [((4, 8), (0, 5))]}, "is not within"),
        ({"emb": [((4, 6), (0, 5))]}, "elements are missing"),
    ],
)
def test_overlaps_and_gaps(
    slices: Slices, message: str, gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]
) -> None:
    """A part that overlaps another, or itself, or leaves a gap is refused by name; sent right it is taken."""
    gatherer.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    before = shadow_bytes(gatherer.run)
    wrong = {**model(1), "emb": torch.ones(9, 5, dtype=torch.bfloat16)}
    with pytest.raises(LayoutMismatch, match=message):
        gatherer.send(1, 1, 2, part_body(wrong, {**rows(model(1), 1, 2), **slices}))
    assert (shadow_bytes(gatherer.run), gatherer.parts.staged(1)) == (before, (0,))

    assert gatherer.send(1, 1, 2, part_body(model(1), rows(model(1), 1, 2))).applied


@pytest.mark.parametrize(
    ("tensors", "metadata", "error"),
    [
        ({"emb": torch.ones(7, 5)}, {}, LayoutMismatch),
        ({"emb": torch.ones(3, 5, dtype=torch.bfloat16)}, {}, LayoutMismatch),
        ({"other": torch.ones(1)}, {}, LayoutMismatch),
        ({"emb": torch.ones(3, dtype=torch.bfloat16)}, {"emb": [[[0, 3]]]}, LayoutMismatch),
        ({"emb": torch.ones(2, 5, dtype=torch.bfloat16)}, {"emb": [[[0, 3], [0, 5]]]}, MalformedBody),
        ({"emb": torch.ones(0, 5, dtype=torch.bfloat16)}, {"emb": [[[3, 3], [0, 5]]]}, MalformedBody),
        ({"emb": torch.ones(1, 5, dtype=torch.bfloat16)}, {"emb": [[[-1, 0], [0, 5]]]}, MalformedBody),
        ({"emb": torch.ones(1, 5, dtype=torch.bfloat16)}, {"emb": "rows"}, MalformedBody),
        ({"emb": torch.ones(7, 5, dtype=torch.bfloat16)}, {"half": [[[0, 11]]]}, MalformedBody),
        ({"emb": torch.ones(7, 5, dtype=torch.bfloat16)}, "{", MalformedBody),
        ({"emb": torch.ones(7, 5, dtype=torch.bfloat16)}, "[]", MalformedBody),
    ],
)
def test_wrong_parts(tensors: dict[str, Tensor], metadata: Any, error: type[Exception], gatherer: Gatherer) -> None:
    """What is not a slice of the run's tensors is refused by its header, and its staging given back."""
    raw = metadata if isinstance(metadata, str) else json.dumps(metadata)
    with pytest.raises(error):
        gatherer.send(1, 0, 2, save(tensors, {"ema.slices": raw} if metadata else None))
    assert (gatherer.staging.bytes_in_use, gatherer.parts.staged(1)) == (0, None)


def test_non_finite(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """NaN in any part refuses the whole update, naming the tensor; the step can be sent again, right."""
    bad = model(1)
    bad["conv.weight"][0, 0, 0] = float("nan")
    before = shadow_bytes(gatherer.run)
    gatherer.send(1, 0, 2, part_body(bad, rows(bad, 0, 2)))
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        gatherer.send(1, 1, 2, part_body(bad, rows(bad, 1, 2)))
    assert (shadow_bytes(gatherer.run), gatherer.staging.bytes_in_use) == (before, 0)
    gatherer.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    assert gatherer.send(1, 1, 2, part_body(model(1), rows(model(1), 1, 2))).applied


def test_refusal_is_told_to_whoever_asks(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """The rank whose part was there before the refusal learns the reason by sending the part again; a mended part of
    another rank ends that."""
    bad = model(1)
    bad["conv.weight"][0, 0, 0] = float("nan")
    gatherer.send(1, 1, 2, part_body(bad, rows(bad, 1, 2)))
    with pytest.raises(NonFinite):
        gatherer.send(1, 0, 2, part_body(bad, rows(bad, 0, 2)))
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        gatherer.send(1, 1, 2, part_body(bad, rows(bad, 1, 2)))
    assert (gatherer.parts.staged(1), gatherer.staging.bytes_in_use) == (None, 0)
    gatherer.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    assert gatherer.send(1, 1, 2, part_body(model(1), rows(model(1), 1, 2))).applied


@pytest.mark.usefixtures("uncollected")
def test_a_fault_that_is_remembered_holds_nothing(
    gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]
) -> None:
    """The frames that a refusal went through refer to the parts and to their memory; what is remembered of it does not,
    nor once it was told again."""
    bad = model(1)
    bad["conv.weight"][0, 0, 0] = float("nan")
    staged = list[weakref.ref[Staged]]()

    def reserve() -> Staged:
        made = gatherer.staging.reserve(gatherer.run.layout)
        staged.append(weakref.ref(made))
        return made

    gatherer.reserve = reserve  # type: ignore[method-assign]
    gatherer.send(1, 1, 2, part_body(bad, rows(bad, 1, 2)))
    for index in (0, 1, 1):
        with pytest.raises(NonFinite):
            gatherer.send(1, index, 2, part_body(bad, rows(bad, index, 2)))
    assert [each() for each in staged] == [None] * len(staged) != []


# --- several steps --------------------------------------------------------------------------------------------------


def test_ranks_at_different_steps(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """A rank may be ahead: its next parts wait beside the step that is not complete yet; neither is lost."""
    for step in (1, 2, 3):
        gatherer.send(step, 0, 2, part_body(model(step), rows(model(step), 0, 2)))
    for step in (1, 2, 3):
        result = gatherer.send(step, 1, 2, part_body(model(step), rows(model(step), 1, 2)))
        assert (result.applied, result.num_updates) == (True, step)


def test_newer_step_ends_older_ones(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """Once a newer step is applied an older incomplete one is given up, also what of it is on its way."""
    gatherer.send(1, 0, 3, part_body(model(1), rows(model(1), 0, 3)))
    coming = gatherer.open(1, 1, 3)
    for index in range(2):
        gatherer.send(2, index, 2, part_body(model(2), rows(model(2), index, 2)))
    assert (gatherer.parts.staged(1), gatherer.staging.bytes_in_use) == (None, 0)
    for late in (lambda: coming.feed(bytes(8)), lambda: gatherer.open(1, 2, 3)):
        with pytest.raises(StaleStep):
            late()


def test_no_more_than_three_steps(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """A rank that fails at every step does not fill the staging of the others: the oldest step makes room."""
    for step in range(1, 7):
        gatherer.send(step, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    assert [step for step in range(1, 7) if gatherer.parts.staged(step)] == [4, 5, 6]
    with pytest.raises(StaleStep, match="given up"):
        gatherer.open(3, 1, 2)


def test_expiry(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """A step of which nothing comes any more is given up, its staging given back, the missing parts named."""
    gatherer.send(1, 0, 4, part_body(model(1), rows(model(1), 0, 4)))
    coming = gatherer.open(1, 1, 4)
    assert gatherer.parts.expire(60.0) == []
    (expired,) = gatherer.parts.expire(0.0)

    assert (expired.step, expired.lacking.missing) == (1, (1, 2, 3))
    assert str(expired) == "step 1 was given up: of 4 parts, 1, 2, 3 did not come"
    assert (gatherer.parts.staged(1), gatherer.staging.bytes_in_use) == (None, 0)
    with pytest.raises(StaleStep):
        coming.feed(bytes(8))


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(("replaced", "told"), [(False, RunNotFound), (True, Superseded)])
def test_run_that_is_gone(
    step: int | None,
    replaced: bool,
    told: type[EmaError],
    gatherer: Gatherer,
    model: Callable[[int], dict[str, Tensor]],
) -> None:
    """A part that is on its way when its run is deleted, or made anew, is told so, as a whole push is; one that begins
    after that takes no staging."""
    gatherer.send(step, 0, 3, part_body(model(1), rows(model(1), 0, 3)))
    coming = gatherer.open(step, 1, 3)
    gatherer.run.retire(lambda: None, replaced=replaced)
    with pytest.raises(told):
        gatherer.parts.begin(step, 2, Terms(3), gatherer.reserve)
    gone = gatherer.run.ledger.gone
    assert gone
    gatherer.parts.close(gone)
    with pytest.raises(told):
        coming.feed(bytes(8))
    gatherer.parts.give_up(coming)
    assert (gatherer.parts.count(), gatherer.staging.bytes_in_use) == (0, 0)


def test_stalled_step_makes_room(
    gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where staging has room for one step, a newer step waits for the older one, until that one has stalled."""
    small = Gatherer(gatherer.run, gatherer.run.layout.shadow_bytes + 256)
    small.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    with pytest.raises(Overloaded):
        small.open(2, 0, 2)
    monkeypatch.setattr("ema_service.runs.parts._STALLED_SECONDS", 0.0)
    small.send(2, 0, 2, part_body(model(2), rows(model(2), 0, 2)))

    assert (small.parts.staged(1), small.parts.staged(2)) == (None, (0,))


def test_decay_changed_between_parts(gatherer: Gatherer, model: Callable[[int], dict[str, Tensor]]) -> None:
    """A decay changed while parts are awaited counts for the update, and asks for no part again."""
    gatherer.send(1, 0, 2, part_body(model(1), rows(model(1), 0, 2)))
    gatherer.run.amend(lambda succession, version: succession.with_decay(version, 0.125, None))
    result: UpdateResult = gatherer.send(1, 1, 2, part_body(model(1), rows(model(1), 1, 2)))

    assert (result.applied, result.effective_decay) == (True, 0.125)
