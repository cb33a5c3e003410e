"""The highest rate of this machine's sockets: ``sendall`` from one warm buffer to a process that only receives.

No service can be faster than this loop over the same socket, so the loop stands beside every figure of the same round.

Knows sockets. Does not know HTTP or the service.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from pathlib import Path
from typing import Self

from ema_service.bench.children import BenchFailed, Child
from ema_service.bench.rounds import Operation, timed
from ema_service.bench.sink import LENGTH_BYTES, warm_buffer

__all__ = ["RAW_TCP", "RAW_UNIX", "Ceiling"]

RAW_TCP = "raw TCP loopback"
RAW_UNIX = "raw Unix socket"
#: Bytes of one sendall(), on sockets with a timeout, as ema_client does. Loopback TCP of a quiet 2-core machine: one
#: sendall of everything on blocking sockets 2.1 GB/s, pieces of 4 MiB 3.9 (2.1 where the kernel has a bad day).
SENT_AT_ONCE = 4 << 20
#: Seconds to wait for one answer; a gigabyte takes a second on a slow machine.
_SECONDS = 120.0


class Ceiling:
    """Two open connections to a sink, within the ``with`` block, over TCP and a Unix socket."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._clean = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-"))
            path = str(Path(folder) / "sink.sock")
            sink = stack.enter_context(Child("ema_service.bench.sink", [str(self._nbytes), path]))
            host, _, port = sink.said.rpartition(":")
            self._tcp = stack.enter_context(socket.create_connection((host, int(port)), timeout=_SECONDS))
            self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._unix = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            self._unix.settimeout(_SECONDS)
            self._unix.connect(path)
            self._buffer = warm_buffer(self._nbytes)
            self._clean = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._clean.close()

    def operations(self) -> dict[str, Operation]:
        """By name, sending ``nbytes`` over each of the two sockets."""
        return {
            RAW_TCP: timed(lambda: self._send(self._tcp)),
            RAW_UNIX: timed(lambda: self._send(self._unix)),
        }

    def _send(self, connection: socket.socket) -> None:
        connection.sendall(self._nbytes.to_bytes(LENGTH_BYTES, "little"))
        for start in range(0, self._nbytes, SENT_AT_ONCE):
            connection.sendall(self._buffer[start : start + SENT_AT_ONCE])
        if connection.recv(1) != b"\1":
            raise BenchFailed("the receiving end of the raw loop has gone")
