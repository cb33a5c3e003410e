"""The texts of rows of the catalog: the facts of a version, and a run's averages, as JSON, written and read back.

Knows the members of those texts, in every format there was. Does not know SQL, files, or which version counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ema_client.protocol import AverageConfig, RunConfig, from_json, to_json
from ema_service.shadows.state import Average, Descent, Member, Setup, State, Version
from ema_service.storage import CheckpointRow

__all__ = [
    "StoredVersion",
    "boot_id",
    "descent_of",
    "dump",
    "dump_setup",
    "is_begun",
    "is_lost",
    "latest_in",
    "read_rows",
    "read_setup",
    "revision_of",
    "settled_in",
    "version_of",
]

#: The members that the text of every row has, in every format.
_MEMBERS = {"lineage", "epoch", "n", "step", "num_updates", "digest", "updated_at", "final", "averages"}


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A row with its text parsed. ``said`` is empty where the text is damaged: SQLite does not checksum its pages."""

    row: CheckpointRow
    said: dict[str, Any]

    @property
    def epoch(self) -> int:
        """The version's epoch; 0 where the row is damaged."""
        epoch: int = self.said.get("epoch", 0)
        return epoch

    @property
    def step(self) -> int | None:
        """The version's step; None where no step was known, or the row is damaged."""
        step: int | None = self.said.get("step")
        return step

    @property
    def final(self) -> bool:
        """Whether a clean stop wrote the row: nothing was applied after its version."""
        return bool(self.said.get("final"))

    @property
    def rebooted(self) -> bool:
        """Whether the machine may have gone down since the row was written: bytes that were not synced may be gone
        then."""
        return self.said.get("boot") is None or self.said["boot"] != boot_id()

    @property
    def checksums(self) -> dict[str, str | None]:
        """By average, the digest of its bytes in hexadecimal; format 1 had none."""
        return {each["name"]: each.get("checksum") for each in self.said["averages"]}

    @property
    def files(self) -> dict[str, str]:
        """The memory file of each average, where the version lies in memory files."""
        files: dict[str, str] = self.said.get("files", {})
        return files

    @property
    def nonce(self) -> str | None:
        """Of the folder that the memory files lie in."""
        nonce: str | None = self.said.get("nonce")
        return nonce

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of updates before this version's, in its epoch, as far as the row tells."""
        return tuple(self.said.get("steps", ()))

    @property
    def age(self) -> tuple[int, int]:
        """Orders the versions of a run: the newest is the largest."""
        return self.epoch, int(self.said.get("n", 0))

    def version(self, setup: Setup) -> Version:
        """The version as it was written, with those averages that the run still has. Only for a row that is not
        damaged."""
        said, averages = self.said, []
        for member in setup.members:
            if each := self._averages.get((member.name, member.lineage)):
                # Rows of a server whose averages all went by the run's counter do not name one for each.
                counter = each.get("num_updates", said["num_updates"])
                averages.append(Average(member, each["decay"], each["effective_decay"], counter))
        return Version(
            lineage=said["lineage"],
            epoch=said["epoch"],
            n=said["n"],
            step=said["step"],
            num_updates=said["num_updates"],
            digest=bytes.fromhex(said["digest"]),
            averages=tuple(averages),
            updated_at=said["updated_at"],
            keys=tuple(said.get("keys", ())),
            descent=descent_of(said.get("descent")),
        )

    @property
    def _averages(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What is said of each average, by name and lineage."""
        return {(each["name"], each.get("lineage", "")): each for each in self.said.get("averages", ())}


def dump(state: State, *, final: bool, **more: object) -> str:
    """The text of a row, readable also for whoever has to repair a catalog by hand.

    final: a clean stop writes it. more: further members, such as which files the version lies in.
    """
    version = state.version
    return json.dumps(
        {
            **more,
            "lineage": version.lineage,
            "epoch": version.epoch,
            "n": version.n,
            "step": version.step,
            "num_updates": version.num_updates,
            "digest": version.digest.hex(),
            "updated_at": version.updated_at,
            "keys": version.keys,
            "descent": asdict(version.descent),
            "final": final,
            "boot": boot_id(),
            "averages": [
                {
                    "name": average.name,
                    "lineage": average.member.lineage,
                    "decay": average.decay,
                    "effective_decay": average.effective_decay,
                    "num_updates": average.num_updates,
                    "checksum": arena.digest.hex() if arena.digest else None,
                }
                for average, arena in zip(version.averages, state.arenas, strict=True)
            ],
        }
    )


def descent_of(said: dict[str, Any] | None) -> Descent:
    """The descent that asdict() wrote; rows of an earlier server have none."""
    if said is None:
        return Descent()
    return Descent(**{**said, "earlier": tuple(tuple(each) for each in said["earlier"])})


def read_rows(rows: list[CheckpointRow]) -> list[StoredVersion]:
    """The rows with their texts parsed, in the same order."""
    return [StoredVersion(row, _parse(row.state)) for row in rows]


def version_of(text: str, setup: Setup) -> Version:
    """The version that dump() wrote. Raises ValueError where the text is damaged."""
    said = _parse(text)
    if not said:
        raise ValueError("no facts of a version")
    return StoredVersion(CheckpointRow(0, 0, "", text, synced=False, created_at=0.0), said).version(setup)


def dump_setup(setup: Setup) -> str:
    """The text of a run's averages, where others were added to those it was created with, or removed."""
    members = [{"average": to_json(member.config), "lineage": member.lineage} for member in setup.members]
    return json.dumps({"members": members, "keys": setup.keys})


def read_setup(created: RunConfig, text: str | None) -> Setup:
    """The averages that a run is to have. text: None where they are those of ``created``. Raises ValueError where the
    text is damaged."""
    if text is None:
        return Setup.of(created)
    said = json.loads(text)
    try:
        members = [Member(from_json(AverageConfig, each["average"]), str(each["lineage"])) for each in said["members"]]
        if not members:
            raise ValueError("it has no averages")
        return Setup(created, tuple(members), tuple(map(str, said["keys"])))
    except (KeyError, TypeError) as fault:
        raise ValueError(f"its averages cannot be read: {fault}") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and said.keys() >= _MEMBERS else {}


def revision_of(record: str) -> int:
    """The revision that a shard's record says the run has come to; 0 for an empty record."""
    revision: int = json.loads(record)["record"]["revision"] if record else 0
    return revision


def is_begun(snapshot: str) -> bool:
    """Whether the text of a snapshot's row says that the snapshot is not there yet, for other hosts may lack it."""
    try:
        return bool(json.loads(snapshot).get("begun"))
    except (ValueError, AttributeError):  # damaged: whoever reads the row is told
        return False


def latest_in(record: str) -> int:
    """The latest revision that a shard's record speaks of: that it votes for, or else has come to; 0 for an empty
    record."""
    vote = json.loads(record)["record"]["vote"] if record else None
    return int(vote["proposal"]["ticket"]["base"]) + 1 if vote else revision_of(record)


def is_lost(record: str) -> bool:
    """Whether a shard's record says that the machine took later versions with it; no empty record does."""
    return bool(record and json.loads(record)["record"].get("lost"))


def settled_in(record: str) -> int:
    """The revision whose checkpoint all shards have, by a shard's record; 0 for an empty one."""
    settled: int = json.loads(record)["record"].get("settled", 0) if record else 0
    return settled


def boot_id() -> str | None:
    """A text that changes each time the machine starts; None where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
