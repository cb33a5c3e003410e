"""A file that appears under its name when it is whole, or not at all.

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
    """A temporary path beside ``path``: the file that the block writes there takes the place of ``path`` at the end.

    A block that raises leaves ``path`` as it was, and no temporary file.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
