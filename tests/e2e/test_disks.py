"""A full disk, a read-only one, a catalog that somebody else has locked: refused with the reason, and nothing is lost.

Knows mounts, SQLite's lock, and plain HTTP. Does not know how a run is kept.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.tracked import Tracked, params

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

#: A folder that cannot be made: versions of durability ``process`` go to slots on disk.
NO_MEMORY = ("--ram-dir", "/proc/no/such/folder")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root: the full disk and the read-only one are not tested here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def start(disk: Path, server_class: type[ServerProcess]) -> Iterator[Callable[..., ServerProcess]]:
    """Start a server on the small disk; it is ended after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        started.append(server_class(disk.parent, arguments, disk / "data").start())
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def _fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def refused(answer: httpx.Response) -> bool:
    """Told to come again, by the storage, with its reason."""
    said = answer.json()
    assert (answer.status_code, said["code"], answer.headers["retry-after"]) == (503, "storage_failed", "1"), said
    return True


@pytest.mark.parametrize(
    ("durability", "arguments"),
    [
        ("process", ()),
        pytest.param("process", NO_MEMORY, marks=pytest.mark.soak),
        pytest.param("disk", (), marks=pytest.mark.soak),
    ],
    ids=["memory", "slots", "disk"],
)
def test_full_disk(
    durability: str,
    arguments: tuple[str, ...],
    disk: Path,
    start: Callable[..., ServerProcess],
    plain_run_class: type[PlainRun],
    litema: type[LitEmaOracle],
) -> None:
    """Runs and snapshots are refused and leave nothing; updates go on, deletions work; killed, all comes back."""
    server = start(*arguments)
    with server.http() as http:
        assert http.get("/readyz").status_code == 200
        tracked = Tracked(plain_run_class(http, "tracked"), litema, durability)
        gone = plain_run_class(http, "gone")
        gone.create(params(0)).raise_for_status()
        for _ in range(3):
            tracked.push()
        http.put(f"{tracked.run.path}/snapshots/old").raise_for_status()
        filler = disk / "filler"
        _fill(filler)
        assert refused(plain_run_class(http, "new").create(params(0)))
        assert refused(http.put(f"{tracked.run.path}/snapshots/new"))
        unready = http.get("/readyz")
        assert (unready.status_code, unready.json()["code"]) == (503, "storage_failed")
        assert "disk is full" in unready.json()["detail"]
        assert http.get("/healthz").status_code == 200
        assert not list((disk / "data" / "runs").glob("new.*"))
        assert [path.name for path in (disk / "data" / "runs").glob("tracked.*/snapshots/*")] == ["old"]
        for _ in range(40):
            tracked.push()
            tracked.run.http.patch(tracked.run.path, json={"decay": 0.9999}).raise_for_status()
            _fill(filler)
        tracked.check()
        assert http.delete(f"{tracked.run.path}/snapshots/old").status_code == 204
        _fill(filler)
        assert http.delete(gone.path).status_code == 204
        _fill(filler)
        tracked.push()
    server.kill()
    server.start()
    with server.http() as http:
        tracked.run = plain_run_class(http, "tracked")
        tracked.check()
        assert http.get(gone.path).status_code == 404
        assert http.get("/readyz").status_code == 503
        filler.unlink()
        assert http.get("/readyz").status_code == 200
        plain_run_class(http, "new").create(params(0)).raise_for_status()
        tracked.push()
        tracked.check()


def test_updates_have_the_last_room(
    disk: Path, start: Callable[..., ServerProcess], plain_run_class: type[PlainRun]
) -> None:
    """Before the disk is full, snapshots and new runs are refused: what is left is for those who train."""
    with start().http() as http:
        run = plain_run_class(http, "run")
        run.create(params(0)).raise_for_status()
        run.begin(params(0)).raise_for_status()
        taken = 0
        while (answer := http.put(f"{run.path}/snapshots/s{taken}")).status_code == 201:
            taken += 1
        assert refused(answer)
        assert "free" in answer.json()["detail"]
        left = shutil.disk_usage(disk)
        assert left.free > left.total / 20
        assert run.push(1, params(1)).json()["applied"]


def test_so_many_snapshots(start: Callable[..., ServerProcess], plain_run_class: type[PlainRun]) -> None:
    """A run has a limit of snapshots, told by its name; one that is there is not another."""
    with start("--max-snapshots", "2").http() as http:
        run = plain_run_class(http, "run")
        run.create(params(0)).raise_for_status()
        run.begin(params(0)).raise_for_status()
        for name in ("a", "b", "b"):
            http.put(f"{run.path}/snapshots/{name}").raise_for_status()
        refusal = http.put(f"{run.path}/snapshots/c")
        assert (refusal.status_code, refusal.json()["code"]) == (409, "too_many_snapshots")
        assert "--max-snapshots" in refusal.json()["hint"]
        http.delete(f"{run.path}/snapshots/a").raise_for_status()
        assert http.put(f"{run.path}/snapshots/c").status_code == 201


#: What changes a run, or which runs there are.
CHANGES = {
    "a push": lambda run: run.push(2, params(2)),
    "a decay": lambda run: run.http.patch(run.path, json={"decay": 0.5}),
    "a reset": lambda run: run.http.post(f"{run.path}/reset-num-updates"),
    "a trainer": lambda run: run.http.post(f"{run.path}/writers"),
    "a rewind": lambda run: run.http.post(f"{run.path}/rewind", json={"snapshot": "s"}),
    "a snapshot": lambda run: run.http.put(f"{run.path}/snapshots/t"),
    "no snapshot": lambda run: run.http.delete(f"{run.path}/snapshots/s"),
    "no run": lambda run: run.http.delete(run.path),
    "a new run": lambda run: type(run)(run.http, "new").create(params(0)),
}


@pytest.mark.parametrize("durability", ["process", pytest.param("disk", marks=pytest.mark.soak)])
def test_catalog_that_somebody_locked(
    durability: str, disk: Path, start: Callable[..., ServerProcess], plain_run_class: type[PlainRun]
) -> None:
    """Each change is refused and has changed nothing; unlocked, each is possible, and outlives the server."""
    server = start()
    with server.http() as http:
        run = plain_run_class(http, "run")
        run.create(params(0), durability=durability).raise_for_status()
        run.begin(params(0)).raise_for_status()
        run.push(1, params(1)).raise_for_status()
        http.put(f"{run.path}/snapshots/s").raise_for_status()
        before = http.get("/v1/runs").json(), http.get(f"{run.path}/snapshots").json(), run.pull().content
        other = sqlite3.connect(disk / "data" / "catalog.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for change in CHANGES.values():
            assert refused(change(run))
        told = http.get("/v1/runs").json(), http.get(f"{run.path}/snapshots").json(), run.pull().content
        other.execute("ROLLBACK")
        other.close()
        for each in (*before[0]["runs"], *told[0]["runs"]):
            for field in ("reason", "remedy", "status"):  # what could not be kept is told
                each.pop(field)
        assert told == before
        for name in ("a push", "a decay", "a trainer", "a snapshot", "no snapshot", "a new run", "no run"):
            CHANGES[name](run).raise_for_status()
    server.kill()
    server.start()
    with server.http() as http:
        assert [each["run"] for each in http.get("/v1/runs").json()["runs"]] == ["new"]


def test_read_only_data_dir(disk: Path, start: Callable[..., ServerProcess]) -> None:
    """A data dir that cannot be written keeps the server from starting: one line that names it."""
    start().stop()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command = [sys.executable, "-m", "ema_service", "serve", "--port", "0", "--data-dir", str(disk / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == 1
    assert ended.stderr.startswith("ema-service: ")
    assert str(disk / "data") in ended.stderr
    assert "Traceback" not in ended.stderr
    assert os.statvfs(disk).f_flag & os.ST_RDONLY
