"""Data of weights compared, as they are received, with the digest that the service gave of them.

Knows the digest's header and the digest. Does not know sockets, tensors, or which weights are read.
"""

from __future__ import annotations

from collections.abc import Callable

from ema_client.errors import DigestMismatch
from ema_client.forks import Lock
from ema_client.http.digests import HASHED_AT_ONCE, Digest, Rest, blocks, can_digest
from ema_client.http.downloads import Download
from ema_client.protocol import HEADER_DIGEST

__all__ = ["Checked", "Progress", "Tally"]

ReadInto = Callable[[memoryview], None]
#: Called with the bytes that have come and the bytes in all. The first number shrinks where the transfer begins anew.
Progress = Callable[[int, int], None]


#: A reader tells of the bytes of so many at a time: each call of the kernel takes as many as have come.
_TOLD_BYTES = 16 << 20


class Tally:
    """How many bytes of a body have come, by whichever way. Thread-safe: one thread at a time calls ``progress``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._come = 0

    def of(self, total: int) -> Callable[[int], None]:
        """What is to be called with the bytes of each piece of a body that begins now, of ``total`` bytes."""
        self._come = 0

        def moved(count: int) -> None:
            with self._lock:
                self._come += count
                self._progress(self._come, total)

        return moved


class Checked:
    """The data section of a body, read in stretches by any number of threads, and compared with the service's digest.

    first: an answer with the body's headers; url: the answer's.

    Nothing is compared where the service gave no digest (cast weights, a selection, TLS), where xxhash is not
    installed, or where the caller does not want it.
    """

    def __init__(self, first: Download, *, wanted: bool = True) -> None:
        self.url = first.url
        self._expected = first.headers.get(HEADER_DIGEST.lower()) if wanted and can_digest() else None
        #: The digests of the stretches that came, by their first bytes.
        self._came: dict[int, Rest] = {}

    def reading(self, start: int, readinto: ReadInto, moved: Callable[[int], None]) -> ReadInto:
        """What fills a view with the next bytes of a stretch from byte ``start`` on, which ``readinto`` reads.

        moved: called with the number of bytes of each piece as it has come. A stretch may be read again.
        """
        digest = Rest(start) if self._expected else None
        if digest is not None:
            self._came[start] = digest

        # What is digested is digested share by share, while each is in the core's cache.
        at_once = _TOLD_BYTES if digest is None else HASHED_AT_ONCE

        def read(view: memoryview) -> None:
            for begin in range(0, len(view), at_once):
                share = view[begin : begin + at_once]
                readinto(share)
                if digest is not None:
                    digest.update(share)
                moved(len(share))

        return read

    def check(self) -> None:
        """After the last byte. Raises DigestMismatch where the bytes are not those that the service has."""
        if self._expected is None:
            return
        whole = Digest(blocks())
        for _, stretch in sorted(self._came.items()):
            whole.append(stretch)
        if whole.digest().hex() != self._expected:
            raise DigestMismatch(f"the weights that came from {self.url} are not those that were sent")
