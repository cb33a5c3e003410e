"""A body to send: pieces of memory, given as often as a retry needs the body, joined and cut for the socket.

Knows: memory, and how much of it one call to the kernel should take. Does not know: sockets, requests, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_client.http.memfd import SharedBody

__all__ = ["Body", "portions"]

#: sendall() is given so many bytes at a time: its timeout is for the whole portion, and between two portions the sender
#: looks for an early answer.
SEND_BYTES = 4 << 20
#: Pieces of at most SMALL_BYTES are joined to portions of at most JOINED_BYTES: one call to the kernel for many biases.
SMALL_BYTES = 64 << 10
JOINED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Body:
    """A body of ``length`` bytes, to be sent as often as need be.

    pieces: gives the body's memory from the beginning at each call. Pieces are not copied: the memory of a piece must
    not change until the sender asks for the next piece.
    shared: shared memory with the same bytes, where a service on the same host reads the body instead.
    """

    length: int
    pieces: Callable[[], Iterable[memoryview]]
    shared: SharedBody | None = None


def portions(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The bytes of ``pieces`` in portions for sendall(): small pieces joined, large pieces cut without a copy."""
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
