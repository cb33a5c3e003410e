"""Slices of weights, fetched by byte ranges: a rank of a sharded model gets its own bytes and little else.

All ranges are of one version: each asks for the ETag of the first (``If-Range``), and when the version has moved on the
reading begins anew; after a few times it reads one answer from its beginning to its end and keeps what it needs.

Knows: the stream's header, where a slice's bytes are in it, HTTP's ranges. Does not know: sockets, retries, meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from ema_client import wire
from ema_client.errors import ProtocolError, UsageError
from ema_client.http.downloads import Download
from ema_client.protocol import WeightsInfo
from ema_client.reading.weights import read_header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Open", "Wanted", "fetch", "whole_length"]

#: Opens the bytes [start, stop) of the body, of the version with this ETag if one is given.
Open = Callable[[int, int | None, str | None], Download]

#: Asked for first: the header of a layout of some hundred tensors.
_FIRST_BYTES = 64 << 10
#: Bytes that are cheaper to read and drop than to leave out by another request.
_GAP_BYTES = 16 << 10
#: So often the version may move on before the whole body is read instead.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """Slices of one tensor (of ``shape`` as a whole), to be written into ``target``, where they lie back to back."""

    shape: tuple[int, ...]
    boxes: tuple[wire.Box, ...]
    target: Tensor


class _Moved(Exception):
    """The version that the first range was of is no longer there."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Bytes [start, stop) of the data, and who takes them."""

    start: int
    stop: int
    take: Callable[[Callable[[memoryview], None]], None]


def fetch(open_range: Open, wanted: Mapping[str, Wanted]) -> WeightsInfo:
    """Write the wanted slices of one version into their targets.

    Raises UsageError, before a byte is written, where the weights have no such tensor or slice. After ConnectionLost
    the targets are part old, part new.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _by_ranges(open_range, wanted)
        except _Moved:
            continue
    with open_range(0, None, None) as body:
        header, info = read_header(body)
        _read(body, 0, _jobs(header, wanted))
    return info


def _by_ranges(open_range: Open, wanted: Mapping[str, Wanted]) -> WeightsInfo:
    with open_range(0, _FIRST_BYTES, None) as first:
        etag = first.headers.get("etag", "")
        head = _Head(first, open_range, etag)
        header, info = read_header(head)
        base = head.position
    for group in _grouped(_jobs(header, wanted)):
        start, stop = group[0].start, group[-1].stop
        with open_range(base + start, base + stop, etag) as part:
            if part.status != 206:
                raise _Moved
            _read(part, start, group)
    return info


class _Head:
    """The beginning of a body of which more is fetched when it is needed."""

    def __init__(self, first: Download, open_range: Open, etag: str) -> None:
        self.url = first.url
        self.length = whole_length(first)
        self.position = 0
        self._etag = etag
        self._open = open_range
        self._buffer = memoryview(bytearray(min(first.length, _FIRST_BYTES)))
        first.readinto(self._buffer)

    def readinto(self, view: memoryview) -> None:
        there = min(len(view), max(0, len(self._buffer) - self.position))
        view[:there] = self._buffer[self.position : self.position + there]
        if there < len(view):
            with self._open(self.position + there, self.position + len(view), self._etag) as rest:
                if rest.status != 206:
                    raise _Moved
                rest.readinto(view[there:])
        self.position += len(view)


def whole_length(first: Download) -> int:
    """Bytes of the body of which this is a part, or all. Raises ProtocolError where that is not said."""
    if first.status != 206:
        return first.length
    whole = first.headers.get("content-range", "").rpartition("/")[2]
    if not (whole.isascii() and whole.isdigit()):
        raise ProtocolError(f"{first.url} answered 206 without the length of the whole")
    return int(whole)


def _grouped(jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
    group: list[_Job] = []
    for job in jobs:
        if group and job.start - group[-1].stop > _GAP_BYTES:
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def _read(body: Download, position: int, jobs: Sequence[_Job]) -> None:
    scratch = memoryview(bytearray(1 << 20))
    for job in jobs:
        while position < job.start:
            count = min(len(scratch), job.start - position)
            body.readinto(scratch[:count])
            position += count
        job.take(body.readinto)
        position = job.stop


def _jobs(header: wire.Header, wanted: Mapping[str, Wanted]) -> list[_Job]:
    entries = {entry.name: entry for entry in header.entries}
    jobs: list[_Job] = []
    for name, want in wanted.items():
        if name not in entries:
            raise UsageError(f"{name!r} is not among the weights")
        if entries[name].shape != want.shape:
            raise UsageError(f"{name!r} has shape {want.shape}, the weights {entries[name].shape}")
        jobs += _jobs_of(entries[name], want)
    return sorted(jobs, key=lambda job: job.start)


def _jobs_of(entry: wire.Entry, want: Wanted) -> Iterator[_Job]:
    from ema_client.tensors.body import take_flat, take_strided

    width = wire.DTYPE_BYTES[entry.dtype]
    ranges = [wire.range_of_box(box, entry.shape) for box in want.boxes]
    stretches = [found for found in ranges if found]
    adjacent = len(stretches) == len(ranges) and all(a[1] == b[0] for a, b in pairwise(stretches))
    if stretches and adjacent:
        # The slices of a flat range are one range of the file too.
        first, last = stretches[0][0], stretches[-1][1]
        yield _Job(entry.begin + first * width, entry.begin + last * width, _bind(take_flat, want.target, entry.dtype))
        return
    done = 0
    for box in want.boxes:
        shape = wire.box_shape(box)
        target = want.target if len(want.boxes) == 1 else want.target[done : done + prod(shape)].view(shape)
        done += prod(shape)
        strides = [prod(entry.shape[axis + 1 :]) for axis in range(len(shape))]
        first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
        last = 1 + sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
        take = _bind(take_strided, target, entry.dtype, last - first, strides)
        yield _Job(entry.begin + first * width, entry.begin + last * width, take)


def _bind(take: Callable[..., None], *given: Any) -> Callable[[Callable[[memoryview], None]], None]:
    return lambda readinto: take(readinto, *given)
