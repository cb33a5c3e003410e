"""Which tensors are sent, under which names, and what cannot be sent. Knows torch; no byte is sent here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client.errors import NameCollision, UsageError
from ema_client.protocol import TensorSpec
from ema_client.tensors.layout import dtype_name, parameters_of, specs_of, state_of


def test_specs_are_in_safetensors_words() -> None:
    """The layout names dtypes as the protocol does."""
    state = {"w": torch.zeros(2, 3).bfloat16(), "s": torch.tensor(1.0).double()}

    assert specs_of(state) == (TensorSpec("w", (2, 3), "BF16"), TensorSpec("s", (), "F64"))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"'w' is of torch\.int64"),
        (torch.zeros(2, dtype=torch.complex64), r"'w' is of torch\.complex64"),
        (torch.zeros(2, dtype=torch.bool), r"'w' is of torch\.bool"),
        (torch.zeros(2, device="meta"), "'w' is on the meta device"),
        (torch.eye(3).to_sparse(), "'w' is a .*sparse"),
        (1.5, "'w' is a float"),
        (None, "'w' is a NoneType"),
    ],
)
def test_what_cannot_be_sent_is_named(tensor: Any, message: str) -> None:
    """A tensor without values, of another dtype or no tensor at all is refused by its name."""
    with pytest.raises(UsageError, match=message):
        state_of({"good": torch.zeros(1), "w": tensor})


def test_wrapped_tensor_without_memory_is_refused() -> None:
    """A sharded or wrapped tensor has no address to send from: it is refused and never read at address zero."""

    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls: type[Wrapper]) -> Wrapper:
            return Tensor._make_wrapper_subclass(cls, (4,), dtype=torch.float32)

        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(UsageError, match=r"'w' \(Wrapper\) has no memory of its own"):
        state_of({"w": Wrapper()})


def test_nothing_to_send_is_refused() -> None:
    """An empty mapping and a wholly frozen model are mistakes, not empty runs."""
    frozen = nn.Linear(2, 2).requires_grad_(False)

    with pytest.raises(UsageError, match="no tensor"):
        state_of({})
    with pytest.raises(UsageError, match="Linear has no parameter that requires gradients"):
        state_of(frozen)


class Model(nn.Module):
    """A submodule of each kind that matters here: trained, frozen, tied, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.norm(self.frozen(self.first(x))))  # type: ignore[no-any-return]


def compiled(model: nn.Module) -> nn.Module:
    # The eager backend: wrapped as by any other, without loading a compiler.
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


NAMES = ["first.weight", "first.bias", "norm.weight", "norm.bias"]


def test_parameters_are_the_trained_ones_once() -> None:
    """Frozen parameters and buffers are left out, tied ones appear once, and the tensors are the model's own."""
    model = Model()
    parameters = parameters_of(model)

    assert list(parameters) == NAMES
    assert parameters["first.weight"] is model.first.weight


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        lambda model: nn.DataParallel(nn.DataParallel(model)),
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: nn.DataParallel(compiled(model)),
    ],
)
def test_wrapping_a_model_changes_no_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A compiled or data-parallel model is the same model to the service."""
    assert list(parameters_of(wrap(Model()))) == NAMES


def test_activation_checkpointing_changes_no_name() -> None:
    """torch's checkpoint wrapper leaves no trace in a name."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = Model()
    model.first = wrapper.checkpoint_wrapper(model.first)

    assert sorted(parameters_of(model)) == sorted(NAMES)


def test_colliding_parameters_are_refused() -> None:
    """A wrapper with a parameter of its own is refused where the names make two parameters one."""
    model = nn.DataParallel(nn.Linear(1, 1))
    model.weight = nn.Parameter(torch.zeros(1))

    with pytest.raises(NameCollision, match=r"'weight' and 'module\.weight'"):
        parameters_of(model)


def test_dtype_names() -> None:
    """torch's and the protocol's words for a dtype are both understood; others are refused with those that are."""
    assert dtype_name(torch.bfloat16) == dtype_name("bf16") == "BF16"
    with pytest.raises(UsageError, match=r"torch\.int8.*F64, F32, BF16, F16"):
        dtype_name(torch.int8)
    with pytest.raises(UsageError, match="float32"):
        dtype_name("float32")
