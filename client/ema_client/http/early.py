"""An answer that comes before the request's body has been sent: its head is read off the bare socket, then replayed.

``http.client`` reads an answer only after the whole request. A server that refuses a body answers earlier, and
``100 Continue`` is an earlier answer too: which of the two came, the head says.

Knows: HTTP/1.1's heads as bytes, ``http.client``'s reader of answers. Does not know: what is sent, or what an answer
means.
"""

from __future__ import annotations

import functools
import io
import socket

from ema_client.http.heads import WholeHead

__all__ = ["is_continue", "read_head", "replaying"]


def read_head(sock: socket.socket) -> bytes:
    """The head of the next answer, with the empty line at its end. Raises ConnectionResetError at the stream's end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        # Byte by byte: the bytes behind the head are the answer's body, which http.client will read.
        byte = sock.recv(1)
        if not byte:
            raise ConnectionResetError("closed before an answer")
        head += byte
    return head


def is_continue(head: bytes) -> bool:
    """Whether a head is that of ``100 Continue``, which asks for the body."""
    return head.startswith(b"HTTP/1.1 100")


def replaying(head: bytes) -> functools.partial[_Replayed]:
    """A class of responses for ``http.client``, which reads ``head`` first and then the socket."""
    return functools.partial(_Replayed, head)


class _Replayed(WholeHead):
    def __init__(self, head: bytes, sock: socket.socket, debuglevel: int = 0, method: str | None = None) -> None:
        super().__init__(sock, debuglevel, method)
        self.fp = io.BufferedReader(_Prepended(head, self.fp))


class _Prepended(io.RawIOBase):
    def __init__(self, head: bytes, rest: io.BufferedReader) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._head:
            return self._rest.readinto1(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count

    def close(self) -> None:
        self._rest.close()
        super().close()
