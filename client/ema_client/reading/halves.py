"""Large weights over two connections at once, each bringing half of one version.

One connection is one thread of the service that sends and one here that receives; of two, what one waits for the other
does (1 GiB over loopback on 2 cores: 7.4 GB/s where one reaches 4.8; three 6.3). The second half is asked for by the
ETag of the first (``If-Range``); where the version has moved on in between, which takes a millisecond, there is none.

Knows: the stream's header, HTTP's ranges, threads. Does not know: sockets, retries, which weights are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ema_client.http.downloads import Download
from ema_client.reading.slices import Open, whole_length
from ema_client.reading.weights import Weights, read_header
from ema_client.tensors.body import check_targets, new_tensors, receive
from ema_client.wire import Entry, Header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SPLIT_ABOVE", "pull_halves", "split_of"]

#: A body of less is here before a second connection would be worth its thread.
SPLIT_ABOVE = 64 << 20
#: The header's length changes with the numbers in it: the first half is asked for with so much more.
_SLACK_BYTES = 4 << 10


def split_of(header: Header, length: int) -> int:
    """The byte of a body of ``length`` bytes where its second half begins, at a tensor's; 0 where it is too small to be
    parted, or one tensor is most of it: a tensor is received by one connection."""
    half = header.data_bytes // 2
    cut = min((entry.end for entry in header.entries), key=lambda end: abs(end - half), default=0)
    if length <= SPLIT_ABOVE or min(cut, header.data_bytes - cut) < header.data_bytes // 4:
        return 0
    return length - header.data_bytes + cut


def pull_halves(open_range: Open, split: int, out: Mapping[str, Tensor] | None) -> Weights | None:
    """Pull weights that were parted at ``split`` the last time, and have the same tensors now or nearly so.

    out: as for tensors.receive(), which also says what is raised. None where they cannot be parted, or were another
    version before the second half was asked for; then they are to be pulled as a whole, and ``out`` may be part new.
    """
    with open_range(0, split + _SLACK_BYTES, None) as first:
        if first.status != 206:
            return None
        source = _Beginning(first)
        header, info = read_header(source)
        entries, there = header.entries, first.length - source.position
        mine = tuple(entry for entry in entries if entry.end <= there)
        others = entries[len(mine) :]
        if not mine or not others:
            return None
        # Here and not by the thread: what the C library gives a new thread has never been touched.
        target = new_tensors(entries) if out is None else out
        check_targets(entries, target)
        etag, begin = first.headers.get("etag", ""), source.position + others[0].begin

        def second_half() -> dict[str, Tensor] | None:
            with open_range(begin, source.length, etag) as second:
                return receive(others, second.readinto, _of(target, others)) if second.status == 206 else None

        # Its end is waited for whatever happens: until then it writes to the tensors.
        with ThreadPoolExecutor(1, "ema pull") as thread:
            coming = thread.submit(second_half)
            tensors = receive(mine, first.readinto, _of(target, mine))
            first.readinto(memoryview(bytearray(there - mine[-1].end)))
    rest = coming.result()
    return None if rest is None else Weights({**tensors, **rest}, info)


class _Beginning:
    """The first part of a body, as the whole that read_header() expects. position: bytes read of it."""

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
