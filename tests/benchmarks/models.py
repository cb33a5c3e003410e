"""Group gpt2: one update of a GPT-2-sized model, by our kernel and by the libraries that keep an EMA in the trainer.

Knows each library's calls. Does not know servers or what the figures are for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel import WEIGHT, flat, in_place
from litema import LitEma
from scale import Scale
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, Row

__all__ = ["Gpt2", "measure"]

DECAY = 1 - WEIGHT
OURS = "kernel on the flat arena"
LITEMA = "LitEma as written"
LAYERS = 12
VOCABULARY = 50257
POSITIONS = 1024

#: Makes an update from the model; None where the library is not here.
Maker = Callable[["Gpt2"], Callable[[], Any] | None]


class Gpt2(nn.Module):
    """The parameters of GPT-2 small, in 148 tensors, and nothing that computes. A width of 768 gives 124,439,808."""

    def __init__(self, width: int) -> None:
        super().__init__()
        scaled = VOCABULARY * width // 768
        shapes = {"wte": (scaled, width), "wpe": (POSITIONS, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
        for layer in range(LAYERS):
            shapes |= {f"h.{layer}.{name}": shape for name, shape in _block(width)}
        for name, shape in shapes.items():
            values = torch.empty(shape).uniform_(0.5, 1.5)
            self.register_parameter(name.replace(".", "_"), nn.Parameter(values))


def _block(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    linears = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for name, (rows, columns) in linears.items():
        yield f"{name}.weight", (rows * width, columns * width)
        yield f"{name}.bias", (columns * width,)
    for norm in ("ln_1", "ln_2"):
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    model = Gpt2(scale.gpt2_width)
    elements = sum(parameter.numel() for parameter in model.parameters())
    operations: dict[str, Operation] = {OURS: in_place(flat(4 * elements), flat(4 * elements))}
    for name, make in MAKERS.items():
        if (update := make(model)) is not None:
            operations[name] = timed(update)
    seconds = interleave(operations, scale.rounds, on_step=on_step)
    rows = tuple(
        Row(name, "ms", tuple(1000 * s for s in seconds.get(name, ())), *_told(name, operations))
        for name in (OURS, *MAKERS)
    )
    return Group(
        "gpt2",
        f"gpt2: one update of {elements / 1e6:.1f} M parameters in {len(list(model.parameters()))} tensors",
        rows,
        (f"float32, {torch.get_num_threads()} threads, all in this process: nothing is sent",),
    )


def _told(name: str, operations: dict[str, Operation]) -> tuple[tuple[Need, ...], str]:
    if name not in operations:
        return (), f"not installed: pip install {name.split()[0].rstrip(',')}"
    return () if name == OURS else (Need(against=OURS),), ""


def _lerp(model: Gpt2) -> Callable[[], Any]:
    elements = sum(parameter.numel() for parameter in model.parameters())
    shadow, param = flat(4 * elements), flat(4 * elements)
    return lambda: shadow.lerp_(param, WEIGHT)


def _litema(model: Gpt2) -> Callable[[], Any]:
    ema = LitEma(model, DECAY)
    return lambda: ema(model)


def _averaged_model(model: Gpt2) -> Callable[[], Any]:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)  # the first call only copies
    return lambda: averaged.update_parameters(model)


def _torch_ema(model: Gpt2) -> Callable[[], Any] | None:
    if importlib.util.find_spec("torch_ema") is None:
        return None
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=DECAY)
    return lambda: ema.update(model.parameters())


def _timm(model: Gpt2) -> Callable[[], Any] | None:
    """ModelEmaV3 from its own file: importing all of timm needs a torchvision made for the very same torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = f"{spec.submodule_search_locations[0]}/utils/model_ema.py"
    file = importlib.util.spec_from_file_location("timm_model_ema", path)
    if file is None or file.loader is None:
        return None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    ema = module.ModelEmaV3(model, decay=DECAY)
    return lambda: ema.update(model)


def _ema_pytorch(model: Gpt2) -> Callable[[], Any] | None:
    if importlib.util.find_spec("ema_pytorch") is None:
        return None
    from ema_pytorch import EMA

    ema = EMA(model, beta=DECAY, update_every=1, update_after_step=0, use_foreach=True, include_online_model=False)
    for _ in range(3):
        ema.update()  # the first calls only copy
    return lambda: ema.update()


#: Named by the package to install, where there is one.
MAKERS: dict[str, Maker] = {
    "lerp_ on one flat tensor": _lerp,
    LITEMA: _litema,
    "torch-ema": _torch_ema,
    "AveragedModel, foreach": _averaged_model,
    "timm ModelEmaV3": _timm,
    "ema-pytorch, foreach": _ema_pytorch,
}
