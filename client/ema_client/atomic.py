"""Atomic writes: a file appears under its name when the file is whole, or not at all.

Knows: temporary names beside a file. Does not know: what is written. Standard library only.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path for the block to write to; at the block's end the file there takes the place of ``path``.

    A block that raises leaves ``path`` as before, and no temporary file.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
