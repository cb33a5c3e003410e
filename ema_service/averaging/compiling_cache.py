"""The files in which compiled code is kept: one that is damaged, or cannot be written, costs a compilation, no start.

numba (whose functions have no types) writes them without a checksum or a sync, so a crash of the machine may leave some
cut short or full of zeros, and whatever the reading then stumbles over ends the start. Here each file ends in a digest
of what stands before; one whose digest is wrong is as good as none.

Knows numba's cache. Does not know what is compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

__all__ = ["CheckedCache"]

_log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


class CheckedCache(FunctionCache):
    """numba's cache of one function, without its exceptions. Raises RuntimeError where there is no place for files."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file = _CheckedFiles(  # type: ignore[no-untyped-call]
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled code, None where there is none that can be read."""
        try:
            return super().load_overload(signature, context)  # type: ignore[no-untyped-call]
        except OSError as fault:
            _log.info("compiled code cannot be read, and is compiled anew: %s", fault)
            return None

    def save_overload(self, signature: Any, code: Any) -> None:
        """Keep the compiled code for the next process, if that can be done."""
        try:
            super().save_overload(signature, code)  # type: ignore[no-untyped-call]
        except OSError as fault:
            _log.warning("compiled code cannot be kept, so that each start compiles anew: %s", fault)


class _CheckedFiles(IndexDataCacheFile):
    """numba's index and data files, each with a digest at its end."""

    def _load_index(self) -> Any:
        whole = _content(Path(self._index_path)) is not None
        return super()._load_index() if whole else {}  # type: ignore[no-untyped-call]

    def _load_data(self, name: str) -> Any:
        path = Path(self._data_path(name))  # type: ignore[no-untyped-call]
        if _content(path) is None:
            raise OSError(f"{path} is damaged")
        return super()._load_data(name)  # type: ignore[no-untyped-call]  # does not mind the digest

    @contextlib.contextmanager
    def _open_for_write(self, path: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        with super()._open_for_write(path) as file:
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def _content(path: Path) -> bytes | None:
    """What a file holds before its digest, None where that is wrong or there is no file. Raises OSError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    content, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
