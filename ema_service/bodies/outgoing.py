"""Weights as a byte stream: a selection of tensors, perhaps cast, as one safetensors body of known length.

An arena in memory and a snapshot on disk are streamed alike: both are a header and tensors back to back. Without a cast
the stream is slices of the source's memory; with one, block after block is cast while sending.

Knows entries, dtypes and byte offsets. Does not know where the source lies, HTTP, or who reads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from ema_client.errors import InvalidRequest
from ema_client.protocol import LAYOUT_DTYPES, TensorSpec, WeightsInfo
from ema_client.wire import Entry, build_header, place
from ema_service.values import array_over, typed

__all__ = ["ReadBytes", "WeightsStream", "header_of"]

#: A function that returns bytes [start, stop) of the source's data section.
ReadBytes = Callable[[int, int], memoryview]

#: Bytes of one chunk: large enough that the loop costs nothing, small enough that a cast chunk stays in the cache.
SENT_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Tensors that are adjacent both in the source and in the body, of one dtype in the source and one in the body.

    source_begin: in the source's data section. begin, end: in the body's.
    """

    source_dtype: str
    dtype: str
    source_begin: int
    begin: int
    end: int


class WeightsStream:
    """A body of ``length`` bytes; ``chunks(start, stop)`` gives any part of the body. ``etag`` names the content.

    head_bytes: of the safetensors header and its length, which the body begins with.

    Args:
        source: the entries of the source, in the order of their bytes.
        info: what the answer says of the weights; goes into the header's ``__metadata__``.
        lineage: tells apart bodies that have the same name, version and layout and yet other bytes: a run that was
            deleted and created again, or that began anew after a crash.
        dtype: cast every tensor to this dtype; None leaves each as it is.
        prefix: only the tensors whose name begins with it.

    Raises InvalidRequest for a dtype that weights cannot be had in, or a prefix that no tensor has.
    """

    def __init__(
        self,
        source: Sequence[Entry],
        info: WeightsInfo,
        *,
        lineage: str = "",
        dtype: str | None = None,
        prefix: str | None = None,
    ):
        if dtype is not None and dtype not in LAYOUT_DTYPES:
            raise InvalidRequest(f"dtype: {dtype!r} is none of {', '.join(LAYOUT_DTYPES)}")
        chosen = [entry for entry in source if entry.name.startswith(prefix or "")]
        if not chosen:
            raise InvalidRequest(f"prefix: no tensor's name begins with {prefix!r}")
        entries = place((TensorSpec(e.name, e.shape, dtype or e.dtype) for e in chosen), sort=False)
        self._header = header_of(entries, info)
        self._stretches = _merge(chosen, entries)
        self._begins = [stretch.begin for stretch in self._stretches]
        self.info = info
        self.head_bytes = len(self._header)
        self.length = self.head_bytes + entries[-1].end
        self.etag = f'"{info.version}-{xxhash.xxh3_64_hexdigest(self._header + lineage.encode())}"'

    def chunks(
        self, read: ReadBytes, start: int = 0, stop: int | None = None, *, at_once: int = SENT_AT_ONCE
    ) -> Iterator[memoryview]:
        """The bytes [start, stop) of the body in chunks of at most ``at_once`` bytes.

        read: gives the source's bytes; may block. Chunks that are not cast are views of what ``read`` returned.
        """
        stop = self.length if stop is None else stop
        head = len(self._header)
        if start < min(stop, head):
            yield memoryview(self._header)[start : min(stop, head)]
        position, stop = max(start - head, 0), stop - head
        while position < stop:
            stretch = self._stretches[bisect_right(self._begins, position) - 1]
            end = min(stop, stretch.end, position + at_once)
            yield _piece(stretch, read, position, end)
            position = end


def header_of(entries: Sequence[Entry], info: WeightsInfo) -> bytes:
    """The header of weights, with its length prefix. info: goes into the metadata."""
    # "format: pt" is what the loaders of transformers look for.
    return build_header(entries, {"format": "pt", **info.to_metadata()})


def _merge(source: Sequence[Entry], entries: Sequence[Entry]) -> list[_Stretch]:
    """The chosen tensors as stretches: entries of the source, and the same tensors' entries in the body.

    Empty tensors are left out.
    """
    merged: list[_Stretch] = []
    for old, new in zip(source, entries, strict=True):
        if new.begin == new.end:
            continue
        last = merged[-1] if merged else None
        if last and (last.source_dtype, last.dtype) == (old.dtype, new.dtype) and _source_end(last) == old.begin:
            merged[-1] = _Stretch(last.source_dtype, last.dtype, last.source_begin, last.begin, new.end)
        else:
            merged.append(_Stretch(old.dtype, new.dtype, old.begin, new.begin, new.end))
    return merged


def _source_end(stretch: _Stretch) -> int:
    """The byte of the source's data section behind a stretch."""
    elements = (stretch.end - stretch.begin) // LAYOUT_DTYPES[stretch.dtype]
    return stretch.source_begin + elements * LAYOUT_DTYPES[stretch.source_dtype]


def _piece(stretch: _Stretch, read: ReadBytes, start: int, stop: int) -> memoryview:
    """Bytes [start, stop) of the body's data section, which lie within one stretch; cast from whole elements, then
    cut."""
    offset = start - stretch.begin
    if stretch.dtype == stretch.source_dtype:
        begin = stretch.source_begin + offset
        return read(begin, begin + stop - start)
    width, source_width = LAYOUT_DTYPES[stretch.dtype], LAYOUT_DTYPES[stretch.source_dtype]
    first, last = offset // width, -(-(stop - stretch.begin) // width)
    raw = read(stretch.source_begin + first * source_width, stretch.source_begin + last * source_width)
    cast = _cast(raw, stretch.source_dtype, stretch.dtype)
    skipped = offset - first * width
    return cast[skipped : skipped + stop - start]


def _cast(raw: memoryview, source_dtype: str, dtype: str) -> memoryview:
    """Values of one dtype as another, rounded to the nearest; ties to even."""
    from ema_service.tensors import TORCH_DTYPES, array_of, tensor_of

    values = tensor_of(typed(array_over(raw), source_dtype))
    return array_of(values.to(TORCH_DTYPES[dtype])).view("u1").data
