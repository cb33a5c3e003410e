"""Names of a wrapped model's parameters, in the wrappers of torch and of frameworks. Knows the real wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from ema_client import EmaClient, RemoteEma
from ema_client.errors import NameCollision
from ema_client.tensors.layout import parameters_of
from ema_client.tensors.wrappers import bare_name
from tests.client.trainers import same, values


class Net(nn.Module):
    """A model with names of its own that others' wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2))
        self._module = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self._module(self.module(batch)) + self.weight  # type: ignore[no-any-return]


class Alone(nn.Module):
    """A model all of which is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.module(batch)  # type: ignore[no-any-return]


def fabric(model: nn.Module) -> nn.Module:
    made: Any = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return made.setup(model)  # type: ignore[no-any-return]


def opacus(model: nn.Module) -> nn.Module:
    made: Any = pytest.importorskip("opacus.grad_sample").GradSampleModule
    return made(model, strict=False)  # type: ignore[no-any-return]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


class PrivateModule(nn.Module):
    """As Opacus' GradSampleModule has the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._module = model

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self._module(batch)  # type: ignore[no-any-return]


class Parallel(nn.DataParallel[nn.Module]):
    """A class of a user's that is a wrapper."""


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A wrapper around a part of a model."""

    def wrapped(model: nn.Module) -> nn.Module:
        for name, child in list(model.named_children()):
            setattr(model, name, wrap(child))
        return model

    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel(compile)": lambda model: nn.DataParallel(compiled(model)),
    "a subclass": Parallel,
    "AveragedModel": AveragedModel,
    "checkpointing": checkpoint_wrapper,
    "Fabric": fabric,
    "Fabric(DataParallel)": lambda model: fabric(nn.DataParallel(model)),
    "Opacus": opacus,
    "as Opacus": PrivateModule,
    "DataParallel inside": inside(nn.DataParallel),
    "compile inside": inside(compiled),
    "twice": lambda model: nn.DataParallel(nn.DataParallel(PrivateModule(model))),
}


@pytest.mark.parametrize("model", [Net, Alone])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_names_of_the_bare_model(
    make_ema: Callable[..., RemoteEma], client: EmaClient, wrapper: str, model: type[nn.Module]
) -> None:
    """Whatever wraps a trainer's model, an evaluator's bare model takes the pulled weights; a bare trainer goes on."""
    wrapped = WRAPPERS[wrapper](model())
    ema = make_ema(wrapped, 0.0, False)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(1)
    ema(wrapped)
    ema.flush()
    bare = model()
    bare.load_state_dict(client.pull(ema.run))
    assert {tuple(each.flatten().tolist()) for each in bare.parameters()} == {
        tuple(each.flatten().tolist()) for each in wrapped.parameters()
    }
    client.copy_to(ema.run, bare)
    with ema.scope(wrapped):
        pass
    again = make_ema(bare, 0.0, False, resume=True)
    again(bare)
    again.flush()
    assert same(client.pull(ema.run), values(bare))


def test_the_last_component_stays() -> None:
    """A parameter may have a wrapper's word for its own name."""
    wrapped = nn.DataParallel(nn.ParameterDict({"module": torch.zeros(1)}))
    assert list(parameters_of(wrapped)) == ["module"]


def test_names_of_no_modules() -> None:
    """Of names whose modules are not there, only words that no model has are left out."""
    assert bare_name(nn.Module(), "a.module._fsdp_wrapped_module.b._orig_mod.w") == "a.module.b.w"


def test_two_names_that_become_one() -> None:
    """Are refused by both names."""
    model = nn.Module()
    model.add_module("_orig_mod", nn.Linear(1, 1))
    model.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(NameCollision, match=r"'weight' and '_orig_mod\.weight' are both 'weight'"):
        parameters_of(model)
