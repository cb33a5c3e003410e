"""From a checkpoint to named EMA weights: which program made it, the EMA's counter and decay, what is left out.

Knows: how LitEma, torch's AveragedModel, diffusers' EMAModel, timm and ema-pytorch keep their state. Does not know:
file formats (files), the service.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_client.checkpoints import files
from ema_client.errors import NameCollision, UsageError, listed
from ema_client.tensors.names import canonical_names

__all__ = ["FORMATS", "Imported", "read"]

#: Entries of a file that hold an EMA: of timm, of diffusion trainers, of BasicSR.
_EMA_ENTRIES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema")
#: Entries that hold weights of some kind: of Lightning, of SAT and DeepSpeed, of many others.
_ENTRIES = (*_EMA_ENTRIES, "state_dict", "module", "model")
#: Names of buffers that every torch user has; users name other buffers with ``drop``.
_BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")


@dataclass(frozen=True)
class Imported:
    """The EMA of a checkpoint.

    format: of the program that wrote the checkpoint, one of FORMATS. source: the entry of the file that held the EMA.
    tensors: by the names that the bare model has. decay, num_updates: None where the file does not say; num_updates is
    -1 where LitEma's counter was off. dropped: names of tensors that were left out, as no parameters. notes: what a
    user should know.
    """

    format: str
    source: str
    tensors: Mapping[str, Tensor]
    decay: float | None = None
    num_updates: int | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read(
    path: Path,
    *,
    format: str | None = None,
    like: Path | None = None,
    drop: Sequence[str] = (),
) -> Imported:
    """The EMA in a checkpoint.

    Args:
        path: a ``.safetensors`` file, a file of torch.save, or a folder of save_pretrained().
        format: one of FORMATS; by default the format is found out.
        like: a checkpoint of the model itself, for a file that does not hold the parameters' names.
        drop: patterns (``*``) of names to leave out: buffers that a state dict holds beside the parameters.

    Raises UsageError for a file that cannot be read, is of no known format, or lacks names; NameCollision where a
    dotless name of LitEma fits two parameters, naming both; OSError.
    """
    content, described = files.read(path)
    state, source = _opened(content)
    if isinstance(own := content.get("ema_names"), Mapping):
        described = {**described, "ema_names": json.dumps(list(own.values()))}
    kind = _detected(state, described) if format is None else format
    if kind not in FORMATS:
        raise UsageError(f"{kind!r} is no format", hint=f"there are {', '.join(FORMATS)}")
    names = _tensors_of(_opened(files.read(like)[0])[0]) if like else None
    found = FORMATS[kind](state, described, names)
    tensors, dropped = _parameters(found.tensors, drop)
    if not tensors:
        raise UsageError(
            f"{path} holds no weights as {kind} keeps them", hint="give another --format, or the right file"
        )
    tensors = {canonical: tensors[name] for name, canonical in canonical_names(tensors).items()}
    where = ", ".join(part for part in (source, found.source) if part)
    return replace(found, source=where, tensors=tensors, dropped=found.dropped + dropped)


def _opened(content: Any) -> tuple[Mapping[str, Any], str]:
    """The mapping in a file's content that holds the weights, and the entry that the mapping stands in."""
    if not isinstance(content, Mapping):
        raise UsageError(f"the file holds a {type(content).__name__}, not named tensors")
    inner = {key: value for key in _ENTRIES if isinstance(value := content.get(key), Mapping) and value}
    whole = "shadow_params" in content or _is_litema(content)
    named = next(iter(inner), None)
    if whole or named is None or (named not in _EMA_ENTRIES and len(_tensors_of(content)) > 1):
        if "shadow_params" not in content and not _tensors_of(content):
            keys = listed(repr(str(key)) for key in content)
            raise UsageError(f"the file holds no named tensors; its entries are {keys}")
        return content, ""
    return inner[named], f"entry {named!r}"


def _detected(state: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    if "shadow_params" in state or "optimization_step" in described:
        return "diffusers"
    if _is_litema(state):
        return "litema"
    if "initted" in state and any(key.startswith("ema_model.") for key in state):
        return "ema-pytorch"
    if "n_averaged" in state:
        return "averaged-model"
    if all(key.startswith("module.") for key in state):
        return "timm"
    return "state-dict"


def _is_litema(state: Mapping[str, Any]) -> bool:
    return _litema_prefix(state) is not None


def _litema_prefix(state: Mapping[str, Any]) -> str | None:
    """The prefix of LitEma's own names: ``model_ema.`` in a checkpoint, empty in a LitEma's own state dict.

    None where there is no LitEma.
    """
    for key in (key for key in state if key.endswith("num_updates")):
        prefix = key.removesuffix("num_updates")
        shadows = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        if prefix + "decay" in state and not any("." in name for name in shadows):
            return prefix
    return None


# --- one function for each program ----------------------------------------------------------------------------------

_Names = Mapping[str, Tensor] | None


def _litema(state: Mapping[str, Any], described: Mapping[str, Any], names: _Names) -> Imported:
    prefix = _litema_prefix(state)
    if prefix is None:
        raise UsageError("the file has no `decay` and `num_updates` as LitEma keeps them")
    shadows = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    decay, num_updates = float(shadows.pop("decay")), int(shadows.pop("num_updates"))
    matched = _match(shadows, _candidates(state, prefix, described, names))
    tensors = {dotted: shadows[short] for short, dotted in matched.items()}
    # LitEma holds the decay as float32, whose nearest to 0.9999 means 0.9999.
    decay = float(f"{decay:.7g}")
    return Imported("litema", f"{prefix}*" if prefix else "", tensors, decay, num_updates)


def _candidates(
    state: Mapping[str, Any], prefix: str, described: Mapping[str, Any], names: _Names
) -> list[dict[str, Tensor | None]]:
    """Where dotted names may come from: ``names`` if given, names that write() added, the model beside the LitEma."""
    if names is not None:
        return [dict(names), _below(names, "model.")]
    if "ema_names" in described:
        return [dict.fromkeys(json.loads(described["ema_names"]))]
    if not prefix:
        # A LitEma's own state dict: there is no model beside it.
        return [{}]
    parent = prefix.removesuffix(prefix.rstrip(".").rpartition(".")[2] + ".")
    beside = {key: value for key, value in _tensors_of(state).items() if not key.startswith(prefix)}
    # sgm and latent-diffusion make a LitEma over self.model, their autoencoders over self.
    return [_below(beside, f"{parent}model."), _below(beside, parent)]


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _match(shadows: Mapping[str, Tensor], sources: Iterable[Mapping[str, Tensor | None]]) -> dict[str, str]:
    """dotless name -> dotted name, from the first source that has a dotted name for each shadow."""
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


def _averaged_model(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Imported:
    tensors = _below(_tensors_of(state), "module.")
    count = state.get("n_averaged")
    return Imported("averaged-model", "module.*", tensors, None, None if count is None else int(count))


def _timm(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Imported:
    return Imported("timm", "", _tensors_of(state))


def _ema_pytorch(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Imported:
    step = state.get("step")
    note = "`step` counts calls of update(), those that ema-pytorch left out included"
    tensors = _below(_tensors_of(state), "ema_model.")
    return Imported("ema-pytorch", "ema_model.*", tensors, None, None if step is None else int(step), notes=(note,))


def _diffusers(state: Mapping[str, Any], described: Mapping[str, Any], names: _Names) -> Imported:
    said = state if "shadow_params" in state else described
    notes = () if not said.get("use_ema_warmup") else ("its warm-up, 1 - (1 + n)^-p, is not carried on",)
    tensors = _ordered(state["shadow_params"], names) if "shadow_params" in state else _tensors_of(state)
    decay, step = said.get("decay"), said.get("optimization_step")
    return Imported("diffusers", "", tensors, decay, None if step is None else int(step), notes=notes)


def _ordered(shadows: Sequence[Tensor], names: _Names) -> dict[str, Tensor]:
    """The shadow_params of an EMAModel, which has no names, by the names of the model, in the model's order."""
    if names is None:
        raise UsageError(
            "EMAModel.state_dict() holds no names, only the order of the parameters",
            hint="give --like MODEL, its state dict by torch.save; or import the folder of save_pretrained()",
        )
    parameters, _ = _parameters(names, ())
    shapes = [tuple(tensor.shape) for tensor in shadows]
    if [tuple(tensor.shape) for tensor in parameters.values()] != shapes:
        raise UsageError(
            f"the {len(shadows)} averages are not of the shapes, in order, of the model's {len(parameters)} tensors",
            hint="a state dict in the model's own order is needed: safetensors files are sorted by name",
        )
    return dict(zip(parameters, shadows, strict=True))


def _state_dict(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Imported:
    return Imported("state-dict", "", _tensors_of(state))


FORMATS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], _Names], Imported]] = {
    "litema": _litema,
    "averaged-model": _averaged_model,
    "diffusers": _diffusers,
    "timm": _timm,
    "ema-pytorch": _ema_pytorch,
    "state-dict": _state_dict,
}


def _tensors_of(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _parameters(tensors: Mapping[str, Tensor], drop: Sequence[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors that can be averaged, and the names of the other tensors, which are left out."""
    patterns = (*_BUFFERS, *drop)
    parameters = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    return parameters, tuple(name for name in tensors if name not in parameters)
