"""How each program keeps the state of an EMA: one function for each, from a state dict to weights and what follows.

Knows: the entries of LitEma, torch_ema, torch's AveragedModel, diffusers' EMAModel, timm and ema-pytorch, what their
counters count, and which decay their next update has. Does not know: file formats (files), which program wrote a file
(reading), the service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ema_client.checkpoints.continuation import POWER_RULE, Continuation, constant, of_emamodel, warmed_up
from ema_client.checkpoints.dotless import below, candidates, litema_prefix, match, tensors_of
from ema_client.checkpoints.values import real, whole
from ema_client.errors import UsageError
from ema_client.protocol import ScheduleName, WeightsInfo

__all__ = ["FORMATS", "OWN", "Found"]

#: The format of the files that ``ema pull`` and ``ema export`` write.
OWN = "ema-service"
#: The decay of AveragedModel's get_ema_avg_fn() and of Lightning's EMAWeightAveraging, unless they are told another.
_TORCH_DECAY = 0.999

_Names = Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Found:
    """What one program's state holds.

    source: where in the state the averages stood. notes: what a user should know, beyond what going_on tells.
    """

    source: str
    tensors: Mapping[str, Tensor]
    going_on: Continuation
    notes: tuple[str, ...] = ()


def _litema(state: Mapping[str, Any], described: Mapping[str, Any], names: _Names) -> Found:
    prefix = litema_prefix(state)
    if prefix is None:
        raise UsageError("the file has no `decay` and `num_updates` as LitEma keeps them")
    shadows = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    decay, num_updates = real(shadows, "decay"), whole(shadows, "num_updates", least=-1)
    shadows = {name: tensor for name, tensor in tensors_of(shadows).items() if name not in ("decay", "num_updates")}
    matched = match(shadows, candidates(state, prefix, described, names))
    tensors = {dotted: shadows[short] for short, dotted in matched.items()}
    # LitEma holds the decay as float32, whose nearest to 0.9999 means 0.9999.
    going_on = _own_going_on(described) or warmed_up(float(f"{decay:.7g}"), num_updates)
    return Found(f"{prefix}*" if prefix else "", tensors, going_on)


def _torch_ema(state: Mapping[str, Any], _: Mapping[str, Any], names: _Names) -> Found:
    if not {"shadow_params", "num_updates", "decay"} <= state.keys():
        raise UsageError("the file has no `shadow_params`, `num_updates` and `decay` as torch_ema keeps them")
    # torch_ema has None as num_updates where its decay is constant.
    count = None if state["num_updates"] is None else whole(state, "num_updates")
    return Found("", _ordered(state["shadow_params"], names), warmed_up(real(state, "decay"), count))


def _diffusers(state: Mapping[str, Any], described: Mapping[str, Any], names: _Names) -> Found:
    in_order = "shadow_params" in state
    going_on = of_emamodel(state if in_order else described)
    return Found("", _ordered(state["shadow_params"], names) if in_order else tensors_of(state), going_on)


def _averaged_model(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Found:
    tensors = below(tensors_of(state), "module.")
    count = whole(state, "n_averaged") if "n_averaged" in state else None
    if count == 0:
        going_on = Continuation("constant", None, 0, 0.0, _TORCH_DECAY, rule="the first update copies the parameters")
    else:
        going_on = constant(count, _TORCH_DECAY)
    note = "AveragedModel keeps no avg_fn in the file; equal averages (SWA, its default) do not go on as such"
    return Found("module.*", tensors, going_on, (note,))


def _timm(state: Mapping[str, Any], described: Mapping[str, Any], _: _Names) -> Found:
    args = described["args"] if isinstance(described.get("args"), Mapping) else {}
    decay = real(args, "model_ema_decay") if "model_ema_decay" in args else None
    notes = (f"timm's warm-up, {POWER_RULE}, is not carried on",) if args.get("model_ema_warmup") else ()
    tensors = tensors_of(state)
    if all(name.startswith("module.") for name in tensors):
        # A ModelEmaV3's own state, not that of the model in it.
        tensors = below(tensors, "module.")
    return Found("", tensors, Continuation("litema", decay, None, None if notes else decay), notes)


def _ema_pytorch(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Found:
    count = whole(state, "step") if "step" in state else None
    notes = (
        "`step` counts calls of update(), those that ema-pytorch left out included",
        f"ema-pytorch's warm-up, {POWER_RULE}, is not carried on; the file has neither its powers nor its beta",
    )
    going_on = constant(count, Continuation.usual_decay)
    return Found("ema_model.*", below(tensors_of(state), "ema_model."), going_on, notes)


def _own(state: Mapping[str, Any], described: Mapping[str, Any], _: _Names) -> Found:
    going_on = _own_going_on(described)
    if going_on is None:
        raise UsageError("the file has no metadata as `ema pull` and `ema export` write it")
    return Found(f"run {described['ema_run']}, version {described['ema_version']}", tensors_of(state), going_on)


def _state_dict(state: Mapping[str, Any], _: Mapping[str, Any], __: _Names) -> Found:
    return Found("", tensors_of(state), Continuation())


def _own_going_on(described: Mapping[str, Any]) -> Continuation | None:
    """How the average of a run goes on, by the metadata that we write; None where there is none."""
    try:
        info = WeightsInfo.from_metadata({key: value for key, value in described.items() if isinstance(value, str)})
    except (KeyError, ValueError):
        return None
    if fields := info.schedule_fields():
        if "gamma" in fields:
            fields.pop("sigma_rel", None)
        counter = info.num_updates if info.num_updates >= 0 else None
        return Continuation(cast(ScheduleName, info.schedule), info.decay, counter, fields=fields)
    if info.schedule != "litema":
        return constant(info.num_updates if info.num_updates >= 0 else None, info.decay, decay=info.decay)
    return warmed_up(info.decay, info.num_updates)


def _ordered(shadows: Any, names: _Names) -> dict[str, Tensor]:
    """The averages of a program that keeps no names, by the names of the model, in the model's order."""
    if not isinstance(shadows, Sequence) or not all(isinstance(tensor, Tensor) for tensor in shadows):
        raise UsageError("the file's `shadow_params` are not a list of tensors", hint="give the right file")
    if names is None:
        raise UsageError(
            "the file holds no names, only the order of the parameters",
            hint="give --like MODEL, its state dict by torch.save; or of EMAModel the folder of save_pretrained()",
        )
    parameters = dict(_each_once(names.items()))
    shapes = [tuple(tensor.shape) for tensor in shadows]
    if [tuple(tensor.shape) for tensor in parameters.values()] != shapes:
        raise UsageError(
            f"the {len(shadows)} averages are not of the shapes, in order, of the model's {len(parameters)} tensors",
            hint="a state dict in the model's own order is needed (safetensors files are sorted by name), "
            "without buffers and parameters that were not averaged (--drop)",
        )
    return dict(zip(parameters, shadows, strict=True))


def _each_once(named: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Tied parameters by their first name, as ``Module.parameters()`` gives them."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in named:
        place = tensor.data_ptr(), tuple(tensor.shape)
        if place not in seen or not tensor.numel():
            seen.add(place)
            yield name, tensor


FORMATS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], _Names], Found]] = {
    "litema": _litema,
    "torch-ema": _torch_ema,
    "averaged-model": _averaged_model,
    "diffusers": _diffusers,
    "timm": _timm,
    "ema-pytorch": _ema_pytorch,
    OWN: _own,
    "state-dict": _state_dict,
}
