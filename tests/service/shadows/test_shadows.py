"""Shadows of one run: what is prepared is whole, beside the current state, and nobody's concern before it is committed.

Knows states, plans and memory. Does not know runs, locks, files or sockets.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import NonFinite
from ema_client.protocol import AverageConfig
from ema_service.averaging import Digest
from ema_service.averaging.schedules import Retention
from ema_service.memory import Layout, Memory, Staged
from ema_service.shadows import Average, Member, Plan, Shadows, State, Version
from ema_service.tensors import tensor_of

Model = Callable[[int], dict[str, Tensor]]

DECAYS = (0.5, 0.9)
AVERAGES = tuple(Average(Member(AverageConfig(f"a{i}")), decay, None, 0) for i, decay in enumerate(DECAYS))
VERSION = Version("life", 1, 0, 0, 0, b"", AVERAGES, 1.0)
PLAN = Plan(VERSION, 1, 1, VERSION.averages, tuple(Retention(decay, 1.0 - decay) for decay in DECAYS))
NEXT = Version("life", 1, 1, 1, 1, b"", VERSION.averages, 2.0)


@pytest.fixture
def layout(layout_of: Callable[[Mapping[str, Tensor]], Layout], model: Model) -> Layout:
    return layout_of(model(0))


@pytest.fixture
def shadows(layout: Layout, memory: Memory, model: Model) -> Shadows:
    """With its first version: the parameters themselves in each average."""
    made = Shadows(layout, memory, check=True)
    prepared = made.cast(staged_of(layout, memory, model(0))).finish()
    made.commit(State(VERSION, prepared.arenas * len(DECAYS)))
    return made


def staged_of(layout: Layout, memory: Memory, tensors: dict[str, Tensor]) -> Staged:
    staged = Staged(layout, memory)
    body = save(tensors)
    staged.data[:] = body[8 + int.from_bytes(body[:8], "little") :]
    return staged


def state_of(shadows: Shadows) -> State:
    assert shadows.state is not None
    return shadows.state


def bytes_of(state: State) -> list[bytes]:
    return [arena.tensor.numpy().tobytes() for arena in state.arenas]


def test_first_version_is_told_of_as_it_arrives(layout: Layout, memory: Memory, model: Model) -> None:
    """Initial weights are looked at while they come; the shadow has its digest then, and nobody reads it again."""
    told: list[int] = []
    shadows, staged = Shadows(layout, memory, check=True), staged_of(layout, memory, model(0))
    preparation = shadows.cast(staged, lambda _data, upto, _start: told.append(upto))
    preparation.advance(layout.param_bytes // 2)
    half = list(told)
    prepared = preparation.finish()

    assert half or layout.param_bytes < 2 << 20, "a piece is told once it is whole"
    assert told[-1] == layout.shadow_bytes
    whole = Digest()
    whole.update(prepared.arenas[0].tensor.numpy().data)
    assert prepared.arenas[0].digest == whole.digest()


def test_prepared_is_whole_beside_the_current(shadows: Shadows, layout: Layout, memory: Memory, model: Model) -> None:
    """While a version is prepared, and once it is, the current state is what it was; a commit replaces it."""
    before = state_of(shadows)
    content = bytes_of(before)
    preparation = shadows.prepare(PLAN, before, staged_of(layout, memory, model(1)), {})
    preparation.advance(layout.param_bytes // 2)
    assert (state_of(shadows), bytes_of(before)) == (before, content)
    prepared = preparation.finish()
    assert (state_of(shadows), bytes_of(before)) == (before, content)
    shadows.commit(State(NEXT, prepared.arenas))

    assert str(state_of(shadows).version) == "1.1"
    assert bytes_of(before) == content, "whoever holds the earlier version reads it on"
    old, new = (tensor_of(before.arenas[0].section(0)), tensor_of(state_of(shadows).arenas[0].section(0)))
    assert torch.equal(new, old - 0.5 * (old - model(1)["wide"]))


def test_dropped_preparation_frees_its_memory(shadows: Shadows, layout: Layout, memory: Memory, model: Model) -> None:
    """What is dropped lets go of its arenas and of the base's, though something still refers to the preparation."""
    base = state_of(shadows)
    preparation = shadows.prepare(PLAN, base, staged_of(layout, memory, model(1)), {})
    preparation.advance(layout.param_bytes)
    held = weakref.ref(base.arenas[0])
    shadows.commit(State(NEXT, shadows.cast(staged_of(layout, memory, model(2))).finish().arenas * len(DECAYS)))
    del base
    preparation.drop()
    gc.collect()

    assert held() is None
    with pytest.raises(RuntimeError, match="dropped"):
        preparation.finish()


def test_nan_prepares_nothing(shadows: Shadows, layout: Layout, memory: Memory, model: Model) -> None:
    """A NaN is refused by its tensor's name, and the current state stays."""
    before = state_of(shadows)
    spoiled = model(1)
    spoiled["scalar"] = torch.tensor(float("nan"))
    with pytest.raises(NonFinite, match="scalar"):
        shadows.prepare(PLAN, before, staged_of(layout, memory, spoiled), {}).finish()

    assert state_of(shadows) is before


def test_plan_without_retentions_asks_for_the_digest(
    shadows: Shadows, layout: Layout, memory: Memory, model: Model
) -> None:
    """Of a step that was applied before only the digest is worked out: the same for the same parameters."""
    plan = Plan(VERSION, 0, 0, (), ())
    base = state_of(shadows)
    first, again, other = (
        shadows.prepare(plan, base, staged_of(layout, memory, model(seed)), {}).finish() for seed in (1, 1, 2)
    )

    assert first == again
    assert first.digest != other.digest
    assert first.arenas == ()


def test_sinks_are_told_by_name(shadows: Shadows, layout: Layout, memory: Memory, model: Model) -> None:
    """The sink of an average is given that average's bytes, and so the arena its digest; others get none."""
    told: dict[str, bytes] = {}

    def sink(data: memoryview, upto: int, _start: int) -> None:
        told["a1"] = bytes(data[:upto])

    prepared = shadows.prepare(PLAN, state_of(shadows), staged_of(layout, memory, model(1)), {"a1": sink}).finish()

    assert told["a1"] == prepared.arenas[1].tensor.numpy().tobytes()
    assert prepared.arenas[1].digest is not None
    assert prepared.arenas[0].digest is None
