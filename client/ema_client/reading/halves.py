"""Large weights over two connections at once, each of which brings half of one version.

One connection is a thread of the service that sends and a thread here that receives; with two connections, one works
while the other waits (1 GiB over loopback on 2 cores: 7.4 GB/s, where one connection reaches 4.8 and three 6.3). The
second half is asked for by the ETag of the first (``If-Range``); where the version has moved on between the two
requests, which lie a millisecond apart, the second request has no half to give.

Knows: the stream's header, HTTP's ranges, threads. Does not know: sockets, retries, which weights are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ema_client.http.downloads import Download
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Checked, Tally
from ema_client.reading.ranges import OpenRange, whole_length
from ema_client.reading.weights import Into, Weights, read_header
from ema_client.wire import Entry, Header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pull_halves", "split_of"]

#: The header's length varies with the numbers in the header: the first request asks for so many bytes more.
_SLACK_BYTES = 4 << 10


def split_of(header: Header, length: int) -> int:
    """The byte of a body of ``length`` bytes at which its second half begins: where the tensor nearest the middle ends.

    0 where one tensor is most of the body: a tensor is received over one connection.
    """
    half = header.data_bytes // 2
    cut = min((entry.end for entry in header.entries), key=lambda end: abs(end - half), default=0)
    if min(cut, header.data_bytes - cut) < header.data_bytes // 4:
        return 0
    return length - header.data_bytes + cut


def pull_halves(
    asked: Asked,
    open_range: OpenRange,
    split: int,
    into: Into,
    *,
    check: bool = False,
    tally: Tally | None = None,
) -> Weights | None:
    """Pull weights in two halves; ``split`` is the result of split_of() at the latest pull of the same weights.

    into: gives the tensors to receive in; see Into. check: whether to compare the data with the service's digest, which
    may raise DigestMismatch. tally: told of the bytes as they come. None where the weights have no such halves, or
    moved on to another version before the second request: the caller then pulls the whole, and the tensors may be part
    new.
    """
    from ema_client.tensors.body import receive

    with open_range(0, split + _SLACK_BYTES, None) as first:
        if first.status != 206:
            return None
        source = _FirstPart(first)
        header, info = read_header(source, asked)
        entries, there = header.entries, first.length - source.position
        mine = tuple(entry for entry in entries if entry.end <= there)
        others = entries[len(mine) :]
        if not mine or not others:
            return None
        # Before the other thread begins: the C library would give a new thread memory that was never touched.
        target = into(entries)
        etag, begin = first.headers.get("etag", ""), source.position + others[0].begin
        data = Checked(first, wanted=check, moved=None if tally is None else tally.of(header.data_bytes))

        def second_half() -> dict[str, Tensor] | None:
            with open_range(begin, source.length, etag) as second:
                if second.status != 206:
                    return None
                return receive(others, data.rest(others[0].begin, second.readinto), _of(target, others))

        # The block waits for the thread whatever happens: the thread writes to the tensors until its end.
        with ThreadPoolExecutor(1, "ema pull") as thread:
            coming = thread.submit(second_half)
            tensors = receive(mine, data.readinto, _of(target, mine))
            first.readinto(memoryview(bytearray(there - mine[-1].end)))
    rest = coming.result()
    if rest is None:
        return None
    data.check()
    return Weights({**tensors, **rest}, info)


class _FirstPart:
    """The first part of a body as a Source of the whole body's length. position: bytes read so far."""

    def __init__(self, first: Download) -> None:
        self._first = first
        self.url = first.url
        self.length = whole_length(first)
        self.position = 0

    def readinto(self, view: memoryview) -> None:
        self._first.readinto(view)
        self.position += len(view)


def _of(tensors: Mapping[str, Tensor], entries: tuple[Entry, ...]) -> dict[str, Tensor]:
    return {entry.name: tensors[entry.name] for entry in entries}
