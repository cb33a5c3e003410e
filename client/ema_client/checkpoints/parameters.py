"""The parameters of a run in a checkpoint: the tensors of the run's names, wherever they stand in the file.

Knows: entries of a file, prefixes of names, how an EMA's entry is called, which is not meant. Does not know: file
formats (files), which program wrote a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ema_client.checkpoints import files
from ema_client.checkpoints.dotless import tensors_of
from ema_client.errors import UsageError, listed
from ema_client.tensors.names import shortened

__all__ = ["Parameters", "read_parameters"]

#: How deep in a file's entries weights may stand: Lightning, DeepSpeed and SAT need one.
_DEPTH = 3
#: An entry or prefix that is an EMA's, of which an update is not made.
_AVERAGES = re.compile(r"(?:^|[._])(?:ema|averaged?|shadow)(?=[._]|$)")


@dataclass(frozen=True)
class Parameters:
    """tensors: by the run's names. prefix: entries of the file, and what stands in front of the names, with dots in
    between. others: how many tensors of that entry are not the run's."""

    tensors: Mapping[str, Tensor]
    prefix: str
    others: int


def read_parameters(path: Path, names: Sequence[str], *, prefix: str | None = None) -> Parameters:
    """The tensors of a run's ``names`` in a file.

    prefix: which of several places; by default the only one that is no EMA's.

    Raises UsageError for a file that files.read() refuses, that lacks one of the names, or that has all of them in
    several places; OSError.
    """
    content, _ = files.read(path)
    # A run of a model with a part of its own called ``module`` has the names that seem to be a wrapper's.
    found = list(_places(content, names)) or list(_places(content, names, as_named=True))
    chosen = [each for each in found if each.prefix in (prefix, f"{prefix}.")] if prefix is not None else _meant(found)
    if len(chosen) == 1:
        return chosen[0]
    there = listed((repr(each.prefix) for each in chosen or found), most=10)
    if not found:
        raise UsageError(f"{path}: {_lacking(content, names)}", hint="give a file of the model that the run averages")
    if not chosen:
        raise UsageError(f"{path} has no parameters of the run behind {prefix!r}", hint=f"they are behind {there}")
    raise UsageError(f"{path} has the run's parameters {len(chosen)} times", hint=f"give one as --prefix: {there}")


def _meant(found: Sequence[Parameters]) -> Sequence[Parameters]:
    return [each for each in found if not _AVERAGES.search(each.prefix)] or found


def _places(content: Any, names: Sequence[str], *, as_named: bool = False) -> Iterator[Parameters]:
    for entry, tensors_there in _entries(content):
        named = {short: tensors_there[name] for name, short in shortened(tensors_there, as_named=as_named)}
        for prefix in sorted({each.removesuffix(names[0]) for each in named if each.endswith(names[0])}):
            if all(prefix + name in named for name in names):
                tensors = {name: named[prefix + name] for name in names}
                yield Parameters(tensors, entry + prefix, len(named) - len(names))


def _entries(content: Any, entry: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each mapping in a file, with the entries that lead to it."""
    if not isinstance(content, Mapping) or not depth:
        return
    yield entry, tensors_of(content)
    for key, value in content.items():
        if isinstance(key, str):
            yield from _entries(value, f"{entry}{key}.", depth - 1)


def _lacking(content: Any, names: Sequence[str]) -> str:
    """What the fullest of a file's entries lacks."""
    held = max(({short for _, short in shortened(named)} for _, named in _entries(content)), key=len, default=set())
    if not held:
        return "the file holds no named tensors"
    missing = [name for name in names if name not in held]
    return f"of the run's {len(names)} tensors the file lacks {listed(missing)}"
