"""Giving back the memory of a server that was killed, as its clean stop would have done, without serving.

Knows which runs have versions in memory files. Does not know the registry, or who asks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

from ema_client.protocol import RunConfig, from_json
from ema_service.memory import FilePool, Layout, Memory
from ema_service.memory.arena import buffer_bytes
from ema_service.persistence.memory_versions import MemoryVersions
from ema_service.persistence.restoring import Restored
from ema_service.persistence.rows import read_setup
from ema_service.persistence.shard_versions import ShardMemoryVersions
from ema_service.storage import MEMORY, MemoryFiles, RunRow, Store, memory_prefix

__all__ = ["release"]

_log = logging.getLogger(__name__)


def release(store: Store) -> Iterator[tuple[str, int | None]]:
    """Bring each run's version in memory to the disk and free its memory; yields the run's name and step.

    store: with its memory files in use. A run whose files cannot be read, or lie in another folder, is left as it is,
    and logged.
    Raises StorageFailed where the disk has no room: then the memory of that run, and of those after it, stays.
    """
    files = store.memory_files
    if files is None:
        return
    memory = Memory("cpu")
    for row in store.runs():
        if not any(each.folder == MEMORY for each in store.checkpoints(row)):
            continue
        versions = _versions(store, row, memory)
        if versions.elsewhere:
            # restore() would take the run back to its checkpoint, as after a loss of the machine.
            _log.error("run %s is left as it is: %s", row.name, _elsewhere(files))
            continue
        found = versions.restore()
        if found.fault or found.state is None:
            _log.error("run %s is left as it is: %s", row.name, found.fault or "there is nothing in memory")
            continue
        damaged: list[Restored] = []
        versions.verify(damaged.append)
        if damaged:
            _log.error("run %s is left as it is: %s", row.name, damaged[0].fault)
            continue
        if isinstance(versions, ShardMemoryVersions) and versions.voted:
            _log.error("run %s is left as it is: it is a shard, and has voted for what is in memory", row.name)
            continue
        versions.save(found.state, final=True)
        yield row.name, found.state.version.step


def _elsewhere(files: MemoryFiles) -> str:
    return (
        f"its memory is not in {files.folder.parent}: give the --ram-dir that its server had, on the same machine; of "
        "a machine that went down nothing is left to release, and the next server brings the run back"
    )


def _versions(store: Store, row: RunRow, memory: Memory) -> MemoryVersions:
    config = from_json(RunConfig, json.loads(row.config))
    layout = Layout(config.layout, config.copied)
    files = store.memory_files
    if files is None:
        raise RuntimeError("there are no memory files")
    pool = FilePool(files, buffer_bytes(layout), memory_prefix(row), memory.pool)
    setup = read_setup(config, row.averages)
    given = config, row, store, layout, memory.of_run(pool), pool, files.nonce
    shard = store.shard(row)
    return ShardMemoryVersions(shard, *given, setup=setup) if shard else MemoryVersions(*given, setup=setup)
