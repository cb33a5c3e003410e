"""Weights into a file: whole under its name or not there at all, and resumed where a connection broke.

Knows: ETags and ranges of an answer. Does not know: sockets, tensors, which weights are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ema_client.atomic import open_whole
from ema_client.errors import DigestMismatch, ProtocolError
from ema_client.http.digests import Digest, blocks, can_digest
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.protocol import HEADER_DIGEST, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.weights import read_header
from ema_client.wire import LENGTH_BYTES

__all__ = ["Progress", "save"]

#: Called with the bytes that have come and the bytes in all. The first number shrinks where the transfer begins anew.
Progress = Callable[[int, int], None]

#: At most so many bytes are read from the connection before they are written and their number told.
_BUFFER_BYTES = 1 << 20


def save(transport: Transport, asked: Asked, path: Path, progress: Progress | None) -> WeightsInfo:
    """Download the weights asked for into the file ``path``, which is replaced when the whole body has come.

    Raises what the transport raises once its retries are spent, DigestMismatch likewise; ProtocolError where the body
    is no weights stream or of other weights; UsageError where ``path`` is no plain file; OSError where the file cannot
    be written.
    """
    with open_whole(path) as file:
        transfer = _Transfer(file, progress)
        transport.retrying(
            lambda _: transfer.go_on(
                transport.download(
                    asked.path, query=asked.query, start=file.tell(), etag=transfer.etag, patience=asked.work_seconds
                )
            )
        )
        return read_header(_File(path, file), asked)[1]


class _Transfer:
    """A body on its way into ``file``, whose position is the end of the bytes so far. etag: the body's, once known."""

    def __init__(self, file: BinaryIO, progress: Progress | None) -> None:
        self.etag: str | None = None
        self._file = file
        self._progress = progress or (lambda _done, _total: None)
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def go_on(self, download: Download) -> None:
        """Append the rest of the body; begin anew where the service has another body by now."""
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
        self._check(download)

    def _check(self, download: Download) -> None:
        """Compare the whole file with the service's digest, if it gave one.

        Raises DigestMismatch, after which the next download begins anew.
        """
        expected = download.headers.get(HEADER_DIGEST.lower())
        if expected is None or not can_digest():
            return
        self._file.seek(0)
        head = LENGTH_BYTES + int.from_bytes(self._file.read(LENGTH_BYTES), "little")
        self._file.seek(head)
        digest = Digest(blocks())
        while count := self._file.readinto(self._buffer):  # type: ignore[attr-defined]
            digest.update(self._buffer[:count])
        if digest.digest().hex() != expected:
            self.etag = None
            self._file.seek(0)
            raise DigestMismatch(f"the weights that came from {download.url} are not those that were sent")

    def _check_continues(self, download: Download) -> None:
        span = download.headers.get("content-range", "")
        if not span.startswith(f"bytes {self._file.tell()}-") or download.headers.get("etag") != self.etag:
            raise ProtocolError(f"{download.url} was asked from byte {self._file.tell()} on and sent {span!r}")


class _File:
    """A file as a Source, from its beginning. path: for messages."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.url = str(path)
        self.length = file.seek(0, os.SEEK_END)
        self._file = file
        file.seek(0)

    def readinto(self, view: memoryview) -> None:
        if self._file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise ProtocolError(f"{self.url} is shorter than its header says")
