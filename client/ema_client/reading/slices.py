"""Slices of weights, fetched by byte ranges: a rank of a sharded model gets its own bytes and little else.

All ranges are of one version: each request names the ETag of the first (``If-Range``). When the version has moved on,
the reading begins anew; after a few times the whole body is read instead, and only the slices in it are used.

Knows: the stream's header, where a slice's bytes are in the stream, HTTP's ranges. Does not know: sockets, retries,
meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from ema_client import wire
from ema_client.errors import UsageError
from ema_client.http.downloads import Download
from ema_client.protocol import WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.ranges import OpenRange, whole_length
from ema_client.reading.weights import read_header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Wanted", "fetch"]

#: Bytes of the first request: the header of a layout of some hundred tensors.
_FIRST_BYTES = 64 << 10
#: A gap of at most so many bytes between two slices is read and dropped: another request would take longer.
_GAP_BYTES = 16 << 10
#: The version may move on so often before the whole body is read instead.
_ATTEMPTS = 3
#: Bytes between two slices are dropped by way of a buffer of this size.
_DROP_BYTES = 1 << 20

#: Fills a buffer with the next bytes of a body.
_ReadInto = Callable[[memoryview], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Slices of a tensor of ``shape``, to be written into ``target``, back to back in row-major order.

    target: of the slice's shape, or flat where there are several slices; on any device, of any floating-point dtype.
    """

    shape: tuple[int, ...]
    boxes: tuple[wire.Box, ...]
    target: Tensor


class _Moved(Exception):
    """The run has moved on from the version of the first range."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Bytes [start, stop) of the data section, and the function that reads the bytes into their target."""

    start: int
    stop: int
    take: Callable[[_ReadInto], None]


def fetch(asked: Asked, open_range: OpenRange, wanted: Mapping[str, Wanted]) -> WeightsInfo:
    """Write the wanted slices of one version, by tensor name, into their targets.

    Raises UsageError, before a byte is written, where the weights have no such tensor or slice. After ConnectionLost
    the targets are part old, part new.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _by_ranges(asked, open_range, wanted)
        except _Moved:
            continue
    with open_range(0, None, None) as body:
        header, info = read_header(body, asked)
        _read(body, 0, _jobs(header, wanted))
    return info


def _by_ranges(asked: Asked, open_range: OpenRange, wanted: Mapping[str, Wanted]) -> WeightsInfo:
    with open_range(0, _FIRST_BYTES, None) as first:
        etag = first.headers.get("etag", "")
        head = _Head(first, open_range, etag)
        header, info = read_header(head, asked)
        base = head.position
    for group in _grouped(_jobs(header, wanted)):
        start, stop = group[0].start, group[-1].stop
        with open_range(base + start, base + stop, etag) as part:
            if part.status != 206:
                raise _Moved
            _read(part, start, group)
    return info


class _Head:
    """The beginning of a body as a Source, which fetches further bytes when they are read. position: bytes read."""

    def __init__(self, first: Download, open_range: OpenRange, etag: str) -> None:
        self.url = first.url
        self.length = whole_length(first)
        self.position = 0
        self._etag = etag
        self._open_range = open_range
        self._buffer = memoryview(bytearray(min(first.length, _FIRST_BYTES)))
        first.readinto(self._buffer)

    def readinto(self, view: memoryview) -> None:
        there = min(len(view), max(0, len(self._buffer) - self.position))
        view[:there] = self._buffer[self.position : self.position + there]
        if there < len(view):
            with self._open_range(self.position + there, self.position + len(view), self._etag) as rest:
                if rest.status != 206:
                    raise _Moved
                rest.readinto(view[there:])
        self.position += len(view)


def _grouped(jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
    """The jobs in groups, a request for each group: small gaps between jobs are read along."""
    group: list[_Job] = []
    for job in jobs:
        if group and job.start - group[-1].stop > _GAP_BYTES:
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def _read(body: Download, position: int, jobs: Sequence[_Job]) -> None:
    """Do ``jobs``, in the order of their bytes, with a body that stands at byte ``position`` of the data section."""
    dropped = memoryview(bytearray(_DROP_BYTES))
    for job in jobs:
        while position < job.start:
            count = min(len(dropped), job.start - position)
            body.readinto(dropped[:count])
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
    ranges = [wire.range_of_box(box, entry.shape) for box in want.boxes]
    stretches = [found for found in ranges if found]
    adjacent = len(stretches) == len(ranges) and all(a[1] == b[0] for a, b in pairwise(stretches))
    if stretches and adjacent:
        # The slices of a range of the flattened tensor are a range of the stream too.
        yield _flat_job(entry, want.target, stretches[0][0], stretches[-1][1])
        return
    done = 0
    for box in want.boxes:
        shape = wire.box_shape(box)
        target = want.target if len(want.boxes) == 1 else want.target[done : done + prod(shape)].view(shape)
        done += prod(shape)
        yield _strided_job(entry, target, box)


def _flat_job(entry: wire.Entry, target: Tensor, first: int, last: int) -> _Job:
    """Elements [first, last) of the flattened tensor into ``target``."""
    from ema_client.tensors.body import take_flat

    width = wire.DTYPE_BYTES[entry.dtype]
    return _Job(
        entry.begin + first * width, entry.begin + last * width, lambda readinto: take_flat(readinto, target, entry)
    )


def _strided_job(entry: wire.Entry, target: Tensor, box: wire.Box) -> _Job:
    """A slice into ``target``: the bytes from the slice's first element to its last, with the elements between."""
    from ema_client.tensors.body import take_strided

    width = wire.DTYPE_BYTES[entry.dtype]
    strides = [prod(entry.shape[axis + 1 :]) for axis in range(len(box))]
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    last = 1 + sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
    return _Job(
        entry.begin + first * width,
        entry.begin + last * width,
        lambda readinto: take_strided(readinto, target, entry, last - first, strides),
    )
