"""``make cluster-demo``: a cluster of three hosts under Ray on this machine, a trainer of two ranks, an evaluator, and
a host that is killed in the middle. At the end the EMA is compared with one in process, bit for bit.

The parts are those of a real cluster: `ema-service cluster up --ray`, Ray's actors and their processes, the public
client. Ray, the evaluator and the killing are in this process; each rank of the trainer is one of its own.

Knows the order of events and what counts as success. Does not know how a cluster recovers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import typer

from ema_client import EmaClient
from ema_client.errors import EmaError
from ema_client.scratch import scratch_folder
from ema_service.demo.plan import Progress, Proof, parse_report

HOSTS, NAME, RUN, STEPS, RANKS = 3, "demo", "digits", 80, 2
KILLED, KILLED_AT = 1, STEPS // 2
#: Ray counts CPUs, and reserves none: three hosts fit on a machine of two.
_CPUS = 8
_POLL_SECONDS = 0.2


class Evaluator(threading.Thread):
    """Pulls the EMA again and again. pulls: that were answered. refused: that were not, while a host was away.
    went_back: answers with an older step than one before."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._ended = threading.Event()
        self.pulls = self.refused = self.went_back = 0

    def run(self) -> None:
        """Pull until the end."""
        latest = 0
        with EmaClient(self._url) as client:
            while not self._ended.wait(_POLL_SECONDS):
                try:
                    step = client.pull(RUN).info.step or 0
                except EmaError:
                    self.refused += 1
                    continue
                self.pulls += 1
                self.went_back += step < latest
                latest = step

    def end(self) -> None:
        """Pull no more."""
        self._ended.set()
        self.join()


class Trainer:
    """The trainer's ranks, each a process. step: their latest. proof: once rank 0 has compared."""

    def __init__(self, address: str, url: str) -> None:
        words = [sys.executable, "-m", "ema_service.demo.on_ray_trainer", address, url, RUN, str(STEPS)]
        port = str(_free_port())
        self._ranks = [
            subprocess.Popen([*words, str(rank), str(RANKS), port], stdout=subprocess.PIPE, text=True)
            for rank in range(RANKS)
        ]
        self.step = 0
        self.proof: Proof | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def reach(self, step: int) -> None:
        """Wait for a step. Raises RuntimeError where the trainer ends before."""
        while self.step < step:
            if any(rank.poll() is not None for rank in self._ranks):
                raise RuntimeError(f"the trainer ended at step {self.step}")
            time.sleep(0.02)

    def wait(self) -> bool:
        """Wait for the end, and say whether the EMAs were alike."""
        statuses = [rank.wait() for rank in self._ranks]
        self._reader.join()
        return not any(statuses)

    def end(self) -> None:
        """Leave no process."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()

    def _read(self) -> None:
        for line in self._ranks[0].stdout or ():
            said = parse_report(line)
            if isinstance(said, Progress):
                self.step = said.step
            elif isinstance(said, Proof):
                self.proof = said


def main() -> int:
    """Play the demo, and return the exit status."""
    from ema_service.cluster.launching.ray_launcher import local_ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _say(f"a Ray of its own and {HOSTS} hosts on this machine ({os.cpu_count()} cores)")
    warnings.simplefilter("ignore", FutureWarning)  # Ray's own, of versions to come
    with scratch_folder() as folder, local_ray(_CPUS) as address:
        try:
            return _play(folder, address)
        finally:
            _cluster("down", address)


def _play(folder: Path, address: str) -> int:
    began = time.monotonic()
    words = ["--shards", str(HOSTS), "--host", "127.0.0.1", "--dir", str(folder)]
    if _cluster("up", address, *words) != 0:
        _say("the cluster did not come up")
        return 1
    url = f"ray://{NAME}"
    _row("up", f"{time.monotonic() - began:.1f} s; trainer and evaluator find it as {url}")
    with contextlib.ExitStack() as stack:
        trainer = Trainer(address, url)
        stack.callback(trainer.end)
        evaluator = Evaluator(url)
        evaluator.start()
        stack.callback(evaluator.end)
        trainer.reach(KILLED_AT)
        _kill(url)
        same = trainer.wait()
    return _verdict(trainer, evaluator, same=same)


def _kill(url: str) -> None:
    """End a host as a machine that fails does: the actor and what it runs, all at once."""
    from ema_service.cluster.launching.ray_launcher import processes_of

    pids = processes_of(NAME, KILLED)
    with EmaClient(url) as client:
        before = client.run(RUN).step or 0
        killed = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _row("killed", f"host {KILLED} with SIGKILL at step {before}: the actor, its server and its gateway")
        while _step(client) <= before + 2:
            time.sleep(0.05)
    _row("back", f"updates are applied again {time.monotonic() - killed:.1f} s later")


def _step(client: EmaClient) -> int:
    try:
        return client.run(RUN).step or 0
    except EmaError:
        return 0


def _verdict(trainer: Trainer, evaluator: Evaluator, *, same: bool) -> int:
    back = f"; {evaluator.went_back} went back" if evaluator.went_back else ""
    _row("evaluator", f"{evaluator.pulls} pulls{back}; {evaluator.refused} tries failed while a host was away")
    proof = trainer.proof
    if not same or proof is None or evaluator.went_back:
        _row("verdict", "FAILED: the EMA is not that of LitEma in process")
        return 1
    _row("verdict", f"{trainer.step} updates, {proof.elements:,} parameters in {proof.tensors} tensors: bit-identical")
    _row("", f"to LitEma in process, of {RANKS} ranks (FSDP2), each of which sent its own slices")
    _say("Not shown: several machines, GPUs, and tensors too large for one host.")
    return 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _cluster(what: str, address: str, *words: str) -> int:
    """``ema-service cluster up`` or ``down``. Returns the exit status."""
    command = [sys.executable, "-m", "ema_service", "cluster", what, "--ray", address, "--name", NAME, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _say(done.stderr)
    return done.returncode


def _row(what: str, said: str) -> None:
    _say(f"  {what:<10} {said}")


def _say(line: str) -> None:
    typer.echo(line)


if __name__ == "__main__":
    sys.exit(main())
