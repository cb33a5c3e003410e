"""Memory shared with a service on the same host: the body of a push is handed over by name instead of being sent.

A segment is an anonymous file in memory (memfd): no folder names the file, and the file is gone when the last process
that has it open ends, by whatever end. A segment begins with a secret, and a service takes a segment only from a client
that knows the secret. The secret stands there during a hand-over and at no other time, so a client may fill the segment
anew after a hand-over that was never answered: a service that still reads finds the secret gone, and drops the bytes.

Knows memfds. Does not know: torch, HTTP, or where the service is.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator
from dataclasses import replace

from ema_client.forks import Home, Lock
from ema_client.protocol import SECRET_BYTES, SEGMENT_NAME, Segment

__all__ = ["SharedBody", "SharedSlice"]

#: fcntl(2): no more seals, no shrinking, no growing. A service must not read memory that is gone.
_SEALS = 0x0001 | 0x0002 | 0x0004


class SharedBody:
    """A body in shared memory: ``header`` in front, then ``size`` bytes of data that begin at a page. Thread-safe.

    data: the data's memory, writable; zeros at first. length: bytes of the whole body. head: what is sent all the same:
    nothing. home: the process that may offer the body, and no fork of it. The memory lives until this object and every
    view of the data are gone; a forked process holds the memory too, until the fork ends.

    Raises OSError where the system has no memfds, or no more memory for one.
    """

    head = b""

    def __init__(self, header: bytes, size: int) -> None:
        start = -(-(SECRET_BYTES + len(header)) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._offset = start - len(header)
        self.home = Home()
        self._descriptor = _create(start + size)
        weakref.finalize(self, os.close, self._descriptor)
        region = mmap.mmap(self._descriptor, start + size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(region)
        self._memory[self._offset : start] = header
        self._lock = Lock()
        self.data = self._memory[start:]
        self.length = len(header) + size

    @contextlib.contextmanager
    def offered(self) -> Iterator[Segment]:
        """What a service needs in order to read the body as it is now; of no use after the block.

        Another thread that offers the same body waits for the end of the block.
        """
        with self._lock:
            secret = secrets.token_bytes(SECRET_BYTES)
            self._memory[:SECRET_BYTES] = secret
            try:
                yield Segment(os.getpid(), self._descriptor, self._offset, self.length, secret)
            finally:
                self._memory[:SECRET_BYTES] = bytes(SECRET_BYTES)


class SharedSlice:
    """Some of a body that is offered to several servers under one secret: ``head``, which is sent, then bytes of the
    segment.

    whole: the body's memory, offered as ``segment`` until the last of the servers has answered, or was given up. start,
    stop: bytes of the whole body. The rest as of SharedBody.
    """

    def __init__(self, whole: SharedBody, segment: Segment, head: bytes, start: int, stop: int) -> None:
        self.head = head
        self.home = whole.home
        self.length = len(head) + stop - start
        self._segment = replace(segment, offset=segment.offset + start, length=stop - start)

    @contextlib.contextmanager
    def offered(self) -> Iterator[Segment]:
        """As SharedBody.offered(), for as long as the whole is offered."""
        yield self._segment


def _create(size: int) -> int:
    """A sealed memfd."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    import fcntl  # not on every system, but where memfds are

    descriptor = os.memfd_create(SEGMENT_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        undo.pop_all()
    return descriptor
