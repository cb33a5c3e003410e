"""What a server says of itself as a whole: its gauges, its capacity, and whether it takes whatever is asked for.

Knows the parts of a server, and the names of gauges. Does not know HTTP. All but gauge() looks at disks: off the event
loop.
"""

from __future__ import annotations

import contextlib
import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from ema_client.errors import Overloaded, StorageFailed
from ema_client.protocol import ServerInfo
from ema_service.api.auth import Access
from ema_service.metrics import Metrics
from ema_service.runs import Registry
from ema_service.runs.claims import MAX_RUNS
from ema_service.storage import DiskSpace

if TYPE_CHECKING:
    from ema_service.api.context import Context
    from ema_service.cluster.hosting.host import Host
    from ema_service.replica.following import Following

__all__ = ["Facts", "gauge", "stranger_info"]

_NAME = "ema-service"
#: Seconds for which the data dir's size is told as it was: a look goes through every file.
_SIZE_SECONDS = 10.0
#: Seconds after which readiness may have changed: somebody has to delete something first.
_RETRY_SECONDS = 5.0


def gauge(metrics: Metrics, context: Context) -> None:
    """Add to the metrics the gauges whose values the parts of the server know."""
    registry, settings = context.registry, context.settings
    metrics.build({"version": version(_NAME), "python": platform.python_version(), "torch": version("torch")})
    metrics.watch("ema_runs_limit", "Most of ema_runs.", lambda: MAX_RUNS)
    metrics.watch("ema_staging_bytes", "Bytes of pushes in flight.", lambda: registry.staging.bytes_in_use)
    metrics.watch("ema_staging_limit_bytes", "Most of ema_staging_bytes.", lambda: settings.staging_bytes)
    metrics.watch("ema_partial_updates", "Updates of which parts are awaited.", lambda: registry.gathering)
    metrics.watch("ema_lanes", "Stretches of updates that are being received.", lambda: len(context.lanes))
    metrics.watch("ema_lanes_limit", "Most of ema_lanes.", lambda: context.lanes.in_all)
    metrics.watch("ema_waiting_pushes", "Pushes that wait for staging.", lambda: context.pushers.waiting)
    metrics.watch("ema_waiting_readers", "Reads that wait for room.", lambda: context.readers.waiting)
    metrics.watch("ema_frozen_bytes", "Bytes of versions being read.", lambda: registry.frozen.bytes_in_use)
    metrics.watch("ema_frozen_limit_bytes", "Most of ema_frozen_bytes.", lambda: settings.frozen_bytes)
    metrics.watch("ema_idle_bytes", "Bytes kept for reuse.", lambda: registry.memory.pool.idle_bytes)
    metrics.watch("ema_memory_bytes", "Bytes of the host for weights, all in all.", lambda: registry.memory.budget.used)
    metrics.watch("ema_memory_limit_bytes", "Most of ema_memory_bytes.", lambda: registry.memory.budget.limit)
    metrics.watch("ema_watchers_limit", "Most of ema_watchers.", lambda: settings.max_watchers)
    host = context.host
    metrics.watch(
        "ema_coordinator_away",
        "1 while a host of a cluster hears no coordinator.",
        lambda: host is not None and not host.linked,
    )
    replica = context.replica
    metrics.watch(
        "ema_replica_original_away",
        "1 while the original of a replica does not answer.",
        lambda: replica is not None and not replica.reached,
    )
    metrics.watch(
        "ema_replica_behind_seconds",
        "For how long a replica has known of a version that it does not hold, of the run that is furthest behind.",
        lambda: replica.info().behind_seconds if replica else 0.0,
    )
    if store := registry.store:
        metrics.watch("ema_disk_free_bytes", "Free bytes of the data dir's disk.", lambda: store.space().free)
        metrics.watch("ema_disk_bytes", "Bytes of the data dir's disk.", lambda: store.space().total)
        metrics.watch(
            "ema_disk_floor_bytes", "With fewer free, runs and snapshots are refused.", lambda: store.space().floor
        )
        if files := store.memory_files:
            metrics.watch("ema_ram_free_bytes", "Bytes that memory files may still take.", lambda: files.room())
    offload = registry.offload
    metrics.watch(
        "ema_snapshots_waiting", "Snapshots to be moved to their store.", lambda: offload.waiting if offload else 0
    )
    metrics.watch(
        "ema_snapshot_removals_waiting", "Snapshots to be removed there.", lambda: offload.removals if offload else 0
    )
    metrics.watch(
        "ema_snapshot_store_failing",
        "1 while the store of snapshots fails.",
        lambda: offload is not None and offload.fault is not None,
    )


def stranger_info() -> ServerInfo:
    """What a server tells to whoever has no token."""
    return ServerInfo(_NAME, version(_NAME))


class Facts:
    """What a running server answers about itself. To be called off the event loop, by one thread at a time."""

    def __init__(
        self, registry: Registry, metrics: Metrics, host: Host | None = None, replica: Following | None = None
    ) -> None:
        self._registry = registry
        self._host = host
        self._replica = replica
        self._metrics = metrics
        self._size: tuple[float, int] | None = None

    def info(self, access: Access) -> ServerInfo:
        """What the server tells to whoever has this access."""
        registry = self._registry
        disk = self._disk()
        return ServerInfo(
            name=_NAME,
            version=version(_NAME),
            device=str(registry.memory.device),
            runs=sum(access.may("pull", run.config.run) for run in registry.runs()),
            memory_bytes=registry.memory.budget.used,
            memory_limit_bytes=registry.memory.budget.limit,
            disk_free_bytes=disk.free if disk else None,
            disk_total_bytes=disk.total if disk else None,
            data_dir_bytes=self._data_dir_bytes(),
            durability="process" if registry.store else "memory",
            time=time.time(),
            python=platform.python_version(),
            torch=version("torch"),
            scopes=tuple(access.all_scopes),
            snapshots_waiting=registry.offload.waiting if registry.offload else None,
            snapshot_store_fault=registry.offload.fault if registry.offload else None,
            replica=self._replica.info() if self._replica else None,
        )

    def metrics(self, access: Access) -> bytes:
        """The body of ``GET /metrics``: runs that the access may not read are counted, and not named."""
        pulses = [run.pulse() for run in self._registry.runs()]
        return self._metrics.render(pulses, lambda run: access.may("pull", run))

    def check_ready(self) -> None:
        """Raises StorageFailed where new runs and snapshots are refused, for the disk is full; as Host.check_ready() of
        a host of a cluster; Overloaded where a replica has not read its original."""
        if self._replica and not self._replica.filled:
            why = self._replica.info().fault
            raise Overloaded(
                f"this replica has not read all runs of its original yet{f': {why}' if why else ''}",
                hint="readers are better sent to the original, or to another replica, until then",
                retry_after=_RETRY_SECONDS,
            )
        if self._host:
            self._host.check_ready()
        store = self._registry.store
        if store is None:
            return
        try:
            disk = store.space()
        except OSError as fault:
            raise StorageFailed(f"the data dir's disk: {fault}", retry_after=_RETRY_SECONDS) from fault
        if disk.full:
            raise StorageFailed(
                f"the data dir's disk is full: {disk.free} of {disk.total} bytes are free, and {disk.floor} are left "
                "to the updates of the runs that there are",
                hint="free room on that disk, or delete snapshots or runs; updates go on meanwhile",
                retry_after=_RETRY_SECONDS,
            )

    def _disk(self) -> DiskSpace | None:
        """None where nothing is kept on disk, or the disk does not answer."""
        store = self._registry.store
        with contextlib.suppress(OSError):
            return store.space() if store else None
        return None

    def _data_dir_bytes(self) -> int | None:
        store = self._registry.store
        if store is None:
            return None
        if self._size is None or time.monotonic() - self._size[0] > _SIZE_SECONDS:
            self._size = time.monotonic(), store.used_bytes()
        return self._size[1]
