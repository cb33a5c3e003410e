"""Two kinds of trainers, of a whole model and of a sharded model, behind one interface: chosen here, once.

Knows: which kind a model is of, and what RemoteEma asks of either. Does not know: how either kind does it.
"""

from __future__ import annotations

from typing import Protocol, Unpack

import torch
from torch import Tensor, nn

from ema_client.client import EmaClient
from ema_client.errors import UsageError
from ema_client.protocol import TensorSpec, WeightsInfo
from ema_client.targets import Wished
from ema_client.training.plan import Plan, plan_whole
from ema_client.training.selection import BufferPolicy, FrozenPolicy, Selection
from ema_client.training.sharded_selection import ShardedSelection
from ema_client.training.sharding import is_sharded

__all__ = ["AnySelection", "choose"]


class AnySelection(Protocol):
    """The tensors of a model for this rank to send, found again in the model at every update.

    specs: of the tensors as sent, in canonical order. copied: names of the tensors to copy instead of averaging.
    left_out: names of buffers that stay the model's own because no average can be made of their values.
    """

    specs: tuple[TensorSpec, ...]
    copied: frozenset[str]
    left_out: tuple[str, ...]

    def of(self, model: nn.Module) -> tuple[list[Tensor], list[str]]:
        """The tensors of now, in the order of ``specs``; and names of parameters frozen since the latest call."""

    def written(self, model: nn.Module) -> list[Tensor]:
        """The tensors to be written by pull_into()."""

    def pull_into(
        self,
        model: nn.Module,
        client: EmaClient,
        run: str,
        *,
        snapshot: str | None = None,
        memory: Tensor | None = None,
        **wished: Unpack[Wished],
    ) -> WeightsInfo:
        """Write the EMA weights, a snapshot's or a wished average's, all or this rank's slices, into the model."""


def choose(
    model: nn.Module,
    *,
    buffers: BufferPolicy = "none",
    frozen: FrozenPolicy = "hold",
    dtype: str | torch.dtype | None = None,
    skips: bool = False,
) -> tuple[AnySelection, Plan]:
    """What of a model is sent, and who of the trainer's ranks does what. All ranks of a sharded model call it together.

    skips: whether updates are left out where earlier ones are on their way. The other arguments are RemoteEma's.

    Raises UsageError for a model that cannot be sent, and for what a sharded model does not allow; NameCollision.
    """
    if not is_sharded(model):
        selection = Selection(model, buffers=buffers, frozen=frozen, dtype=dtype)
        return selection, plan_whole(selection.specs)
    if buffers != "none":
        raise UsageError("the buffers of a sharded model are not averaged or copied", hint="leave buffers='none'")
    if skips:
        raise UsageError("each rank would leave out updates of its own", hint="use on_busy='block', update_every=k")
    sharded = ShardedSelection(model, frozen=frozen, dtype=dtype)
    return sharded, sharded.plan
