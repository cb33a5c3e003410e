"""Weights into a file or a stream: a file is whole under its name or not there at all, and resumed after a break.

Knows: ETags and ranges of an answer. Does not know: sockets, tensors, which weights are asked for.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ema_client.atomic import open_kept, open_whole
from ema_client.errors import DigestMismatch, ProtocolError
from ema_client.http.digests import Digest, blocks, can_digest
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.protocol import HEADER_DIGEST, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Progress
from ema_client.reading.ordered import Ordered, open_ordered
from ema_client.reading.weights import info_of, read_head, read_header
from ema_client.wire import LENGTH_BYTES

__all__ = ["pour", "save", "save_on"]

#: Called with the ETag and the length of a body that is written from its beginning.
_Begins = Callable[[str | None, int], None]

#: At most so many bytes are read from the connection before they are written and their number told.
_BUFFER_BYTES = 1 << 20
#: What Linux calls the time since its latest start.
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def save(transport: Transport, asked: Asked, path: Path, progress: Progress | None) -> WeightsInfo:
    """Download the weights asked for into the file ``path``, which is replaced when the whole body has come.

    Raises what the transport raises once its retries are spent, DigestMismatch likewise; ProtocolError where the body
    is no weights stream or of other weights; UsageError where ``path`` is no plain file; OSError where the file cannot
    be written.
    """
    with open_whole(path) as file:
        return _filled(transport, asked, path, _Transfer(file, progress))


def save_on(transport: Transport, asked: Asked, path: Path, progress: Progress | None) -> WeightsInfo:
    """save(), going on with the same bytes of an earlier process that was ended, and leaving them to a later process.

    The same bytes: of one service, of one request and one ETag, since the machine's latest start. What was written
    before a power loss may not be on the disk.
    """
    with open_kept(path) as kept:

        def begins(etag: str | None, length: int) -> None:
            kept.rename(_content(transport.url, asked, etag, length))

        transfer = _Transfer(kept.file, progress, begins)
        if kept.file.tell():
            first = transport.retrying(lambda _: _opened(transport, asked))
            transfer.go_on_from(
                first, lambda etag, length: _content(transport.url, asked, etag, length) == kept.content
            )
        return _filled(transport, asked, path, transfer)


def pour(transport: Transport, asked: Asked, stream: BinaryIO, progress: Progress | None) -> WeightsInfo:
    """Write the weights asked for to ``stream``, which takes bytes once, such as standard output.

    The head is checked before a byte is written, the digest after the last one: who reads the stream learns of a
    mismatch by this call alone. Raises as save() does, and ProtocolError where the connection broke and other weights
    have taken the place of those that were sent in part.
    """
    poured = _Poured(stream, asked, progress)
    return transport.retrying(
        lambda _: poured.go_on(_opened(transport, asked, poured.count, poured.etag)), brought=lambda: poured.count
    )


def _opened(transport: Transport, asked: Asked, start: int = 0, etag: str | None = None) -> Download | Ordered:
    return open_ordered(transport, asked, start, etag)


def _filled(transport: Transport, asked: Asked, path: Path, transfer: _Transfer) -> WeightsInfo:
    file = transfer.file
    transport.retrying(
        lambda _: transfer.go_on(_opened(transport, asked, file.tell(), transfer.etag)),
        brought=lambda: transfer.brought,
    )
    return read_header(_File(path, file), asked)[1]


def _content(url: str, asked: Asked, etag: str | None, length: int) -> str:
    """What names the bytes of a body; bytes without a strong ETag have no name that comes again."""
    if etag is None:
        return secrets.token_hex(8)
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    said = repr((boot, url, asked.path, sorted(asked.query.items()), etag, length))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _strong_etag(download: Download | Ordered) -> str | None:
    """The body's ETag. A weak one promises like content, not like bytes."""
    etag = download.headers.get("etag", "")
    return etag if etag.startswith('"') else None


def _check_continues(download: Download | Ordered, start: int, etag: str | None) -> None:
    span = download.headers.get("content-range", "")
    if not span.startswith(f"bytes {start}-") or download.headers.get("etag") != etag:
        raise ProtocolError(f"{download.url} was asked from byte {start} on and sent {span!r}")


class _Transfer:
    """A body on its way into ``file``, whose position is the end of the bytes so far.

    etag: the body's, once known. begins: called with the ETag and the length of a body that is written from its
    beginning.
    """

    def __init__(self, file: BinaryIO, progress: Progress | None, begins: _Begins | None = None) -> None:
        self.etag: str | None = None
        self.file = file
        self._progress = progress or _nobody
        self._begins = begins or _nobody
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    @property
    def brought(self) -> int:
        """Bytes of the file that a later try goes on from: none of a body without an ETag."""
        return self.file.tell() if self.etag else 0

    def go_on_from(self, download: Download | Ordered, same: Callable[[str | None, int], bool]) -> None:
        """Let the file's bytes stay where they are the first of the body of ``download``, of which none is read."""
        with download:
            etag, there = _strong_etag(download), self.file.tell()
            if not same(etag, download.length) or there > download.length:
                self._empty()
                return
            self.etag = etag
            if there == download.length:
                # The last byte is asked for again: with it comes the digest.
                self.file.seek(there - 1)
                self.file.truncate()

    def go_on(self, download: Download | Ordered) -> None:
        """Append the rest of the body; begin anew where the service has another body by now."""
        with download:
            if download.status == 206:
                _check_continues(download, self.file.tell(), self.etag)
            else:
                self._empty()
                self.etag = _strong_etag(download)
                self._begins(self.etag, download.length)
            total = self.file.tell() + download.length
            while (missing := total - self.file.tell()) > 0:
                count = download.read_some(self._buffer[:missing])
                self.file.write(self._buffer[:count])
                self._progress(self.file.tell(), total)
        self._check(download)

    def _empty(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def _check(self, download: Download | Ordered) -> None:
        """Compare the whole file with the service's digest, if it gave one.

        Raises DigestMismatch, after which the next download begins anew.
        """
        expected = download.headers.get(HEADER_DIGEST.lower())
        if expected is None or not can_digest():
            return
        self.file.seek(0)
        head = LENGTH_BYTES + int.from_bytes(self.file.read(LENGTH_BYTES), "little")
        self.file.seek(head)
        digest = Digest(blocks())
        while count := self.file.readinto(self._buffer):  # type: ignore[attr-defined]
            digest.update(self._buffer[:count])
        if digest.digest().hex() != expected:
            self.etag = None
            self._empty()
            raise DigestMismatch(f"the weights that came from {download.url} are not those that were sent")


class _Poured:
    """A body on its way into a stream that takes bytes once. count: bytes that are out; etag: the body's."""

    def __init__(self, stream: BinaryIO, asked: Asked, progress: Progress | None) -> None:
        self.count = 0
        self.etag: str | None = None
        self._stream = stream
        self._asked = asked
        self._progress = progress or _nobody
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._digest: Digest | None = None
        self._info: WeightsInfo | None = None

    def go_on(self, download: Download | Ordered) -> WeightsInfo:
        with download:
            total = download.length + self.count
            if self._info is not None:
                self._check_goes_on(download)
            info = self._info or self._begin(download)
            while (missing := total - self.count) > 0:
                piece = self._buffer[: download.read_some(self._buffer[:missing])]
                if self._digest:
                    self._digest.update(piece)
                self._write(piece)
                self._progress(self.count, total)
        expected = download.headers.get(HEADER_DIGEST.lower())
        if expected and self._digest and self._digest.digest().hex() != expected:
            # The bytes are out: another try could not take them back.
            raise ProtocolError(f"the weights that came from {download.url} are not those that were sent", hint=_AGAIN)
        self._stream.flush()
        return info

    def _begin(self, download: Download | Ordered) -> WeightsInfo:
        raw, header = read_head(download, download.length)
        if len(raw) + header.data_bytes != download.length:
            raise ProtocolError(f"{download.url} sent {download.length} bytes; its header describes others")
        info = info_of(download.url, header, self._asked)
        self.etag = _strong_etag(download)
        self._digest = Digest(blocks()) if can_digest() else None
        self._write(raw)
        self._info = info
        return info

    def _check_goes_on(self, download: Download | Ordered) -> None:
        if download.status != 206:
            raise ProtocolError(
                f"the connection to {download.url} broke after {self.count} bytes, and the weights are others now",
                hint=_AGAIN,
            )
        _check_continues(download, self.count, self.etag)

    def _write(self, piece: bytes | memoryview) -> None:
        self._stream.write(piece)
        self.count += len(piece)


_AGAIN = "throw away what was written, and ask again; a file is written whole or not at all, a snapshot stays as it is"


def _nobody(*_: object) -> None:
    pass


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
