"""Process: the receiving end of several raw flows at once, a thread for each connection.

``flows BYTES [ADDRESS]`` listens on a free TCP port; on each connection, as the sink of the raw loops: the number of
bytes as eight bytes, little-endian, at most BYTES; then the bytes; one byte back once all have arrived; and so on.

Knows sockets. Does not know who sends, or how fast.
"""

from __future__ import annotations

import socket
import sys
import threading

from ema_service.bench.sink import LENGTH_BYTES, receive, warm_buffer


def _follow(connection: socket.socket, nbytes: int) -> None:
    buffer, prefix = warm_buffer(nbytes), memoryview(bytearray(LENGTH_BYTES))
    with connection:
        while receive(connection, prefix) and receive(connection, buffer[: int.from_bytes(prefix, "little")]):
            connection.sendall(b"\1")


def main() -> None:
    host = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    listener = socket.create_server((host, 0))
    sys.stdout.write(f"listens on {host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_follow, args=(connection, int(sys.argv[1])), daemon=True).start()


if __name__ == "__main__":
    main()
