"""Parameter names: canonical names, which travel, and dotless names, under which LitEma has its buffers.

A wrapper (torch.compile, DDP, FSDP, activation checkpointing) puts its own component into every parameter's name. Those
components say how a model is run, not what the model is, so a run's names are without them.

Knows: names as strings, and how wrappers change names. Does not know: tensors, modules, torch, or what a run is.
"""

from __future__ import annotations

from collections.abc import Iterable

from ema_client.errors import NameCollision

__all__ = ["canonical_name", "canonical_names", "distinct", "dotless_names", "is_wrappers_word"]

#: Components that torch.compile, FSDP and activation checkpointing put anywhere into a dotted name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

#: The component that DataParallel and DistributedDataParallel put in front. Further inside a name, ``module`` may be
#: the model's own word.
_PARALLEL = "module"

#: LitEma's own buffers, in the same namespace as the shadows.
_LITEMA_OWN = ("decay", "num_updates")


def canonical_name(name: str) -> str:
    """``name`` without the components of wrappers: ``module._orig_mod.conv.weight`` is ``conv.weight``.

    For names in a file, whose model is not there to be asked (wrappers): ``module`` in front is taken for a wrapper's.
    The last component is the parameter's own name and stays, whatever that name is.
    """
    *path, last = name.split(".")
    bare = [component for component in path if component not in _WRAPPERS]
    while bare and bare[0] == _PARALLEL:
        del bare[0]
    return ".".join([*bare, last])


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """name -> canonical name, in the order given. Raises NameCollision where two names share a canonical name."""
    return distinct(((name, canonical_name(name)) for name in names), "without wrappers' prefixes")


def dotless_names(names: Iterable[str]) -> dict[str, str]:
    """name -> the parameter's buffer in a LitEma, which is the name without its dots.

    Raises NameCollision where LitEma would let two parameters share a buffer (``a.bc`` and ``ab.c``), or where a
    parameter's buffer would overwrite LitEma's own ``decay`` or ``num_updates``.
    """
    dotless = distinct(((name, name.replace(".", "")) for name in names), "without dots")
    for name, short in dotless.items():
        if short in _LITEMA_OWN:
            raise NameCollision(f"parameter {name!r} would take the place of LitEma's own buffer {short!r}")
    return dotless


def is_wrappers_word(component: str) -> bool:
    """Whether a component of a name is a word that no model of its own has."""
    return component in _WRAPPERS


def distinct(pairs: Iterable[tuple[str, str]], how: str) -> dict[str, str]:
    """name -> short name, of pairs of the two. Raises NameCollision, saying ``how`` names are shortened."""
    owners: dict[str, str] = {}
    for name, short in pairs:
        first = owners.setdefault(short, name)
        if first != name:
            raise NameCollision(f"{first!r} and {name!r} are both {short!r} {how}")
    return {name: short for short, name in owners.items()}
