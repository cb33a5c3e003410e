"""What comes back after the server ended, cleanly or by kill -9; and what keeps one from starting.

Knows processes, signals and plain HTTP. Does not know how a run is kept.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

Start = Callable[..., "ServerProcess"]
MakeRun = Callable[..., "PlainRun"]

WAIT_SECONDS = 30.0
#: Checkpoints are taken at the end only.
SELDOM = ("--checkpoint-interval", "1000")
OFTEN = ("--checkpoint-interval", "0.2")


def tensors(seed: int) -> dict[str, Tensor]:
    """All dtypes a run may hold, a 0-d and an empty tensor."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"conv": (8, 3, 3, 3), "scalar": (), "none": (0, 4), "emb": (50, 7), "half": (11,), "wide": (5,)}
    dtypes = {"emb": torch.bfloat16, "half": torch.float16, "wide": torch.float64}
    return {n: torch.randn(s, generator=random).to(dtypes.get(n, torch.float32)) for n, s in shapes.items()}


def push_all(run: PlainRun, steps: range) -> None:
    for step in steps:
        run.push(step, tensors(step)).raise_for_status()


def stands_as(run: PlainRun) -> dict[str, Any]:
    """Everything a reader can see of a run: its info, the bytes of each average, its snapshots and their bytes.

    But for its link, which is that of the latest push to this life of the server.
    """
    seen: dict[str, Any] = {"info": run.info(), "list": run.http.get("/v1/runs").json()}
    for info in (seen["info"], *seen["list"]["runs"]):
        info.pop("link")
    for average in seen["info"]["averages"]:
        answer = run.pull(average=average["name"])
        if answer.status_code == 200:
            seen[average["name"]] = (answer.headers["etag"], answer.content)
    seen["snapshots"] = run.http.get(f"{run.path}/snapshots").json()
    for snapshot in seen["snapshots"]["snapshots"]:
        weights = run.http.get(f"{run.path}/snapshots/{snapshot['name']}/weights")
        seen[f"snapshot {snapshot['name']}"] = (weights.headers["etag"], weights.content)
    return seen


def forget_connections(run: PlainRun, server: ServerProcess) -> PlainRun:
    """The same run on the restarted server, which has another port."""
    return type(run)(server.http(), run.name)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# --- a clean stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_clean_restart_brings_everything_back(durability: str, start_server: Start, plain_run: MakeRun) -> None:
    """After SIGTERM and a new start each run is what it was, to the byte, and goes on as if nothing had happened."""
    server = start_server(*SELDOM)
    averages = [{"name": "ema"}, {"name": "fast", "decay": 0.9}, {"name": "flat", "schedule": "constant", "decay": 0.5}]
    several = plain_run(server, tensors(0), name="several", averages=averages, durability=durability)
    fixed = plain_run(server, tensors(0), name="fixed", durability=durability, decay=0.99, use_num_updates=False)
    spaced = plain_run(server, tensors(0), name="spaced", durability=durability, decay_per="step")
    begun = plain_run(server, tensors(0), name="begun", durability=durability)
    empty = plain_run(server, name="empty")
    empty.create(tensors(0), decay=0.25, durability=durability).raise_for_status()
    runs = [several, fixed, spaced, begun, empty]

    push_all(several, range(1, 8))
    several.http.put(f"{several.path}/snapshots/early").raise_for_status()
    push_all(several, range(8, 12))
    several.http.patch(several.path, json={"decay": 0.75, "average": "fast"}).raise_for_status()
    push_all(fixed, range(1, 4))
    fixed.http.post(f"{fixed.path}/reset-num-updates").raise_for_status()
    push_all(spaced, range(10, 40, 10))
    push_all(begun, range(1, 3))
    begun.http.post(f"{begun.path}/reset-num-updates").raise_for_status()
    before = {run.name: stands_as(run) for run in runs}

    told = {run.info()["durable_step"] for run in (several, fixed, spaced, begun)}
    assert told == ({None} if durability == "memory" else {11, 3, 30, 2})
    assert server.stop() == 0
    server.start()
    runs = [forget_connections(run, server) for run in runs]

    for run in runs:
        seen = stands_as(run)
        assert _without_durable_step(seen) == _without_durable_step(before[run.name])
        assert seen["info"]["durable_step"] == seen["info"]["checkpoint_step"] == seen["info"]["step"]
    _goes_on(runs, before, durable_step=11 if durability == "memory" else 12)
    for run in runs:
        run.http.close()


def _goes_on(runs: list[PlainRun], before: dict[str, Any], *, durable_step: int) -> None:
    several, fixed, spaced, _, empty = runs
    again = several.push(11, tensors(11)).json()
    assert (again["applied"], again["version"]) == (False, before["several"]["info"]["version"])
    assert several.push(11, tensors(5)).json()["code"] == "step_conflict"
    assert several.push(10, tensors(10)).json()["code"] == "stale_step"
    assert several.create(tensors(0), averages=_averages(before)).status_code == 200
    assert several.push(12, tensors(12)).json() == {
        **again, "applied": True, "step": 12, "num_updates": 12, "version": "1.12", "durable_step": durable_step,
        "effective_decay": torch.div(13, torch.tensor(22.0)).item(),
    }  # fmt: skip
    assert fixed.push(4, tensors(4)).json()["num_updates"] == -1
    assert spaced.push(45, tensors(1)).json()["num_updates"] == before["spaced"]["info"]["num_updates"] + 15
    assert empty.begin(tensors(0)).status_code == 200


def _averages(before: dict[str, Any]) -> list[dict[str, Any]]:
    """The averages as the run was created with, before the decay of one was changed."""
    given: dict[str, dict[str, Any]] = {"ema": {}, "fast": {"decay": 0.9}, "flat": {"decay": 0.5}}
    infos = before["several"]["info"]["averages"]
    return [{"name": a["name"], "schedule": a["schedule"], **given[a["name"]]} for a in infos]


def _without_durable_step(seen: dict[str, Any]) -> dict[str, Any]:
    """A clean stop makes every step durable, and writes a checkpoint: the two fields that may change by it."""
    unknown = {"durable_step": None, "checkpoint_step": None}
    infos = [{**info, **unknown} for info in seen["list"]["runs"]]
    return {**seen, "info": {**seen["info"], **unknown}, "list": infos}


# --- kill -9 --------------------------------------------------------------------------------------------------------


def test_kill_brings_back_the_last_checkpoint(start_server: Start, plain_run: MakeRun) -> None:
    """After SIGKILL a run of durability memory stands at its last durable_step or a later one, in a new epoch."""
    server = start_server(*OFTEN)
    run = plain_run(server, tensors(0), durability="memory")
    weights, told = {}, -1
    for step in range(1, 3000):
        answer = run.push(step, tensors(step % 50)).raise_for_status().json()
        weights[step] = run.weights()
        told = -1 if answer["durable_step"] is None else answer["durable_step"]
        assert told < step
        if told > 5:
            break
    server.kill()
    server.start()
    run = forget_connections(run, server)
    info = run.info()

    assert told > 5, "no checkpoint was taken while the run moved"
    assert info["step"] == info["durable_step"] >= told
    assert info["version"] == f"2.{info['step']}"
    assert same(run.weights(), weights[info["step"]])
    assert run.push(info["step"], tensors(info["step"] % 50)).json()["applied"] is False
    assert run.push(info["step"] + 1, tensors(1)).json()["version"] == f"2.{info['step'] + 1}"
    run.http.close()


# --- the end in the middle of a push --------------------------------------------------------------------------------


class HalfPush:
    """A push whose second half waits."""

    def __init__(self, server: ServerProcess, run: PlainRun, step: int) -> None:
        address = urlsplit(server.url)
        self._payload = save(tensors(step))
        self._socket = socket.create_connection((address.hostname, address.port), timeout=WAIT_SECONDS)
        head = f"PUT {run.path}/updates/{step} HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Length: {len(self._payload)}\r\n\r\n"
        self._half = len(self._payload) // 2
        self._socket.sendall(head.encode() + self._payload[: self._half])

    def rest(self) -> bytes:
        """Send it and return what came back, b"" for a closed connection."""
        with self._socket:
            try:
                self._socket.sendall(self._payload[self._half :])
                return b"".join(iter(lambda: self._socket.recv(65536), b""))
            except OSError:
                return b""


def test_kill_in_the_middle_of_a_push(start_server: Start, plain_run: MakeRun) -> None:
    """SIGKILL while half a body has come leaves the run as its checkpoint has it, ready for the same push again."""
    server = start_server(*OFTEN)
    run = plain_run(server, tensors(0), durability="memory")
    push_all(run, range(1, 3))
    wait_until(lambda: run.info()["durable_step"] == 2, "a checkpoint")
    before = run.weights()
    push = HalfPush(server, run, 3)
    wait_until(lambda: _staging(run) > 0, "the push")
    server.kill()
    assert push.rest() == b""
    server.start()
    run = forget_connections(run, server)

    assert same(run.weights(), before)
    assert run.push(3, tensors(3)).json()["applied"]
    run.http.close()


def _staging(run: PlainRun) -> float:
    lines = run.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ema_staging_bytes ")))


# --- what keeps a server from starting ------------------------------------------------------------------------------


def _serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start a server that cannot start."""
    command = [sys.executable, "-m", "ema_service", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _refused(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    assert ended.returncode == 1
    assert ended.stderr.startswith("ema-service: ")
    assert "Traceback" not in ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


def test_second_server_is_refused(server: ServerProcess) -> None:
    """A data dir, a port or a socket in use: one line says what to do, exit status 1, the first server is unharmed."""
    port = str(urlsplit(server.url).port)
    path = server.uds.removeprefix("unix://")
    inode = Path(path).stat().st_ino

    cases = [
        (("--port", "0", "--data-dir", str(server.data_dir)), (str(server.data_dir), "--data-dir")),
        (("--port", port, "--memory"), (port, "--port")),
        (("--port", "0", "--memory", "--uds", path), (path, "--uds")),
    ]
    with ThreadPoolExecutor(len(cases)) as threads:
        for ended, (_, words) in zip(threads.map(lambda case: _serve(*case[0]), cases), cases, strict=True):
            _refused(ended, *words)
    with server.http() as http:
        assert http.get("/readyz").status_code == 200
    assert Path(path).stat().st_ino == inode
