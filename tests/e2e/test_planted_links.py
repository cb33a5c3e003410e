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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
