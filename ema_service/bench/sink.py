"""Process: the receiving end of the raw loops, nothing but ``recv_into`` into one warm buffer.

``python -m ema_service.bench.sink BYTES SOCKET_PATH`` listens on a free TCP port and on a Unix socket. On either: the
number of bytes as eight bytes, little-endian; then the bytes; one byte back once all have arrived; and so on. Standard
library only: torch would take seconds to import.

Knows sockets. Does not know who sends, or why.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import sys
import threading

LENGTH_BYTES = 8
#: Seconds that a sender may be idle. A socket with a timeout is also the faster one, see ceiling.SENT_AT_ONCE.
SECONDS = 600.0


def warm_buffer(nbytes: int) -> memoryview:
    """Memory whose pages have been touched, huge pages where the system has them, like the server's own staging."""
    # MAP_PRIVATE: shared memory, mmap's default, gets no huge pages.
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(region)
    for start in range(0, nbytes, mmap.PAGESIZE):
        view[start] = 1
    return view


def receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill ``buffer``; False where the sender has gone."""
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if not count:
            return False
        filled += count
    return True


def _serve(listener: socket.socket, buffer: memoryview) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(TimeoutError):
            connection.settimeout(SECONDS)
            if connection.family == socket.AF_INET:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _follow(connection, buffer)


def _follow(connection: socket.socket, buffer: memoryview) -> None:
    prefix = memoryview(bytearray(LENGTH_BYTES))
    while receive(connection, prefix) and receive(connection, buffer[: int.from_bytes(prefix, "little")]):
        connection.sendall(b"\1")


def main() -> None:
    buffer = warm_buffer(int(sys.argv[1]))
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(sys.argv[2])
    unix.listen()
    sys.stdout.write(f"listens on 127.0.0.1:{tcp.getsockname()[1]}\n")
    sys.stdout.flush()
    threading.Thread(target=_serve, args=(unix, buffer), daemon=True).start()
    _serve(tcp, buffer)


if __name__ == "__main__":
    main()
