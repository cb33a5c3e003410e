"""Where weights are published: which kind of place a URL names, and what publishing needs of each.

    file:///folder                      a folder of this machine               publishing/folder.py
    s3://, gs://, abfs://bucket/prefix  S3, Google Cloud Storage, Azure        publishing/bucket.py
    hf://owner/name[@revision][/folder] a model on the Hugging Face Hub        publishing/hub.py

Knows: URLs. Does not know: weights, formats, how a place is written to.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from ema_client.errors import UsageError
from ema_client.publishing.bucket import KINDS, Bucket

__all__ = ["Store", "open_store"]


class Store(Protocol):
    """A place for the files of one model. Every call raises DestinationFailed; a folder's OSError besides.

    at_once: nothing is seen of what is written before finish(); otherwise each file is seen when it is whole.
    """

    url: str
    at_once: bool

    def names(self) -> frozenset[str]:
        """The files that are there. The first call, which finds out whether the place can be had."""
        ...

    def read(self, name: str) -> bytes:
        """A small file, one of names()."""
        ...

    def writing(self, name: str, size: int) -> AbstractContextManager[BinaryIO]:
        """A file of ``size`` bytes to write: whole at the block's end, not there if the block raises."""
        ...

    def finish(self, removed: Collection[str], said: str) -> str | None:
        """Remove files, and end: all that was written is there. said: one line that says what was published.

        The commit, where the place has commits.
        """
        ...

    def loads_from(self) -> tuple[str, dict[str, str]]:
        """What from_pretrained() takes: the first argument, and keyword arguments."""
        ...


def open_store(url: str, *, public: bool = False) -> Store:
    """The place that a URL names; nothing is sent yet. public: of a model that is made on the Hub, see Hub.

    Raises UsageError where the URL names no such place, or the package that reaches such places is not installed.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and path.startswith("/"):
        from ema_client.publishing.folder import Folder

        return Folder(Path(path))
    if parts.scheme in KINDS and parts.netloc:
        return Bucket(url)
    if parts.scheme == "hf":
        from ema_client.publishing.hub import hub_of

        return hub_of(url, public=public)
    raise UsageError(f"{url!r} names no place to publish to", hint=_hint(url, parts.scheme))


def _hint(url: str, scheme: str) -> str:
    if not scheme:
        return f"for a folder write {Path(url).absolute().as_uri()}"
    return (
        "there are file:///folder, hf://owner/name, s3://bucket/prefix, gs://bucket/prefix and abfs://container/prefix"
    )
