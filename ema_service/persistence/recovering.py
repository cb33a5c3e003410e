"""Having snapshots again that lie on an object store, after the data dir that knew of them was lost.

Each snapshot's folder has a card, written last, that says what the catalog said: so what is listed here is whole.

Knows cards and rows. Does not know how a run is brought back, how snapshots come to the store, or which snapshots all
hosts of a cluster have (cluster/hosting/recovering).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ema_client.protocol import RunConfig, from_json, to_json
from ema_service.persistence.cards import CARD, CARD_BYTES, Card, read_card
from ema_service.storage import ObjectStore, RunRow, SnapshotRow, Store

__all__ = ["Recovered", "read_cards", "recover"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A folder of the store. run, snapshot: empty where its card cannot be read. left_out: why the snapshot is not in
    the catalog, None where it is."""

    folder: str
    run: str = ""
    snapshot: str = ""
    left_out: str | None = None


def read_cards(objects: ObjectStore) -> tuple[list[Card], list[Recovered]]:
    """The cards of an object store, in the order in which their snapshots were made, and the folders of those that
    cannot be read. Nothing is read but the cards. Raises ObjectStoreFailed."""
    objects.names()  # a bucket that is not there has no files, and is not empty
    cards: list[Card] = []
    unread: list[Recovered] = []
    for path in objects.find(CARD):
        folder = path.rpartition("/")[0]
        try:
            cards.append(read_card(folder, objects.read(path, 0, CARD_BYTES)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
            unread.append(Recovered(folder, left_out=f"its {CARD} cannot be read: {fault}"))
    return sorted(cards, key=lambda card: card.created_at), unread


def recover(store: Store, objects: ObjectStore) -> Iterator[Recovered]:
    """Add the snapshots of an object store to a data dir that does not know them, and runs that are not there: without
    weights, until somebody rewinds them to a snapshot or a trainer gives some. What was there stays as it was. Slices
    of the hosts of a cluster are left out.

    Each run's snapshots come in the order in which they were made. Raises ObjectStoreFailed, sqlite3.Error, OSError.
    """
    cards, unread = read_cards(objects)
    yield from unread
    leaving = set(store.removals())
    runs = {row.name: row for row in store.runs()}
    for card in cards:
        name = card.config.run
        if card.host:
            slice_of = f"it is the slice of host {card.host.place} of {card.host.of}"
            told = f"{slice_of}: recover each host with --shard, as in --shard {card.host.place}/{card.host.of}"
            yield Recovered(card.folder, name, card.info.name, told)
            continue
        if name not in runs:
            runs[name] = _add_run(store, card)
        why = "it was deleted" if card.folder in leaving else _add_snapshot(store, runs[name], card)
        yield Recovered(card.folder, name, card.info.name, why)


def _add_run(store: Store, card: Card) -> RunRow:
    row = store.add_run(card.config.run, json.dumps(to_json(card.config)), time.time())
    if card.averages is not None:
        store.set_averages(row, card.averages)
    return row


def _add_snapshot(store: Store, run: RunRow, card: Card) -> str | None:
    """Add a snapshot to a run. Why not, None where it is there then."""
    there = {row.name: row for row in store.snapshots(run)}.get(card.info.name)
    if there is not None:
        return None if there.folder == card.folder else f"run {run.name!r} has another snapshot of this name"
    config = from_json(RunConfig, json.loads(run.config))
    if (config.layout, config.copied) != (card.config.layout, card.config.copied):
        return f"run {run.name!r} has other tensors by now"
    store.adopt_snapshot(SnapshotRow(run.id, card.info.name, card.text, card.created_at, card.folder, card.files))
    return None
