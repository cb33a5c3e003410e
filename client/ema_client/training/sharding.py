"""Sharded models: which slices of which tensors this rank holds, and which of them it sends.

A model is read where it lies: parameters that are DTensors (FSDP2's ``fully_shard``, tensor parallelism, any mesh),
flat shards of FSDP1 and ZeRO-3, whole tensors (DDP). Each rank sends what it holds as one part of an update; of
replicas, the first sends. Nothing is gathered.

Knows: torch.distributed and how it lays tensors out over ranks. Does not know: HTTP, runs, steps.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_client import wire
from ema_client.errors import EmaError, NameCollision, UsageError, listed
from ema_client.protocol import TensorSpec
from ema_client.reading.slices import Wanted
from ema_client.tensors.layout import dtype_name, spec_of, state_of
from ema_client.tensors.names import canonical_name
from ema_client.training.selection import FrozenPolicy
from ema_client.wire import Box, boxes_of_range

__all__ = [
    "Plan",
    "Shard",
    "ShardedSelection",
    "agreed",
    "gathered",
    "is_sharded",
    "plan_whole",
    "reshard",
    "shards_of",
    "together",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of one tensor.

    spec: the whole tensor. boxes: the slices of it, back to back in ``local``; none where this rank holds nothing.
    local: this rank's own memory, of the one slice's shape, or flat where there are several.
    ranks: those that the tensor is sharded over; none where it is whole. replica: 0 in the first of its copies there.
    """

    spec: TensorSpec
    boxes: tuple[Box, ...]
    local: Tensor
    ranks: tuple[int, ...] = ()
    replica: int = 0

    @property
    def sliced(self) -> bool:
        return self.boxes != (_whole(self.spec.shape),)

    def is_sent(self, rank: int, first: int) -> bool:
        """Whether ``rank``, which holds it, sends it. ``first``: the lowest of all ranks that know the tensor.

        Of several meshes that each hold all of it (data parallel ones beside a tensor parallel dimension) the one with
        that rank sends.
        """
        if not self.boxes or self.replica:
            return False
        return first in self.ranks if self.ranks else first == rank


@dataclass(frozen=True, slots=True)
class Plan:
    """Who of a trainer's ranks sends what.

    layout: the whole model. part: this rank's number among ``of`` parts, None where it sends nothing. group: of this
    start of the trainer, the same on all ranks. slices: those that this rank's tensors are; the others are whole.
    others: whether there are other ranks, which may send what this one waits for.
    """

    layout: tuple[TensorSpec, ...]
    part: int | None
    of: int = 1
    group: str = ""
    slices: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    others: bool = False

    @property
    def sharded(self) -> bool:
        """Whether updates go out in parts, and ranks act together. If not, rank 0 sends the whole on its own."""
        return bool(self.group)


def plan_whole(layout: tuple[TensorSpec, ...]) -> Plan:
    """The plan of a model that every rank holds whole, as in DDP: rank 0 sends it, and no rank asks another."""
    others = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Plan(layout, 0 if not others or dist.get_rank() == 0 else None, others=others)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold different parts of the model's parameters."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if any(_is_dtensor(p) or _is_zero3(p) for p in model.parameters()):
        return True
    return any(_handle(module) is not None for module in model.modules())


class ShardedSelection:
    """The slices of a sharded model's parameters that this rank sends, found again in it at every update.

    Made by all ranks of the default group together. As Selection: ``specs`` are those of the tensors that are sent,
    here of this rank's slices; ``plan.layout`` is of the whole model. Buffers are not among them, so none is copied.

    Raises UsageError for a model that cannot be sent; NameCollision.
    """

    copied: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, *, frozen: FrozenPolicy = "hold", dtype: str | torch.dtype | None = None):
        self._policy = frozen
        self._dtype = None if dtype is None else dtype_name(dtype)
        shards = shards_of(model)
        self._shards = {name: (shard.spec, shard.boxes) for name, shard in shards.items()}
        layout, firsts, group = _agreed(tuple(self._sent(shard.spec) for shard in shards.values()))
        sends = {name: shard for name, shard in shards.items() if shard.is_sent(dist.get_rank(), firsts[name])}
        specs = [self._sent(spec_of(name, shard.local)) for name, shard in sends.items()]
        self.specs = tuple(entry.spec for entry in wire.place(specs))
        senders = [rank for rank, sending in enumerate(gathered(bool(sends))) if sending]
        part = senders.index(dist.get_rank()) if sends else None
        slices = {name: shard.boxes for name, shard in sends.items() if shard.sliced}
        self.plan = Plan(layout, part, len(senders), group, slices, others=True)
        self._model: weakref.ref[nn.Module] | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._parameters: list[Tensor] = []

    def of(self, model: nn.Module) -> tuple[list[Tensor], list[str]]:
        """This rank's memory of now, in the order of ``specs``, and the names of parameters frozen since the last call.

        Raises UsageError naming what is missing, new or changed.
        """
        reshard(model)
        signature = [(id(p), p.requires_grad, p.dtype, p.shape) for p in model.parameters()]
        if self._model is not None and self._model() is model and signature == self._signature:
            return [_local(parameter) for parameter in self._parameters], []
        shards = self._found(model)
        trained = {canonical_name(name): p for name, p in model.named_parameters()}
        if not any(_handle(module) for module in model.modules()):
            self._model, self._signature = weakref.ref(model), signature
            self._parameters = [trained[spec.name] for spec in self.specs]
        frozen = [spec.name for spec in self.specs if spec.name in trained and not trained[spec.name].requires_grad]
        if frozen and self._policy == "error":
            raise _mismatch([f"{name!r} is frozen" for name in frozen])
        return [shards[spec.name].local for spec in self.specs], frozen

    def targets(self, model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Tensor, str]]]:
        """This rank's memory of all parameters, those of replicas and frozen ones too, by name. Raises as of()."""
        return {name: shard.local for name, shard in self._found(model).items()}, []

    def wanted(self, model: nn.Module) -> dict[str, Wanted]:
        """What copy_to() of this rank writes."""
        found = self._found(model).items()
        return {name: Wanted(s.spec.shape, s.boxes, s.local) for name, s in found if s.boxes}

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


def shards_of(model: nn.Module, *, frozen: frozenset[str] = frozenset()) -> dict[str, Shard]:
    """What this rank holds of the parameters that require gradients, by their canonical names.

    frozen: names that are wanted even if they require none. A model that FSDP has gathered for a forward pass is
    sharded again first. Raises UsageError, NameCollision.
    """
    reshard(model)
    flat = dict(_flat_shards(model, frozen))
    originals: dict[str, str] = {}
    shards: dict[str, Shard] = {}
    for original, parameter in model.named_parameters():
        name = canonical_name(original)
        if name in flat or name.rpartition(".")[2] == "_flat_param" or not (parameter.requires_grad or name in frozen):
            continue
        if (first := originals.setdefault(name, original)) != original:
            raise NameCollision(f"{first!r} and {original!r} are both {name!r} without wrappers' prefixes")
        shards[name] = _shard(name, parameter)
    shards.update(flat)
    if not shards:
        raise UsageError(f"{type(model).__name__} has no parameter that requires gradients")
    state_of({name: shard.local for name, shard in shards.items()})
    return shards


def reshard(model: nn.Module) -> None:
    """Let go of parameters that FSDP has gathered, so that what is written into the shards is what is computed with.

    After a forward pass without a backward one FSDP keeps those of the outermost module, and would use them again.
    """
    held: list[Any] = [p for p in model.parameters() if _is_zero3(p) and p.data.numel()]
    for parameter in held:
        parameter.partition()
    for module in model.modules():
        if (handle := _handle(module)) is not None:
            # Before its first forward pass it has gathered nothing, and cannot be asked.
            if hasattr(handle.flat_param, "_local_shard"):
                handle.reshard(handle.uses_sharded_strategy)
        elif hasattr(module, "_get_fsdp_state") and callable(again := getattr(module, "reshard", None)):
            again()


def together(work: Callable[[], T]) -> T:
    """Do ``work`` on this rank, and return once all ranks have done theirs; what one raises is raised on all."""
    fault: EmaError | None = None
    result: T | None = None
    try:
        result = work()
    except EmaError as error:
        fault = error
    for rank, other in enumerate(gathered(fault)):
        if other is not None:
            other.add_note(f"on rank {rank}")
            raise other
    return cast(T, result)


def agreed(work: Callable[[], T | None]) -> T | None:
    """together(), for work that makes something on one rank only: that, on all."""
    return next((made for made in gathered(together(work)) if made is not None), None)


def _mismatch(faults: list[str]) -> UsageError:
    return UsageError(
        f"the model's tensors are not those of the run: {listed(faults, '; ')}",
        hint="wrap, freeze and shard the model before the RemoteEma is made, or make a new run for the changed model",
    )


# --- DTensor --------------------------------------------------------------------------------------------------------


def _shard(name: str, parameter: Tensor) -> Shard:
    if _is_zero3(parameter):
        return _zero3_shard(name, parameter)
    if not _is_dtensor(parameter):
        return Shard(spec_of(name, parameter), (_whole(parameter.shape),), parameter)
    tensor: Any = parameter
    local = _local(parameter)
    spec = TensorSpec(name, tuple(tensor.shape), spec_of(name, local).dtype)
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Shard(spec, (), local)
    box = _box(name, spec.shape, tuple(mesh.shape), tuple(coordinate), placements)
    if box and tuple(local.shape) != tuple(stop - start for start, stop in box):
        raise UsageError(f"{name!r} is laid out in a way that is not known: {placements}, {tuple(local.shape)} here")
    replica = sum(c for c, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
    ranks = tuple(mesh.mesh.flatten().tolist())
    return Shard(spec, (box,) if box is not None else (), local, ranks, replica)


@functools.lru_cache(maxsize=100_000)
def _box(
    name: str, shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> Box | None:
    """The slice of a tensor at one coordinate of its mesh; None where it is empty."""
    box = list(_whole(shape))
    for axis in _order_of_sharding(name, mesh, placements):
        dim = placements[axis].dim
        start, stop = box[dim]
        # As torch.chunk cuts: the last chunks are smaller, or empty.
        each = -(-(stop - start) // mesh[axis])
        box[dim] = (min(start + each * coordinate[axis], stop), min(start + each * (coordinate[axis] + 1), stop))
    return tuple(box) if all(start < stop for start, stop in box) else None


def _local(parameter: Tensor) -> Tensor:
    """This rank's memory of a parameter."""
    if _is_zero3(parameter):
        return _zero3_shard("", parameter).local
    if not _is_dtensor(parameter):
        return parameter
    tensor: Any = parameter
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _order_of_sharding(name: str, mesh: tuple[int, ...], placements: tuple[Any, ...]) -> Iterator[int]:
    """The mesh dimensions that shard, in the order in which they do: from the left; strided ones from the right, last.

    FSDP on top of tensor parallelism shards what that left, though its mesh dimension stands before it.
    """
    strided = []
    for axis, placement in enumerate(placements):
        factor = getattr(placement, "split_factor", None)
        if placement.is_partial():
            raise UsageError(f"{name!r} is a sum over ranks that has not been made yet ({placement})")
        if factor is not None:
            strided.append(axis)
            inner = [mesh[i] for i in range(axis + 1, len(mesh)) if _dim(placements[i]) == placement.dim]
            if functools.reduce(int.__mul__, inner, 1) != factor:
                raise UsageError(f"{name!r} is laid out in a way that is not known: {placements}")
        elif _dim(placement) is not None:
            yield axis
    yield from reversed(strided)


def _dim(placement: Any) -> int | None:
    dim: int | None = getattr(placement, "dim", None)
    return dim


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


# --- DeepSpeed's ZeRO-3: each parameter flattened and cut into equal ranges, the last one padded ----------------------


def _zero3_shard(name: str, parameter: Any) -> Shard:
    data: Tensor = parameter.ds_tensor.detach().view(-1)
    ranks = tuple(dist.get_process_group_ranks(parameter.ds_process_group))
    start = ranks.index(dist.get_rank()) * data.numel()
    stop = min(start + data.numel(), parameter.ds_numel)
    spec = TensorSpec(name, tuple(parameter.ds_shape), spec_of(name, data).dtype)
    return _range_shard(spec, start, stop, data[: max(0, stop - start)], ranks, 0)


def _range_shard(spec: TensorSpec, start: int, stop: int, local: Tensor, ranks: tuple[int, ...], replica: int) -> Shard:
    """The elements [start, stop) of a flattened tensor."""
    boxes = boxes_of_range(start, stop, spec.shape)
    if len(boxes) == 1:
        local = local.view([last - first for first, last in boxes[0]])
    return Shard(spec, boxes, local, ranks, replica)


def _is_zero3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_shape")


# --- FSDP1: one flat parameter for a whole module, cut into equal ranges ---------------------------------------------


def _flat_shards(model: nn.Module, frozen: frozenset[str]) -> Iterator[tuple[str, Shard]]:
    seen: dict[str, str] = {}
    for path, module in model.named_modules():
        handle = _handle(module)
        if handle is None:
            continue
        flat = handle.flat_param
        ranks = tuple(dist.get_process_group_ranks(handle.process_group))
        replica = 0 if handle.uses_sharded_strategy else dist.get_rank(handle.process_group)
        shards = zip(flat._fqns, flat._shapes, flat._shard_param_infos, _trained(flat), strict=True)
        for fqn, shape, info, trained in shards:
            name = canonical_name(f"{path}.{fqn}" if path else fqn)
            if not trained and name not in frozen:
                continue
            if seen.setdefault(name, path) != path:
                raise NameCollision(f"{name!r} is in two FSDP modules")
            yield name, _flat_shard(name, shape, info, flat, ranks, replica)


def _flat_shard(name: str, shape: Sequence[int], info: Any, flat: Any, ranks: tuple[int, ...], replica: int) -> Shard:
    data: Tensor = getattr(flat, "_local_shard", flat).detach()
    spec = TensorSpec(name, tuple(shape), spec_of(name, data).dtype)
    if not info.in_shard:
        return Shard(spec, (), data[:0], ranks, replica)
    local = data[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
    return _range_shard(spec, info.intra_param_start_idx, info.intra_param_end_idx + 1, local, ranks, replica)


def _handle(module: nn.Module) -> Any:
    """The handle of an FSDP1 module's flat parameter, or None."""
    return getattr(module, "_handle", None) if hasattr(module, "_fsdp_wrapped_module") else None


def _trained(flat: Any) -> list[bool]:
    originals = getattr(flat, "_params", None)
    return [p.requires_grad for p in originals] if originals else [flat.requires_grad] * len(flat._fqns)


# --- among ranks ----------------------------------------------------------------------------------------------------


def _agreed(mine: tuple[TensorSpec, ...]) -> tuple[tuple[TensorSpec, ...], dict[str, int], str]:
    """The whole layout, the lowest rank that knows each of its tensors, and rank 0's choice of a group."""
    digest = hashlib.sha256(repr(sorted(mine, key=lambda spec: spec.name)).encode()).hexdigest()
    answers: list[tuple[str, str]] = gathered((digest, secrets.token_hex(8)))
    group = answers[0][1]
    if len({digest for digest, _ in answers}) == 1:
        return mine, dict.fromkeys((spec.name for spec in mine), 0), group
    # The ranks of a pipeline hold different tensors.
    first: dict[str, tuple[int, TensorSpec]] = {}
    for other, specs in enumerate(gathered(mine)):
        for spec in specs:
            if first.setdefault(spec.name, (other, spec))[1] != spec:
                raise UsageError(
                    f"{spec.name!r} is {spec.shape} on rank {other}, {first[spec.name][1].shape} elsewhere"
                )
    return tuple(s for _, s in first.values()), {name: rank for name, (rank, _) in first.items()}, group


def gathered(value: Any) -> list[Any]:
    """Each rank's ``value``, by rank, on all ranks: they call it together."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)
