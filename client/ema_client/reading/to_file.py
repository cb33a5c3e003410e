"""Weights into a file: whole under its name or not there at all, and resumed where a connection broke.

Knows: temporary names, ETags and ranges of an answer. Does not know: sockets, tensors, which route it reads.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from ema_client.errors import ProtocolError
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.protocol import WeightsInfo
from ema_client.reading.weights import read_header

__all__ = ["Progress", "save"]

#: Called with the bytes that have come and the bytes in all. The first shrinks where the transfer begins anew.
Progress = Callable[[int, int], None]

CHUNK = 1 << 20


def save(
    transport: Transport, route: str, query: Mapping[str, str | None], path: Path, progress: Progress | None
) -> WeightsInfo:
    """Download the weights at ``route`` into the file ``path``, replacing what was there only when all has come.

    Raises what the transport raises once its retries are spent, ProtocolError if what came is no weights file, OSError
    if the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            transfer = _Transfer(file, progress)
            transport.retrying(
                lambda _: transfer.go_on(transport.download(route, query=query, start=file.tell(), etag=transfer.etag))
            )
        info = _check(part)
        part.replace(path)
        return info
    finally:
        part.unlink(missing_ok=True)


class _Transfer:
    """What has come so far: ``file`` stands at its end, ``etag`` names the body it is of."""

    def __init__(self, file: BinaryIO, progress: Progress | None) -> None:
        self.etag: str | None = None
        self._file = file
        self._progress = progress or (lambda _done, _total: None)
        self._buffer = memoryview(bytearray(CHUNK))

    def go_on(self, download: Download) -> None:
        """Append the rest, or all anew if the service has another body by now."""
        with download:
            if download.status == 206:
                self._check_continues(download)
            else:
                self._file.seek(0)
                self._file.truncate()
            etag = download.headers.get("etag", "")
            # A weak ETag promises like content, not like bytes.
            self.etag = etag if etag.startswith('"') else None
            total = self._file.tell() + download.length
            while (missing := total - self._file.tell()) > 0:
                count = download.read_some(self._buffer[:missing])
                self._file.write(self._buffer[:count])
                self._progress(self._file.tell(), total)

    def _check_continues(self, download: Download) -> None:
        span = download.headers.get("content-range", "")
        if not span.startswith(f"bytes {self._file.tell()}-") or download.headers.get("etag") != self.etag:
            raise ProtocolError(f"{download.url} was asked from byte {self._file.tell()} on and sent {span!r}")


class _File:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.url = str(path)
        self.length = path.stat().st_size
        self._file = file

    def readinto(self, view: memoryview) -> None:
        if self._file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise ProtocolError(f"{self.url} is shorter than its header says")


def _check(path: Path) -> WeightsInfo:
    with path.open("rb") as file:
        return read_header(_File(path, file))[1]
