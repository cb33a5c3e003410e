"""Symbolic links planted in the data dir lead nowhere: nothing outside it is read, written or deleted.

Knows where the server keeps its files. Does not know how it writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save, save_file

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.ones(100)}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is none of the server's business, with a file that looks like weights."""
    folder = tmp_path / "outside"
    folder.mkdir()
    save_file({"w": torch.full((100,), 666.0)}, folder / "ema.safetensors")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def planted(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> tuple[ServerProcess, PlainRun, Path]:
    """A server, a run with a snapshot, and the folder of its snapshots."""
    server = start_server()
    run = plain_run(server, TENSORS)
    run.http.put(f"{run.path}/snapshots/first").raise_for_status()
    assert server.data_dir
    return server, run, next((server.data_dir / "runs").glob(f"{run.name}.*/snapshots"))


@pytest.fixture
def on_disk(start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]) -> tuple[PlainRun, Path]:
    """A run whose versions lie in slots on disk, as there is no memory for them; with a snapshot; and its folder."""
    server = start_server("--ram-dir", "/proc/no/such/folder")
    run = plain_run(server, TENSORS)
    run.http.put(f"{run.path}/snapshots/first").raise_for_status()
    assert server.data_dir
    return run, next((server.data_dir / "runs").glob(f"{run.name}.*"))


def test_a_link_is_no_snapshot(planted: tuple[ServerProcess, PlainRun, Path], outside: Path) -> None:
    """A link among the snapshots is not one: not listed, not served, not deleted."""
    _, run, folder = planted
    (folder / "link").symlink_to(outside)

    assert [each["name"] for each in run.http.get(f"{run.path}/snapshots").json()["snapshots"]] == ["first"]
    for method, path in (("GET", "link/weights"), ("GET", "link"), ("DELETE", "link")):
        assert run.http.request(method, f"{run.path}/snapshots/{path}").status_code == 404
    assert contents(outside).keys() == {"ema.safetensors"}


def test_nothing_is_written_through_a_link(planted: tuple[ServerProcess, PlainRun, Path], outside: Path) -> None:
    """A snapshot of the link's name, and deleting it and the run, leave what the link points to alone."""
    _, run, folder = planted
    before = contents(outside)
    (folder / "next").symlink_to(outside)
    answer = run.http.put(f"{run.path}/snapshots/next")

    assert answer.status_code in (201, 503)  # in the link's place, or not at all
    assert contents(outside) == before
    run.http.delete(f"{run.path}/snapshots/next")
    assert contents(outside) == before
    assert run.http.delete(run.path).status_code == 204
    assert contents(outside) == before


def test_a_link_in_the_place_of_weights_is_not_followed(
    planted: tuple[ServerProcess, PlainRun, Path], outside: Path
) -> None:
    """Links where the run's weights are kept are not written through, whether the run comes back or not."""
    server, run, folder = planted
    before = contents(outside)
    assert server.stop() == 0
    kept = list(folder.parent.glob("slots/*/ema.safetensors"))
    assert kept
    for path in kept:
        path.unlink()
        path.symlink_to(outside / "ema.safetensors")
        path.with_name("ema.safetensors.tmp").symlink_to(outside / "ema.safetensors")
    server.start()
    with server.http() as http:
        assert http.put(f"{run.path}/updates/1", content=save({"w": torch.zeros(100)})).status_code in (409, 503)
    server.stop()

    assert contents(outside) == before


def moved_behind_a_link(path: Path, to: Path) -> dict[str, bytes]:
    """Plant a link in the place of a folder or file that leads to all that was there; what that is."""
    path.rename(to)
    path.symlink_to(to)
    return contents(to)


def test_a_link_in_the_place_of_a_run_is_not_followed(
    planted: tuple[ServerProcess, PlainRun, Path], tmp_path: Path
) -> None:
    """The run comes up degraded and says which path to mend; nothing behind the link is served, written or deleted.

    With its own folder in its place again it is what it was.
    """
    server, run, snapshots = planted
    folder, elsewhere = snapshots.parent, tmp_path / "elsewhere"
    run.http.put(f"{run.path}/snapshots/second").raise_for_status()
    assert server.stop() == 0
    (folder / "checkpoint-a").mkdir()  # as format 1 left them: removed where they are ours
    (folder / "checkpoint-a" / "ema.safetensors").touch()
    before = moved_behind_a_link(folder, elsewhere)
    server.start()
    with server.http() as http:
        info = http.get(run.path).json()
        assert info["status"] == "degraded"
        assert f"{folder} is a symbolic link" in info["reason"]
        refused = [
            http.put(f"{run.path}/updates/1", content=save(TENSORS)),
            http.put(f"{run.path}/snapshots/third"),
            http.get(f"{run.path}/snapshots/first/weights"),
            http.post(f"{run.path}/rewind", json={"snapshot": "first"}),
            http.post(f"{run.path}/rewind", json={}),
        ]
        codes = ["run_degraded", "run_degraded", "snapshot_damaged", "snapshot_damaged", "run_degraded"]
        assert [answer.json()["code"] for answer in refused] == codes
        assert http.delete(f"{run.path}/snapshots/second").status_code == 204
    assert server.stop() == 0
    assert contents(elsewhere) == before

    folder.unlink()
    elsewhere.rename(folder)
    server.start()
    with server.http() as http:
        assert http.get(run.path).json()["status"] == "ready"
        assert http.put(f"{run.path}/updates/1", content=save(TENSORS)).status_code == 200


def test_a_link_in_the_place_of_a_run_without_weights(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun], outside: Path
) -> None:
    """A run that has nothing on disk yet is degraded as well, and its weights are not written through the link."""
    server = start_server()
    run = plain_run(server)
    run.create(TENSORS).raise_for_status()
    assert server.stop() == 0
    assert server.data_dir
    folder = next((server.data_dir / "runs").iterdir())
    moved_behind_a_link(folder, outside / "run")
    before = contents(outside)
    server.start()
    with server.http() as http:
        assert http.get(run.path).json()["status"] == "degraded"
        assert http.put(f"{run.path}/weights", content=save(TENSORS)).status_code == 409

    assert contents(outside) == before


def test_a_link_planted_under_a_running_server(on_disk: tuple[PlainRun, Path], tmp_path: Path) -> None:
    """Pushes and snapshots are refused from then on, and deleting the run removes the link alone."""
    (run, folder), elsewhere = on_disk, tmp_path / "elsewhere"
    before = moved_behind_a_link(folder, elsewhere)

    for answer in (run.push(1, TENSORS), run.http.put(f"{run.path}/snapshots/second")):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")
        assert f"{folder} is a symbolic link" in answer.json()["detail"]
    assert run.http.delete(run.path).status_code == 204
    assert not folder.is_symlink()
    assert contents(elsewhere) == before


@pytest.mark.parametrize("place", ["slots", "slots/*", "slots/*/ema.safetensors"])
@pytest.mark.parametrize("which", [0, pytest.param(-1, marks=pytest.mark.soak)])
def test_a_link_in_the_place_of_a_slot(
    planted: tuple[ServerProcess, PlainRun, Path], outside: Path, place: str, which: int
) -> None:
    """The run comes up degraded, whether that slot counts or is free, and is what it was once it has its own again."""
    server, run, snapshots = planted
    assert server.stop() == 0
    path = sorted(snapshots.parent.glob(place))[which]
    moved_behind_a_link(path, outside / "moved")
    before = contents(outside)
    server.start()
    with server.http() as http:
        info = http.get(run.path).json()
        assert info["status"] == "degraded"
        assert f"{path} is a symbolic link" in info["reason"]
        assert http.get(f"{run.path}/weights").json()["code"] == "run_degraded"
        assert http.put(f"{run.path}/updates/1", content=save(TENSORS)).json()["code"] == "run_degraded"
    assert server.stop() == 0
    assert contents(outside) == before

    path.unlink()
    (outside / "moved").rename(path)
    server.start()
    with server.http() as http:
        assert http.get(run.path).json()["status"] == "ready"
        assert http.put(f"{run.path}/updates/1", content=save(TENSORS)).status_code == 200


def test_a_link_where_slots_will_be(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun], outside: Path
) -> None:
    """A run that has no slot yet is degraded as well where a link waits for the first."""
    server = start_server()
    run = plain_run(server, TENSORS, durability="memory")
    server.kill()
    assert server.data_dir
    slots = next((server.data_dir / "runs").iterdir()) / "slots"
    assert not slots.exists()
    (outside / "empty").mkdir()
    slots.symlink_to(outside / "empty")
    server.start()
    with server.http() as http:
        info = http.get(run.path).json()
        assert info["status"] == "degraded"
        assert f"{slots} is a symbolic link" in info["reason"]


@pytest.mark.parametrize("place", ["slots", "slots/*", "slots/*/ema.safetensors"])
@pytest.mark.parametrize("empty", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_link_in_the_place_of_a_slot_of_a_running_server(
    on_disk: tuple[PlainRun, Path], outside: Path, place: str, empty: bool
) -> None:
    """Pushes are refused from then on, wherever the link leads, and deleting the run leaves that as it is."""
    run, folder = on_disk
    found = list(folder.glob(place))
    for number, path in enumerate(found):
        moved_behind_a_link(path, outside / f"moved-{number}")
        if empty:
            path.unlink()
            path.symlink_to(outside / f"nothing-{number}")
    before = contents(outside)

    for _ in range(2):
        answer = run.push(1, TENSORS)
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")
        assert any(f"{path} is a symbolic link" in answer.json()["detail"] for path in found)
    assert run.http.delete(run.path).status_code == 204
    assert contents(outside) == before


@pytest.mark.parametrize("place", ["snapshots", "snapshots/first", "snapshots/first/ema.safetensors"])
@pytest.mark.parametrize("restart", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_link_in_the_place_of_a_snapshot(
    planted: tuple[ServerProcess, PlainRun, Path], outside: Path, place: str, restart: bool
) -> None:
    """The snapshot is neither read nor deleted through it, and none is written through it; the run goes on."""
    server, run, snapshots = planted
    path = snapshots.parent / place
    moved_behind_a_link(path, outside / "moved")
    if place == "snapshots":
        (outside / "moved" / "second").mkdir()
        (outside / "moved" / "second" / "ema.safetensors").touch()
    before = contents(outside)
    if restart:
        assert server.stop() == 0
        server.start()
    with server.http() as http:
        assert http.put(f"{run.path}/updates/1", content=save(TENSORS)).status_code == 200
        refused = [
            http.get(f"{run.path}/snapshots/first/weights"),
            http.post(f"{run.path}/rewind", json={"snapshot": "first"}),
        ]
        for answer in refused:
            assert answer.json()["code"] == "snapshot_damaged"
            assert f"{path} is a symbolic link" in answer.json()["detail"]
        made = http.put(f"{run.path}/snapshots/second")
        assert made.status_code == (503 if place == "snapshots" else 201)
        assert http.delete(f"{run.path}/snapshots/first").status_code == 204
        assert contents(outside) == before
        assert http.delete(run.path).status_code == 204
    assert not snapshots.parent.exists()
    assert contents(outside) == before


def test_links_in_the_folder_of_a_coming_run(
    planted: tuple[ServerProcess, PlainRun, Path], plain_run: Callable[..., PlainRun], outside: Path
) -> None:
    """A folder planted under a coming run's name, with links in it, keeps the run from coming, once."""
    server, _, snapshots = planted
    folder, before = snapshots.parent, contents(outside)
    coming = folder.with_name(f"coming.{int(folder.suffix[1:]) + 1}")
    coming.mkdir()
    (coming / "slots").symlink_to(outside)
    run = plain_run(server, name="coming")
    answer = run.create(TENSORS)

    assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")
    assert not coming.exists()
    run.create(TENSORS).raise_for_status()
    assert contents(outside) == before


def test_a_link_in_the_place_of_a_deleted_or_coming_run(
    planted: tuple[ServerProcess, PlainRun, Path], plain_run: Callable[..., PlainRun], outside: Path
) -> None:
    """The sweep at the start removes the link alone; a link under a coming run's name makes way for its folder."""
    server, run, snapshots = planted
    folder, before = snapshots.parent, contents(outside)
    assert run.http.delete(run.path).status_code == 204
    assert server.stop() == 0
    folder.symlink_to(outside)
    number = int(folder.suffix[1:])
    coming = folder.with_name(f"coming.{number + 1}")
    coming.symlink_to(outside)
    server.start()
    assert not folder.is_symlink()
    again = plain_run(server, TENSORS, name="coming", durability="memory")
    again.http.put(f"{again.path}/snapshots/first").raise_for_status()

    assert coming.is_dir()
    assert not coming.is_symlink()
    assert contents(outside) == before
