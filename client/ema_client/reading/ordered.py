"""A large body in the order of its bytes, brought by several connections: for files and streams, which take it so.

Lanes fetch stretches ahead of the reader, into memory of a few stretches; what is read is the body from its beginning,
as over one connection. So a file on its way is as long as what has come, whoever ends the process.

The reader waits for one lane at a time, and the lanes for the reader: a lane that stands still would hold all. So the
reader cancels the lane that brings nothing of what is awaited, while others have brought what comes after.

Knows: HTTP's ranges, stretches, threads. Does not know: sockets, files, retries of the whole, tensors.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

from ema_client.errors import ConnectionLost, Overloaded
from ema_client.http import cancelling
from ema_client.http.cancelling import Cancellation
from ema_client.http.downloads import Download
from ema_client.http.lanes import LanesEnded, Moved, carry_all
from ema_client.http.pace import PULLS, Pace
from ema_client.http.stretches import SMALLEST_BYTES, STILL_SECONDS, Stretch, Stretches
from ema_client.http.transport import Transport
from ema_client.reading.asked import Asked
from ema_client.reading.ranges import check_part, whole_length

__all__ = ["Ordered", "open_ordered"]

#: Bytes of the first request: a body of no more is one request.
_LEAD_BYTES = 64 << 20
#: Stretches that each lane may be ahead of the reader.
_AHEAD = 2
#: A stretch is asked for so often in a row in vain; after that the whole is, from where it stands.
_TRIES = 3
#: Bytes that a lane reads between two looks at whether anybody wants the rest.
_SHARE_BYTES = 1 << 20
#: Seconds between two looks of the reader at the lane that it waits for, and how often the lanes of one stretch are
#: cancelled.
_LOOK_SECONDS, _MOST_CANCELLED = 0.1, 3


def open_ordered(transport: Transport, asked: Asked, start: int, etag: str | None) -> Download | Ordered:
    """The body from byte ``start`` on, of the version with that ETag, or whole where there is another version by now.

    Tried once. Raises as Transport.download().
    """
    if not asked.is_stored or (start and etag is None):
        return transport.download(asked.path, query=asked.query, start=start, etag=etag, patience=asked.work_seconds)
    first = transport.download(asked.path, query=asked.query, start=start, stop=start + _LEAD_BYTES, etag=etag)
    if first.status != 206:
        return first
    check_part(first, start, etag)
    if not first.headers.get("etag", "").startswith('"'):
        # Without a name for the version nothing more of it can be asked for.
        with first:
            return transport.download(asked.path, query=asked.query)
    return Ordered(transport, asked, first, start, continues=etag is not None)


@dataclass(slots=True)
class _Lane:
    """The lane of a stretch. last: when its last bytes came, by time.monotonic(); or when it began."""

    cancellation: Cancellation | None
    last: float


class Ordered:
    """A body on its way, as a Download is. Not thread-safe.

    status: 200 for a body from its beginning, 206 for one that ``continues``; length: bytes from ``start`` on.

    More than a dozen attributes: the body as its reader sees it, and how far lanes are ahead of the reader.
    """

    def __init__(self, transport: Transport, asked: Asked, first: Download, start: int, *, continues: bool) -> None:
        self.url, self.headers = first.url, first.headers
        self.status = 206 if continues else 200
        self._whole = whole_length(first)
        self.length = self._whole - start
        self._transport = transport
        self._asked = asked
        self._first = first
        self._open = ExitStack()
        self._lead, self._ends_lead = first.length, Cancellation()
        #: The byte of the body that is read next.
        self._position = start
        self._fetched: dict[int, memoryview] = {}
        #: The lanes by the first bytes of their stretches, and how often those of a stretch were cancelled.
        self._lanes: dict[int, _Lane] = {}
        self._cancelled: Counter[int] = Counter()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._stopped = False

    def __enter__(self) -> Ordered:
        self._open.enter_context(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stopped = True
            for lane in self._lanes.values():
                if lane.cancellation is not None:
                    lane.cancellation.cancel()
            self._change.notify_all()
        self._open.close()
        if self._thread is not None:
            self._thread.join()

    def readinto(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes of the body. Raises as read_some()."""
        while view:
            view = view[self.read_some(view) :]

    def read_some(self, view: memoryview) -> int:
        """Put the next bytes of the body, at least one, at the front of ``view``; returns their number.

        Raises ConnectionLost, or the error that ended the lanes.
        """
        if self._thread is None:
            self._begin()
        if self._lead:
            count = self._read_lead(view[: self._lead])
            self._lead -= count
            if not self._lead:
                self._open.close()
        else:
            count = self._take(view)
        with self._change:
            self._position += count
            self._change.notify_all()
        return count

    def _read_lead(self, view: memoryview) -> int:
        """The next bytes of the first answer; of another one where that answer stands still, and lanes do not."""
        while True:
            # One cancellation for all reads of an answer: a read that is ended may bring bytes, and the next one none.
            with self._ends_lead as cancellation:
                try:
                    self._first.hand_over()
                    with self._change:
                        self._lanes[self._position] = _Lane(cancellation, time.monotonic())
                    return self._first.read_some(view)
                except ConnectionLost:
                    if not cancellation.cancelled:
                        raise
                finally:
                    with self._change:
                        self._lanes.pop(self._position, None)
            self._open.close()
            self._ends_lead = Cancellation()
            self._first = self._open.enter_context(self._part(self._position, self._position + self._lead))

    def _begin(self) -> None:
        """Have lanes fetch what the first answer does not bring."""
        begin = self._position + self._first.length
        stretches = Stretches(begin, self._whole, grain=_SHARE_BYTES, largest=SMALLEST_BYTES)
        pace = self._transport.pace(PULLS) if begin < self._whole else Pace.fixed(1)
        self._thread = threading.Thread(target=self._fetch, args=(stretches, pace), name="ema ahead", daemon=True)
        self._thread.start()

    def _take(self, view: memoryview) -> int:
        with self._change:
            while self._position not in self._fetched:
                if self._fault is not None:
                    raise self._fault
                self._cancel_late()
                self._change.wait(_LOOK_SECONDS)
            there = self._fetched.pop(self._position)
            count = min(len(there), len(view))
            if count < len(there):
                self._fetched[self._position + count] = there[count:]
        view[:count] = there[:count]
        return count

    def _cancel_late(self) -> None:
        """Cancel the lane that the reader waits for where the lane stands still, and others do not. Another lane, or
        that one, then brings the stretch over another connection. Under the lock."""
        awaited = self._lanes.get(self._position)
        if awaited is None or awaited.cancellation is None or not self._fetched:
            return
        still = time.monotonic() - awaited.last >= STILL_SECONDS
        if still and self._cancelled[self._position] < _MOST_CANCELLED:
            self._cancelled[self._position] += 1
            del self._lanes[self._position]
            awaited.cancellation.cancel()

    def _fetch(self, stretches: Stretches, pace: Pace) -> None:
        """On a thread of its own."""

        def carry(stretch: Stretch, moved: Moved) -> None:
            self._wait_for_room(stretch, pace)
            buffer, come, left = memoryview(bytearray(stretch.size)), 0, _TRIES
            lane = _Lane(cancelling.current(), time.monotonic())
            with self._change:
                self._lanes[stretch.start] = lane

            def came(count: int) -> None:
                nonlocal come
                come += count
                lane.last = time.monotonic()
                moved(count)

            while come < stretch.size:
                before = come
                try:
                    self._read(stretch.start + come, buffer[come:], came)
                except (ConnectionLost, Overloaded) as fault:
                    # By this lane: the reader waits for the stretch, and other lanes for the reader.
                    left = _TRIES if come > before else left - 1
                    if not left or cancelling.is_cancelled():
                        raise
                    time.sleep(fault.retry_after or 0.0)
            with self._change:
                self._lanes.pop(stretch.start, None)
                self._fetched[stretch.start] = buffer
                self._change.notify_all()

        try:
            carry_all(stretches, carry, pace, alone=lambda _: False, helped=False)
            self._watch_lead()
        except LanesEnded:
            pass
        except Exception as fault:  # noqa: BLE001 - raised by read_some(), on the thread of the reader
            with self._change:
                self._fault = fault
                self._change.notify_all()

    def _wait_for_room(self, stretch: Stretch, pace: Pace) -> None:
        with self._change:
            while stretch.start - self._position > _AHEAD * pace.lanes * SMALLEST_BYTES + self._lead:
                self._check_wanted()
                # The reader of the first answer notices nothing else.
                self._cancel_late()
                self._change.wait(_LOOK_SECONDS)
            self._check_wanted()

    def _watch_lead(self) -> None:
        """With all else there, cancel the reader of the first answer where that answer stands still."""
        with self._change:
            while self._lead and self._fetched and not self._stopped:
                self._cancel_late()
                self._change.wait(_LOOK_SECONDS)

    def _check_wanted(self) -> None:
        if self._stopped or self._fault is not None:
            raise LanesEnded

    def _read(self, at: int, buffer: memoryview, came: Moved) -> None:
        """Fill ``buffer`` with the body from byte ``at`` on, and call ``came`` with the bytes of each share."""
        with self._part(at, at + len(buffer)) as part:
            for start in range(0, len(buffer), _SHARE_BYTES):
                self._check_wanted()
                share = buffer[start : start + _SHARE_BYTES]
                part.readinto(share)
                came(len(share))

    def _part(self, start: int, stop: int) -> Download:
        """Bytes [start, stop) of the body. Raises ConnectionLost where the version has moved on."""
        asked, etag = self._asked, self.headers["etag"]
        part = self._transport.download(asked.path, query=asked.query, start=start, stop=stop, etag=etag)
        check_part(part, start, etag)
        if part.status != 206:
            with part:
                raise ConnectionLost(f"{part.url} has another version by now")
        return part
