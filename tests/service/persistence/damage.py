"""Ways in which a safetensors file on disk is damaged. Knows paths. Does not know what the file is for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a header of rubbish": lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtyqe"', 1)),
    "another layout": lambda path: path.write_bytes(path.read_bytes().replace(b'"scalar"', b'"scalax"', 1)),
    "gone": lambda path: path.unlink(),
    "its folder gone": lambda path: shutil.rmtree(path.parent),
}
