"""Going on after damage, of processes: one host's slot file is damaged, or its data dir is replaced by an older copy,
and an operator says what all hosts go back to, with the commands that the runbook names.

Knows the launcher, its data dirs, and ``ema``. Does not know messages between the processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import InvalidRequest, RunDegraded, SnapshotNotFound
from tests.service.cluster.launched import Launched
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

DECAY = 0.9
Model = Callable[[int], dict[str, Tensor]]
_SECONDS = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Two hosts, which tests stop and start again over other data."""
    found = Launched(tmp_path_factory.mktemp("damaged") / "all", "--local", "2").start()
    yield found
    found.end()


def ema(cluster: Launched, *words: str) -> str:
    """What a command says; it succeeds, or fails."""
    environment = {**os.environ, "EMA_SERVICE_URL": cluster.url}
    program = "from ema_client.cli import main; main()"
    told = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    return told.stdout + told.stderr


def train(client: EmaClient, run: str, model: Model, oracle: LitEmaOracle) -> None:
    """A run with a snapshot of step 2, and two updates after that. oracle: what the snapshot holds then."""
    client.create_run(run, model(0), decay=DECAY, durability="disk")
    for step in (1, 2):
        client.push(run, model(step), step=step)
        oracle.update(model(step))
    client.snapshot(run, "s-2")
    for step in (3, 4):
        client.push(run, model(step), step=step)


def wait_for_damage(client: EmaClient, run: str) -> str:
    """Wait until the run is told to be degraded, and say why."""
    wait_until(lambda: client.run(run).status == "degraded", "the damage to be told", _SECONDS)
    return str(client.run(run).reason)


def assert_goes_on(client: EmaClient, run: str, model: Model, oracle: LitEmaOracle) -> None:
    """The run is LitEma's, and so is its next update."""
    for step in (None, 7):
        if step:
            assert client.push(run, model(step), step=step).applied
            oracle.update(model(step))
        found = client.pull(run)
        assert all(torch.equal(found[name], tensor) for name, tensor in oracle.shadow.items())


@pytest.mark.soak
def test_damage_and_an_older_copy(
    cluster: Launched, run_name: str, model: Model, litema: type[LitEmaOracle], tmp_path: Path
) -> None:
    """A damaged file is told of the run, with the steps that are gone, and takes no other run along; then a host's data
    dir is put back from a backup of before. Each time the command of the runbook has all hosts go back to the snapshot,
    once, and the run is LitEma's from there. In the end a host begins with an empty data dir, and is given its own."""
    first, second = litema(model(0), decay=DECAY), litema(model(0), decay=DECAY)
    damaged, copied = f"{run_name}-a", f"{run_name}-b"
    with EmaClient(cluster.url) as client:
        train(client, damaged, model, first)
        train(client, copied, model, second)
    assert cluster.stop() == 0
    host = cluster.folder / "host-1"
    shutil.copytree(host, tmp_path / "backup")
    files = (host / "runs").glob(f"{damaged}.*/slots/*/*.safetensors")
    path = max(files, key=lambda each: each.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))

    cluster.start()
    with EmaClient(cluster.url) as client:
        reason = wait_for_damage(client, damaged)
        assert reason.startswith("host 1: the updates after step 3 up to step 4 are gone")
        assert {each.run: each.status for each in client.runs()}[copied] == "ready"
        assert "ema rewind" in str(client.run(damaged).remedy)
        with pytest.raises(RunDegraded):
            client.push(damaged, model(5), step=5)
        with pytest.raises(RunDegraded, match="no version that all hosts can read"):
            client.rewind(damaged, None)
        assert "version 2.0, step 2" in ema(cluster, "rewind", damaged, "s-2", "--yes")
        assert_goes_on(client, damaged, model, first)
        assert "rewound to snapshot s-2" in client.timeline(damaged).entries[-1].text
        with pytest.raises(InvalidRequest, match="not degraded"):
            client.rewind(damaged, None)
        client.push(copied, model(5), step=5)
        client.snapshot(copied, "s-5")
    assert cluster.stop() == 0
    shutil.rmtree(host)
    shutil.move(tmp_path / "backup", host)

    cluster.start()
    with EmaClient(cluster.url) as client:
        assert "is its data dir an older copy?" in wait_for_damage(client, copied)
        assert [each.name for each in client.snapshots(copied)] == ["s-2"]
        with pytest.raises(SnapshotNotFound):
            client.rewind(copied, "s-5")
        assert "version 2.0, step 2" in ema(cluster, "rewind", copied, "s-2", "--yes")
        assert_goes_on(client, copied, model, second)
    assert cluster.stop() == 0
    shutil.move(host, tmp_path / "kept")

    cluster.start()
    with cluster.http() as http:
        for path in (f"/v1/runs/{copied}", "/v1/runs"):
            told = [http.get(path)]
            wait_until(lambda path=path, told=told: "older copy" in (told.append(http.get(path)) or told[-1].text))
            assert {each.status_code for each in told} == {503}, "nobody is told that the runs are gone"
    assert cluster.stop() == 0
    shutil.rmtree(host)
    shutil.move(tmp_path / "kept", host)
    cluster.start()
    with EmaClient(cluster.url) as client:
        client.push(copied, model(8), step=8)
