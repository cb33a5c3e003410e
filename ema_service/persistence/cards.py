"""The card of a snapshot in the object store: all that a catalog which was lost needs for having the snapshot again.

    server that decides alone    format 1: the run's configuration
    host of a cluster            format 2: the configuration of the whole run, and which host moved which shard

Knows the members of a card, and the folder that it stands in. Does not know when one is written, or what is done with
one that is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from ema_client.protocol import RunConfig, SnapshotInfo, from_json
from ema_service.persistence.rows import read_setup
from ema_service.storage import ObjectStoreFailed, RunRow, SnapshotRow, Store

__all__ = [
    "CARD",
    "CARD_BYTES",
    "Card",
    "CardHost",
    "StoredFile",
    "card_of",
    "check_homes",
    "files_in",
    "folder_of",
    "read_card",
    "read_files",
]

#: What a snapshot's folder has beside the files of its averages.
CARD = "snapshot.json"
#: Most bytes of a card: a layout has 32 MiB at most, as JSON.
CARD_BYTES = 64 << 20
#: Of the card of a server that decides alone, and of a host of a cluster: whoever reads only the former takes no slice
#: for a snapshot.
_FORMAT, _HOST_FORMAT = 1, 2
#: The folder of a host, the how manieth of how many. No run's name begins so (protocol.NAME_PATTERN).
_HOME = re.compile(r"_host-(\d{1,6})-of-(\d{1,6})", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the object store. identity: of the file it was written from, for its ETag. xxh3: XXH3-128 of its bytes,
    in hexadecimal digits."""

    bytes: int
    identity: str
    xxh3: str


@dataclass(frozen=True, slots=True)
class CardHost:
    """Which host of a cluster moved a snapshot. place: of so many hosts. shards: of the run. birth, created_at: of the
    run."""

    place: int
    of: int
    shards: int
    birth: int
    created_at: float

    @property
    def shard(self) -> int:
        """Which shard of the run the host has."""
        return self.place % self.shards


@dataclass(frozen=True, slots=True)
class Card:
    """A card that was read and checked. config: of the whole run. text: for the row of the snapshot. host: None where a
    server that decides alone moved the snapshot."""

    folder: str
    config: RunConfig
    averages: str | None
    info: SnapshotInfo
    text: str
    created_at: float
    files: str
    host: CardHost | None


def folder_of(place: tuple[int, int] | None, run: RunRow, name: str, created_at: float) -> str:
    """Where a snapshot is to lie in the store: the same at each try, and for no other snapshot that there may be.

    place: of a host, the how manieth of how many; None of a server that decides alone. Of a host the folder is the same
    after it lost its data dir: ``created_at`` is what all hosts have, and the row's id is left out.
    """
    home, number = (f"_host-{place[0]}-of-{place[1]}/", "") if place else ("", f"{run.id} ")
    digits = xxhash.xxh3_64_hexdigest(f"{number}{run.created_at!r} {created_at!r}".encode())[:12]
    return f"{home}{run.name}/{name}.{digits}"


def check_homes(names: Iterable[str], place: tuple[int, int] | None, url: str) -> None:
    """Raises ObjectStoreFailed where a store has, by the names at its top, snapshots of a cluster of another number of
    hosts than that of ``place``."""
    for found in filter(None, map(_HOME.fullmatch, names)):
        if place and int(found[2]) != place[1]:
            raise ObjectStoreFailed(
                f"{url} has snapshots of a cluster of {found[2]} hosts ({found[0]}), and this is host {place[0]} of "
                f"{place[1]}: give another --snapshot-store, or remove those"
            )


def card_of(
    store: Store, place: tuple[int, int] | None, run: RunRow, snapshot: SnapshotRow, files: str
) -> dict[str, Any]:
    """The card of a snapshot. place: as for folder_of(). files: as read_files() reads. Raises sqlite3.Error."""
    card = {
        "format": _FORMAT,
        "run": json.loads(run.config),
        "averages": run.averages,
        "snapshot": json.loads(snapshot.info),
        "created_at": snapshot.created_at,
        "files": json.loads(files),
    }
    if place and (shard := store.shard(run)):
        card["format"] = _HOST_FORMAT
        card["run"] = json.loads(store.whole(run))
        card["run_created_at"] = run.created_at
        card["host"] = {"place": place[0], "of": place[1], "shards": shard.of, "birth": shard.birth}
    return card


def read_card(folder: str, raw: bytes) -> Card:
    """A card. Raises ValueError, TypeError, KeyError, AttributeError, RecursionError where it is none."""
    said: dict[str, Any] = json.loads(raw)
    if said["format"] not in (_FORMAT, _HOST_FORMAT):
        raise ValueError(f"it has format {said['format']}, this version reads {_HOST_FORMAT}: upgrade ema-service")
    config, info = from_json(RunConfig, said["run"]), from_json(SnapshotInfo, said["snapshot"])
    averages = None if said["averages"] is None else str(said["averages"])
    read_setup(config, averages)
    if info.run != config.run:
        raise ValueError(f"it is of run {info.run!r} and of run {config.run!r}")
    files = json.dumps(said["files"])
    if read_files(files).keys() != set(info.averages):
        raise ValueError("it names other files than averages")
    text = json.dumps({**said["snapshot"], "recovered": True})
    host = _read_host(said) if said["format"] == _HOST_FORMAT else None
    return Card(folder, config, averages, info, text, float(said["created_at"]), files, host)


def _read_host(said: dict[str, Any]) -> CardHost:
    """Raises ValueError, TypeError, KeyError where the card names no host."""
    place, of, shards, birth = (int(said["host"][name]) for name in ("place", "of", "shards", "birth"))
    if not 0 <= place < of or of not in (shards, 2 * shards) or birth < 1:
        raise ValueError(f"host {place} of {of}, with {shards} shards of a run that was the {birth}th, is none")
    return CardHost(place, of, shards, birth, float(said["run_created_at"]))


def files_in(raw: bytes, text: str) -> str | None:
    """The files of a host's card where its snapshot is that of a row's ``text``, as read_files() reads; else None.
    Raises as read_card()."""
    card, said = json.loads(raw), json.loads(text)
    said.pop("recovered", None)  # only a row says so
    if card["format"] != _HOST_FORMAT or card["snapshot"] != said:
        return None
    files = json.dumps(card["files"])
    read_files(files)
    return files


def read_files(text: str) -> dict[str, StoredFile]:
    """The files of a snapshot in the store, by name of the average, as its row has them. Raises ValueError, TypeError,
    KeyError on any other text."""
    found: dict[str, Any] = json.loads(text)
    return {name: StoredFile(int(e["bytes"]), str(e["identity"]), str(e["xxh3"])) for name, e in found.items()}
