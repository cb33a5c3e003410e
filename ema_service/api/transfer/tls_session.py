"""One connection's TLS between two byte streams: encrypted bytes at one end, plain ones at the other.

A Session belongs to one thread at a time: OpenSSL locks nothing, and Python calls OpenSSL without the interpreter lock.
Either the event loop has a Session (tls_transport), or the thread that receives a body or sends weights (SecureStream).

Knows the standard library's ``ssl`` and a socket's descriptor. Does not know the event loop, HTTP, or certificates.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from collections.abc import Callable
from typing import cast

__all__ = ["SecureStream", "Session", "scratch"]

#: Encrypted bytes that are read from a socket at once: still in the core's cache when they are decrypted.
_READ_AT_ONCE = 256 << 10
#: Plain bytes that a thread encrypts at once.
_ENCRYPTED_AT_ONCE = 256 << 10


class Session:
    """The server's side of TLS of one connection. For one thread at a time.

    tls: OpenSSL's object, for what it tells of the peer. ended: whether the peer has said that no more follows.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.ended = False

    def handshake(self) -> bool:
        """Go on with the handshake, and say whether it is done. Raises ssl.SSLError where it cannot be done."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def feed(self, encrypted: memoryview) -> None:
        """Take bytes that the peer sent."""
        self._incoming.write(encrypted)

    def read_into(self, view: memoryview) -> int:
        """Decrypt into ``view`` as many bytes as have been fed, or fit.

        Returns their number; 0 where the next record is not whole, or the peer has ended. Raises ssl.SSLError where the
        peer sent what is no TLS; bytes before that are returned first.
        """
        count = 0
        try:
            while count < len(view) and not self.ended:
                read = self._decrypt(view[count:])
                self.ended = not read
                count += read
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            if not count:
                raise
        return count

    def _decrypt(self, view: memoryview) -> int:
        """Decrypt one record, or what fits of one. Returns 0 where the peer has ended."""
        return cast(int, self.tls.read(len(view), cast(bytearray, view)))  # a number, where there is a buffer to fill

    def write(self, plain: bytes | bytearray | memoryview) -> None:
        """Encrypt bytes for the peer, all of them: take() has them."""
        rest = memoryview(plain)
        while rest:
            rest = rest[self.tls.write(rest) :]

    def take(self) -> bytes:
        """The encrypted bytes that are to be sent: of write(), of the handshake, and TLS's own answers."""
        return self._outgoing.read()

    def end(self) -> None:
        """Tell the peer that no more follows: take() has the alert."""
        with contextlib.suppress(ssl.SSLError):  # the peer's farewell is not waited for, and a broken session has none
            self.tls.unwrap()


class SecureStream:
    """A connection under TLS in the hands of one thread: a Stream that decrypts and encrypts on that thread.

    Owns ``descriptor``, a duplicate of the connection's, and ``session`` until close(), which calls ``returned`` on the
    thread. unsent: encrypted bytes that the socket has not taken, which go out before any other.
    """

    def __init__(self, descriptor: int, session: Session, returned: Callable[[SecureStream], None]) -> None:
        self._descriptor = descriptor
        self._session = session
        self._returned = returned
        self.unsent = memoryview(b"")

    def fileno(self) -> int:
        return self._descriptor

    def read_into(self, view: memoryview) -> int:
        """As Stream.read_into(): until ``view`` is full or the socket is empty."""
        count = 0
        while count < len(view):
            read = self._session.read_into(view[count:])
            count += read
            if not read and (self._session.ended or not self._receive(waits=not count)):
                break
        return count

    def _receive(self, *, waits: bool) -> bool:
        """Feed the session with what has come, and say whether anything has. Raises as os.readv(), but
        BlockingIOError only where the caller ``waits``."""
        encrypted = scratch()
        try:
            count = os.readv(self._descriptor, [encrypted])
        except BlockingIOError:
            if waits:
                raise
            return False
        self._session.feed(encrypted[:count])
        return count > 0

    def write(self, view: memoryview) -> int:
        """As Stream.write(). Bytes count as sent once they are encrypted; those in ``unsent`` go first."""
        self._flush()
        piece = view[:_ENCRYPTED_AT_ONCE]
        self._session.write(piece)
        self.unsent = memoryview(self._session.take())
        with contextlib.suppress(BlockingIOError):
            self._flush()
        return len(piece)

    def _flush(self) -> None:
        while self.unsent:
            self.unsent = self.unsent[os.write(self._descriptor, self.unsent) :]

    def close(self) -> None:
        os.close(self._descriptor)
        self._returned(self)


_threads = threading.local()


def scratch() -> memoryview:
    """This thread's memory for encrypted bytes, warm from the latest use."""
    scratch: memoryview | None = getattr(_threads, "scratch", None)
    if scratch is None:
        scratch = _threads.scratch = memoryview(bytearray(_READ_AT_ONCE))
    return scratch
