"""LitEma's names: the model's without their dots. Finds a LitEma in a state dict, and the dotted names of its averages.

Knows: which names a LitEma has, and where beside it the model's names may stand. Does not know: decays and counters,
file formats, the service.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ema_client.checkpoints.values import strings
from ema_client.errors import NameCollision, UsageError, listed

__all__ = ["below", "candidates", "litema_prefix", "match", "tensors_of"]


def litema_prefix(state: Mapping[Any, Any]) -> str | None:
    """The prefix of LitEma's own names: ``model_ema.`` in a checkpoint, empty in a LitEma's own state dict.

    None where there is no LitEma.
    """
    for key in (key for key in state if isinstance(key, str) and key.endswith("num_updates")):
        prefix = key.removesuffix("num_updates")
        shadows = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        if prefix + "decay" in state and not any("." in name for name in shadows):
            return prefix
    return None


def candidates(
    state: Mapping[str, Any], prefix: str, described: Mapping[str, Any], names: Mapping[str, Tensor] | None
) -> list[dict[str, Tensor | None]]:
    """Where dotted names may come from: ``names`` if given, names that write() added, the model beside the LitEma."""
    if names is not None:
        return [dict(names), below(names, "model.")]
    if "ema_names" in described:
        return [dict.fromkeys(_said_names(described["ema_names"]))]
    if not prefix:
        # A LitEma's own state dict: there is no model beside it.
        return [{}]
    parent = prefix.removesuffix(prefix.rstrip(".").rpartition(".")[2] + ".")
    beside = {key: value for key, value in tensors_of(state).items() if not key.startswith(prefix)}
    # sgm and latent-diffusion make a LitEma over self.model, their autoencoders over self.
    return [below(beside, f"{parent}model."), below(beside, parent)]


def _said_names(said: Any) -> list[str]:
    try:
        return strings(json.loads(said))
    except (RecursionError, TypeError, ValueError):
        return strings(None)


def match(shadows: Mapping[str, Tensor], sources: Iterable[Mapping[str, Tensor | None]]) -> dict[str, str]:
    """dotless name -> dotted name, from the first source that has a dotted name for each shadow.

    Raises UsageError where no source has; NameCollision where two dotted names are one without dots.
    """
    best: dict[str, str] = {}
    for source in sources:
        found = _dotted(shadows, source)
        if len(found) == len(shadows):
            return found
        best = max(best, found, key=len)
    missing = [name for name in shadows if name not in best]
    raise UsageError(
        f"the dotted names of {listed(map(repr, missing))} are not in the file",
        hint="give --like MODEL, a checkpoint of the model itself, for its names",
    )


def _dotted(shadows: Mapping[str, Tensor], source: Mapping[str, Tensor | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, tensor in source.items():
        short = name.replace(".", "")
        if short not in shadows or (tensor is not None and not tensor.is_floating_point()):
            continue
        if short in found:
            raise NameCollision(
                f"LitEma's {short!r} may be of {found[short]!r} or of {name!r}",
                hint="LitEma kept one average for both, so it is the average of neither; rename one and train anew",
            )
        if tensor is not None and tensor.shape != shadows[short].shape:
            shapes = f"{tuple(shadows[short].shape)}, the parameter {tuple(tensor.shape)}"
            raise UsageError(f"the average of {name!r} has shape {shapes}", hint="the names are of another model")
        found[short] = name
    return found


def below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with ``prefix``, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def tensors_of(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The entries of ``state`` that are named tensors."""
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
