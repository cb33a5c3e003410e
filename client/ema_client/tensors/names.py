"""Parameter names: canonical names, which travel, and dotless names, under which LitEma has its buffers.

A wrapper (torch.compile, DDP, FSDP, activation checkpointing) puts its own component into every parameter's name. Those
components say how a model is run, not what the model is, so a run's names are without them.

Knows: names as strings, and how wrappers change names. Does not know: tensors, modules, torch, or what a run is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ema_client.errors import NameCollision

__all__ = ["canonical_names", "distinct", "dotless_names", "in_front", "is_wrappers_word", "shortened"]

#: Components that torch.compile, FSDP and activation checkpointing put anywhere into a dotted name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

#: Components that other wrappers put in front of all names: DataParallel and DistributedDataParallel, Fabric, Opacus.
#: Further inside a name, and in front of some names only, they are the model's own words.
_IN_FRONT = frozenset({"module", "_forward_module", "_module", "_original_module"})

#: LitEma's own buffers, in the same namespace as the shadows.
_LITEMA_OWN = ("decay", "num_updates")


def canonical_names(names: Iterable[str], *, as_named: bool = False) -> dict[str, str]:
    """name -> the name without the components of wrappers, in the order given: ``module._orig_mod.a.w`` is ``a.w``.

    For names in a file, whose model is not there to be asked (wrappers): what is in front of all names, and may be a
    wrapper's, is taken for a wrapper's. as_named: is taken for the model's own; only words that no model has are left
    out. The last component is the parameter's own name and stays, whatever that name is.

    Raises NameCollision where two names share a canonical name.
    """
    return distinct(shortened(names, as_named=as_named), "without wrappers' prefixes")


def shortened(names: Iterable[str], *, as_named: bool = False) -> list[tuple[str, str]]:
    """Each name with its canonical name, as canonical_names(), where two may share one."""
    named = list(names)
    paths = [(*(each for each in path if each not in _WRAPPERS), last) for *path, last in _split(named)]
    while not as_named and _is_wrapped(paths):
        paths = [path[1:] for path in paths]
    return [(name, ".".join(path)) for name, path in zip(named, paths, strict=True)]


def in_front(names: Iterable[str]) -> str:
    """What canonical_names() takes for a wrapper's in front of all names, though it may be the model's own; or ""."""
    name = next(iter(named := list(names)), None)
    if name is None:
        return ""
    own, canonical = dict(shortened(named, as_named=True))[name], dict(shortened(named))[name]
    return own.removesuffix(canonical)


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


def _is_wrapped(paths: Sequence[Sequence[str]]) -> bool:
    """Whether all paths begin with the same component, which may be a wrapper's."""
    fronts = {path[0] for path in paths if len(path) > 1}
    return len(fronts) == 1 and fronts <= _IN_FRONT and all(len(path) > 1 for path in paths)


def _split(names: Iterable[str]) -> Iterable[list[str]]:
    return (name.split(".") for name in names)


def distinct(pairs: Iterable[tuple[str, str]], how: str) -> dict[str, str]:
    """name -> short name, of pairs of the two. Raises NameCollision, saying ``how`` names are shortened."""
    owners: dict[str, str] = {}
    for name, short in pairs:
        first = owners.setdefault(short, name)
        if first != name:
            raise NameCollision(f"{first!r} and {name!r} are both {short!r} {how}")
    return {name: short for short, name in owners.items()}
