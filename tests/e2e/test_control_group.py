"""A server in a control group with little memory, as a container or a batch job is: full is refused, never killed.

Knows control groups of both versions, processes and plain HTTP. Does not know how a run is kept.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from torch import Tensor

from tests.control_groups import memory_group

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

GROUPED = Path(__file__).parent / "processes" / "grouped.py"
#: Of which the server itself counts 550.
LIMIT = 720 << 20


def model(seed: int) -> dict[str, Tensor]:
    return {"w": torch.randn(8 << 20, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with LIMIT bytes of memory, whose processes are killed after the test."""
    with memory_group(LIMIT) as folder:
        yield folder


@pytest.fixture
def server(group: Path, tmp_path: Path, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """A server of the group."""
    arguments = ("--staging-bytes", str(80 << 20), "--frozen-bytes", str(1 << 20))
    made = server_class(tmp_path, arguments, tmp_path / "data", (str(GROUPED), str(group)))
    yield made.start()
    if made.process.poll() is None:
        made.kill()


@pytest.mark.parametrize("durability", ["process", pytest.param("memory", marks=pytest.mark.soak)])
def test_what_the_group_has_no_room_for(
    durability: str, group: Path, server: ServerProcess, plain_run_class: type[PlainRun], tmp_path: Path
) -> None:
    """A run too many is refused; those that were taken are pushed to, killed, and there again, within the group."""
    runs = 0
    with server.http() as http:
        while (answer := create(plain_run_class(http, f"run-{runs}"), durability)).status_code == 201:
            run = plain_run_class(http, f"run-{runs}")
            run.begin(model(0)).raise_for_status()
            run.push(1, model(1)).raise_for_status()
            runs += 1
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert "--memory-limit" in answer.json()["hint"]
        with ThreadPoolExecutor(runs) as pool:
            names = [f"run-{number}" for number in range(runs)]
            answers = list(pool.map(lambda name: plain_run_class(http, name).push(2, model(2)).status_code, names))
        assert set(answers) <= {200, 503}
        for name in names:
            plain_run_class(http, name).push(3, model(3)).raise_for_status()
    assert server.process.poll() is None
    assert runs >= 2
    server.kill() if durability == "process" else server.stop()

    server.start()
    with server.http() as http:
        for name in names:
            run = plain_run_class(http, name)
            assert run.info()["step"] == 3
            run.push(4, model(4)).raise_for_status()
        assert create(plain_run_class(http, "another"), durability).status_code == 503
        plain_run_class(http, "run-0").http.delete("/v1/runs/run-0").raise_for_status()
        assert create(plain_run_class(http, "another"), durability).status_code == 201
    server.kill()

    words = [sys.executable, str(GROUPED), str(group), "release", "--data-dir", str(tmp_path / "data")]
    released = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (released.returncode, released.stderr) == (0, "")
    assert released.stdout.count("step 4 is on disk") == (runs - 1 if durability == "process" else 0)


def create(run: PlainRun, durability: str) -> httpx.Response:
    return run.create(model(0), decay=0.5, durability=durability)


def test_less_memory_than_before(start_server: Callable[..., ServerProcess], plain_run_class: type[PlainRun]) -> None:
    """A run for which there is no memory any more is degraded, and says so; with the memory, all is as it was."""
    server = start_server()
    with server.http() as http:
        run = plain_run_class(http, "large")
        create(run, "memory").raise_for_status()
        run.begin(model(0)).raise_for_status()
    server.stop()
    arguments, server.arguments = server.arguments, ("--memory-limit", "1")
    with pytest.raises(RuntimeError, match=r"--memory-limit.* the server itself takes \d+") as refused:
        server.start()
    itself = int(str(refused.value).rpartition(" takes ")[2])
    server.arguments = ("--memory-limit", str(itself + (16 << 20)))
    server.start()
    with server.http() as http:
        info = plain_run_class(http, "large").info()
        assert (info["status"], "--memory-limit" in info["reason"]) == ("degraded", True)
    server.stop()

    server.arguments = arguments
    server.start()
    with server.http() as http:
        run = plain_run_class(http, "large")
        assert run.info()["status"] == "ready"
        assert torch.equal(run.weights()["w"], model(0)["w"])
        run.push(1, model(1)).raise_for_status()
