"""Tensors as the bytes of a body: sent from the tensors' memory and received into it, without a second whole model.

A contiguous CPU tensor is sent from, and received into, its own memory. Any other tensor goes through a copy on the
host, one tensor at a time.

Knows: torch, where in a stream each tensor lies. Does not know: HTTP, runs, or what the numbers mean.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from ema_client import wire
from ema_client.http.body import Body
from ema_client.http.digests import Digest, blocks, can_digest
from ema_client.protocol import TensorSpec
from ema_client.tensors.layout import check_targets, dtype_of, is_sent_as, specs_of
from ema_client.tensors.writing import noticed, write

__all__ = [
    "Landing",
    "digesting",
    "encode",
    "is_plain",
    "memory",
    "new_tensors",
    "on_host",
    "receive",
    "take_flat",
    "take_strided",
    "targets_in",
]

#: Bytes of a tensor on a device, or of another dtype, that are brought to the host before they are copied over.
_PIECE_BYTES = 4 << 20


def encode(state: Mapping[str, Tensor], slices: Mapping[str, Sequence[wire.Box]] | None = None) -> Body:
    """The safetensors body of checked tensors, in canonical order and without metadata.

    The body is read from the tensors' memory as it is sent: the tensors must not change until then.

    slices: for a part of an update, which slices of the run's tensors these tensors hold; the others are whole.
    """
    entries, header = _framed(specs_of(state), tuple(wire.write_slices(slices or {}).items()))
    # Beforehand: between two calls to the kernel, which empties the core's caches, this would take ten times as long.
    views = {entry.name: memory(state[entry.name]) for entry in entries if is_plain(state[entry.name])}

    def pieces() -> Iterator[memoryview]:
        yield memoryview(header)
        for name in (entry.name for entry in entries):
            yield views[name] if name in views else memory(on_host(state[name]))

    plain = len(views) == len(entries)
    return Body(
        len(header) + (entries[-1].end if entries else 0),
        pieces,
        digest=digesting(header, entries, part=slices is not None),
        data=(lambda: tuple(views[entry.name] for entry in entries)) if plain else None,
    )


def digesting(header: bytes, entries: Sequence[wire.Entry], *, part: bool) -> Callable[[], Digest] | None:
    """What digests a body of this header and these tensors, as the service does; None without xxhash. part: whether the
    body is a part of an update."""
    if not can_digest():
        return None

    def digest() -> Digest:
        sizes = (entry.end - entry.begin for entry in entries)
        # The service has no hash of a tensor without bytes.
        return Digest((size for size in sizes if size) if part else blocks(), skip=len(header))

    return digest


@functools.lru_cache(maxsize=2)
def _framed(
    specs: tuple[TensorSpec, ...], metadata: tuple[tuple[str, str], ...]
) -> tuple[tuple[wire.Entry, ...], bytes]:
    """The place of each tensor, and the header. Cached: a trainer pushes the same layout for weeks."""
    entries = wire.place(specs)
    return entries, wire.build_header(entries, dict(metadata))


def receive(
    entries: Iterable[wire.Entry], readinto: Callable[[memoryview], None], out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a stream, in the stream's order: into the tensors of ``out``, else into new ones on the CPU.

    entries: of the stream's header, in the order of their bytes.
    readinto: fills a buffer with the next bytes of the data section.
    out: must hold exactly these names and shapes; values are cast to the tensors' dtypes and go to their devices.

    Raises UsageError as check_targets() does, before a byte of ``out`` is changed. Whatever ``readinto`` raises passes
    through, and ``out`` is then part old, part new.
    """
    entries = tuple(entries)
    if out is None:
        out = new_tensors(entries)
    else:
        check_targets(entries, out)
    scratch = _Scratch()
    for entry in entries:
        _take(readinto, out[entry.name], entry, lambda entry=entry: scratch.tensor(entry))  # type: ignore[misc]
    return {entry.name: out[entry.name] for entry in entries}


class Landing:
    """Where the tensors of a stream are received in any order of stretches. Thread-safe for stretches that are apart.

    A tensor that cannot be received in place is copied over by pieces as they come, or, where its elements lie apart in
    its memory, by way of a whole copy on the host, which is freed once the tensor is written.

    entries: of the stream, in the order of their bytes; ``out``: their tensors, checked to fit.
    """

    def __init__(self, entries: Sequence[wire.Entry], out: Mapping[str, Tensor]) -> None:
        self._entries = [entry for entry in entries if entry.end > entry.begin]
        self._begins = [entry.begin for entry in self._entries]
        self._out = out
        self._plain = {
            entry.name: memory(out[entry.name])
            for entry in self._entries
            if is_plain(out[entry.name]) and is_sent_as(out[entry.name], entry.dtype)
        }
        self._copies: dict[str, _HostCopy] = {}
        self._lock = threading.Lock()
        self.tensors = {entry.name: out[entry.name] for entry in entries}

    def receive(self, readinto: Callable[[memoryview], None], start: int, stop: int) -> None:
        """Read bytes [start, stop) of the stream's data section, the next of ``readinto``, into the tensors.

        A stretch that did not come whole may be received again.
        """
        copied: list[tuple[_HostCopy, int]] = []
        first = max(0, bisect_right(self._begins, start) - 1)
        for entry in itertools.islice(self._entries, first, None):
            if entry.begin >= stop:
                break
            begin, end = max(start, entry.begin) - entry.begin, min(stop, entry.end) - entry.begin
            if entry.name in self._plain:
                readinto(self._plain[entry.name][begin:end])
            elif self._divides(entry, begin, end):
                self._by_pieces(readinto, entry, begin, end)
            else:
                copy = self._copy_of(entry)
                readinto(memory(copy.tensor)[begin:end])
                copied.append((copy, end - begin))
        for copy, count in copied:
            copy.came(count)

    def noticed(self) -> None:
        """Let torch know that the tensors' memory was written to."""
        noticed(self._out[name] for name in self._plain)

    def _divides(self, entry: wire.Entry, begin: int, end: int) -> bool:
        width = wire.DTYPE_BYTES[entry.dtype]
        return self._out[entry.name].is_contiguous() and begin % width == 0 and end % width == 0

    def _by_pieces(self, readinto: Callable[[memoryview], None], entry: wire.Entry, begin: int, end: int) -> None:
        flat, dtype = self._out[entry.name].detach().view(-1), dtype_of(entry)
        size = min(_PIECE_BYTES, end - begin)
        # From pinned memory a device copies without a detour by memory of the driver's.
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=flat.is_cuda)
        for at in range(begin, end, size):
            piece = buffer[: min(size, end - at)]
            readinto(memory(piece))
            source = piece.view(dtype)
            element = at // dtype.itemsize
            write([flat[element : element + source.numel()]], [source])

    def _copy_of(self, entry: wire.Entry) -> _HostCopy:
        with self._lock:
            if entry.name not in self._copies:
                host = torch.empty(entry.shape, dtype=dtype_of(entry), device="cpu")
                self._copies[entry.name] = _HostCopy(host, entry.end - entry.begin, partial(self._written, entry))
            return self._copies[entry.name]

    def _written(self, entry: wire.Entry) -> None:
        with self._lock:
            copy = self._copies.pop(entry.name)
        write([self._out[entry.name]], [copy.tensor])


class _HostCopy:
    """A copy on the host of a tensor that comes in stretches. whole: called once ``missing`` bytes have come."""

    def __init__(self, tensor: Tensor, missing: int, whole: Callable[[], None]) -> None:
        self.tensor = tensor
        self._missing = missing
        self._whole = whole
        self._lock = threading.Lock()

    def came(self, count: int) -> None:
        with self._lock:
            self._missing -= count
            over = self._missing == 0
        if over:
            self._whole()


def targets_in(out: Mapping[str, Tensor] | None) -> Callable[[Iterable[wire.Entry]], Mapping[str, Tensor]]:
    """What gives the tensors to receive a stream in: those of ``out``, once they are checked, or new ones."""
    if out is None:
        return new_tensors
    return lambda entries: _checked(tuple(entries), out)


def _checked(entries: tuple[wire.Entry, ...], out: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    check_targets(entries, out)
    return out


def new_tensors(entries: Iterable[wire.Entry]) -> dict[str, Tensor]:
    """Tensors for a stream, on the CPU, with arbitrary values. Raises ProtocolError for a dtype that no run holds."""
    return {entry.name: torch.empty(entry.shape, dtype=dtype_of(entry), device="cpu") for entry in entries}


def take_flat(readinto: Callable[[memoryview], None], target: Tensor, entry: wire.Entry) -> None:
    """Read as many elements as ``target`` has, in row-major order; cast and moved as copy_() does."""
    _take(readinto, target, entry, lambda: torch.empty(target.shape, dtype=dtype_of(entry), device="cpu"))


def take_strided(
    readinto: Callable[[memoryview], None], target: Tensor, entry: wire.Entry, elements: int, strides: Sequence[int]
) -> None:
    """Read ``elements`` elements, of which ``target``, laid out with ``strides``, takes its own."""
    host = torch.empty(elements, dtype=dtype_of(entry), device="cpu")
    readinto(memory(host))
    write([target], [host.as_strided(target.shape, strides)])


def _take(
    readinto: Callable[[memoryview], None], target: Tensor, entry: wire.Entry, scratch: Callable[[], Tensor]
) -> None:
    """Read a tensor into ``target``'s own memory where that can be, else by way of ``scratch``."""
    if not (is_plain(target) and is_sent_as(target, entry.dtype)):
        host = scratch()
        readinto(memory(host))
        write([target], [host])
        return
    try:
        readinto(memory(target))
    finally:
        noticed([target])


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor: the tensor's own memory, writable, kept alive by the view."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    # ctypes and not numpy: numpy has no bfloat16, and torch does without numpy.
    array = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def on_host(tensor: Tensor) -> Tensor:
    """The tensor itself if its memory can be sent, else a contiguous copy on the CPU, which the caller owns."""
    return tensor if is_plain(tensor) else tensor.detach().to("cpu").resolve_neg().contiguous()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's own memory can be sent, and received into."""
    # A negative view (of a conjugate's imaginary part) says of its memory that the signs are to be turned.
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg()


class _Scratch:
    """Host memory for tensors that cannot be received in place: a buffer as large as the largest such tensor."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def tensor(self, entry: wire.Entry) -> Tensor:
        """A tensor of the entry's dtype and shape in the buffer, valid until the next call."""
        dtype = dtype_of(entry)
        size = prod(entry.shape) * dtype.itemsize
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._buffer[:size].view(dtype).view(entry.shape)
