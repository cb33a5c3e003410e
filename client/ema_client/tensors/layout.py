"""The layout of a state: which tensors an EMA is of, their names, shapes and dtypes, and what cannot be sent.

Knows: torch, the dtypes that a run can hold. Does not know: bytes, HTTP, runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ema_client import wire
from ema_client.errors import ProtocolError, UsageError, listed
from ema_client.protocol import TensorSpec
from ema_client.tensors.wrappers import bare_names

__all__ = [
    "Named",
    "check_targets",
    "check_writable",
    "dtype_name",
    "dtype_of",
    "is_lazy",
    "is_sent_as",
    "not_named",
    "parameters_of",
    "spec_of",
    "specs_of",
    "state_of",
]

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

#: Tensors by name: a module, or a mapping.
Named = Mapping[str, Tensor] | nn.Module


def parameters_of(module: nn.Module, *, frozen: bool = False) -> dict[str, Tensor]:
    """The parameters to average of ``module``: all that require gradients, by their canonical names.

    frozen: with the floating-point parameters that do not.
    Tied parameters appear once, as in named_parameters(). The tensors are the module's own. Raises NameCollision;
    UsageError if no parameter requires gradients.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UsageError(
            f"{type(module).__name__} has no parameter that requires gradients",
            hint="make the EMA before freezing the model, or pass the tensors to average as a mapping",
        )
    chosen = {n: p for n, p in module.named_parameters() if n in trained or (frozen and p.is_floating_point())}
    return {name: chosen[original] for original, name in bare_names(module, chosen).items()}


def state_of(state: Named) -> dict[str, Tensor]:
    """The named tensors of a module (see parameters_of) or of a mapping, checked to be sendable.

    Raises UsageError for what has no names, and naming the first tensor that cannot be sent.
    """
    if not isinstance(state, nn.Module | Mapping):
        raise not_named(state)
    named = parameters_of(state) if isinstance(state, nn.Module) else dict(state)
    if not named:
        raise UsageError("there is no tensor to send")
    for name, tensor in named.items():
        _check_sendable(name, tensor)
    return named


def specs_of(state: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The layout of checked tensors, in the order of the mapping."""
    return tuple(spec_of(name, tensor) for name, tensor in state.items())


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """A tensor's entry in a layout. Raises UsageError for a dtype that no run can hold."""
    if tensor.dtype not in _NAMES:
        raise _unsendable(name, tensor)
    return TensorSpec(name, tuple(tensor.shape), _NAMES[tensor.dtype])


def dtype_name(dtype: str | torch.dtype) -> str:
    """``torch.bfloat16`` or ``"BF16"`` as ``"BF16"``. Raises UsageError for a dtype that no run can hold."""
    name = _NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype.upper()
    if name not in _DTYPES:
        raise UsageError(f"weights cannot be had as {dtype}", hint=f"ask for one of {', '.join(_DTYPES)}")
    return name


def dtype_of(entry: wire.Entry) -> torch.dtype:
    """The torch dtype of a tensor in a stream. Raises ProtocolError for a dtype that no run can hold."""
    if entry.dtype not in _DTYPES:
        raise ProtocolError(f"{entry.name!r} came as {entry.dtype}, which this client does not read")
    return _DTYPES[entry.dtype]


def is_sent_as(tensor: Tensor, dtype: str) -> bool:
    """Whether the elements of ``tensor`` are what a stream calls ``dtype``, so that no cast is needed."""
    return _NAMES.get(tensor.dtype) == dtype


def check_targets(entries: tuple[wire.Entry, ...], out: Mapping[str, Tensor]) -> None:
    """Raises UsageError unless ``out`` has a dense floating-point tensor of the same shape for each entry, and no more.

    entries: of the stream that ``out`` is to receive. The message names what is missing, additional or of another
    shape.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    faults = [f"{name!r} is missing" for name in shapes if name not in out]
    faults += [f"{name!r} is not among the weights" for name in out if name not in shapes]
    faults += [
        f"{name!r} has shape {tuple(out[name].shape)}, the weights {shape}"
        for name, shape in shapes.items()
        if name in out and tuple(out[name].shape) != shape
    ]
    if faults:
        raise UsageError(
            f"the tensors to fill are not those of the weights: {listed(faults, '; ')}",
            hint="give exactly the tensors of the run; nothing was written",
        )
    for name, tensor in out.items():
        if not tensor.is_floating_point():
            raise UsageError(f"{name!r} is of {tensor.dtype}; weights need floating point")
        _check_dense(name, tensor)
        check_writable(repr(name), tensor)


def check_writable(what: str, tensor: Tensor) -> None:
    """Raises UsageError for a tensor that torch refuses to write to, as several elements lie in the same memory."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise UsageError(
            f"{what} has several elements in the same memory, as expand() makes them, and cannot be written to",
            hint="give the model memory for each element: nn.Parameter(tensor.clone()); nothing was written",
        )


def not_named(given: object) -> UsageError:
    """The error for tensors without names, such as model.parameters()."""
    return UsageError(
        f"a module, or a mapping from name to tensor, is needed, not a {type(given).__name__}",
        hint="give the model itself or, of some of its parameters, dict(model.named_parameters())",
    )


def is_lazy(tensor: Tensor) -> bool:
    """Whether a parameter or buffer gets its shape with the first batch."""
    return bool(nn.parameter.is_lazy(tensor))


def _check_sendable(name: str, tensor: object) -> None:
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is a {type(name).__name__}, not a tensor's name")
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    if is_lazy(tensor):
        raise UsageError(
            f"{name!r} has no shape yet, as its module is lazy",
            hint="run a batch through the model before its EMA is made",
        )
    if tensor.dtype not in _NAMES:
        raise _unsendable(name, tensor)
    _check_dense(name, tensor)


def _unsendable(name: str, tensor: Tensor) -> UsageError:
    if tensor.is_complex():
        return UsageError(
            f"{name!r} is of {tensor.dtype}, and an EMA is kept of real numbers",
            hint="give a mapping from name to tensor, with torch.view_as_real() of the complex ones",
        )
    return UsageError(
        f"{name!r} is of {tensor.dtype}; an EMA is kept of {', '.join(_DTYPES)}",
        hint="leave out what is not averaged (counters, masks), or cast it",
    )


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise UsageError(f"{name!r} is on the meta device and has no values", hint="give the model its weights first")
    if tensor.layout != torch.strided:
        raise UsageError(f"{name!r} is a {tensor.layout} tensor", hint="make it dense")
    if tensor.numel() and tensor.data_ptr() == 0:
        # DTensor and other wrappers, or a parameter whose storage is freed between uses.
        kind = type(tensor).__name__
        raise UsageError(f"{name!r} ({kind}) has no memory of its own", hint="gather sharded tensors first")
