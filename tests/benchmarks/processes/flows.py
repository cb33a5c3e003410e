"""Process: the receiving end of several raw flows at once, a thread for each connection.

``flows BYTES [average] [ADDRESS]`` listens on a free TCP port; on each connection, as the sink of the raw loops: the
number of bytes as eight bytes, little-endian, at most BYTES; then the bytes; one byte back once all have arrived; and
so on. With ``average`` the bytes are float32 parameters, and each piece is averaged with a shadow once it is there:
what a push costs where nothing is asked of it but the average.

Knows sockets, and the loop that averages. Does not know who sends, or how fast.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable

import numpy as np

from ema_service.averaging import averaging
from ema_service.bench.sink import LENGTH_BYTES, receive, warm_buffer

#: Bytes that are received before they are averaged, as the service has it: they are in a cache still.
_AT_ONCE = 1 << 20
_WEIGHT = 1e-4


def _follow(connection: socket.socket, nbytes: int, average: bool) -> None:
    buffer, prefix = warm_buffer(nbytes), memoryview(bytearray(LENGTH_BYTES))
    work = _averaging(buffer) if average else None
    with connection:
        while receive(connection, prefix):
            body = buffer[: int.from_bytes(prefix, "little")]
            if not (_receive_and(work, connection, body) if work else receive(connection, body)):
                return
            connection.sendall(b"\1")


def _averaging(buffer: memoryview) -> Callable[[int, int], object]:
    """Averages elements of a buffer with those of a shadow: each result takes the place of its parameter."""
    params = np.frombuffer(buffer, dtype=np.float32)
    shadow = np.frombuffer(warm_buffer(len(buffer)), dtype=np.float32)
    shadow.fill(1.0)
    work = averaging(params, shadow, params, _WEIGHT)
    work(0, min(len(params), _AT_ONCE // 4))  # the loop is compiled now, not with the first body
    return work


def _receive_and(work: Callable[[int, int], object], connection: socket.socket, body: memoryview) -> bool:
    for start in range(0, len(body), _AT_ONCE):
        piece = body[start : start + _AT_ONCE]
        if not receive(connection, piece):
            return False
        work(start // 4, (start + len(piece)) // 4)
    return True


def main() -> None:
    words = sys.argv[2:]
    host = next((word for word in words if word != "average"), "127.0.0.1")
    listener = socket.create_server((host, 0))
    sys.stdout.write(f"listens on {host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        given = (connection, int(sys.argv[1]), "average" in words)
        threading.Thread(target=_follow, args=given, daemon=True).start()


if __name__ == "__main__":
    main()
