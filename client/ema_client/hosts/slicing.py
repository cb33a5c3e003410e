"""A body cut into bodies, one for each host of a run or for each stretch of a part, from the memory that the whole body
is sent from.

Knows: where a body's bytes lie, and which are whose. Does not know: sockets, tensors, or how a host is found.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from ema_client.http.body import Body, cut
from ema_client.http.digests import Digest, blocks
from ema_client.http.memfd import SharedBody, SharedSlice
from ema_client.protocol import Segment
from ema_client.wire import PartCut

__all__ = ["Slices", "offered"]


@contextlib.contextmanager
def offered(body: Body, *, wanted: bool) -> Iterator[Segment | None]:
    """What servers on this host need in order to read a body in shared memory, or slices of it; of no use after the
    block. None where the body lies elsewhere, or where nobody wants that: then no other thread waits."""
    if wanted and isinstance(body.shared, SharedBody):
        with body.shared.offered() as segment:
            yield segment
    else:
        yield None


class Slices:
    """The bodies that a body is cut into. Tells the whole body's listener of the bytes of all of them that went out, by
    one thread at a time.

    cuts: by place, a host's or a stretch's; one without sizes is of whole tensors. waits: seconds that each host may
    wait for others. segment: of the whole body, where that lies in shared memory and is offered to all: then whoever is
    on this host reads a body of one span there.
    """

    def __init__(
        self, body: Body, cuts: Sequence[PartCut], *, waits: float = 0.0, segment: Segment | None = None
    ) -> None:
        self._body = body
        self._segment = segment
        self._cuts = cuts
        self._waits = waits
        self._views = () if body.data is None else body.data()
        #: The bytes of the body's own header, which goes to nobody.
        self._head = body.length - sum(map(len, self._views))
        #: By place, and by whom: the bytes that went out.
        self._sent: dict[int, dict[str, int]] = {}
        self._lock = threading.Lock()

    def of(self, place: int, to: str = "", look: Callable[[], None] | None = None) -> Body:
        """The body at one place; again for each try. to: whom it is sent, where a place has several who are: of these
        the listener is told of the fastest. look: as Body.look."""
        mine = self._cuts[place]
        skip = len(mine.header)

        def data() -> Iterator[memoryview]:
            for start, stop in mine.spans:
                yield from cut(self._views, start, stop)

        return Body(
            skip + mine.nbytes,
            lambda: chain([memoryview(mine.header)], data()),
            self._shared(mine),
            digest=None if self._body.digest is None else lambda: Digest(mine.sizes or blocks(), skip=skip),
            data=lambda: tuple(data()),
            moved=lambda sent: self._moved(place, to, sent - skip),
            look=look or self._body.look,
            waits=self._waits,
            key=self._body.key,
        )

    def _shared(self, mine: PartCut) -> SharedSlice | None:
        """A slice in shared memory; None where the whole body is not offered, and for a slice of several spans."""
        whole = self._body.shared
        if self._segment is None or len(mine.spans) != 1 or not isinstance(whole, SharedBody):
            return None
        (start, stop) = mine.spans[0]
        return SharedSlice(whole, self._segment, mine.header, self._head + start, self._head + stop)

    def _moved(self, place: int, to: str, sent: int) -> None:
        with self._lock:
            self._sent.setdefault(place, {})[to] = max(0, sent)
            self._body.moved(self._head + sum(max(each.values()) for each in self._sent.values()))
