"""Which files below a folder this process holds open.

A process that runs many tests has others open too, and closes them when its garbage is collected, in the middle of any
test: a test that counts descriptors counts those of its own folder.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def open_below(folder: Path) -> list[str]:
    """Where the descriptors lead that end below ``folder``, sorted; a removed file's path ends with " (deleted)"."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            paths.append(str(descriptor.readlink()))
    return sorted(path for path in paths if path.startswith(f"{folder.resolve()}/"))
