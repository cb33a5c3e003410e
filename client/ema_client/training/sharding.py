"""Shards: which slices of a sharded model's tensors lie on this rank.

A model is read where it lies: parameters that are DTensors (FSDP2's ``fully_shard``, tensor parallelism, any mesh),
flat shards of FSDP1 and ZeRO-3, whole tensors (DDP). Nothing is gathered.

Knows: how torch.distributed, FSDP and DeepSpeed lay tensors out over ranks. Does not know: what is sent, HTTP, runs,
steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_client.errors import NameCollision, UsageError
from ema_client.protocol import TensorSpec
from ema_client.tensors.layout import spec_of, state_of
from ema_client.tensors.wrappers import bare_name
from ema_client.training.ranks import is_distributed
from ema_client.wire import Box, boxes_of_range

__all__ = ["Shard", "box_at", "has_flat_parameters", "is_sharded", "local_memory", "reshard", "shards_of"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's share of a tensor.

    spec: the whole tensor. boxes: the slices of the tensor that lie back to back in ``local``; none where the rank has
    nothing of the tensor. local: the rank's own memory, of the slice's shape, or flat where there are several slices.
    ranks: the ranks over which the tensor is sharded; none for a whole tensor. replica: 0 in the first copy of the
    shard.
    """

    spec: TensorSpec
    boxes: tuple[Box, ...]
    local: Tensor
    ranks: tuple[int, ...] = ()
    replica: int = 0

    @property
    def sliced(self) -> bool:
        """Whether the shard is less than the whole tensor."""
        return self.boxes != (_whole(self.spec.shape),)

    def is_sent(self, rank: int, first: int) -> bool:
        """Whether ``rank``, the shard's own, sends the shard. first: the lowest rank with the tensor.

        Where several meshes each hold the whole tensor (data parallel ranks beside a tensor parallel dimension), the
        mesh with the lowest rank sends.
        """
        if not self.boxes or self.replica:
            return False
        return first in self.ranks if self.ranks else first == rank


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold different parts of the model's parameters."""
    if not is_distributed():
        return False
    if any(_is_dtensor(p) or _is_zero3(p) for p in model.parameters()):
        return True
    return has_flat_parameters(model)


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether FSDP1 holds the model's parameters in flat parameters, of which every pass makes new views."""
    return any(_handle(module) is not None for module in model.modules())


def shards_of(model: nn.Module, *, frozen: frozenset[str] = frozenset()) -> dict[str, Shard]:
    """The shards of this rank, of the parameters that require gradients, by canonical name.

    frozen: names of further parameters, without gradients. A model gathered by FSDP for a forward pass is sharded again
    first. Raises UsageError, NameCollision.
    """
    reshard(model)
    flat = dict(_flat_shards(model, frozen))
    originals: dict[str, str] = {}
    shards: dict[str, Shard] = {}
    for original, parameter in model.named_parameters():
        name = bare_name(model, original)
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
    """Let FSDP and ZeRO-3 drop gathered parameters, so that the next forward pass computes with what the shards hold.

    After a forward pass without a backward pass, FSDP holds the gathered parameters of the outermost module for the
    next forward pass. A model without gathered parameters does not change.
    """
    whole: list[Any] = [p for p in model.parameters() if _is_zero3(p) and p.data.numel()]
    for parameter in whole:
        parameter.partition()
    for module in model.modules():
        if (handle := _handle(module)) is not None:
            # Before the first forward pass nothing is gathered, and the handle cannot be asked.
            if hasattr(handle.flat_param, "_local_shard"):
                handle.reshard(handle.uses_sharded_strategy)
        elif hasattr(module, "_get_fsdp_state") and callable(again := getattr(module, "reshard", None)):
            again()


# --- DTensor --------------------------------------------------------------------------------------------------------


def _shard(name: str, parameter: Tensor) -> Shard:
    if _is_zero3(parameter):
        return _zero3_shard(name, parameter)
    if not _is_dtensor(parameter):
        return Shard(spec_of(name, parameter), (_whole(parameter.shape),), parameter)
    tensor: Any = parameter
    local = local_memory(parameter)
    spec = TensorSpec(name, tuple(tensor.shape), spec_of(name, local).dtype)
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Shard(spec, (), local)
    box = box_at(name, spec.shape, tuple(mesh.shape), tuple(coordinate), placements)
    if box and tuple(local.shape) != tuple(stop - start for start, stop in box):
        raise UsageError(f"{name!r} is laid out in a way that is not known: {placements}, {tuple(local.shape)} here")
    replica = sum(c for c, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
    ranks = tuple(mesh.mesh.flatten().tolist())
    return Shard(spec, (box,) if box is not None else (), local, ranks, replica)


@functools.lru_cache(maxsize=100_000)
def box_at(
    name: str, shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> Box | None:
    """The slice of a DTensor at a coordinate of its mesh; None where the slice is empty.

    shape: of the whole tensor. mesh: the mesh's shape. placements: torch's, one for each dimension of the mesh. Raises
    UsageError, naming the tensor, for placements whose meaning is not certain.
    """
    box = list(_whole(shape))
    for axis in _order_of_sharding(name, mesh, placements):
        dim = placements[axis].dim
        start, stop = box[dim]
        # As torch.chunk cuts: the last chunks are smaller, or empty.
        each = -(-(stop - start) // mesh[axis])
        box[dim] = (min(start + each * coordinate[axis], stop), min(start + each * (coordinate[axis] + 1), stop))
    return tuple(box) if all(start < stop for start, stop in box) else None


def local_memory(parameter: Tensor) -> Tensor:
    """The rank's own memory of a parameter."""
    if _is_zero3(parameter):
        return _zero3_shard("", parameter).local
    if not _is_dtensor(parameter):
        return parameter
    tensor: Any = parameter
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _order_of_sharding(name: str, mesh: tuple[int, ...], placements: tuple[Any, ...]) -> Iterator[int]:
    """The mesh dimensions that shard, in the order of sharding: from the left; strided dimensions from the right, last.

    FSDP on top of tensor parallelism is strided: FSDP shards what tensor parallelism left, though FSDP's dimension
    comes first in the mesh.
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
    """The shard that holds the elements [start, stop) of a flattened tensor."""
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
            name = bare_name(model, f"{path}.{fqn}" if path else fqn)
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


def _whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)
