"""Pickles of torch.save as data: opcode by opcode, with nothing imported, called or executed.

A pickle is a program. The opcodes that torch.save() writes for tensors and plain values are carried out here on lists
and dicts of this module; a name of Python code stays a name, and the few that describe values are made by a closed
table. Memory is in proportion to the pickle's bytes: no opcode and no name can ask for more.

Knows: opcodes of pickle protocols 2 and 3, names that torch.save() writes. Does not know: files, storages, torch.
"""

from __future__ import annotations

import pickletools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import IO, Any

__all__ = ["Name", "load"]

#: Opcodes that push their argument.
_LITERALS = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    )
)
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
#: Names of values beside the weights that no import needs. A value of such a type is kept as the name alone.
_UNUSED = frozenset(
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("complex", "bytearray")
) | {
    "torch.device",
    "torch.serialization._get_layout",
}


@dataclass(frozen=True, slots=True)
class Name:
    """A name of Python code in a pickle, such as ``torch.FloatStorage``: never looked up."""

    path: str


def load(file: IO[bytes], storage: Callable[[Any], Any], tensors: Mapping[str, Callable[..., Any]]) -> Any:
    """The content of the pickle at the position of ``file``, which is left behind the pickle.

    Args:
        storage: gives the storage of a persistent id.
        tensors: constructors of tensors, by their names in a pickle, for tuples of plain values and storages.

    Raises pickle.UnpicklingError for a pickle that could run code elsewhere; ValueError for a damaged pickle.
    """
    machine = _Machine(storage, tensors)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        return machine.pop()
    except (LookupError, TypeError) as fault:
        raise ValueError(f"its pickle is damaged ({type(fault).__name__})") from None


class _Machine:
    """The stack of a pickle. Errors of a damaged pickle are LookupError, TypeError and ValueError."""

    def __init__(self, storage: Callable[[Any], Any], tensors: Mapping[str, Callable[..., Any]]) -> None:
        self._storage = storage
        self._tensors = tensors
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self._stack.append(_encodable(argument))
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "STOP"):
            raise ValueError(
                f"its pickle has {opcode}, which torch.save() writes only in another protocol than 2 and 3"
            )

    def pop(self) -> Any:
        return self._stack.pop()

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _items(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _tuple(self, _: Any) -> None:
        items = tuple(self._items())
        self._stack.append(items)

    def _tuple_of(self, length: int) -> None:
        items = [self._stack.pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._stack[-1][_key(key)] = value

    def _global(self, argument: str) -> None:
        # Pickletools parts the module from the name with one space.
        self._stack.append(Name(argument.replace(" ", ".", 1)))

    def _persistent(self, _: Any) -> None:
        self._stack.append(self._storage(self._stack.pop()))

    def _make(self, _: Any) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or type(name) is not Name:
            raise TypeError
        self._stack.append(self._made(name, arguments))

    def _made(self, name: Name, arguments: tuple[Any, ...]) -> Any:
        if name.path in _UNUSED:
            return name
        if name.path in _VALUES:
            return _VALUES[name.path](*arguments)
        if name.path in self._tensors:
            return self._tensors[name.path](*arguments)
        if name.path == "torch._tensor._rebuild_from_type_v2":
            # A tensor with Python attributes, or of a subclass: the tensor without them.
            constructor, _, inner, _ = arguments
            if constructor.__class__ is not Name or constructor.path not in self._tensors:
                raise TypeError
            return self._tensors[constructor.path](*inner)
        if name.path.startswith("torch._utils._rebuild_"):
            raise ValueError(f"it holds a tensor that is sparse, quantized or of another special kind ({name.path})")
        raise UnpicklingError(name.path)

    def _build(self, _: Any) -> None:
        """The attributes of a Namespace; of a dict they are torch's notes on a state dict, which are left out."""
        state, thing = self._stack.pop(), self._stack[-1]
        if type(thing) is Namespace and type(state) is dict:
            vars(thing).update({key: value for key, value in state.items() if type(key) is str})
        elif type(thing) is not dict and type(thing) is not Name:
            raise TypeError


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "APPEND": lambda machine, _: machine._append([machine.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._items()),
    "SETITEM": lambda machine, _: machine._set([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set(machine._items()),
    "GLOBAL": _Machine._global,
    "BINPERSID": _Machine._persistent,
    "REDUCE": _Machine._make,
    "NEWOBJ": _Machine._make,
    "BUILD": _Machine._build,
}


def _encodable(value: Any) -> Any:
    if isinstance(value, str) and not value.isascii():
        # Half of a surrogate pair is no name: ValueError.
        value.encode()
    return value


def _key(key: Any) -> Any:
    """A key of a dict. Of tuples only flat ones: Python works out the hash of a nested tuple by recursion in C."""
    for part in key if type(key) is tuple else (key,):
        if part is not None and type(part) not in (str, int, float, bool, bytes, Name):
            raise TypeError
    return key


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    items = pairs.items() if type(pairs) is dict else pairs
    return {_key(key): value for key, value in items}


def _bytes(text: str, encoding: str) -> bytes:
    # Other codecs make more of a text than it has bytes.
    if type(text) is not str or encoding != "latin1":
        raise TypeError
    return text.encode("latin1")


def _items_of(items: Any = ()) -> tuple[Any, ...]:
    if type(items) not in (list, tuple):
        raise TypeError
    return tuple(items)


#: What a pickle's names of plain values make. A set becomes a tuple: no import needs one.
_VALUES: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": _items_of,
    "builtins.set": _items_of,
    "__builtin__.set": _items_of,
    "_codecs.encode": _bytes,
    "argparse.Namespace": Namespace,
}
