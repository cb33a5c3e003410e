"""What the hosts say of their shards, as one server would say it of the whole run.

Pure. Knows the dataclasses of the protocol, layouts, and what must be the same on all hosts. Does not know HTTP, or
when hosts are asked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

from ema_client.errors import EmaError
from ema_client.protocol import (
    HostedShard,
    RingInfo,
    RunInfo,
    RunLayout,
    RunShards,
    ServerInfo,
    SliceDigest,
    SnapshotInfo,
    SnapshotList,
    TensorSpec,
    UpdateResult,
    UpdateStatus,
)
from ema_service.cluster.gateway.hosts import HostAddress
from ema_service.cluster.layout_map import LayoutMap, ShardLayout
from ema_service.memory import Layout

__all__ = [
    "Apart",
    "degraded_info",
    "layout_of",
    "map_of",
    "shards_of",
    "slice_digests",
    "whole_info",
    "whole_part",
    "whole_result",
    "whole_ring",
    "whole_server",
    "whole_snapshot",
    "whole_snapshots",
    "whole_status",
]

T = TypeVar("T")

#: What to do about a run of which a host has less than the others.
_REMEDY = (
    "go back to a snapshot that all hosts have, or to the newest version that all can read (ema rewind); or restore "
    "the host's data dir"
)
#: Worst first.
_STATUSES = ("degraded", "awaiting_weights", "ready")


class Apart(Exception):
    """The hosts are not at the same place at this moment: a decision is on its way to one of them. Ask again."""


def map_of(layouts: Sequence[RunLayout]) -> LayoutMap:
    """Which rows of the whole run each host has. layouts: the shards', by place. Raises Apart where these are no shards
    of one layout: the run was made anew between two answers."""
    specs: list[TensorSpec] = []
    for _, group in groupby((spec for each in layouts for spec in each.layout), key=lambda spec: spec.name):
        parts = list(group)
        specs.append(parts[0] if len(parts) == 1 else _joined(parts))
    try:
        found = LayoutMap(Layout(specs, {name for each in layouts for name in each.copied}), len(layouts))
    except EmaError as fault:
        raise Apart(f"the hosts' tensors are no run: {fault.detail}") from None
    if [shard.layout.digest for shard in found.shards] != [each.digest for each in layouts]:
        raise Apart("the hosts' tensors are not cut from one run")
    return found


def _joined(parts: Sequence[TensorSpec]) -> TensorSpec:
    """A tensor of which several hosts have rows. Raises Apart."""
    first = parts[0]
    if not all(part.shape and (part.shape[1:], part.dtype) == (first.shape[1:], first.dtype) for part in parts):
        raise Apart(f"the rows of tensor {first.name!r} do not fit together")
    return replace(first, shape=(sum(part.shape[0] for part in parts), *first.shape[1:]))


def layout_of(run: str, shards: LayoutMap) -> RunLayout:
    """The layout of the whole run, as a server tells it that takes an update over one connection; with the number of
    hosts."""
    layout = shards.layout
    specs = tuple(entry.spec for entry in layout.params)
    return RunLayout(run, specs, layout.copied, layout.digest, shards=len(shards.shards))


def shards_of(
    infos: Sequence[RunInfo], shards: LayoutMap, hosts: Sequence[Sequence[HostAddress]], *, twins: bool
) -> RunShards:
    """Where each shard is. infos: by place; hosts: those that count, by place; twins: whether there may be two. No
    shard where a host that counts has never come. Raises Apart."""
    if not all(host.address for each in hosts for host in each):
        return RunShards(infos[0].run, (), twins)
    found = [*map(_birth, infos)]
    _check_same(found, infos[0].run)
    return RunShards(infos[0].run, tuple(map(_hosted, shards.shards, found, hosts)), twins)


def _hosted(shard: ShardLayout, birth: int, hosts: Sequence[HostAddress]) -> HostedShard:
    host, *others = hosts
    specs = tuple(entry.spec for entry in shard.layout.params)
    firsts = tuple(box[0][0] if (box := shard.boxes[spec.name]) else 0 for spec in specs)
    twin = others[0].address if others else None
    return HostedShard(shard.place, birth, host.address, specs, firsts, host.replicas, twin)


def whole_info(infos: Sequence[RunInfo]) -> RunInfo:
    """The whole run as it stands. Raises Apart."""
    first = infos[0]
    _check_same(((each.version, each.step, each.num_updates, each.averages) for each in infos), first.run)
    _check_same(map(_birth, infos), first.run)
    return _together(infos, first)


def degraded_info(infos: Sequence[RunInfo], fault: str) -> RunInfo:
    """As whole_info(), of hosts that have come apart for good: as the one says that is furthest behind. fault: why
    nothing is decided."""
    least = min(infos, key=lambda each: (_STATUSES.index(each.status), each.step is not None, each.step or 0))
    found = _together(infos, least)
    # Of a host that is an older copy, and knows nothing of it, the coordinator alone can say what is wrong.
    return found if found.status == "degraded" else replace(found, status="degraded", reason=fault, remedy=_REMEDY)


def _together(infos: Sequence[RunInfo], told: RunInfo) -> RunInfo:
    """What one host tells of its version, with what all have together, and the worst that one of them says."""
    worst = min(infos, key=lambda each: _STATUSES.index(each.status))
    place = infos.index(worst)
    dtypes = (dtype for each in infos for dtype in each.shadow_dtype.split("+"))
    return replace(
        told,
        status=worst.status,
        reason=worst.reason and f"host {place}: {worst.reason}",
        remedy=worst.remedy,
        tensors=told.shard.tensors if told.shard else told.tensors,
        copied=told.shard.copied if told.shard else told.copied,
        parameters=sum(each.parameters for each in infos),
        bytes=sum(each.bytes for each in infos),
        durable_step=_least(each.durable_step for each in infos),
        checkpoint_step=_least(each.checkpoint_step for each in infos),
        updated_at=max(each.updated_at for each in infos),
        device=", ".join(dict.fromkeys(each.device for each in infos)),
        shadow_dtype="+".join(dict.fromkeys(dtypes)),  # hosts are in the layout's order, as sections are
        writer=max(each.writer for each in infos),
        refused=next((each.refused for each in infos if each.refused), None),
        shard=None,
        ring=whole_ring([each.ring for each in infos]),
        link=f"a gateway to {len(infos)} hosts",
    )


def whole_ring(rings: Sequence[RingInfo | None]) -> RingInfo | None:
    """The ring of the whole run: of the snapshots those that all hosts have."""
    found = [each for each in rings if each is not None]
    if len(found) < len(rings):
        return None
    first, trouble = found[0], [(place, each.trouble) for place, each in enumerate(found) if each.trouble]
    return replace(
        first,
        times=tuple(time for time in first.times if all(time in each.times for each in found)),
        begin=first.begin if all(each.begin == first.begin for each in found) else None,
        bytes=sum(each.bytes for each in found),
        waiting=max(each.waiting for each in found),
        trouble=f"host {trouble[0][0]}: {trouble[0][1]}" if trouble else None,
    )


def whole_result(results: Sequence[UpdateResult]) -> UpdateResult:
    """What became of an update. Raises Apart."""
    first = results[0]
    _check_same(((each.step, each.num_updates, each.version) for each in results), f"step {first.step}")
    # A host that had decided before the others answers a repeat of the slice: the update was applied all the same.
    applied = any(each.applied for each in results)
    return replace(first, applied=applied, durable_step=_least(each.durable_step for each in results))


def slice_digests(statuses: Sequence[UpdateStatus], shards: LayoutMap) -> tuple[SliceDigest, ...]:
    """The digests of all hosts' slices of an update, by place; none where a host does not know its own."""
    found = [each.digest for each in statuses if each.digest is not None]
    sizes = [each.params.stop - each.params.start for each in shards.shards]
    return tuple(map(SliceDigest, sizes, found)) if len(found) == len(sizes) else ()


def whole_status(statuses: Sequence[UpdateStatus], digests: tuple[SliceDigest, ...] = ()) -> UpdateStatus:
    """What is known of a step. digests: of the slices, where all have applied the step.

    Of parts those are told that all hosts have. A host that has applied the step needs none: the others are about to.
    """
    step = statuses[0].step
    waiting = [each for each in statuses if each.state != "applied"]
    if not waiting:
        return UpdateStatus(step, "applied", digests=digests)
    if any(each.state == "unknown" for each in waiting):
        return UpdateStatus(step, "unknown")
    return UpdateStatus(step, "staged", tuple(sorted(set[int].intersection(*(set(each.parts) for each in waiting)))))


def whole_part(answers: Sequence[UpdateResult | UpdateStatus]) -> UpdateResult | UpdateStatus:
    """What became of a part of an update: applied where a host says so, for all hosts do as one. Raises Apart."""
    applied = [each for each in answers if isinstance(each, UpdateResult)]
    statuses = [each for each in answers if isinstance(each, UpdateStatus)]
    return whole_result(applied) if applied else whole_status(statuses)


def whole_snapshot(infos: Sequence[SnapshotInfo]) -> SnapshotInfo:
    """A snapshot of the whole run. Raises Apart."""
    first = infos[0]
    _check_same(((each.version, each.step, each.averages, each.created_at) for each in infos), first.name)
    here = next((each.stored for each in infos if each.stored == "local"), first.stored)
    return replace(first, bytes=sum(each.bytes for each in infos), stored=here)


def whole_snapshots(lists: Sequence[SnapshotList]) -> SnapshotList:
    """The snapshots of the whole run, oldest first: those that all hosts have. One that a host lacks is on its way, or
    the host's data dir is an older copy. Raises Apart."""
    found = [{(each.created_at, each.name): each for each in told.snapshots} for told in lists]
    common = set(found[0]).intersection(*found)
    return SnapshotList(tuple(whole_snapshot([each[key] for each in found]) for key in sorted(common)))


def whole_server(infos: Sequence[ServerInfo]) -> ServerInfo:
    """What the hosts are together; without a token, as each host says it, name and version, and how many hosts."""
    first = replace(infos[0], hosts=len(infos))
    if not first.scopes:
        return first
    faults = [(place, each.snapshot_store_fault) for place, each in enumerate(infos) if each.snapshot_store_fault]
    return replace(
        first,
        device=", ".join(dict.fromkeys(each.device or "" for each in infos)),
        memory_bytes=_sum(each.memory_bytes for each in infos),
        memory_limit_bytes=_sum(each.memory_limit_bytes for each in infos),
        disk_free_bytes=_sum(each.disk_free_bytes for each in infos),
        disk_total_bytes=_sum(each.disk_total_bytes for each in infos),
        data_dir_bytes=_sum(each.data_dir_bytes for each in infos),
        snapshots_waiting=_sum(each.snapshots_waiting for each in infos),
        snapshot_store_fault=f"host {faults[0][0]}: {faults[0][1]}" if faults else None,
    )


def _birth(info: RunInfo) -> int:
    """Of the run that a host tells of: one that was made later under the same name has another."""
    return info.shard.birth if info.shard else 0


def _check_same(values: Iterable[T], what: str) -> None:
    """Raises Apart unless the values of all hosts are one."""
    found = list(values)
    if any(each != found[0] for each in found):
        raise Apart(f"{what}: a decision is on its way to some of the hosts")


def _least(steps: Iterable[int | None]) -> int | None:
    """What the run has in the end is what each of its shards has."""
    found = list(steps)
    return None if None in found else min(step for step in found if step is not None)


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where a host does not say."""
    found = list(counts)
    return None if None in found else sum(count for count in found if count is not None)
