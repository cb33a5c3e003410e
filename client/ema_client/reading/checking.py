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
    """The data section of a whole body, of which ``download`` stands at the first byte.

    moved: called with the number of bytes of each piece as it has come, by whichever thread reads.

    Nothing is compared where the service gave no digest (cast weights, a selection, TLS), where xxhash is not
    installed, or where the caller does not want it.
    """

    def __init__(self, download: Download, *, wanted: bool = True, moved: Callable[[int], None] | None = None) -> None:
        self._download = download
        self._moved = moved
        self._expected = download.headers.get(HEADER_DIGEST.lower())
        self._digest = Digest(blocks()) if wanted and self._expected and can_digest() else None
        self._rest: Rest | None = None

    def readinto(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes. Raises ConnectionLost where there are fewer."""
        _read(self._download.readinto, view, self._digest, self._moved)

    def rest(self, begin: int, readinto: ReadInto) -> ReadInto:
        """What fills a view with the bytes from ``begin`` on, which come another way: for another thread."""
        self._rest = Rest(begin) if self._digest else None
        return lambda view: _read(readinto, view, self._rest, self._moved)

    def check(self) -> None:
        """After the last byte. Raises DigestMismatch where the bytes are not those that the service has."""
        if self._digest is None:
            return
        if self._rest:
            self._digest.append(self._rest)
        if self._digest.digest().hex() != self._expected:
            raise DigestMismatch(f"the weights that came from {self._download.url} are not those that were sent")


def _read(
    readinto: ReadInto, view: memoryview, digest: Digest | Rest | None, moved: Callable[[int], None] | None
) -> None:
    """Fill ``view``, and digest it share by share, while each is in the core's cache."""
    if digest is None and moved is None:
        readinto(view)
        return
    for start in range(0, len(view), HASHED_AT_ONCE):
        share = view[start : start + HASHED_AT_ONCE]
        readinto(share)
        if digest is not None:
            digest.update(share)
        if moved is not None:
            moved(len(share))
