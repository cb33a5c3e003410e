"""From a checkpoint to named EMA weights: which program made it, how the average goes on, what is left out.

Knows: in which entry of a file an EMA may stand, and by what a program's state is recognised. Does not know: how a
program keeps its state (programs), file formats (files), the service.
"""

from __future__ import annotations

import fnmatch
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_client.checkpoints import files
from ema_client.checkpoints.continuation import Continuation
from ema_client.checkpoints.dotless import below, litema_prefix, tensors_of
from ema_client.checkpoints.programs import FORMATS, OWN
from ema_client.checkpoints.values import strings
from ema_client.errors import UsageError, listed
from ema_client.tensors.names import canonical_names, in_front

__all__ = ["FORMATS", "Imported", "read"]

#: Entries of a file that hold an EMA: of timm, of diffusion trainers, of BasicSR.
_EMA_ENTRIES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema")
#: Entries that hold weights of some kind: of Lightning, of SAT and DeepSpeed, of many others.
_ENTRIES = (*_EMA_ENTRIES, "state_dict", "module", "model")
#: Names of buffers that every torch user has; users name other buffers with ``drop``.
_BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")
#: A step has fewer digits: what 64 bits hold.
_STEP_DIGITS = 18
#: How often the tensors of a file may hold the file's bytes. Tied parameters have several names for the same bytes, a
#: layer that is applied many times has as many; in a file of a kilobyte a thousand names are a megabyte.
_MOST_TIED = 64


@dataclass(frozen=True)
class Imported:
    """The EMA of a checkpoint.

    format: of the program that wrote the checkpoint, one of FORMATS. source: the entry of the file that held the EMA.
    tensors: by the names that the bare model has. going_on: the run in which the average goes on as it would have.
    step: the trainer's step, None where the file does not say. dropped: names of tensors that were left out, as no
    parameters. notes: what a user should know.
    """

    format: str
    source: str
    tensors: Mapping[str, Tensor]
    going_on: Continuation
    step: int | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read(
    path: Path,
    *,
    format: str | None = None,
    like: Path | None = None,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    prefix: str | None = None,
) -> Imported:
    """The EMA in a checkpoint.

    Args:
        path: a ``.safetensors`` file, a file of torch.save, or a folder of save_pretrained().
        format: one of FORMATS; by default the format is found out.
        like: a checkpoint of the model itself, for a file that does not hold the parameters' names.
        drop: patterns (``*``) of names to leave out: buffers that a state dict holds beside the parameters.
        keep: patterns of names not to leave out: BatchNorm's statistics, which are left out by themselves.
        prefix: take the tensors whose names begin so, by the rest of their names, which is the model's own. By default
            all, without what is in front of all names and may be a wrapper's (``module.``).

    Raises UsageError for a file that cannot be read, is of no known format, or lacks names; NameCollision where a
    dotless name of LitEma fits two parameters, naming both; OSError.
    """
    try:
        return _read(path, format, like, drop, keep, prefix)
    except UsageError as fault:
        if str(path) in fault.detail:
            raise
        # Who knows a program's entries does not know files.
        raise type(fault)(f"{path}: {fault.detail}", hint=fault.hint) from None


def _read(
    path: Path, format: str | None, like: Path | None, drop: Sequence[str], keep: Sequence[str], prefix: str | None
) -> Imported:
    content, described = files.read(path)
    state, source = _opened(content)
    described = {**described, **_described_by(content)}
    kind = _detected(state, described) if format is None else format
    if kind not in FORMATS:
        raise UsageError(f"{kind!r} is no format", hint=f"there are {', '.join(FORMATS)}")
    names = None
    if like is not None:
        names, _ = _parameters(tensors_of(_opened(files.read(like)[0])[0]), drop, _BUFFERS)
    found = FORMATS[kind](state, described, names)
    own = kind == OWN or "ema_names" in described
    tensors, dropped = _parameters(found.tensors, drop, () if own else _BUFFERS, keep)
    if prefix is not None:
        tensors = below(tensors, prefix)
    if not tensors:
        raise UsageError(
            f"{path} holds no weights as {kind} keeps them", hint="give another --format, or the right file"
        )
    _check_tied(path, tensors)
    notes = found.notes
    if not own:
        # A run's own names are canonical, whatever they begin with.
        if prefix is None and (front := in_front(tensors)):
            notes = (
                *notes,
                f"{front!r} in front of all names is taken for a wrapper's (--prefix '': for the model's own)",
            )
        as_named = prefix is not None
        tensors = {canonical: tensors[name] for name, canonical in canonical_names(tensors, as_named=as_named).items()}
    where = ", ".join(part for part in (source, found.source) if part)
    return Imported(kind, where, tensors, found.going_on, _step(described), dropped, notes)


def _check_tied(path: Path, tensors: Mapping[str, Tensor]) -> None:
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > _MOST_TIED * held:
        raise UsageError(
            f"{path} holds {held} bytes of weights, and names them {total / max(held, 1):.0f} times over: "
            f"{_MOST_TIED} times are possible",
            hint="save the model's parameters without their other names",
        )


def _opened(content: Any) -> tuple[Mapping[str, Any], str]:
    """The mapping in a file's content that holds the weights, and the entry that the mapping stands in."""
    if not isinstance(content, Mapping):
        raise UsageError(f"the file holds a {type(content).__name__}, not named tensors")
    content = _named(content)
    if isinstance(count := content.get("averaging_state"), Mapping) and isinstance(content.get("state_dict"), Mapping):
        # Lightning's WeightAveraging has the average in the model's place, and what else AveragedModel holds beside it.
        averaged = {f"module.{key}": value for key, value in _named(content["state_dict"]).items()}
        return {**averaged, **_named(count)}, "WeightAveraging"
    inner = {key: _named(value) for key in _ENTRIES if isinstance(value := content.get(key), Mapping) and value}
    whole = "shadow_params" in content or litema_prefix(content) is not None
    named = next(iter(inner), None)
    if whole or named is None or (named not in _EMA_ENTRIES and len(tensors_of(content)) > 1):
        if "shadow_params" not in content and not tensors_of(content):
            keys = listed(repr(str(key)) for key in content)
            raise UsageError(f"the file holds no named tensors; its entries are {keys}")
        return content, ""
    return inner[named], f"entry {named!r}"


def _named(content: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if isinstance(key, str)}


def _described_by(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of torch.save says beside its weights, as the metadata of a safetensors file would say it."""
    said: dict[str, Any] = {"global_step": content["global_step"]} if "global_step" in content else {}
    if isinstance(args := content.get("args"), Namespace):
        said["args"] = vars(args)
    if isinstance(info := content.get("ema_info"), Mapping):
        said.update(_named(info))
    if isinstance(names := content.get("ema_names"), Mapping):
        said["ema_names"] = json.dumps(strings(list(names.values())))
    return said


def _detected(state: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    if "shadow_params" in state:
        return "torch-ema" if "num_updates" in state else "diffusers"
    if "optimization_step" in described:
        return "diffusers"
    if litema_prefix(state) is not None:
        return "litema"
    if "ema_num_updates" in described:
        return OWN
    if "initted" in state and any(key.startswith("ema_model.") for key in state):
        return "ema-pytorch"
    if "n_averaged" in state:
        return "averaged-model"
    args = described.get("args")
    if (isinstance(args, Mapping) and "model_ema_decay" in args) or all(key.startswith("module.") for key in state):
        return "timm"
    return "state-dict"


def _step(described: Mapping[str, Any]) -> int | None:
    """The trainer's step, as Lightning and we say it."""
    step = described.get("ema_step", described.get("global_step"))
    if isinstance(step, str) and step.isdecimal() and len(step) < _STEP_DIGITS:
        step = int(step)
    return step if isinstance(step, int) and 0 <= step < 10**_STEP_DIGITS else None


def _parameters(
    tensors: Mapping[str, Tensor], drop: Sequence[str], buffers: Sequence[str], keep: Sequence[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors that can be averaged, and the names of the other tensors, which are left out.

    drop, buffers: patterns of names to leave out; of ``buffers`` those that ``keep`` fits stay.
    """
    parameters = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        and not _fits(name, drop)
        and (_fits(name, keep) or not _fits(name, buffers))
    }
    return parameters, tuple(name for name in tensors if name not in parameters)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
