"""Having the snapshots of a cluster again, host by host, after its data dirs were lost: those that all hosts had moved.

    every host's cards in the object store   -> the same choice of runs and snapshots, on whichever host it is made
    one host's data dir                         those runs, without weights, and the slices of that host

Each host has the directory's record of one revision then, and of each run a shard with nothing committed, as after the
runs' creation: so the hosts go on together, and a rewind brings all of them to one snapshot.

Knows cards, rows and the directory's record. Does not know how hosts go on from there, or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ema_client.protocol import to_json
from ema_service.cluster.encoding import encode
from ema_service.cluster.hosting.directory import shard_config
from ema_service.cluster.messages import Record
from ema_service.persistence.cards import Card, CardHost
from ema_service.persistence.recovering import Recovered, read_cards
from ema_service.storage import ObjectStore, RunRow, ShardRow, SnapshotRow, Store

__all__ = ["NotRecovered", "recover_host"]


class NotRecovered(Exception):
    """This host cannot have the snapshots of the object store; the text says what to do."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """A card with the host that moved its snapshot."""

    card: Card
    host: CardHost

    @property
    def run(self) -> tuple[float, int]:
        """Of several runs of one name that there were, which: the latest is the largest."""
        return self.host.created_at, self.host.birth

    @property
    def key(self) -> tuple[float, str, str]:
        """Of the snapshot, the same on all hosts; of several of one name that there were, the latest is the largest."""
        return self.card.info.created_at, self.card.config.run, self.card.info.name


def recover_host(store: Store, objects: ObjectStore, place: int, of: int) -> Iterator[Recovered]:
    """Have a new data dir be that of a host of a cluster, with those snapshots of the object store that all hosts had
    moved there, and with their runs, which have no weights until somebody rewinds them.

    It may be done again where it was interrupted. Raises NotRecovered, CatalogUnusable, ObjectStoreFailed,
    sqlite3.Error, OSError.
    """
    cards, unread = read_cards(objects)
    yield from unread
    slices = [_Slice(card, card.host) for card in cards if card.host]
    if not slices:
        return
    _check(slices, objects.url, place, of)
    wanted = _chosen(slices)
    own = sorted((each for each in slices if each.host.place == place), key=lambda each: each.key)
    _check_has(own, wanted, place)
    averages = _averages(slices, wanted)
    _be_host(store, place, of, max(each.host.birth for each in slices))
    runs = {row.name: row for row in store.runs()}
    for each in own:
        name, snapshot = each.card.config.run, each.card.info.name
        if each.key not in wanted:
            yield Recovered(each.card.folder, name, snapshot, "not all hosts had moved it, or it was deleted")
            continue
        if name not in runs:
            runs[name] = _add_run(store, each, averages[name])
        _add_snapshot(store, runs[name], each.card)
        yield Recovered(each.card.folder, name, snapshot)


def _check(slices: Sequence[_Slice], url: str, place: int, of: int) -> None:
    """Raises NotRecovered where the store has snapshots of another cluster than one of so many hosts, or of several."""
    kinds = sorted({(each.host.of, each.host.shards) for each in slices})
    if len(kinds) > 1 or kinds[0][0] != of:
        found = " and ".join(f"{hosts} hosts with {shards} shards" for hosts, shards in kinds)
        raise NotRecovered(
            f"{url} has snapshots of a cluster of {found}, and this is to be host {place} of {of}: give the --shard "
            "that its server had, and remove what is of another cluster"
        )


def _chosen(slices: Sequence[_Slice]) -> set[tuple[float, str, str]]:
    """Which snapshots are recovered: of the latest run of each name, and of each name the latest, all that one host of
    every shard has: of twins that which has more. Which host asks makes no difference."""
    latest: dict[str, tuple[float, int]] = {}
    for each in slices:
        latest[each.card.config.run] = max(latest.get(each.card.config.run, each.run), each.run)
    there: dict[int, set[tuple[float, str, str]]] = {}
    for each in slices:
        if each.run == latest[each.card.config.run]:
            there.setdefault(each.host.place, set()).add(each.key)
    shards = slices[0].host.shards
    most = (max((there.get(place, set()) for place in (shard, shard + shards)), key=len) for shard in range(shards))
    newest = {(run, name): (created_at, run, name) for created_at, run, name in sorted(set.intersection(*most))}
    return set(newest.values())


def _check_has(own: Sequence[_Slice], wanted: set[tuple[float, str, str]], place: int) -> None:
    """Raises NotRecovered where a host lacks what is recovered on the others, its twin among them."""
    if lacking := sorted(wanted - {each.key for each in own}):
        _, run, name = lacking[0]
        raise NotRecovered(
            f"host {place} had not moved snapshot {name!r} of run {run!r}, and its twin had: start this host with an "
            "empty data dir, and it is filled from its twin, which is recovered"
        )


def _be_host(store: Store, place: int, of: int, revision: int) -> None:
    """Have the data dir be a host's whose directory has come to a revision, before it has a run: a run of a later
    revision would be removed at the start, and its snapshots with it. Raises CatalogUnusable, NotRecovered."""
    store.be_host((place, of))
    record, directory = encode(Record(revision=revision)), store.directory()
    if directory and directory.record not in ("", record):
        raise NotRecovered(
            "the data dir is that of a host that has served since: only a new one is recovered, on all hosts"
        )
    store.keep_directory(record)


def _averages(slices: Sequence[_Slice], wanted: set[tuple[float, str, str]]) -> dict[str, str | None]:
    """By run, which averages it is to have, as the row of a run has it: what one card says, on all hosts the same one.
    A card says what the run had when its host moved the snapshot, which is another moment on each."""
    told = sorted((each for each in slices if each.key in wanted), key=lambda each: (each.key, -each.host.place))
    return {each.card.config.run: each.card.averages for each in told}


def _add_run(store: Store, moved: _Slice, averages: str | None) -> RunRow:
    card, host = moved.card, moved.host
    own, whole = shard_config(card.config, host.shard, host.shards), json.dumps(to_json(card.config))
    shard = ShardRow(host.shard, host.shards, birth=host.birth, whole=whole)
    row = store.add_run(card.config.run, json.dumps(to_json(own)), host.created_at, shard=shard)
    if averages is not None:
        store.set_averages(row, averages)
    return row


def _add_snapshot(store: Store, run: RunRow, card: Card) -> None:
    if card.info.name not in {row.name for row in store.snapshots(run)}:  # else by an earlier try
        store.adopt_snapshot(SnapshotRow(run.id, card.info.name, card.text, card.created_at, card.folder, card.files))
