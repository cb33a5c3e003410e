"""The compiled loops by name, and what each takes: what compiles them and what calls them agree on it here.

Knows names and dtypes. Does not know compilers, or what a loop computes.
"""

from __future__ import annotations

__all__ = ["MEASURING_BYTES", "SIGNATURES"]

_AVERAGE = "{0}* {1}* {2}* i8 f4 u8* i8 u8* i8 i8"
#: By group and loop: what the loop takes, as numpy writes dtypes; with a star, the address of such values. Each gives
#: an i8.
SIGNATURES = {
    "averaging": {
        "average_f32": _AVERAGE.format("f4", "f4", "f4"),
        "average_bf16": _AVERAGE.format("f4", "f4", "u2"),
        "take_last": "u8* u1*",
        "add_f32": "f8* f4* i8 f8",
        "add_f64": "f8* f8* i8 f8",
    },
    "measuring": {
        "measure_f32": _AVERAGE.format("f4", "f4", "f4") + " i8 i8* i8 f8* f8*",
        "measure_bf16": _AVERAGE.format("f4", "f4", "u2") + " i8 i8* i8 f8* f8*",
    },
}
#: Of the memory that a measuring loop is given as its own.
MEASURING_BYTES = 8 * (2 * 48 + 256)
