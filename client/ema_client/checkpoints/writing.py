"""From EMA weights of a run to a checkpoint that another program loads.

Knows: how LitEma and diffusers' EMAModel hold their state. Does not know: the service, or how files are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_client.atomic import open_whole
from ema_client.checkpoints import files
from ema_client.checkpoints.continuation import next_decay, to_emamodel
from ema_client.errors import UsageError
from ema_client.protocol import WeightsInfo
from ema_client.tensors.names import dotless_names

__all__ = ["FORMATS", "write"]


def write(
    path: Path,
    format: str,
    tensors: Mapping[str, Tensor],
    info: WeightsInfo,
    *,
    like: Path | None = None,
) -> None:
    """Write EMA weights as a checkpoint of ``format``.

    Args:
        path: the file, replaced when the new file is whole; for "diffusers" with a folder as ``like``, a folder.
        format: "litema": ``model_ema.*`` as in a checkpoint of sgm or latent-diffusion; as safetensors if ``path`` ends
            so, else by torch.save under "state_dict". "diffusers": EMAModel's. "safetensors": the tensors by name.
        like: for "diffusers", the model: its folder of save_pretrained(), whose config is taken over, or its state
            dict, for the order of the parameters.

    Raises NameCollision where two names are the same without dots; UsageError; OSError.
    """
    if format not in FORMATS:
        raise UsageError(f"{format!r} cannot be written", hint=f"there are {', '.join(FORMATS)}")
    FORMATS[format](path, tensors, info, like)


def _safetensors(path: Path, tensors: Mapping[str, Tensor], info: WeightsInfo, _: Path | None) -> None:
    files.write_safetensors(path, tensors, {"format": "pt", **info.to_metadata()})


def _litema(path: Path, tensors: Mapping[str, Tensor], info: WeightsInfo, _: Path | None) -> None:
    short = dotless_names(tensors)
    # LitEma warms its decay up wherever there is a counter; of another schedule it gets the next decay, constant.
    warm = info.schedule == "litema" and info.start is None
    counter = info.num_updates if warm else -1
    decay = info.decay if warm else next_decay(info, info.decay, info.num_updates)
    state = {
        "model_ema.decay": torch.tensor(decay, dtype=torch.float32, device="cpu"),
        "model_ema.num_updates": torch.tensor(counter, dtype=torch.int, device="cpu"),
        **{f"model_ema.{short[name]}": tensor for name, tensor in tensors.items()},
    }
    # LitEma has no dotted names; a file that has them too can be imported again without the model.
    names = {dotless: name for name, dotless in short.items()}
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", **info.to_metadata(), "ema_names": json.dumps(list(names.values()))}
        files.write_safetensors(path, state, metadata)
    else:
        step = {} if info.step is None else {"global_step": info.step}
        files.write_torch(path, {"state_dict": state, "ema_names": names, "ema_info": info.to_metadata(), **step})


def _diffusers(path: Path, tensors: Mapping[str, Tensor], info: WeightsInfo, like: Path | None) -> None:
    said = to_emamodel(info)
    if like is None:
        raise UsageError(
            "EMAModel needs to know the model's config or the order of its parameters",
            hint="give --like MODEL: the folder of its save_pretrained(), or its state dict as torch.save writes it",
        )
    if like.is_dir():
        _write_folder(path, tensors, info, said, like)
    else:
        files.write_torch(path, said | {"shadow_params": _in_order(tensors, like)})


def _write_folder(
    path: Path, tensors: Mapping[str, Tensor], info: WeightsInfo, said: Mapping[str, Any], like: Path
) -> None:
    config = files.read_json(like / "config.json")
    path.mkdir(parents=True, exist_ok=True)
    # The weights last: a folder without weights is seen to be no model.
    with open_whole(path / "config.json") as file:
        file.write(json.dumps({**config, **said}, indent=2).encode() + b"\n")
    _safetensors(path / "diffusion_pytorch_model.safetensors", tensors, info, None)


def _in_order(tensors: Mapping[str, Tensor], like: Path) -> list[Tensor]:
    content, _ = files.read(like)
    content = content if isinstance(content, Mapping) else {}
    state = inner if isinstance(inner := content.get("state_dict"), Mapping) else content
    order = [name for name in state if name in tensors]
    if missing := [name for name in tensors if name not in state]:
        raise UsageError(f"{like} has no {missing[0]!r} ({len(missing)} of {len(tensors)} names are missing)")
    if like.suffix == ".safetensors":
        raise UsageError(f"{like} is sorted by name", hint="give a state dict as torch.save writes it, in model order")
    return [tensors[name] for name in order]


FORMATS: dict[str, Callable[[Path, Mapping[str, Tensor], WeightsInfo, Path | None], None]] = {
    "litema": _litema,
    "safetensors": _safetensors,
    "diffusers": _diffusers,
}
