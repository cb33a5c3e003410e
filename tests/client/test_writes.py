"""Writes to tensors that torch has computed with: whole or not at all, and noticed by torch.

Knows torch's autocast, autograd and inference mode, and the real service, to which connections break. Does not know how
weights are received.
"""

from __future__ import annotations

import _thread
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import AlreadyStored, ConnectionLost, EmaError, NothingStored
from ema_client.tensors import writing
from tests.client.conftest import Request, Scripted
from tests.client.trainers import ONCE, same, values

Relay = Callable[..., Scripted]


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).to(dtype)


def change(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


# --- all or nothing ---------------------------------------------------------------------------------------------------


class Faults:
    """What happens to the pulls that a relay carries, until told otherwise: nothing, or a break in the weights."""

    def __init__(self) -> None:
        self.breaking = False
        self.interrupting = False

    def __call__(self, request: Request) -> bool:
        if request.method != "GET" or "/weights" not in request.target:
            return False
        if self.interrupting:
            _thread.interrupt_main()
        return self.breaking or self.interrupting


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def breaking(relay: Relay, faults: Faults) -> Iterator[EmaClient]:
    """A client of the real service whose pulls break after half of the weights, while ``faults`` say so."""
    with EmaClient(relay(faults, after=60_000).url, retry=ONCE) as client:
        yield client


@contextlib.contextmanager
def ema_scope(model_ema: RemoteEma, model: nn.Module) -> Iterator[None]:
    """As sgm's DiffusionEngine has it."""
    model_ema.store(model.parameters())
    model_ema.copy_to(model)
    try:
        yield None
    finally:
        model_ema.restore(model.parameters())


@pytest.mark.parametrize("fault", ["break", "Ctrl-C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", [ema_scope, RemoteEma.scope])
def test_a_scope_that_cannot_begin(
    breaking: EmaClient, faults: Faults, run_name: str, scope: Any, dtype: torch.dtype, fault: str
) -> None:
    """The model keeps its training weights, whole, and the next scope works."""
    model = layers(dtype)
    with RemoteEma(model, 0.5, False, run=run_name, client=breaking) as ema:
        change(model)
        ema(model)
        training = values(model)
        faults.breaking, faults.interrupting = fault == "break", fault == "Ctrl-C"
        for _ in range(2):
            with pytest.raises(ConnectionLost if faults.breaking else KeyboardInterrupt), scope(ema, model):
                pytest.fail("the scope began")
            assert same(values(model), training)
        faults.breaking = faults.interrupting = False
        with scope(ema, model):
            assert not any(torch.equal(tensor, training[name]) for name, tensor in values(model).items())
        assert same(values(model), training)


def test_no_memory_but_that_of_updates(
    client: EmaClient, server: Any, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """copy_to() receives in the memory of an update that was sent, and the next update is sent from there again."""
    model = layers()
    with RemoteEma(model, 0.5, False, run=run_name, url=server.url) as ema:
        for _ in range(2):
            change(model)
            ema(model)
            ema.flush()
            with monkeypatch.context() as patch:
                patch.setattr(writing, "pages", lambda size: pytest.fail(f"{size} bytes of new memory"))
                training = values(model)
                with ema.scope(model):
                    pulled = client.pull(run_name)
                    assert all(torch.equal(tensor, pulled[name]) for name, tensor in values(model).items())
                assert same(values(model), training)


def test_a_flush_that_fails(breaking: EmaClient, run_name: str) -> None:
    """So does a scope that cannot begin because an update was refused."""
    model = layers()
    with RemoteEma(model, 0.5, False, run=run_name, client=breaking) as ema:
        change(model, float("nan"))
        ema(model)
        with pytest.raises(EmaError), ema_scope(ema, model):
            pytest.fail("the scope began")
        with ema_scope(ema, model):
            assert all(tensor.isfinite().all() for tensor in values(model).values())


def test_the_copies_of_overwritten_weights_stay(breaking: EmaClient, faults: Faults, run_name: str) -> None:
    """A second copy_to() that fails does not give up the training weights, which only the copies still hold."""
    model = layers()
    with RemoteEma(model, 0.5, False, run=run_name, client=breaking) as ema:
        change(model)
        ema(model)
        training = values(model)
        ema.store(model.parameters())
        ema.copy_to(model)
        faults.breaking = True
        with pytest.raises(ConnectionLost):
            ema.copy_to(model)
        with pytest.raises(AlreadyStored):
            ema.store(model.parameters())
        ema.restore(model.parameters())
        assert same(values(model), training)
        faults.breaking = False


def test_restore_after_a_copy_that_failed(breaking: EmaClient, faults: Faults, run_name: str) -> None:
    """Code that restores in any case may: the copies are there until then, and gone after it."""
    model = layers()
    with RemoteEma(model, 0.5, False, run=run_name, client=breaking) as ema:
        ema.store(model.parameters())
        faults.breaking = True
        with pytest.raises(ConnectionLost):
            ema.copy_to(model)
        faults.breaking = False
        ema.restore(model.parameters())
        with pytest.raises(NothingStored):
            ema.restore(model.parameters())


@pytest.mark.parametrize("target", ["module", "mapping"])
def test_an_evaluators_copy(breaking: EmaClient, faults: Faults, run_name: str, target: str) -> None:
    """EmaClient.copy_to() as well, into a module or a mapping."""
    model = layers()
    breaking.create_run(run_name, model)
    other = layers()
    before = values(other)
    into = other if target == "module" else {name: tensor.detach() for name, tensor in other.named_parameters()}
    faults.breaking = True
    with pytest.raises(ConnectionLost):
        breaking.copy_to(run_name, into)
    assert same(values(other), before)
    faults.breaking = False
    assert breaking.copy_to(run_name, into).run == run_name
    assert same(values(other), values(model))


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[nn.Module]:
    """A model whose parameters are DTensors."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    model = layers()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    yield model
    dist.destroy_process_group()


def test_shards(breaking: EmaClient, faults: Faults, run_name: str, sharded: nn.Module) -> None:
    """A rank's slices come whole or not at all too; a backward pass sees that they were written to."""
    with RemoteEma(sharded, 0.5, False, run=run_name, client=breaking) as ema:
        change(sharded)
        ema(sharded)
        training = {name: p.to_local().clone() for name, p in sharded.named_parameters()}  # type: ignore[operator]
        weight: Any = sharded[0].weight  # type: ignore[index]
        faults.breaking = True
        with pytest.raises(ConnectionLost), ema_scope(ema, sharded):
            pytest.fail("the scope began")
        assert same({name: p.to_local() for name, p in sharded.named_parameters()}, training)  # type: ignore[operator]
        faults.breaking = False
        before = weight._version
        with ema.scope(sharded):
            inside = weight._version
            assert inside > before
        assert weight._version > inside


# --- what torch remembers ---------------------------------------------------------------------------------------------


@pytest.fixture
def swapping(make_ema: Callable[..., RemoteEma]) -> tuple[RemoteEma, nn.Linear, Tensor]:
    """An EMA, its model with other weights, and an input."""
    model = nn.Linear(8, 8)
    ema = make_ema(model, 0.9, False)
    change(model, 5)
    ema(model)
    return ema, model, torch.randn(2, 8)


def outputs(ema: RemoteEma, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of the EMA and of the training weights, each of an autocast region of its own."""
    with torch.no_grad(), ema.scope(model), torch.autocast("cpu", torch.bfloat16):
        averaged = model(batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = model(batch)
    assert not torch.equal(averaged, trained)
    return averaged, trained


def test_a_scope_inside_an_autocast_region(swapping: tuple[RemoteEma, nn.Linear, Tensor]) -> None:
    """The casts that the region holds of the other weights are not used: outputs and gradients are as outside."""
    ema, model, batch = swapping
    averaged, trained = outputs(ema, model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(model(batch).float().square().mean(), model.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
        with ema.scope(model), torch.no_grad():
            assert torch.equal(model(batch), averaged)
        output = model(batch)
    assert torch.equal(output.detach(), trained)
    assert torch.equal(torch.autograd.grad(output.float().square().mean(), model.weight)[0], expected)


WAYS: dict[str, Callable[[RemoteEma, EmaClient, nn.Module], object]] = {
    "copy_to": lambda ema, _, model: ema.copy_to(model),
    "client.copy_to": lambda ema, client, model: client.copy_to(ema.run, model),
    "pull(out=)": lambda ema, client, model: client.pull(ema.run, out=dict(model.named_parameters())),
    "restore": lambda ema, client, model: restore(ema, client.pull(ema.run), model),
}


def restore(ema: RemoteEma, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """restore() of weights that store() was given."""
    ema.store(weights[name] for name, _ in model.named_parameters())
    ema.restore(model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_each_way_inside_an_autocast_region(
    swapping: tuple[RemoteEma, nn.Linear, Tensor], client: EmaClient, way: str
) -> None:
    """Whatever writes to the model, the next forward pass computes with what was written."""
    ema, model, batch = swapping
    averaged, _ = outputs(ema, model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
        WAYS[way](ema, client, model)
        assert torch.equal(model(batch), averaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_backward_pass_notices(
    make_ema: Callable[..., RemoteEma], client: EmaClient, way: str, dtype: torch.dtype
) -> None:
    """A graph that was made with the old weights is refused instead of giving the gradients of neither."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    ema = make_ema(model, 0.9, False)
    loss = model(torch.randn(2, 8, dtype=dtype)).sum()
    WAYS[way](ema, client, model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("where", ["made", "updated", "read"])
@pytest.mark.parametrize("options", [{}, {"borrow": True}], ids=str)
@pytest.mark.parametrize("size", [4, 600])
def test_inference_mode(
    make_ema: Callable[..., RemoteEma], client: EmaClient, where: str, options: dict[str, Any], size: int
) -> None:
    """A RemoteEma made, updated or read in inference mode works on outside, with shared memory and without."""
    model = nn.Linear(size, size)

    def mode(now: str) -> torch.inference_mode:
        return torch.inference_mode(now == where)

    with mode("made"):
        ema = make_ema(model, 0.0, False, **options)
        shared = client.shared_state(model)
    change(model)
    with mode("updated"):
        ema(model)
    shared.fill(model)
    with mode("read"):
        ema.store(model.parameters())
        ema.copy_to(model)
    ema.restore(model.parameters())
    change(model)
    for _ in range(3):
        ema(model)
    with ema.scope(model):
        inside = values(model)
    assert same(inside, values(model))
    assert same(values(model), {name: tensor + 1 for name, tensor in shared.items()})


def test_tensors_made_in_inference_mode(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Such tensors can be filled, cast or not, though torch counts no writes to them."""
    model = nn.Linear(4, 4)
    run = make_ema(model, 0.9).run
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            out = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in model.named_parameters()}
        client.pull(run, out=out)
        assert same(out, {name: tensor.to(dtype) for name, tensor in values(model).items()})
        client.copy_to(run, out)


def test_a_negative_view(client: EmaClient, run_name: str) -> None:
    """A tensor whose signs torch keeps beside its memory is sent, and received, with its values."""
    number = torch.randn(5, dtype=torch.complex64)
    view = number.conj().imag
    assert view.is_neg()
    client.create_run(run_name, {"w": torch.zeros(5)}, decay=0.0, use_num_updates=False)
    client.push(run_name, {"w": view})
    assert torch.equal(client.pull(run_name)["w"], -number.imag)
    number.zero_()
    client.pull(run_name, out={"w": view})
    assert torch.equal(client.pull(run_name)["w"], view)
