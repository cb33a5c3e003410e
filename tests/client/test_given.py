"""What may be given as a model or as weights: mappings, what has no names, tensors that no average can be made of.

Knows torch, safetensors and the real service. Does not know how tensors are found again in a model.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma, Weights
from ema_client.errors import UsageError
from tests.client.trainers import LitEmaOracle, Zoo, same, values

# --- named tensors in place of a module -------------------------------------------------------------------------------

MAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: dict(model.named_parameters()),
    "trained": lambda model: {name: p for name, p in model.named_parameters() if p.requires_grad},
    "state dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("options", [{}, {"borrow": True}], ids=str)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_mapping_is_a_model(
    make_ema: Callable[..., RemoteEma], client: EmaClient, mapping: str, options: dict[str, Any]
) -> None:
    """Updates, scopes and copies of a mapping, made once or at each call, are those of the module with its tensors."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    given, fresh = MAPPINGS[mapping](model), lambda: MAPPINGS[mapping](model)
    ema, oracle = make_ema(given, 0.9, **options), LitEmaOracle(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for now in (given, fresh(), fresh()):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        ema(now)
        oracle(model)
    training = values(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)
    with ema.scope(fresh()):
        assert same(values(model), oracle.shadow)
    assert same(values(model), training)
    ema.store(fresh())
    ema.copy_to(fresh())
    assert same(values(model), oracle.shadow)
    ema.restore(model)
    assert same(values(model), training)


def test_a_mapping_says_what_is_averaged(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Frozen parameters too, and tied ones once."""
    model = Zoo().requires_grad_(False)
    ema = make_ema(dict(model.named_parameters(remove_duplicate=False)))
    assert set(client.pull(ema.run)) == set(values(model))


NAMELESS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters()": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "tensor": lambda model: next(model.parameters()),
    "named_parameters()": lambda model: model.named_parameters(),
    "class": type,
    "nothing": lambda _: None,
}

CALLS: dict[str, Callable[[RemoteEma, EmaClient, Any], object]] = {
    "RemoteEma": lambda ema, client, given: RemoteEma(given, run=f"{ema.run}-2", client=client),
    "update": lambda ema, _, given: ema(given),
    "copy_to": lambda ema, _, given: ema.copy_to(given),
    "scope": lambda ema, _, given: ema.scope(given).__enter__(),
    "create_run": lambda ema, client, given: client.create_run(f"{ema.run}-2", given),
    "push": lambda ema, client, given: client.push(ema.run, given),
    "client.copy_to": lambda ema, client, given: client.copy_to(ema.run, given),
    "shared_state": lambda _, client, given: client.shared_state(given),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_has_no_names(make_ema: Callable[..., RemoteEma], client: EmaClient, call: str) -> None:
    """As torch_ema's and EMAModel's users give it: refused, with the line to write."""
    model = nn.Linear(2, 2)
    ema = make_ema(model)
    for given in NAMELESS.values():
        with pytest.raises(UsageError, match=r"a module, or a mapping.*dict\(model\.named_parameters\(\)\)"):
            CALLS[call](ema, client, given(model))
    ema(model)
    ema.flush()


@pytest.mark.parametrize("given", [[1, 2], ["w"], nn.Sequential(nn.Linear(1, 1)).children()])
def test_what_cannot_be_stored(make_ema: Callable[..., RemoteEma], given: Any) -> None:
    """store() is told so too."""
    with pytest.raises(UsageError, match=r"give model\.parameters\(\)"):
        make_ema(nn.Linear(2, 2)).store(given)


def test_names_are_strings(client: EmaClient, run_name: str) -> None:
    """As an optimizer's state has numbers for names."""
    with pytest.raises(UsageError, match="0 is a int, not a tensor's name"):
        client.create_run(run_name, {0: torch.ones(1)})  # type: ignore[dict-item]


# --- tensors that no average can be made of ---------------------------------------------------------------------------


class Masked(nn.Module):
    """With a mask of infinities among its buffers, as attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, batch: Tensor) -> Tensor:
        return self.norm(batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_a_buffer_of_infinities(server: Any, client: EmaClient, run_name: str, buffers: Any) -> None:
    """Stays the model's own, and is named once, by the line that made the EMA; the other buffers go with the EMA."""
    model = Masked()
    with pytest.warns(UserWarning, match="infinities or NaN and stay the model's own: mask") as warned:
        ema = RemoteEma(model, 0.5, run=run_name, url=server.url, buffers=buffers)
    assert [each.filename for each in warned] == [__file__]
    with ema:
        for _ in range(3):
            model(torch.randn(4, 3)).sum().backward()
            ema(model)
        mask = model.mask.clone()  # type: ignore[operator]
        with ema.scope(model):
            assert torch.equal(model.mask, mask)  # type: ignore[arg-type]
    assert ema.stats.sent == 3
    assert set(client.pull(run_name)) == {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}


def test_a_lazy_module(make_ema: Callable[..., RemoteEma]) -> None:
    """Is named, with what can be done."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(UsageError, match=r"'1\.weight' has no shape yet.*run a batch through the model"):
        make_ema(model)
    model(torch.randn(2, 3))
    make_ema(model)(model)


def test_a_lazy_buffer(make_ema: Callable[..., RemoteEma]) -> None:
    """Is named where it would be averaged, and else stands in nobody's way."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(UsageError, match=r"'1\.running_mean' has no shape yet"):
        make_ema(model, buffers="average")
    make_ema(model)(model)


def test_a_complex_parameter(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Is named, with what can be done, and what is said can be done."""
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    with pytest.raises(UsageError, match=r"'w' is of torch\.complex64.*torch\.view_as_real\(\)"):
        make_ema(model)
    real = {"w": torch.view_as_real(model.w.detach())}
    ema = make_ema(real, 0.0, False)
    with torch.no_grad():
        model.w.mul_(2)
    ema(real)
    ema.flush()
    assert torch.equal(torch.view_as_complex(client.pull(ema.run)["w"]), model.w)


# --- pulled weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pulled(client: EmaClient, run_name: str) -> Weights:
    client.create_run(run_name, Zoo())
    return client.pull(run_name)


def test_pulled_weights_are_saved_as_a_state_dict_is(pulled: Weights, tmp_path: Path) -> None:
    """By torch.save, loaded without weights_only=False; by safetensors; by pickle."""
    torch.save(pulled, tmp_path / "w.pt")
    save_file(pulled, tmp_path / "w.safetensors")
    buffer = io.BytesIO()
    torch.save({"state_dict": pulled, "step": 3}, buffer)
    buffer.seek(0)
    for loaded in (
        torch.load(tmp_path / "w.pt", weights_only=True),
        load_file(tmp_path / "w.safetensors"),
        torch.load(buffer, weights_only=True)["state_dict"],
        pickle.loads(pickle.dumps(pulled)),  # noqa: S301 - of our own making
    ):
        assert same(loaded, pulled)
    assert type(torch.load(tmp_path / "w.pt", weights_only=True)) is OrderedDict


def test_copies_of_pulled_weights(pulled: Weights) -> None:
    """Keep what they are of; a deep copy has tensors of its own."""
    shallow, deep = copy.copy(pulled), copy.deepcopy(pulled)
    assert shallow.info == deep.info == pulled.info
    assert same(deep, pulled)
    assert all(shallow[name] is tensor and deep[name] is not tensor for name, tensor in pulled.items())
