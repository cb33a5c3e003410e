"""A server whose data dir is on a network's file system: one that the table of mounts names so, and one of FUSE.

Knows processes. Does not know SQLite.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

#: A server that reads another table of mounts.
ELSEWHERE = """
from pathlib import Path
from ema_service.storage import mounts
mounts._TABLE = Path({table!r})
from ema_service.cli import main
main()
"""


@pytest.fixture(params=[pytest.param("nfs4", marks=pytest.mark.soak), "fuse"])
def network_server(
    request: pytest.FixtureRequest, tmp_path: Path, server_class: type[ServerProcess]
) -> Iterator[ServerProcess]:
    data = tmp_path / "data"
    data.mkdir()
    if request.param == "nfs4":
        table = tmp_path / "mountinfo"
        table.write_text(f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:7 / {data} rw - nfs4 server:/export rw\n")
        (tmp_path / "elsewhere.py").write_text(ELSEWHERE.format(table=str(table)))
        program = (str(tmp_path / "elsewhere.py"),)
    else:
        _mount(tmp_path / "behind", data)
        program = ("-m", "ema_service")
    server = server_class(tmp_path, ("--checkpoint-interval", "1000"), data, program=program)
    yield server
    if server.process.poll() is None:
        server.kill()
    if request.param == "fuse":
        subprocess.run(["umount", data], check=True, timeout=20)


def _mount(behind: Path, folder: Path) -> None:
    """Have FUSE show another folder in place of this one."""
    if shutil.which("bindfs") is None:
        pytest.skip("bindfs, which shows a folder through FUSE, is not installed")
    behind.mkdir()
    done = subprocess.run(["bindfs", behind, folder], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"no file system of FUSE can be mounted here: {done.stderr}")


def test_killed_server_has_lost_nothing(network_server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A run of each durability comes back after kill -9 as it was; the catalog was this server's alone meanwhile."""
    server = network_server.start()
    assert "its catalog is this server's alone" in server.log
    tensors = {"w": torch.randn(70_000)}
    runs = {each: plain_run(server, tensors, name=each, durability=each) for each in ("disk", "process")}
    for step in range(1, 6):
        for run in runs.values():
            run.push(step, {"w": torch.randn(70_000)}).raise_for_status()
    for run in runs.values():
        run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    before = {name: (run.weights()["w"], run.info()["num_updates"]) for name, run in runs.items()}
    server.kill()
    assert server.data_dir is not None
    assert not (server.data_dir / "catalog.db-shm").exists()

    server.start()
    for name, (weights, num_updates) in before.items():
        again = plain_run(server, name=name)
        assert torch.equal(again.weights()["w"], weights)
        assert again.info()["num_updates"] == num_updates == 5
        kept = load(again.http.get(f"{again.path}/snapshots/s/weights").raise_for_status().content)
        assert torch.equal(kept["w"], weights)
        again.push(6, tensors).raise_for_status()
    assert server.stop() == 0
