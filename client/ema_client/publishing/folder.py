"""A folder of this machine as a place to publish to.

Knows: files that appear when they are whole. Does not know: weights, formats, other places.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from ema_client.atomic import open_whole

__all__ = ["Folder"]


class Folder:
    """A folder, made with its first file where there is none; a Store."""

    at_once = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = path.as_uri()

    def names(self) -> frozenset[str]:
        return frozenset(each.name for each in self._path.iterdir()) if self._path.exists() else frozenset()

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def writing(self, name: str, size: int) -> AbstractContextManager[BinaryIO]:
        del size
        self._path.mkdir(parents=True, exist_ok=True)
        return open_whole(self._path / name)

    def finish(self, removed: Collection[str], said: str) -> None:
        del said
        for name in removed:
            (self._path / name).unlink(missing_ok=True)

    def loads_from(self) -> tuple[str, dict[str, str]]:
        return str(self._path), {}
