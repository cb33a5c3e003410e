"""Messages and records as JSON: one object with one member, which is named as the message is.

    {"resolve":{"shard":1,"term":{"number":3,"name":"5f0c"},"edition":9,"committed":true,"reason":""}}

A message is read strictly. A member that is missing, unknown or there twice, and a value of another type, is an error
that names the place: both ends are of one version of the service, so whatever else comes is a mistake, and what becomes
of a run must not hang on how a mistake is read.

Knows the fields of ``messages`` and JSON. Does not know what follows from a message, or how it travels.
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from ema_service.cluster.messages import Message, Proposal, Record, Rewind, SnapshotBegun, SnapshotTaken

__all__ = ["MalformedMessage", "decode", "encode"]

M = TypeVar("M", bound=Message)

#: Numbers are smaller: SQLite's integers.
_END = 1 << 63
_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}


#: What records of earlier servers, and changes in these, lack, and then is as by default.
_LATER: dict[type, set[str]] = {
    Proposal: {"seating", "word", "to"},
    Record: {"seating"},
    Rewind: {"version", "step", "source"},
    SnapshotBegun: {"held"},
    SnapshotTaken: {"recipe"},
}


class MalformedMessage(ValueError):
    """What came is none of the messages that may come, and the text says where not."""


def encode(message: Message) -> str:
    """A message, a change or a record as JSON, on one line, in ASCII."""
    return json.dumps({_name(type(message)): _plain(message)}, separators=(",", ":"))


def decode(text: str | bytes, *kinds: type[M]) -> M:
    """The message in ``text``, which is of one of these kinds. Raises MalformedMessage."""
    names = {_name(kind): kind for kind in kinds}
    expected = f"an object with one member: {' or '.join(names)}"
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except MalformedMessage:
        raise
    except (RecursionError, ValueError) as fault:
        # ValueError covers JSONDecodeError, UnicodeDecodeError, and integers of thousands of digits.
        raise MalformedMessage(f"not JSON: {type(fault).__name__}: {str(fault)[:120]}") from None
    if not isinstance(data, dict) or len(data) != 1:
        _refuse("the message", expected, data)
    ((name, body),) = data.items()
    if name not in names:
        raise MalformedMessage(f"the message: expected {expected}, got {name[:80]!r}")
    found: M = _read_message(names[name], body, name)
    return found


def _no_number(spelling: str) -> NoReturn:
    """NaN and the infinities, which Python's reader takes for numbers."""
    raise MalformedMessage(f"not JSON: {spelling}")


def _name(kind: type) -> str:
    return kind.__name__.lower()


def _plain(value: Any) -> Any:
    """A message as an object, with the messages in it."""
    if isinstance(value, tuple):
        fields: tuple[str, ...] = type(value)._fields  # type: ignore[attr-defined]  # there are named tuples alone
        return {field: _plain(each) for field, each in zip(fields, value, strict=True)}
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise MalformedMessage(f"a member stands twice in an object with {', '.join(map(repr, sorted(table)))[:200]}")
    return table


@cache
def _fields(kind: type) -> dict[str, Any]:
    """The types of a message's fields, by name."""
    return get_type_hints(kind)


def _read_message(kind: type, data: Any, where: str) -> Any:
    """A message from its object."""
    if not isinstance(data, dict):
        _refuse(where, "an object", data)
    fields = _fields(kind)
    for word, names in (
        ("lacks", fields.keys() - data.keys() - _LATER.get(kind, set())),
        ("has an unknown", data.keys() - fields.keys()),
    ):
        if names:
            raise MalformedMessage(f"{where} {word} member {min(names)[:80]!r}")
    found = {name: hint for name, hint in fields.items() if name in data}
    return kind(**{name: _read(hint, data[name], f"{where}.{name}") for name, hint in found.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    """The value of a field of this type."""
    if choices := get_args(hint):  # a type, or null
        return None if value is None else _read(choices[0], value, where)
    if hasattr(hint, "_fields"):
        return _read_message(hint, value, where)
    # Not isinstance(): true is no number.
    if type(value) is not hint or not _has_form(value):
        _refuse(where, f"a number from 0 to {_END - 1}" if hint is int else _TYPES[hint], value)
    return value


def _has_form(value: str | float) -> bool:
    """Whether a text or a number is one that may come."""
    if isinstance(value, str):
        return _encodable(value)
    if type(value) is float:
        return math.isfinite(value)  # 1e999 is read as infinite
    return 0 <= value < _END


def _encodable(text: str) -> bool:
    # JSON can spell half of a surrogate pair; a database cannot keep it.
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _refuse(where: str, expected: str, value: Any) -> NoReturn:
    shown = f"{json.dumps(value)[:80]}" if isinstance(value, int | float | str) else _TYPES.get(type(value), "null")
    raise MalformedMessage(f"{where}: expected {expected}, got {shown}")
