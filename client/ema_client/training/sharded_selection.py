"""The tensors of a sharded model for a rank to send: chosen once with the other ranks, found again at every update.

Each rank sends its own shards; of replicas, the first sends.

Knows: shards, the ranks' layouts, and which rank sends which shard. Does not know: how a framework shards a model
(sharding), HTTP, steps.
"""

from __future__ import annotations

import hashlib
import secrets
import weakref
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ema_client import wire
from ema_client.client import EmaClient
from ema_client.errors import UsageError, listed
from ema_client.protocol import TensorSpec, WeightsInfo
from ema_client.reading.slices import Wanted
from ema_client.targets import Wished
from ema_client.tensors.layout import dtype_name, spec_of
from ema_client.tensors.wrappers import bare_name
from ema_client.tensors.writing import noticed, write
from ema_client.training.plan import ShardedPlan
from ema_client.training.ranks import gathered, own_rank
from ema_client.training.selection import FrozenPolicy
from ema_client.training.sharding import Shard, has_flat_parameters, local_memory, reshard, shards_of

__all__ = ["ShardedSelection"]


class ShardedSelection:
    """The shards of a sharded model's parameters on this rank. All ranks of the default group make theirs together.

    As Selection: ``specs`` are of the tensors to send, so of slices. ``plan`` says which rank sends what. The model's
    buffers are not selected, so none is copied.

    Raises UsageError for a model that cannot be sent; NameCollision.
    """

    copied: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, *, frozen: FrozenPolicy = "hold", dtype: str | torch.dtype | None = None):
        self._frozen_policy = frozen
        self._dtype = None if dtype is None else dtype_name(dtype)
        shards = shards_of(model, frozen=_floating(model) if frozen == "average" else frozenset())
        self._shards = {name: (shard.spec, shard.boxes) for name, shard in shards.items()}
        layout, firsts, group = _agree_on_layout(tuple(self._sent(shard.spec) for shard in shards.values()))
        sends = {name: shard for name, shard in shards.items() if shard.is_sent(own_rank(), firsts[name])}
        specs = [self._sent(spec_of(name, shard.local)) for name, shard in sends.items()]
        self.specs = tuple(entry.spec for entry in wire.place(specs))
        senders = [rank for rank, sending in enumerate(gathered(bool(sends))) if sending]
        part = senders.index(own_rank()) if sends else None
        slices = {name: shard.boxes for name, shard in sends.items() if shard.sliced}
        self.plan = ShardedPlan(layout, part, len(senders), group, slices)
        self._model: weakref.ref[nn.Module] | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._parameters: list[Tensor] = []

    def of(self, model: nn.Module) -> tuple[list[Tensor], list[str]]:
        """This rank's memory of now, in the order of ``specs``; and names of parameters frozen since the latest call.

        Raises UsageError naming what is missing, new or changed.
        """
        reshard(model)
        signature = [(id(p), p.requires_grad, p.dtype, p.shape) for p in model.parameters()]
        if self._model is not None and self._model() is model and signature == self._signature:
            return [local_memory(parameter) for parameter in self._parameters], []
        shards = self._found(model)
        parameters = {bare_name(model, name): p for name, p in model.named_parameters()}
        if not has_flat_parameters(model):
            self._model, self._signature = weakref.ref(model), signature
            self._parameters = [parameters[spec.name] for spec in self.specs]
        present = (spec.name for spec in self.specs if spec.name in parameters)
        told = self._frozen_policy != "average"
        frozen = [name for name in present if told and not parameters[name].requires_grad]
        if frozen and self._frozen_policy == "error":
            raise _mismatch([f"{name!r} is frozen" for name in frozen])
        return [shards[spec.name].local for spec in self.specs], frozen

    def written(self, model: nn.Module) -> list[Tensor]:
        """The memory to be written by pull_into(), of replicas and frozen parameters too. Raises as of()."""
        return [shard.local for shard in self._found(model).values()]

    def pull_into(
        self,
        model: nn.Module,
        client: EmaClient,
        run: str,
        *,
        snapshot: str | None = None,
        memory: Tensor | None = None,  # noqa: ARG002 - slices lie one by one
        **wished: Unpack[Wished],
    ) -> WeightsInfo:
        """Write this rank's slices of the EMA weights, or of a snapshot's, into the model, once all have come.

        wished: see EmaClient.pull(). Returns what was written. Raises as of().
        """
        shards = {name: shard for name, shard in self._found(model).items() if shard.boxes}
        wanted = {name: Wanted(s.spec.shape, s.boxes, _on_host(s.local)) for name, s in shards.items()}
        info = client.pull_slices(run, wanted, snapshot=snapshot, **wished)
        write([shard.local for shard in shards.values()], [want.target for want in wanted.values()])
        # A DTensor counts the writes to it by itself, and not those to its local memory.
        noticed(model.parameters())
        return info

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its tensors anew, in a model of its own.
        return {**self.__dict__, "_model": None, "_signature": [], "_parameters": []}

    def _found(self, model: nn.Module) -> dict[str, Shard]:
        shards = shards_of(model, frozen=frozenset(self._shards))
        faults = [f"{name!r} is missing" for name in self._shards if name not in shards]
        faults += [f"{name!r} is new or no longer frozen" for name in shards if name not in self._shards]
        faults += [
            f"{name!r} is {was[0].dtype} {was[0].shape} otherwise, or sharded otherwise, than it was"
            for name, was in self._shards.items()
            if name in shards and (shards[name].spec, shards[name].boxes) != was
        ]
        if faults:
            raise _mismatch(faults)
        return shards

    def _sent(self, spec: TensorSpec) -> TensorSpec:
        return spec if self._dtype is None else TensorSpec(spec.name, spec.shape, self._dtype)


def _floating(model: nn.Module) -> frozenset[str]:
    """The canonical names of a model's floating-point parameters."""
    return frozenset(bare_name(model, name) for name, p in model.named_parameters() if p.is_floating_point())


def _agree_on_layout(mine: tuple[TensorSpec, ...]) -> tuple[tuple[TensorSpec, ...], dict[str, int], str]:
    """The layout of the whole model; name -> the lowest rank with the tensor; and rank 0's choice of a group.

    Raises UsageError where two ranks have different shapes for a tensor.
    """
    digest = hashlib.sha256(repr(sorted(mine, key=lambda spec: spec.name)).encode()).hexdigest()
    answers: list[tuple[str, str]] = gathered((digest, secrets.token_hex(8)))
    group = answers[0][1]
    if len({digest for digest, _ in answers}) == 1:
        return mine, dict.fromkeys((spec.name for spec in mine), 0), group
    # The ranks of a pipeline hold different tensors.
    first: dict[str, tuple[int, TensorSpec]] = {}
    for rank, specs in enumerate(gathered(mine)):
        for spec in specs:
            if first.setdefault(spec.name, (rank, spec))[1] != spec:
                raise UsageError(f"{spec.name!r} is {spec.shape} on rank {rank}, {first[spec.name][1].shape} elsewhere")
    return tuple(s for _, s in first.values()), {name: rank for name, (rank, _) in first.items()}, group


def _on_host(local: Tensor) -> Tensor:
    return torch.empty(local.shape, dtype=local.dtype, device="cpu")


def _mismatch(faults: list[str]) -> UsageError:
    return UsageError(
        f"the model's tensors are not those of the run: {listed(faults, '; ')}",
        hint="wrap, freeze and shard the model before the RemoteEma is made, or make a new run for the changed model",
    )
