"""All runs of a server: creating, finding, deleting, and keeping them.

Knows the names of the runs and which are on disk. Does not know HTTP, the event loop, how an update is decided (run) or
kept (persistence). Its methods may block: call them off the event loop.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass, fields, replace

from ema_client.errors import (
    InvalidRequest,
    RunExists,
    RunNotFound,
    StorageDisabled,
    StorageFailed,
    TooManyRuns,
    listed,
)
from ema_client.protocol import MAX_AVERAGES, Durability, RunConfig, Writer, from_json, to_json
from ema_service.averaging import prepare
from ema_service.memory.arena import Memory
from ema_service.memory.frozen import FrozenWeights
from ema_service.memory.layout import Layout
from ema_service.memory.staging import Staging
from ema_service.runs.parts import Expired, Parts
from ema_service.runs.persistence import RunFiles
from ema_service.runs.run import Run
from ema_service.storage import CatalogUnusable, RunRow, Store

__all__ = ["MAX_RUNS", "Registry"]

#: Most runs of a server. Each costs a row, its layout in memory and a line of every list, with weights or without.
MAX_RUNS = 10_000

#: What of a configuration names tensors: too long to be shown as it is.
_LONG = ("layout", "copied")


@dataclass(frozen=True, slots=True)
class _Kept:
    run: Run
    parts: Parts
    files: RunFiles | None


class Registry:
    """The runs of one server. Thread-safe.

    store: None keeps nothing on disk. staging, frozen: the budgets that pushes and reads draw from.
    """

    def __init__(self, memory: Memory, store: Store | None, *, staging_bytes: int, frozen_bytes: int) -> None:
        """Brings back every run of the store; one whose files are damaged comes up ``degraded`` and says why.

        Raises CatalogUnusable, sqlite3.Error where the catalog is damaged.
        """
        prepare()
        self.memory = memory
        self.staging = Staging(memory, staging_bytes)
        self.frozen = FrozenWeights(memory, frozen_bytes)
        self._store = store
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        for row in store.runs() if store else []:
            config = _config_of(row)
            layout = Layout(config.layout, config.copied)
            kept = self._kept[row.name] = self._keep(config, layout, row, row.created_at)
            if kept.files:
                kept.files.restore()

    def close(self) -> None:
        """Take a last checkpoint of every run that moved and let go of the store."""
        for kept in self._all():
            if kept.files:
                kept.files.checkpoint(final=True)
        if self._store:
            self._store.close()

    def checkpoint(self) -> None:
        """Take a checkpoint of every run that moved since its last."""
        for kept in self._all():
            if kept.files:
                kept.files.checkpoint()

    def unsynced(self) -> list[RunFiles]:
        """The files of runs whose newest version a power loss would take: sync() them."""
        return [kept.files for kept in self._all() if kept.files and kept.files.unsynced]

    def create(self, config: RunConfig) -> tuple[Run, bool]:
        """The run of this configuration and whether it is new.

        A ``durability`` that is left out is that of the run if it exists, else ``process``, or ``memory`` where there
        is no store. Raises RunExists, TooManyRuns, InvalidRequest, StorageDisabled, StorageFailed.
        """
        _check_averages(config)
        layout = Layout(config.layout, config.copied)
        config = replace(config, layout=tuple(entry.spec for entry in layout.params), copied=layout.copied)
        with self._lock:
            kept = self._kept.get(config.run)
            if kept is None:
                if len(self._kept) >= MAX_RUNS:
                    raise TooManyRuns(f"this server holds {len(self._kept)} runs; {MAX_RUNS} are possible")
                config = replace(config, durability=self._durability(config))
                kept = self._kept[config.run] = self._add(config, layout)
                return kept.run, True
        if config.durability is None:
            config = replace(config, durability=kept.run.config.durability)
        if kept.run.config != config:
            raise RunExists(f"run {config.run!r} exists with another {_difference(kept.run.config, config)}")
        return kept.run, False

    def get(self, name: str) -> Run:
        """Raises RunNotFound."""
        return self._find(name).run

    def parts(self, name: str) -> Parts:
        """The parts of a run's updates that are being put together. Raises RunNotFound."""
        return self._find(name).parts

    @property
    def gathering(self) -> int:
        """How many updates are being put together from parts."""
        return sum(kept.parts.count() for kept in self._all())

    def expire_parts(self, silence: float) -> list[tuple[str, Expired]]:
        """Give up the steps of which no part has come for ``silence`` seconds, each with the name of its run."""
        return [(kept.run.config.run, expired) for kept in self._all() for expired in kept.parts.expire(silence)]

    def files(self, name: str) -> RunFiles:
        """What is on disk of a run. Raises RunNotFound, StorageDisabled where nothing is."""
        files = self._find(name).files
        if files is None:
            raise StorageDisabled("snapshots are files, and this server was started with --memory")
        return files

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return [kept.run for kept in self._all()]

    def set_decay(self, name: str, decay: float, average: str | None) -> Run:
        """Change a decay from the next update on and note it in the run's history. Raises as Run.set_decay()."""
        kept = self._find(name)
        kept.run.set_decay(decay, average)
        if kept.files:
            kept.files.record(f"decay of {average or kept.run.config.averages[0].name} set to {decay}")
        return kept.run

    def attach(self, name: str) -> Writer:
        """A number for a trainer that takes over the run; earlier ones are fenced off. Raises as Run.attach()."""
        kept = self._find(name)
        keep = kept.files.keep_writer if kept.files else _nothing
        return Writer(name, kept.run.attach(keep))

    def rewind(self, name: str, snapshot: str | None) -> Run:
        """Go back to a snapshot, or (None) go on with a degraded run's version. Raises as RunFiles does."""
        files = self.files(name)
        if snapshot is None:
            files.accept()
        else:
            files.rewind(snapshot)
        return self.get(name)

    def delete(self, name: str) -> None:
        """Forget the run with its weights, checkpoint and snapshots, after the update in hand. Raises RunNotFound."""
        with self._lock:
            kept = self._kept.pop(name, None)
            if kept is None:
                raise RunNotFound(f"there is no run {name!r}")
            kept.run.retire()
            kept.parts.close()
            if kept.files:
                kept.files.remove()

    def _durability(self, config: RunConfig) -> Durability:
        chosen = config.durability or ("process" if self._store else "memory")
        if chosen != "memory" and not self._store:
            raise StorageDisabled(
                f"durability: {chosen!r} needs a disk, and this server was started with --memory",
                hint='leave durability out or ask for "memory", or start the server with --data-dir',
            )
        return chosen

    def _add(self, config: RunConfig, layout: Layout) -> _Kept:
        created_at = time.time()
        if self._store is None:
            return self._keep(config, layout, None, created_at)
        try:
            row = self._store.add_run(config.run, json.dumps(to_json(config)), created_at)
            try:
                kept = self._keep(config, layout, row, created_at)
                if kept.files:
                    kept.files.allocate()
            except OSError:
                self._store.remove_run(row)
                raise
        except (OSError, sqlite3.Error) as fault:
            raise StorageFailed(f"run {config.run!r} was not created: {fault}", retry_after=1.0) from fault
        return kept

    def _keep(self, config: RunConfig, layout: Layout, row: RunRow | None, created_at: float) -> _Kept:
        run = Run(config, layout, self.memory, created_at=created_at)
        files = RunFiles(run, row, self._store, self.memory) if self._store and row else None
        run.writer = row.writer if row else 0
        return _Kept(run, Parts(run), files)

    def _all(self) -> list[_Kept]:
        # Without the lock, which may be held for a disk: the event loop asks too. (Copying a dict's values is atomic.)
        return list(self._kept.values())

    def _find(self, name: str) -> _Kept:
        kept = self._kept.get(name)
        if kept is None:
            raise RunNotFound(f"there is no run {name!r}")
        return kept


def _nothing(_: int) -> None:
    """Where nothing is kept on disk."""


def _config_of(row: RunRow) -> RunConfig:
    try:
        return from_json(RunConfig, json.loads(row.config))
    except ValueError as fault:
        raise CatalogUnusable(
            f"the catalog's row of run {row.name!r} is damaged: {fault}; restore the data dir from a backup"
        ) from None


def _check_averages(config: RunConfig) -> None:
    names = Counter(average.name for average in config.averages)
    if not 1 <= len(config.averages) <= MAX_AVERAGES:
        raise InvalidRequest(f"averages: {len(config.averages)} were given; 1 to {MAX_AVERAGES} are possible")
    name, count = names.most_common(1)[0]
    if count > 1:
        raise InvalidRequest(f"averages: the name {name!r} stands there {count} times")


def _difference(old: RunConfig, new: RunConfig) -> str:
    names = [f.name for f in fields(RunConfig) if getattr(old, f.name) != getattr(new, f.name)]
    shown = [f"{name} ({getattr(old, name)}, not {getattr(new, name)})" for name in names if name not in _LONG]
    if "copied" in names:
        tensors = sorted(set(old.copied) ^ set(new.copied))
        shown.append(f"choice of copied tensors ({listed(tensors)})")
    return " and ".join([*shown, *(["layout"] if "layout" in names else [])])
