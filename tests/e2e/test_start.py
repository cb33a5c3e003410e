"""What a server loads, and what it takes of the machine at rest: neither torch nor numba, as long as nobody needs them.

Knows the files that a process has in its memory, on Linux. Does not know modules. The server is a process of its own,
not forked from one that has loaded more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from tests.conftest import LitEmaOracle, PlainRun
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")

#: MiB of a server with a float32 run of a few bytes. Measured: 130.
REST_MIB = 250
FLOATS = {"w": torch.linspace(-1, 1, 5000), "half": torch.linspace(-1, 1, 700).bfloat16()}


class Started:
    """A server, and the address at which it was told to listen."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def has(self, library: str) -> bool:
        """Whether a file of this library is in the server's memory."""
        return f"/{library}/" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def mib(self) -> float:
        """What the server has in memory, MiB."""
        [line] = [
            line
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        ]
        return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("start")
    told = folder / "address"
    command = [sys.executable, "-m", "ema_service", "serve", "--port", "0", "--device", "cpu", "--memory"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*command, "--address-file", str(told)], stdout=log, stderr=log) as process,
    ):
        wait_until(told.exists, "the server", 120)
        yield Started(process, told.read_text().splitlines()[0])
        process.terminate()


def updated(run: PlainRun, tensors: dict[str, Tensor], oracle: LitEmaOracle) -> bool:
    """Whether two updates are those of LitEma, bit for bit."""
    run.create(tensors).raise_for_status()
    run.begin(tensors).raise_for_status()
    for step in (1, 2):
        later = {name: tensor + step for name, tensor in tensors.items()}
        run.push(step, later).raise_for_status()
        oracle.update(later)
    return all(torch.equal(tensor, oracle.shadow[name]) for name, tensor in run.weights().items())


def test_torch_comes_with_whoever_needs_it(started: Started, litema: Callable[..., LitEmaOracle]) -> None:
    """Runs of float32 and bf16 begin, are updated and read without torch and numba; fp16 brings torch, and is right."""
    with httpx.Client(base_url=started.url, timeout=60) as http:
        assert updated(PlainRun(http, "floats"), FLOATS, litema(FLOATS))
        assert http.get("/metrics").status_code == 200
        assert not [name for name in ("torch", "numba", "scipy") if started.has(name)]
        assert started.mib() < REST_MIB

        narrow = {"w": FLOATS["w"].half(), "wide": FLOATS["w"].double()}
        assert updated(PlainRun(http, "narrow"), narrow, litema(narrow))
        assert started.has("torch")
