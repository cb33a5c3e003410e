"""The scripts for Slurm, run by bash as Slurm runs them, each in a folder of its own, with one folder for all nodes.

Slurm is played by three programs: `srun` runs what follows its options, `scancel` tells that to end, `scontrol` puts
down what it was asked. Knows processes and signals. Does not know how server and client find each other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.waiting import wait_until

SCRIPTS = Path(__file__).parents[2] / "client" / "examples" / "slurm"
TRAINER = Path(__file__).parent / "processes" / "slurm_trainer.py"
PLAYED = {
    "srun": 'while [[ "${1:-}" == --* ]]; do shift; done\necho $$ > "$SLURM_STEP"\n'
    'echo "$SRUN_CPUS_PER_TASK" > "$EMA_HOME/cores"\nexec "$@"',
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM "$(cat "$SLURM_STEP")"',
    "scontrol": 'echo "$@" >> "$SCONTROL_LOG"',
    "ema-service": f'exec {sys.executable} -m ema_service "$@"',
}

Submit = Callable[..., subprocess.Popen[bytes]]


class Cluster:
    """Nodes that share ``home``; each has working folder and shared memory of its own, which end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.jobs: list[subprocess.Popen[bytes]] = []
        (folder / "bin").mkdir()
        for name, text in PLAYED.items():
            self.play(name, text)

    def play(self, name: str, text: str) -> None:
        """Have a program of this name on every node."""
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)

    def submit(self, node: str, script: str, *words: str, job: int = 7) -> subprocess.Popen[bytes]:
        """A job that begins on ``node`` at once."""
        work = self.folder / node
        work.mkdir(exist_ok=True)
        env = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "EMA_HOME": str(self.home),
            "EMA_SERVICE_RAM_DIR": str(Path(os.environ["EMA_SERVICE_RAM_DIR"]) / f"{self.folder.name}-{node}"),
            "SCONTROL_LOG": str(self.folder / "scontrol"),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": node,
            "SLURM_STEP": str(work / "step"),
            "SLURMD_NODENAME": node,
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
        }
        Path(env["EMA_SERVICE_RAM_DIR"]).parent.mkdir(exist_ok=True)
        with (work / "out").open("ab") as out:
            begun = subprocess.Popen(
                ["bash", SCRIPTS / script, *words], cwd=work, env=env, stdout=out, stderr=out, start_new_session=True
            )
        self.jobs.append(begun)
        return begun

    def out(self, node: str) -> str:
        return (self.folder / node / "out").read_text()

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, {node.name: self.out(node.name) for node in self.folder.glob("n*")}
            time.sleep(0.002)

    def end(self) -> None:
        for job in self.jobs:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.end()


def test_server_moves_under_a_training(cluster: Cluster) -> None:
    """A server whose node failed comes up on another; the training that waited has LitEma's numbers, bit for bit.

    The training's job may begin before the server's. Ahead of its time limit the server's job stops in order, and asks
    to be queued again.
    """
    training = cluster.submit("n1", "train.sbatch", sys.executable, str(TRAINER), "r", str(cluster.folder), "20")
    server = cluster.submit("n2", "server.sbatch", "--checkpoint-interval", "1000")
    cluster.wait_for(cluster.folder / "halfway")
    before = (cluster.home / "address").read_text()

    os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)
    (cluster.folder / "go").touch()
    server = cluster.submit("n3", "server.sbatch")
    assert training.wait(60) == 0, cluster.out("n1") + cluster.out("n3")
    assert "20 updates, the same as LitEma's" in cluster.out("n1")
    assert (cluster.home / "address").read_text() != before
    assert (cluster.home / "cores").read_text() == "4\n"
    assert {path.stat().st_mode & 0o077 for path in (cluster.home / "token", cluster.home / "tokens")} == {0}

    server.send_signal(signal.SIGUSR1)
    assert server.wait(30) == 0
    assert "stopped" in cluster.out("n3")
    assert (cluster.folder / "scontrol").read_text() == "requeue 7\n"
    assert not (cluster.home / "address").exists()


@pytest.mark.soak
def test_one_job(cluster: Cluster) -> None:
    """Server and training in one job: the server ends with the training, and the EMA is LitEma's."""
    (cluster.folder / "go").touch()
    job = cluster.submit("n1", "one-job.sbatch", sys.executable, str(TRAINER), "r", str(cluster.folder), "10")
    assert job.wait(60) == 0, cluster.out("n1")
    assert "the same as LitEma's" in cluster.out("n1")
    assert "stopped" in cluster.out("n1")


#: A server that is there at once, and stops when it is told to.
SERVER = """
[ "$1" = token ] && exec echo secret
home=$EMA_HOME
echo "$@" >> "$home/words"
trap 'echo stopped; rm "$home/address"; exit 3' TERM
echo http://127.0.0.1:1 > "$home/address"
while :; do sleep 0.02; done
"""


@pytest.mark.parametrize("order", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "scancel"])
@pytest.mark.parametrize("script", ["server.sbatch", "one-job.sbatch"])
def test_jobs_that_are_told_to_end(cluster: Cluster, script: str, order: signal.Signals) -> None:
    """A job ends what it started, in order, and gives its exit code; it comes again ahead of a time limit alone."""
    cluster.play("ema-service", SERVER)
    cluster.play("training", "trap 'ls $EMA_HOME; exit 4' TERM; touch $EMA_HOME/trains; while :; do sleep 0.02; done")
    job = cluster.submit("n1", script, *(["--slow-request", "1"] if script == "server.sbatch" else ["training"]))
    cluster.wait_for(cluster.home / ("address" if script == "server.sbatch" else "trains"))
    job.send_signal(order)
    job.send_signal(order)

    assert job.wait(20) == (3 if script == "server.sbatch" else 4), cluster.out("n1")
    assert cluster.out("n1").count("stopped") == 1
    if script == "one-job.sbatch":
        assert "address" in cluster.out("n1"), "the server ended before the training"
        assert (cluster.home / "cores").read_text() == "4\n"
    asked = cluster.folder / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if order == signal.SIGUSR1 else "")
    words = (cluster.home / "words").read_text()
    assert "serve --host 0.0.0.0 --port 0 --address-file" in words
    assert ("--slow-request 1" in words) == (script == "server.sbatch")


@pytest.mark.parametrize("script", ["server.sbatch", "one-job.sbatch"])
def test_jobs_that_are_told_to_end_as_they_begin(cluster: Cluster, script: str) -> None:
    """Whenever the order comes, nothing that the job started outlives it, and a server that was there is stopped."""
    cluster.play("ema-service", SERVER)
    cluster.play("training", "while :; do sleep 0.02; done")
    for number, delay in enumerate((0.0, 0.02, 0.05, 0.1, 0.2, 0.3)):
        job = cluster.submit(f"n{number}", script, *([] if script == "server.sbatch" else ["training"]))
        time.sleep(delay)
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) != 0
        wait_until(partial(_ended, job.pid), "the end of all that the job started")
    assert not (cluster.home / "address").exists()


def _ended(group: int) -> bool:
    """Whether a process group has no members left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_server_that_does_not_start(cluster: Cluster) -> None:
    """A job whose server cannot start ends, and says so, instead of waiting until the time limit."""
    cluster.play("ema-service", "exit 1")
    job = cluster.submit("n1", "one-job.sbatch", "true")
    assert job.wait(20) == 1
