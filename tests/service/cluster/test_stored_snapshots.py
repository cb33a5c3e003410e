"""Snapshots of a cluster on an object store: each host moves its slices to a place of its own, and finds them there
again; hosts are killed and lost, and all data dirs are.

Knows processes, of two shards on four hosts, and a folder as the store. Does not know S3 (tests/e2e/
test_snapshot_store.py), or which snapshots are recovered where hosts had moved others (hosting/test_recovering.py).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ema_client import EmaClient
from ema_client.errors import EmaError, SnapshotExists
from ema_client.protocol import AverageConfig
from ema_service.cli import app as ema_service
from tests.service.cluster.launched import Launched
from tests.waiting import wait_until

HOSTS = 4


def model(seed: int, rows: int = 100) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"a.w": torch.randn(rows, 600, generator=random), "b": torch.randn(7, 5, generator=random)}


class Stored:
    """A cluster of two shards with twins whose snapshots go to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ram, self.store = folder / "all", folder / "ram", folder / "store"
        self.store.mkdir()
        flags = "--local", "2", "--twins", "--", "--ram-dir", str(self.ram), "--snapshot-store", str(self.store)
        self.cluster = Launched(self.folder, *flags).start()
        self.client = EmaClient(self.cluster.url)

    def start(self) -> None:
        """Start the cluster again, which was stopped."""
        self.client.close()
        self.cluster.start()
        self.client = EmaClient(self.cluster.url)

    def begin(self, run: str, rows: int = 100) -> dict[str, Tensor]:
        """Make a run with two averages, at step 1. Returns what the second has then."""
        averages = [AverageConfig("slow"), AverageConfig("fast", decay=0.5)]
        self.client.create_run(run, model(0, rows), averages=averages)
        self.client.push(run, model(1, rows), step=1)
        return dict(self.client.pull(run, average="fast"))

    def place(self, place: int) -> Path:
        """Where a host moves its slices to."""
        return self.store / f"_host-{place}-of-{HOSTS}"

    def files(self, run: str) -> list[dict[str, int]]:
        """By host, the files of a run in the store with their times of writing."""
        return [_files_below(self.place(place) / run) for place in range(HOSTS)]

    def folders(self, run: str) -> list[set[str]]:
        """By host, the snapshots of a run that have any file in the store."""
        return [{Path(path).parent.name.partition(".")[0] for path in files} for files in self.files(run)]

    def moved(self, run: str) -> None:
        """Return once each host has all snapshots of a run in the store."""
        wait_until(
            lambda: all({"store"} == set(each.values()) for each in self.told(run)), "the snapshots in the store"
        )

    def told(self, run: str) -> list[dict[str, str]]:
        """By host, where each says that its slices of a run's snapshots are; nothing of one that says nothing."""
        return [{each["name"]: each["stored"] for each in self._snapshots(place, run)} for place in range(HOSTS)]

    def _snapshots(self, place: int, run: str) -> list[dict[str, Any]]:
        try:
            found = httpx.get(f"{self.addresses()[place]}/v1/runs/{run}/snapshots")
        except httpx.TransportError:
            return []
        return found.json()["snapshots"] if found.status_code == 200 else []

    def addresses(self) -> list[str]:
        """Of the hosts, by place."""
        with self.cluster.http() as http:
            return [str(each["address"]) for each in http.get("/v1/hosts").raise_for_status().json()["hosts"]]

    def is_at(self, run: str, wanted: dict[str, Tensor], snapshot: str | None = None) -> bool:
        """Whether a version, or a snapshot, has these tensors."""
        found = self.client.pull(run, average="fast", snapshot=snapshot)
        return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    def lose(self, place: int) -> None:
        """SIGKILL a host, and remove all that it had on disk and in memory."""
        pid = self.cluster.processes()[f"host {place}"]
        lines = [line for line in self.cluster.log.splitlines() if line.startswith(f"host {place} |   memory")]
        ram = self.ram / Path(lines[-1].split("memory", 1)[1].split(",")[0].strip()).name
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(ram, ignore_errors=True)
        shutil.rmtree(self.folder / f"host-{place}", ignore_errors=True)
        wait_until(lambda: self.cluster.processes().get(f"host {place}") != pid, "the end of the host")

    def push(self, run: str, step: int, rows: int = 100) -> None:
        """Push an update, until it is applied: a host may just have been lost."""

        def pushed() -> bool:
            try:
                return self.client.push(run, model(step, rows), step=step).step == step
            except EmaError:
                return False

        wait_until(pushed, "the update")


def _files_below(folder: Path) -> dict[str, int]:
    """Path and time of writing of each file; they come and go meanwhile."""
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                path = Path(top, name)
                found[str(path.relative_to(folder))] = path.stat().st_mtime_ns
    return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    found = Stored(tmp_path_factory.mktemp("stored"))
    yield found
    found.client.close()
    found.cluster.end()


def test_each_host_moves_its_slices(stored: Stored) -> None:
    """To its own place, and gives the room back; what was moved is pulled, rewound to and deleted as before, on all."""
    wanted = stored.begin("moved")
    stored.client.snapshot("moved", "s")
    before = stored.client.pull("moved", snapshot="s").info
    stored.moved("moved")
    assert [each.stored for each in stored.client.snapshots("moved")] == ["store"]
    names = ["fast.safetensors", "slow.safetensors", "snapshot.json"]
    assert [sorted(Path(path).name for path in files) for files in stored.files("moved")] == [names] * HOSTS
    wait_until(lambda: not list(stored.folder.glob("host-*/runs/moved.*/snapshots/*")), "the room in the data dirs")
    assert stored.is_at("moved", wanted, snapshot="s")
    assert stored.client.pull("moved", snapshot="s").info == before
    stored.client.push("moved", model(2), step=2)
    assert stored.client.rewind("moved", "s").version == "2.0"
    assert stored.is_at("moved", wanted)
    with stored.cluster.http() as http:
        assert http.get("/v1/server").json()["snapshots_waiting"] == 0
    stored.client.delete_snapshot("moved", "s")
    wait_until(lambda: not any(stored.files("moved")), "the snapshot's removal, by all hosts")
    stored.client.snapshot("moved", "t")
    stored.moved("moved")
    stored.client.delete_run("moved")
    wait_until(lambda: not any(stored.files("moved")), "the run's removal, by all hosts")


def test_kill_in_the_middle_of_a_move(stored: Stored) -> None:
    """The snapshot is there, on all hosts, and a host that was killed as it moved its slice goes on by itself; so do
    all where the store was away."""
    wanted = stored.begin("killed", rows=8000)
    stored.client.snapshot("killed", "s")
    wait_until(lambda: stored.files("killed")[2], "the begin of a move")
    stored.cluster.kill("host 2")
    stored.moved("killed")
    away = stored.store.with_name("away")
    stored.store.rename(away)
    stored.client.snapshot("killed", "t")
    with stored.cluster.http() as http:
        wait_until(lambda: http.get("/v1/server").json()["snapshot_store_fault"], "the fault")
        assert http.get("/v1/server").json()["snapshot_store_fault"].startswith("host 0: the folder")
    assert {each.name: each.stored for each in stored.client.snapshots("killed")} == {"s": "store", "t": "local"}
    assert stored.is_at("killed", wanted, snapshot="t")
    away.rename(stored.store)
    stored.moved("killed")
    assert stored.is_at("killed", wanted, snapshot="s")
    assert stored.is_at("killed", wanted, snapshot="t")
    assert [len(files) for files in stored.files("killed")] == [6] * HOSTS


def test_an_empty_host_finds_what_it_had_moved(stored: Stored) -> None:
    """It writes none of its slices again; one that it had not moved it has from its twin's place in the store."""
    wanted = stored.begin("emptied")
    for name in ("s", "t"):
        stored.client.snapshot("emptied", name)
    stored.moved("emptied")
    for folder in (stored.place(2) / "emptied").glob("t.*"):
        shutil.rmtree(folder)
    before = stored.files("emptied")
    stored.lose(2)
    stored.push("emptied", 2)
    wait_until(lambda: set(stored.told("emptied")[2]) == {"s", "t"}, "the host to be filled")
    stored.moved("emptied")
    after = stored.files("emptied")
    assert [files.items() >= before[place].items() for place, files in enumerate(after)] == [True] * HOSTS
    assert after[2].keys() == after[0].keys()
    assert "was replaced by" not in stored.cluster.log, "it is not heard for its number"
    for name in ("s", "t"):
        path = f"/v1/runs/emptied/snapshots/{name}/weights"
        there = [httpx.get(f"{stored.addresses()[place]}{path}").content for place in (0, 2)]
        assert there[0] == there[1], name
        assert stored.is_at("emptied", wanted, snapshot=name)
    stored.client.delete_snapshot("emptied", "s")
    wait_until(lambda: [len(files) for files in stored.files("emptied")] == [3] * HOSTS, "the removal, by all hosts")


def test_all_data_dirs_are_lost(stored: Stored) -> None:
    """Each host is recovered by itself, then all go on from a snapshot; what only some had moved is not there."""
    wanted = stored.begin("lost")
    stored.begin("anew")
    stored.client.snapshot("anew", "s")
    stored.moved("anew")
    stored.client.snapshot("lost", "s")
    stored.client.add_average("lost", "late", decay=0.9)
    stored.client.push("lost", model(2), step=2)
    stored.client.snapshot("lost", "half")
    stored.moved("lost")
    assert stored.cluster.stop() == 0
    for place in (1, 3):
        for folder in (stored.place(place) / "lost").glob("half.*"):
            shutil.rmtree(folder)
    said = recovered(stored)
    assert [("lost/s: is there" in each, "lost/half: left out" in each) for each in said] == [
        (True, place in (0, 2)) for place in range(HOSTS)
    ]
    stored.start()
    assert stored.client.run("lost").status == "awaiting_weights"
    assert [each.name for each in stored.client.snapshots("lost")] == ["s"]
    assert stored.is_at("lost", wanted, snapshot="s")
    told = stored.client.rewind("lost", "s")
    assert (told.step, told.version) == (1, "2.0")
    assert stored.is_at("lost", wanted)
    stored.begin("anew")
    with pytest.raises(SnapshotExists):  # of a version of this name that there was before
        stored.client.snapshot("anew", "s")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_random_kills(stored: Stored) -> None:
    """For a minute, hosts are killed while snapshots are taken and deleted: in the end the store has what there is."""
    wanted, random = stored.begin("random", rows=2000), Random(seed := secrets.randbits(32))
    until, number = time.monotonic() + 60, 0
    while time.monotonic() < until:
        number += 1
        with suppress(EmaError):
            stored.client.snapshot("random", f"s-{number}", keep=4)
        if random.random() < 0.3:
            with suppress(EmaError):
                stored.client.delete_snapshot("random", f"s-{number - random.randrange(3)}")
        if random.random() < 0.2:
            stored.cluster.kill(f"host {random.randrange(HOSTS)}", wait=False)
    stored.push("random", 2, rows=2000)
    names = {each.name for each in stored.client.snapshots("random")}
    wait_until(lambda: all(set(each) == names for each in stored.told("random")), f"all hosts, seed {seed}")
    stored.moved("random")
    wait_until(lambda: stored.folders("random") == [names] * HOSTS, f"the removals, seed {seed}")
    assert all(stored.is_at("random", wanted, snapshot=name) for name in names)


@pytest.mark.soak
def test_a_host_is_lost_after_a_recovery(stored: Stored) -> None:
    """It is heard by the coordinator, and filled, as any other."""
    stored.begin("again")
    stored.client.snapshot("again", "s")
    stored.moved("again")
    assert stored.cluster.stop() == 0
    recovered(stored)
    stored.start()
    stored.client.rewind("again", "s")
    stored.lose(3)
    stored.push("again", 3)
    wait_until(lambda: set(stored.told("again")[3]) == {"s"}, "the host to be filled")
    stored.moved("again")


def recovered(stored: Stored) -> list[str]:
    """Remove all data dirs and memory. By host, what `ema-service recover` prints then."""
    shutil.rmtree(stored.folder)
    shutil.rmtree(stored.ram)
    flags = [f"--data-dir={stored.folder / f'host-{place}'} --shard={place}/{HOSTS}" for place in range(HOSTS)]
    words = ["recover", f"--snapshot-store={stored.store}"]
    return [CliRunner().invoke(ema_service, [*words, *each.split()]).output for each in flags]
