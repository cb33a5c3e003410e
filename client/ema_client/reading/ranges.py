"""Bytes of a body by HTTP ranges, all of one version.

Knows: what a 206 says of the whole body. Does not know: sockets, retries, which bytes are wanted.
"""

from __future__ import annotations

from collections.abc import Callable

from ema_client.errors import ProtocolError
from ema_client.http.downloads import Download

__all__ = ["OpenRange", "check_part", "whole_length"]

#: Opens the bytes [start, stop) of a body. With an ETag: of the version with that ETag or, where the version has moved
#: on, the whole new body (status 200).
OpenRange = Callable[[int, int | None, str | None], Download]


def check_part(download: Download, start: int, etag: str | None) -> None:
    """Raises ProtocolError for a part (206) that does not begin at byte ``start``, or is not of the body ``etag``."""
    span, tag = download.headers.get("content-range", ""), download.headers.get("etag")
    if download.status == 206 and not (span.startswith(f"bytes {start}-") and etag in (None, tag)):
        with download:
            wanted = f"byte {start} of {etag or 'a body'}"
            raise ProtocolError(f"{download.url} was asked from {wanted} on and sent {span!r} of {tag}")


def whole_length(download: Download) -> int:
    """Bytes of the whole body that ``download`` is, or is a part of. Raises ProtocolError where a 206 does not say."""
    if download.status != 206:
        return download.length
    whole = download.headers.get("content-range", "").rpartition("/")[2]
    if not (whole.isascii() and whole.isdigit() and len(whole) <= 19):
        raise ProtocolError(f"{download.url} answered 206 without the length of the whole")
    return int(whole)
