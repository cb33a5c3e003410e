"""A body to send: pieces of memory, given as often as a retry needs the body, joined and cut for the socket.

Knows: memory, and how much of it one call to the kernel should take. Does not know: sockets, requests, tensors.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ema_client.http.digests import HASHED_AT_ONCE, Digest

if TYPE_CHECKING:
    from ema_client.http.memfd import SharedBody, SharedSlice

__all__ = ["Body", "cut", "digested", "portions"]

#: Between two portions of so many bytes the sender looks for an early answer.
SEND_BYTES = 4 << 20
#: Pieces of at most SMALL_BYTES are joined to portions of at most JOINED_BYTES: one call to the kernel for many biases.
SMALL_BYTES = 64 << 10
JOINED_BYTES = 1 << 20

#: A service averages, and writes to its disk, this many bytes per second at the least: so much longer than a short
#: answer may the answer to a body take before silence means that the service is away.
SLOWEST_BYTES_PER_SECOND = 200e6


def _nothing(_: int) -> None:
    pass


def _look() -> None:
    pass


def _drawn() -> str:
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class Body:
    """A body of ``length`` bytes, to be sent as often as need be.

    pieces: gives the body's memory from the beginning at each call. Pieces are not copied: the memory of a piece must
    not change until the sender asks for the next piece.
    shared: shared memory with the same bytes, where a service on the same host reads the body instead.
    digest: gives what digests the body as it is sent, header and all; None for a body that goes without a digest.
    data: gives what is behind the header, in one or several views, where all of it lies in memory and in the layout's
    canonical order: such a body may go in stretches, or to several hosts. None for any other body.
    moved: called by the sending thread, or by one of several at a time, whenever bytes of the body went out, with their
    number since its beginning.
    look: called by the sending thread with each portion, and each second in which nobody takes any or answers. What the
    call raises ends the sending.
    waits: seconds that the service may wait for others before it answers.
    key: the same in all tries of one push, and in no other: hosts that have some of the body from an earlier try know
    the rest by it.
    """

    length: int
    pieces: Callable[[], Iterable[memoryview]]
    shared: SharedBody | SharedSlice | None = None
    digest: Callable[[], Digest] | None = None
    data: Callable[[], Sequence[memoryview]] | None = None
    moved: Callable[[int], None] = _nothing
    look: Callable[[], None] = _look
    waits: float = 0.0
    key: str = field(default_factory=_drawn)

    @property
    def patience(self) -> float:
        """Seconds beyond those of a short answer that the answer to this body may take."""
        return self.waits + self.length / SLOWEST_BYTES_PER_SECOND

    def of_another_push(self) -> Body:
        """A body of the same memory with a key of its own: what the memory holds by now is another push."""
        return replace(self, key=_drawn())


def cut(views: Iterable[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """Bytes [start, stop) of views that lie back to back."""
    begin = 0
    for view in views:
        if begin >= stop:
            return
        if piece := view[max(0, start - begin) : stop - begin]:
            yield piece
        begin += len(view)


def digested(portions: Iterable[memoryview], digest: Digest) -> Iterator[memoryview]:
    """The portions in shares that are hashed just before they are sent, and the digest behind the last."""
    for portion in portions:
        for start in range(0, len(portion), HASHED_AT_ONCE):
            share = portion[start : start + HASHED_AT_ONCE]
            digest.update(share)
            yield share
    yield memoryview(digest.digest())


def portions(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The bytes of ``pieces`` in portions for a socket: small pieces joined, large pieces cut without a copy."""
    for piece in _joined(pieces):
        for start in range(0, len(piece), SEND_BYTES):
            yield piece[start : start + SEND_BYTES]


def _joined(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    pending = bytearray()
    for piece in pieces:
        small = len(piece) <= SMALL_BYTES
        if pending and not (small and len(pending) + len(piece) <= JOINED_BYTES):
            yield memoryview(pending)
            pending = bytearray()
        if small:
            pending += piece
        else:
            yield piece
    if pending:
        yield memoryview(pending)
