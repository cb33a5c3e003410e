"""Tensors and the bytes they lie in: what a body is sent from and received into, without a second copy of the model.

A contiguous CPU tensor is sent from, and received into, its own memory. Any other tensor goes through a copy of its own
on the host, one tensor at a time.

Knows: torch. Does not know: HTTP, runs, or what the numbers mean.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from ema_client import wire
from ema_client.errors import ProtocolError, UsageError, listed
from ema_client.http.body import Body
from ema_client.protocol import TensorSpec
from ema_client.tensors.names import canonical_names

__all__ = [
    "check_targets",
    "dtype_name",
    "dtype_of",
    "encode",
    "memory",
    "new_tensors",
    "on_host",
    "parameters_of",
    "receive",
    "spec_of",
    "specs_of",
    "state_of",
    "take_flat",
    "take_strided",
]

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that an EMA of ``module`` is of: those that require gradients, by their canonical names.

    Tied parameters appear once, as in named_parameters(). The tensors are the module's own. Raises NameCollision;
    UsageError if there are none.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UsageError(
            f"{type(module).__name__} has no parameter that requires gradients",
            hint="make the EMA before freezing the model, or pass the tensors to average as a mapping",
        )
    return {name: trained[original] for original, name in canonical_names(trained).items()}


def state_of(state: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """The named tensors of a module (see parameters_of) or of a mapping, checked to be sendable.

    Raises UsageError naming the first tensor that is not.
    """
    named = parameters_of(state) if isinstance(state, nn.Module) else dict(state)
    if not named:
        raise UsageError("there is no tensor to send")
    for name, tensor in named.items():
        _check_sendable(name, tensor)
    return named


def specs_of(state: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The layout of checked tensors, in their order."""
    return tuple(spec_of(name, tensor) for name, tensor in state.items())


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """One tensor of a layout. Raises UsageError for a dtype that no run can hold."""
    if tensor.dtype not in _NAMES:
        raise _unsendable(name, tensor)
    return TensorSpec(name, tuple(tensor.shape), _NAMES[tensor.dtype])


def encode(state: Mapping[str, Tensor], slices: Mapping[str, Sequence[wire.Box]] | None = None) -> Body:
    """The safetensors body of checked tensors, in canonical order and without metadata.

    The body is read from the tensors' memory as it is sent: they must not change until then.

    slices: which slices of the run's tensors these are, in a part of an update; the others are whole.
    """
    entries, header = _framed(specs_of(state), tuple(wire.write_slices(slices or {}).items()))
    # Beforehand: between two calls to the kernel, which empties the core's caches, this would take ten times as long.
    views = {entry.name: memory(state[entry.name]) for entry in entries if _is_plain(state[entry.name])}

    def pieces() -> Iterator[memoryview]:
        yield memoryview(header)
        for name in (entry.name for entry in entries):
            yield views[name] if name in views else memory(on_host(state[name]))

    return Body(len(header) + (entries[-1].end if entries else 0), pieces)


@functools.lru_cache(maxsize=2)
def _framed(
    specs: tuple[TensorSpec, ...], metadata: tuple[tuple[str, str], ...]
) -> tuple[tuple[wire.Entry, ...], bytes]:
    """Where each tensor goes, and the header. A trainer pushes the same layout for weeks."""
    entries = wire.place(specs)
    return entries, wire.build_header(entries, dict(metadata))


def receive(
    entries: Iterable[wire.Entry], readinto: Callable[[memoryview], None], out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a stream, in the stream's order: into those of ``out``, else into new ones on the CPU.

    entries: of the stream's header, in the order of their bytes.
    readinto: fills a buffer with the next bytes of the data section.
    out: must hold exactly these names and shapes; values are cast to their dtypes and go to their devices.

    Raises UsageError naming what ``out`` lacks, has too many or of another shape, before a byte of it is changed. What
    ``readinto`` raises passes through, and ``out`` is then part old, part new.
    """
    entries = tuple(entries)
    if out is None:
        out = new_tensors(entries)
    else:
        check_targets(entries, out)
    scratch = _Scratch()
    for entry in entries:
        target = out[entry.name]
        if _is_plain(target) and _NAMES.get(target.dtype) == entry.dtype:
            readinto(memory(target))
        else:
            host = scratch.tensor(entry)
            readinto(memory(host))
            with torch.no_grad():
                target.copy_(host)
    return {entry.name: out[entry.name] for entry in entries}


def new_tensors(entries: Iterable[wire.Entry]) -> dict[str, Tensor]:
    """Tensors for a stream, on the CPU, with arbitrary values. Raises ProtocolError for a dtype that no run holds."""
    return {entry.name: torch.empty(entry.shape, dtype=dtype_of(entry)) for entry in entries}


def take_flat(readinto: Callable[[memoryview], None], target: Tensor, dtype: str) -> None:
    """Read as many elements as ``target`` has, in its order, cast to its dtype and moved to its device."""
    if _is_plain(target) and _NAMES.get(target.dtype) == dtype:
        readinto(memory(target))
        return
    host = torch.empty(target.shape, dtype=_DTYPES[dtype])
    readinto(memory(host))
    with torch.no_grad():
        target.copy_(host)


def take_strided(
    readinto: Callable[[memoryview], None], target: Tensor, dtype: str, elements: int, strides: Sequence[int]
) -> None:
    """Read ``elements`` elements, and put those that lie at ``strides`` into ``target``."""
    host = torch.empty(elements, dtype=_DTYPES[dtype])
    readinto(memory(host))
    with torch.no_grad():
        target.copy_(host.as_strided(target.shape, strides))


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor: its own memory, writable, kept alive by the view."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    # ctypes and not numpy: numpy has no bfloat16, and torch does without numpy.
    array = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def dtype_name(dtype: str | torch.dtype) -> str:
    """``torch.bfloat16`` or ``"BF16"`` as ``"BF16"``. Raises UsageError for what the service does not hold."""
    name = _NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype.upper()
    if name not in _DTYPES:
        raise UsageError(f"weights cannot be had as {dtype}", hint=f"ask for one of {', '.join(_DTYPES)}")
    return name


def _check_sendable(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in _NAMES:
        raise _unsendable(name, tensor)
    _check_dense(name, tensor)


def _unsendable(name: str, tensor: Tensor) -> UsageError:
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


def check_targets(entries: tuple[wire.Entry, ...], out: Mapping[str, Tensor]) -> None:
    """Raises UsageError unless ``out`` is what receive() may fill."""
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


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def on_host(tensor: Tensor) -> Tensor:
    """The tensor itself if its memory can be sent, else a copy that lives until it is sent."""
    return tensor if _is_plain(tensor) else tensor.detach().to("cpu").contiguous()


def dtype_of(entry: wire.Entry) -> torch.dtype:
    """The dtype of one tensor of a stream. Raises ProtocolError for one that no run holds."""
    if entry.dtype not in _DTYPES:
        raise ProtocolError(f"{entry.name!r} came as {entry.dtype}, which this client does not read")
    return _DTYPES[entry.dtype]


class _Scratch:
    """Host memory for tensors that cannot be received where they belong: one buffer, as large as the largest."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def tensor(self, entry: wire.Entry) -> Tensor:
        """Memory of the entry's dtype and shape, until the next call."""
        dtype = dtype_of(entry)
        size = prod(entry.shape) * dtype.itemsize
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size].view(dtype).view(entry.shape)
