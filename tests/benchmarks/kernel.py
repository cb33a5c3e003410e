"""Groups kernel and gpt2: the averaging itself, in this process, beside other ways to do it.

Knows the kernel, its alternatives on flat memory, and what is demanded. Does not know servers. The alternatives that
take a whole model are in ``models``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from litema import LitEma
from scale import Scale
from torch import Tensor, nn

from ema_service.averaging import average_into
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size

__all__ = ["WEIGHT", "flat", "in_place", "measure"]

WEIGHT = 1e-4
LERP = "lerp_"
LITEMA = "LitEma as written"
OURS = "kernel, float32"
OURS_BF16 = "kernel, bf16 into float32"


def flat(nbytes: int) -> Tensor:
    """Float32, between 0.5 and 1.5."""
    return torch.empty(nbytes // 4).uniform_(0.5, 1.5)


def in_place(shadow: Tensor, param: Tensor) -> Operation:
    """The kernel as the server uses it: the result takes the place of the parameters that were received."""
    buffer = torch.empty_like(shadow)
    return _average(shadow, buffer, buffer, param)


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """One flat tensor of ``scale.flat_bytes``."""
    shadow, param = flat(scale.flat_bytes), flat(scale.flat_bytes)
    other, model = shadow.clone(), _One(param)
    litema = LitEma(model)
    operations = {
        LERP: timed(lambda: other.lerp_(param, WEIGHT)),
        OURS: in_place(shadow, param),
        OURS_BF16: _in_place_bf16(shadow, param.bfloat16()),
        LITEMA: timed(lambda: litema(model)),
    }
    needs = {
        OURS: (Need(0.65, LERP), Need(3, LITEMA)),
        OURS_BF16: (Need(0.6, LERP),),
        LITEMA: (Need(against=LERP),),
    }
    seconds = interleave(operations, scale.rounds, on_step=on_step)
    return Group(
        "kernel",
        f"kernel: a flat float32 shadow of {show_size(scale.flat_bytes)}, GB/s of shadow",
        tuple(rate_row(name, scale.flat_bytes, seconds, needs.get(name, ())) for name in operations),
        (
            f"{torch.get_num_threads()} threads; the kernel rounds as LitEma does and looks for NaN and Inf, and its "
            "result takes the place of the parameters; lerp_ rounds otherwise and checks nothing",
        ),
    )


class _One(nn.Module):
    """A model of one parameter."""

    def __init__(self, param: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(param)


def _in_place_bf16(shadow: Tensor, param: Tensor) -> Operation:
    """As in_place(): the parameters lie at the end of the memory that the result fills from the front."""
    buffer = torch.empty_like(shadow)
    received = buffer.view(torch.bfloat16)[-param.numel() :]
    return _average(shadow, buffer, received, param)


def _average(shadow: Tensor, buffer: Tensor, received: Tensor, param: Tensor) -> Operation:
    averaging = timed(lambda: average_into(buffer, shadow, received, WEIGHT))

    target, source = (tensor.view(torch.uint8).numpy() for tensor in (received, param))

    def operation() -> float:
        # By one thread and not by torch's, which spin after their work and would take a core from what is timed.
        target[:] = source
        return averaging()

    return operation
