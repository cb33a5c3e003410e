"""Dataclass and JSON, with the rule of each field.

Knows: annotations, as of fields. Does not know: which bodies there are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ema_client.protocol.fields import FINITE

__all__ = [
    "from_json",
    "integer_of",
    "to_json",
]

#: A word for one of several things; a newer service may have more of them than the Literal.
_WORD = re.compile(r"[a-z_]{1,64}\Z")
_INTEGER = re.compile(r"-?[0-9]{1,19}\Z")

T = TypeVar("T")

_Reader = Callable[[Any], Any]

#: Dataclass -> field -> what reads the field's value. Making readers at each answer takes longer than a small push.
_READERS: dict[type, dict[str, _Reader]] = {}


def to_json(body: Any) -> dict[str, Any]:
    """The JSON object of a dataclass of the protocol."""
    return dataclasses.asdict(body)


def from_json(cls: type[T], data: Any) -> T:
    """A dataclass of the protocol from its JSON object, every field by its annotation's rule.

    Unknown members are ignored, so that an older client reads a newer server. Raises ValueError naming what is missing,
    or the field that does not keep its rule.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(data).__name__}")
    readers = _READERS.get(cls) or _READERS.setdefault(cls, _readers(cls))
    given = {}
    for name, read in readers.items():
        if name in data:
            try:
                given[name] = read(data[name])
            except ValueError as fault:
                raise ValueError(f"{cls.__name__}.{name}: {fault}") from None
    try:
        return cls(**given)
    except TypeError as missing:
        raise ValueError(f"{cls.__name__}: {missing}") from None


def _readers(cls: type) -> dict[str, _Reader]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: _reader(hints[field.name]) for field in dataclasses.fields(cls)}


def _reader(hint: Any) -> _Reader:
    """What turns a value of JSON into a field of this annotation. The reader raises ValueError on any other value."""
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin in (UnionType, Union):
        return _either([_reader(each) for each in arguments if each is not NoneType])
    if origin is Annotated:
        plain, keeps = _reader(arguments[0]), _keeper(arguments[1])
        return lambda value: keeps(plain(value))
    if origin is tuple:
        inner = _reader(arguments[0])
        return lambda value: tuple(map(inner, _typed(list, value)))
    if origin is dict:
        inner = _reader(arguments[1])
        return lambda value: {_typed(str, key): inner(each) for key, each in _typed(dict, value).items()}
    if origin is Literal:
        return _reader(Annotated[str, _WORD])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return lambda value: from_json(hint, value)
    return _number if hint is float else lambda value: _typed(hint, value)


def _either(readers: list[_Reader]) -> _Reader:
    """What reads null, and what one of the readers reads."""
    first, *others = readers
    if not others:
        return lambda value: None if value is None else first(value)
    rest = _either(others)

    def read(value: Any) -> Any:
        try:
            return None if value is None else first(value)
        except ValueError:
            return rest(value)

    return read


def _keeper(rule: Any) -> _Reader:
    """What returns a value that keeps a rule, and raises ValueError on any other."""
    if callable(rule):
        return rule  # type: ignore[no-any-return]

    def keep(value: Any) -> Any:
        kept = rule.match(value) if isinstance(rule, re.Pattern) else rule[0] <= value <= rule[1]
        return value if kept else _refuse(value)

    return keep


def _typed(kind: type[T], value: Any) -> T:
    # Not isinstance(): true is no number.
    return value if type(value) is kind else _refuse(value)


def _number(value: Any) -> float:
    # NaN is between no bounds; a larger integer is no float.
    return float(value) if type(value) in (int, float) and FINITE[0] <= value <= FINITE[1] else _refuse(value)


def integer_of(text: str) -> int:
    """The integer that a header is. Raises ValueError."""
    return int(text) if _INTEGER.match(text) else _refuse(text)


def _refuse(value: Any) -> NoReturn:
    raise ValueError(f"{str(value)[:80]!r} is not possible here")
