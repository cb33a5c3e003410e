"""Numbers of bytes as people write them.

Knows units. Does not know what has the size.
"""

from __future__ import annotations

import re

__all__ = ["parse_size", "show_size"]

_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = _DECIMAL | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """``1GiB``, ``100 MB``, ``4096`` as bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 1GiB, 100MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def show_size(nbytes: int) -> str:
    """Bytes as people write them: in binary units where that gives a whole number, else in decimal ones."""
    for unit in ("GIB", "MIB", "GB", "MB", "KIB", "KB"):
        if nbytes >= _UNITS[unit] and nbytes % _UNITS[unit] == 0:
            return f"{nbytes // _UNITS[unit]} {unit.replace('I', 'i')}"
    return f"{nbytes} B"
