"""Having snapshots again that lie on an object store, after the data dir that knew of them was lost.

Each snapshot's folder has a card, written last, that says what the catalog said: so what is listed here is whole.

Knows cards and rows. Does not know how a run is brought back, or how snapshots come to the store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ema_client.protocol import RunConfig, SnapshotInfo, from_json, to_json
from ema_service.persistence.offload import CARD, CARD_FORMAT, read_files
from ema_service.persistence.rows import read_setup
from ema_service.storage import ObjectStore, RunRow, SnapshotRow, Store

__all__ = ["Recovered", "recover"]

#: Most bytes of a card: a layout has 32 MiB at most, as JSON.
_CARD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Recovered:
    """A folder of the store. run, snapshot: empty where its card cannot be read. left_out: why the snapshot is not in
    the catalog, None where it is."""

    folder: str
    run: str = ""
    snapshot: str = ""
    left_out: str | None = None


@dataclass(frozen=True, slots=True)
class _Card:
    """A card that was read and checked."""

    folder: str
    config: RunConfig
    averages: str | None
    info: SnapshotInfo
    text: str
    created_at: float
    files: str


def recover(store: Store, objects: ObjectStore) -> Iterator[Recovered]:
    """Add the snapshots of an object store to a data dir that does not know them, and runs that are not there: without
    weights, until somebody rewinds them to a snapshot or a trainer gives some. What was there stays as it was.

    Each run's snapshots come in the order in which they were made. Nothing is read but the cards. Raises
    ObjectStoreFailed, sqlite3.Error, OSError.
    """
    cards: list[_Card] = []
    for path in objects.find(CARD):
        folder = path.rpartition("/")[0]
        try:
            cards.append(_read(folder, objects.read(path, 0, _CARD_BYTES)))
        except (ValueError, TypeError, KeyError, RecursionError) as fault:
            yield Recovered(folder, left_out=f"its {CARD} cannot be read: {fault}")
    leaving = set(store.removals())
    runs = {row.name: row for row in store.runs()}
    for card in sorted(cards, key=lambda card: card.created_at):
        name = card.config.run
        if name not in runs:
            runs[name] = _add_run(store, card)
        why = "it was deleted" if card.folder in leaving else _add_snapshot(store, runs[name], card)
        yield Recovered(card.folder, name, card.info.name, why)


def _read(folder: str, raw: bytes) -> _Card:
    """A card. Raises ValueError, TypeError, KeyError, RecursionError where it is none."""
    said: dict[str, Any] = json.loads(raw)
    if said["format"] != CARD_FORMAT:
        raise ValueError(f"it has format {said['format']}, this version reads {CARD_FORMAT}: upgrade ema-service")
    config, info = from_json(RunConfig, said["run"]), from_json(SnapshotInfo, said["snapshot"])
    averages = None if said["averages"] is None else str(said["averages"])
    read_setup(config, averages)
    if info.run != config.run:
        raise ValueError(f"it is of run {info.run!r} and of run {config.run!r}")
    files = json.dumps(said["files"])
    if read_files(files).keys() != set(info.averages):
        raise ValueError("it names other files than averages")
    text = json.dumps({**said["snapshot"], "recovered": True})
    return _Card(folder, config, averages, info, text, float(said["created_at"]), files)


def _add_run(store: Store, card: _Card) -> RunRow:
    row = store.add_run(card.config.run, json.dumps(to_json(card.config)), time.time())
    if card.averages is not None:
        store.set_averages(row, card.averages)
    return row


def _add_snapshot(store: Store, run: RunRow, card: _Card) -> str | None:
    """Add a snapshot to a run. Why not, None where it is there then."""
    there = {row.name: row for row in store.snapshots(run)}.get(card.info.name)
    if there is not None:
        return None if there.folder == card.folder else f"run {run.name!r} has another snapshot of this name"
    config = from_json(RunConfig, json.loads(run.config))
    if (config.layout, config.copied) != (card.config.layout, card.config.copied):
        return f"run {run.name!r} has other tensors by now"
    store.adopt_snapshot(SnapshotRow(run.id, card.info.name, card.text, card.created_at, card.folder, card.files))
    return None
