"""Takes over a push that lies in shared memory of a client on this host, in place of a body from the socket.

The memory is the client's: a memfd (a *segment*) with a secret in front, which a request names by process, descriptor
and place. It is opened anew for each push, and checked for everything a stranger could do by naming other files,
processes or lengths. Whatever is wrong is one error, SegmentUnusable, upon which a client sends an ordinary body. Only
the pages stay mapped for the next push, for seconds and not beyond the end of the client's process.

Knows /proc, memfds and their seals. Does not know what the bytes mean (a Body does) or who asks for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import mmap
import os
import select
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ema_client.errors import SegmentUnusable
from ema_client.protocol import SECRET_BYTES, SEGMENT_NAME, Segment
from ema_service.bodies import Body
from ema_service.descriptors import EXHAUSTED
from ema_service.memory import Shared

__all__ = ["Mappings", "named", "take_over"]

#: Seconds that a mapping stays after its last push. A trainer's steps are shorter; where they are not, mapping anew, 40
#: ms for 1 GiB, is nothing to them.
_IDLE_SECONDS = 3.0
#: Most mappings at once; each takes a descriptor.
_MOST_MAPPINGS = 256
#: Most bytes of mappings that stay after their push: what stays is counted as memory of the server (half of it, as the
#: client maps the pages, too), and beside a push of gigabytes mapping anew takes little.
_MOST_BYTES = 2304 << 20
#: Bytes of a mapping that does not stay that are mapped at once, about: pages are let go so many at a time, behind the
#: reading.
_BEHIND_BYTES = 64 << 20
#: Milliseconds between two looks for mappings to let go; the end of a process is noticed at once.
_SWEEP_MS = 500

#: From fcntl(2): Python names F_GET_SEALS and the seals on Linux only.
_GET_SEALS = getattr(fcntl, "F_GET_SEALS", None)
_SEAL_SHRINK = 0x0002


def named(header: str, *, same_host: bool) -> Segment:
    """The segment that a request's header names.

    Raises SegmentUnusable where the header cannot be read, or the client is on another host.
    """
    if not same_host:
        raise SegmentUnusable("the connection does not come over loopback or a Unix socket")
    if _GET_SEALS is None:
        raise SegmentUnusable("this server runs on a system without memfd")
    try:
        return Segment.from_header(header)
    except ValueError as fault:
        raise SegmentUnusable(str(fault)) from None


@dataclass(slots=True)
class _Mapped:
    """The pages of one segment. owner: a descriptor of the client's process (pidfd), readable once the process ended.
    used: the time of the last push, by time.monotonic()."""

    memory: memoryview
    owner: int
    used: float


class Mappings:
    """Pages of segments, mapped for one push and held for the next: mapping takes a third of a push. Thread-safe.

    A mapping is let go ``seconds`` after its last push, or when its process ends, whichever is first, by a thread that
    runs while there are mappings. most, most_bytes: mappings at once; a push beyond maps for itself alone. sweep_ms:
    between looks.
    """

    def __init__(
        self,
        *,
        seconds: float = _IDLE_SECONDS,
        most: int = _MOST_MAPPINGS,
        most_bytes: int = _MOST_BYTES,
        sweep_ms: int = _SWEEP_MS,
    ) -> None:
        self._seconds = seconds
        self._most = most
        self._most_bytes = most_bytes
        self._sweep_ms = sweep_ms
        #: By device, file, and where in the file a mapping begins.
        self._mapped: dict[tuple[int, int, int], _Mapped] = {}
        self._sweeper: threading.Thread | None = None
        self._lock = threading.Lock()

    def map(self, descriptor: int, start: int, stop: int, process: int) -> memoryview:
        """Bytes [start, stop) of a memfd of the process ``process``; mapped as long as views of them live.

        start: of a page. Raises OSError.
        """
        found, nbytes = os.fstat(descriptor), stop - start
        place = (found.st_dev, found.st_ino, start)
        with self._lock:
            mapped = self._mapped.get(place)
            if mapped is None or len(mapped.memory) < nbytes:
                # ACCESS_COPY (copy on write), although nothing is written: torch takes no read-only memory.
                memory = memoryview(mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY, offset=start))
                if mapped is None and self._has_room(nbytes) and (owner := _watched(process)) is not None:
                    self._mapped[place] = _Mapped(memory, owner, time.monotonic())
                    self._begin_sweeping()
                return memory
            mapped.used = time.monotonic()
            return mapped.memory[:nbytes]

    def stays(self, memory: memoryview) -> bool:
        """Whether memory that was mapped is held for the next push."""
        with self._lock:
            return any(mapped.memory.obj is memory.obj for mapped in self._mapped.values())

    def _has_room(self, nbytes: int) -> bool:
        held = sum(len(mapped.memory) for mapped in self._mapped.values())
        return len(self._mapped) < self._most and held + nbytes <= self._most_bytes

    def _begin_sweeping(self) -> None:
        if self._sweeper is None:
            self._sweeper = threading.Thread(target=self._sweep, name="ema-segments", daemon=True)
            self._sweeper.start()

    def _sweep(self) -> None:
        """On a thread of its own: let mappings go until none is left."""
        while True:
            with self._lock:
                if not self._mapped:
                    self._sweeper = None
                    return
                owners = [mapped.owner for mapped in self._mapped.values()]
            # While waiting, this thread refers to no mapping.
            ends = select.poll()
            for owner in owners:
                ends.register(owner, select.POLLIN)
            ended = {owner for owner, _ in ends.poll(self._sweep_ms)}
            self._let_go(ended, before=time.monotonic() - self._seconds)

    def _let_go(self, ended: set[int], before: float) -> None:
        """Let go of mappings whose process ended, and of those last used before a time."""
        with self._lock:
            places = [place for place, mapped in self._mapped.items() if mapped.owner in ended or mapped.used < before]
            gone = [self._mapped.pop(place) for place in places]
        for mapped in gone:
            os.close(mapped.owner)


def _watched(process: int) -> int | None:
    """A descriptor that becomes readable when a process ends; None where the system or the process has none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(process)
    except OSError:
        return None


def take_over(segment: Segment, body: Body, helpers: Executor, mappings: Mappings) -> None:
    """Make the bytes of a segment the body. The push holds the segment until the push is released. May take long.

    helpers: threads that the pass may be divided among. Raises SegmentUnusable, and what UpdateBody raises.
    """
    with _opened(segment) as descriptor:
        secret = _Secret(os.dup(descriptor), segment.secret)
        secret.check()
        # With the byte in front of the body: mmap() takes no bytes for all bytes.
        start = (segment.offset - 1) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skip, stop = segment.offset - start, segment.offset + segment.length
        memory = mappings.map(descriptor, start, stop, segment.pid)
    passed = None if mappings.stays(memory) else _Behind(memory, skip)
    body.take_over(Shared(memory[skip:], secret.check, helpers, passed))


class _Behind:
    """Lets the pages of a mapping go that the reading has passed: beside a shadow of gigabytes the mapped half of as
    large a segment would count as memory of the server.

    memory: all of the mapping. offset: of the body in the mapping. Pages that are read again all the same come back,
    with what the segment holds.
    """

    def __init__(self, memory: memoryview, offset: int) -> None:
        self._memory = cast("mmap.mmap", memory.obj)
        self._offset = offset
        self._gone = 0

    def __call__(self, stop: int) -> None:
        """Let go of the pages in front of byte ``stop`` of the body, once there are many."""
        passed = (self._offset + stop) // mmap.PAGESIZE * mmap.PAGESIZE
        if passed - self._gone >= _BEHIND_BYTES:
            self._memory.madvise(mmap.MADV_DONTNEED, self._gone, passed - self._gone)
            self._gone = passed


class _Secret:
    """The secret of an open segment. A client that gives a push up changes the secret before the rest of the
    segment."""

    def __init__(self, descriptor: int, secret: bytes) -> None:
        self._descriptor = descriptor
        self._secret = secret

    def check(self) -> None:
        """Raises SegmentUnusable unless the segment still begins with the secret of the request."""
        if not hmac.compare_digest(os.pread(self._descriptor, SECRET_BYTES, 0), self._secret):
            raise SegmentUnusable("the segment does not begin with the secret of the request")

    def __del__(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def _opened(segment: Segment) -> Iterator[int]:
    """The descriptor of a segment, checked and open for reading within the block. Raises SegmentUnusable, and OSError
    where this server has no descriptor left."""
    try:
        # O_PATH opens nothing, so a FIFO or a device that somebody names does not notice.
        path = os.open(f"/proc/{segment.pid}/fd/{segment.fd}", os.O_PATH | os.O_CLOEXEC)
        try:
            _check_kind(path, segment)
            descriptor = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(path)
    except OSError as fault:
        _check_left(fault)
        where = f"descriptor {segment.fd} of process {segment.pid}"
        raise SegmentUnusable(f"{where} cannot be opened: {fault.strerror}") from None
    try:
        _check_memory(descriptor, segment)
        yield descriptor
    except OSError as fault:
        _check_left(fault)
        raise SegmentUnusable(f"the segment cannot be mapped: {fault.strerror}") from None
    finally:
        os.close(descriptor)


def _check_left(fault: OSError) -> None:
    """Raises the fault where this server has no descriptor left: the segment is as good as any then."""
    if fault.errno in EXHAUSTED:
        try:
            raise fault
        finally:
            del fault


def _check_kind(path: int, segment: Segment) -> None:
    """Raises SegmentUnusable unless the file is a memfd of our name and of this server's user."""
    found = os.fstat(path)
    name = str(Path(f"/proc/self/fd/{path}").readlink())
    if not stat.S_ISREG(found.st_mode) or name != f"/memfd:{SEGMENT_NAME} (deleted)":
        raise SegmentUnusable(f"descriptor {segment.fd} of process {segment.pid} is no memfd named {SEGMENT_NAME}")
    if found.st_uid != os.geteuid():
        raise SegmentUnusable(f"the segment belongs to user {found.st_uid}, this server to user {os.geteuid()}")


def _check_memory(descriptor: int, segment: Segment) -> None:
    """Raises SegmentUnusable unless the body lies in the segment and will stay there.

    Seals first, then the size: a segment that shrinks while it is read would end the server by SIGBUS.
    """
    seals = fcntl.fcntl(descriptor, _GET_SEALS) if _GET_SEALS is not None else 0
    if not seals & _SEAL_SHRINK:
        raise SegmentUnusable("the segment is not sealed against shrinking")
    end, size = segment.offset + segment.length, os.fstat(descriptor).st_size
    if segment.offset < SECRET_BYTES or end > size:
        raise SegmentUnusable(
            f"the body is said to lie at {segment.offset} to {end} of a segment of {size} bytes, "
            f"{SECRET_BYTES} of which are its secret"
        )
