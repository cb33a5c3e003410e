"""Large weights over several connections at once, each of which brings stretches of one version.

One connection is a thread of the service that sends and a thread here that receives; with two, one works while the
other waits, and where a link gives each flow a share, the shares add up. The first request brings the head, and the
first stretch with it; the other stretches are asked for by its ETag (``If-Range``). The service keeps a version that is
being read; where the version has moved on all the same, the reading begins anew.

Knows: the stream's header, HTTP's ranges, stretches. Does not know: sockets, retries, how many lanes pay.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ema_client.errors import ConnectionLost
from ema_client.http.digests import BLOCK_BYTES
from ema_client.http.downloads import Download
from ema_client.http.lanes import Moved, carry_all
from ema_client.http.pace import Pace
from ema_client.http.stretches import Stretch, Stretches
from ema_client.protocol import HEADER_RECIPE, HEADER_SHARDS, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Checked
from ema_client.reading.ranges import OpenRange, whole_length
from ema_client.reading.weights import Into, Weights, read_header
from ema_client.wire import Entry

if TYPE_CHECKING:
    from ema_client.tensors.body import Landing

__all__ = ["LanedPull", "Listener", "OnSeveralHosts"]

#: Stretches begin and end at a multiple of so many bytes: no element of a tensor lies in two.
_GRAIN_BYTES = 64
#: The header's length varies with the numbers in the header: the first request asks for so many bytes more.
_SLACK_BYTES = 4 << 10
#: The version may move on so often; the last time the whole body is asked for over one connection.
_ATTEMPTS = 4


class OnSeveralHosts(Exception):
    """A gateway began to answer, and the run's hosts have the weights themselves. entries, recipe: of the gateway's
    answer."""

    def __init__(self, entries: tuple[Entry, ...], recipe: str | None) -> None:
        super().__init__()
        self.entries, self.recipe = entries, recipe


class _Moved(Exception):
    """The run has moved on from the version of the first request, or another version is wanted than has begun."""


@dataclass(frozen=True, slots=True)
class Listener:
    """What a pull tells, and asks, on its way.

    begins: told the bytes of the data section that begins now; gives what is told of each piece of it.
    wants: told the version once its head has come, before any more is read; whether that version is wanted.
    leaves: whether a body of so many bytes is left to the hosts that have it, see OnSeveralHosts.
    """

    begins: Callable[[int], Moved] = lambda _: _nobody
    wants: Callable[[WeightsInfo], bool] = lambda _: True
    leaves: Callable[[int], bool] = lambda _: False


def _nobody(_: int) -> None:
    pass


@dataclass(slots=True)
class _Begun:
    """A version on its way. base: the byte of the body at which the data section begins."""

    etag: str
    base: int
    info: WeightsInfo
    landing: Landing
    stretches: Stretches
    checked: Checked
    moved: Moved

    @property
    def named(self) -> bool:
        """Whether more of this very body can be asked for: a weak ETag promises like content, not like bytes."""
        return self.etag.startswith('"')


class LanedPull:
    """One pull, which may be tried several times: a later try goes on with what an earlier one has brought.

    Args:
        asked, open_range: the weights, and what opens them.
        into: gives the tensors to receive in; see Into.
        lead: bytes of the data section that the first request asks for with the head, which took ``head`` bytes the
            latest time; a body of no more is one request. None: of a body that is not to be parted.
        pace: gives the pace of a body of so many bytes.
        smallest: bytes of the smallest stretch, given those of the data section.
        wants_digest: whether a body of so many bytes is compared with the service's digest.
        listener: is told what comes.
    """

    def __init__(
        self,
        asked: Asked,
        open_range: OpenRange,
        into: Into,
        *,
        lead: int | None,
        head: int,
        pace: Callable[[int], Pace],
        smallest: Callable[[int], int],
        wants_digest: Callable[[int], bool],
        listener: Listener,
    ) -> None:
        self._asked = asked
        self._open_range = open_range
        self._into = into
        self._lead = lead
        self._head = head
        self._pace = pace
        self._smallest = smallest
        self._wants_digest = wants_digest
        self._listener = listener
        self._begun: _Begun | None = None
        #: Of the body that came: bytes of its head, and of its data section.
        self.sizes = 0, 0

    @property
    def brought(self) -> int:
        """Bytes of the data section that have come, and that a later try goes on from."""
        return self._begun.stretches.come if self._begun else 0

    def attempt(self) -> Weights:
        """Bring what is missing. Raises ConnectionLost, DigestMismatch and what the service answers."""
        for left in reversed(range(_ATTEMPTS)):
            if not left:
                self._lead = None
            try:
                return self._go_on()
            except _Moved:
                self._begun = None
        raise ConnectionLost(f"{self._asked.path}: the version moved on, again and again, while it was read")

    def _go_on(self) -> Weights:
        with ExitStack() as stack:
            first, taken = None, None
            if self._begun is None:
                first = stack.enter_context(self._first())
                self._begun, taken = self._begin(first)
            begun, closed = self._begun, stack.pop_all().close
            stack.callback(closed)
            #: The first answer, until it is read: it breaks off once.
            brings = [] if first is None or taken is None else [first]

            def carry(stretch: Stretch, moved: Moved) -> None:
                if stretch is taken and brings:
                    lead = brings.pop()
                    try:
                        lead.hand_over()
                        _receive(begun, stretch, lead, moved)
                        lead.drain()
                    finally:
                        closed()
                    return
                if not begun.named:
                    raise ConnectionLost(f"{begun.checked.url} gave its body no ETag, and the body broke off")
                with self._open_range(begun.base + stretch.start, begun.base + stretch.stop, begun.etag) as part:
                    if part.status != 206:
                        raise _Moved
                    _receive(begun, stretch, part, moved)

            if taken is None:
                closed()
            try:
                pace = self._pace(self.sizes[1])
                # Weights that are worked out come in silences of any length.
                helped = self._asked.is_stored
                carry_all(begun.stretches, carry, pace, first=taken, moved=begun.moved, helped=helped)
            except ConnectionLost:
                if not begun.named:
                    self._begun = None
                raise
            finally:
                begun.landing.noticed()
        # Another try begins anew: nobody knows which stretch was wrong.
        self._begun = None
        begun.checked.check()
        return Weights(begun.landing.tensors, begun.info)

    def _first(self) -> Download:
        """The answer with the head: of the lead, or of the whole."""
        if self._lead is not None:
            first = self._open_range(0, self._head + self._lead + _SLACK_BYTES, None)
            if first.status != 206 or first.headers.get("etag", "").startswith('"'):
                return first
            # Without a name for the version nothing more of it can be asked for.
            with first:
                pass
        return self._open_range(0, None, None)

    def _begin(self, first: Download) -> tuple[_Begun, Stretch | None]:
        from ema_client.tensors.body import Landing

        source = _FirstPart(first)
        header, info = read_header(source, self._asked)
        size = header.data_bytes
        self.sizes = source.position, size
        if HEADER_SHARDS.lower() in first.headers and self._listener.leaves(size):
            raise OnSeveralHosts(header.entries, first.headers.get(HEADER_RECIPE.lower()))
        if not self._listener.wants(info):
            raise _Moved
        # Before other threads begin: the C library would give a new thread memory that was never touched.
        landing = Landing(header.entries, self._into(header.entries))
        whole = first.status != 206
        stretches = Stretches(0, size, grain=_GRAIN_BYTES, smallest=self._smallest(size))
        there = first.length - source.position
        if there < size:
            there -= there % _GRAIN_BYTES
        taken = stretches.take(0, 1, size=there) if there else None
        checked = Checked(first, wanted=whole or self._wants_digest(size))
        moved = self._listener.begins(size)
        etag = first.headers.get("etag", "")
        return _Begun(etag, source.position, info, landing, stretches, checked, moved), taken


def _receive(begun: _Begun, stretch: Stretch, part: Download, moved: Moved) -> None:
    """Receive a stretch block by block of the digest: where the connection breaks, the blocks that came stay."""
    start = stretch.start
    while start < stretch.stop:
        stop = min(start + BLOCK_BYTES - start % BLOCK_BYTES, stretch.stop)
        begun.landing.receive(begun.checked.reading(start, part.readinto, moved), start, stop)
        begun.stretches.reached(stretch, stop)
        start = stop


class _FirstPart:
    """The first part of a body as a Source of the whole body's length. position: bytes read so far."""

    def __init__(self, first: Download) -> None:
        self._first = first
        self.url = first.url
        self.length = whole_length(first)
        self.position = 0

    def readinto(self, view: memoryview) -> None:
        if self.position + len(view) > self._first.length:
            # The header has grown beyond what was asked for.
            raise _Moved
        self._first.readinto(view)
        self.position += len(view)
