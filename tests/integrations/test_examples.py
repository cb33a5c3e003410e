"""The examples run as a reader would run them, each with its real framework beside a real server.

Knows their names, what each needs, and what each says at its end. Does not know frameworks.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ema_client import EmaClient

EXAMPLES = Path(__file__).resolve().parents[2] / "client" / "examples"

#: What each needs; what its last line says; num_updates of its run at the end.
CASES = {
    "lightning_callback.py": (["lightning"], "validation loss of the EMA: ", 32),
    "transformers_trainer.py": (["transformers", "accelerate"], "loss of the EMA: ", 10),
    "diffusers_loop.py": (["diffusers", "accelerate"], "num_updates: 5", 5),
    "sgm_engine.py": (["lightning"], "num_updates: 8", 8),
    "peft_lora.py": (["peft"], "averaged: 400 of ", 10),
}


#: Has a cluster on Ray, where the others have a server: test_ray_train.py.
ON_RAY = "ray_train_fsdp2.py"


def test_every_example_is_run() -> None:
    """No example is left out here."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*CASES, ON_RAY}


def missing(name: str) -> list[str]:
    return [package for package in CASES[name][0] if importlib.util.find_spec(package) is None]


@pytest.fixture(scope="module")
def started(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All examples at once: most of the time of each goes into importing its framework."""
    env = {**os.environ, "EMA_SERVICE_URL": server.url, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = tmp_path_factory.mktemp("examples")
    processes = {
        name: subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), run_of(name)],
            cwd=folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in CASES
        if not missing(name)
    }
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


def run_of(name: str) -> str:
    return f"example-{os.getpid()}-{name}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CASES)
def test_example(name: str, server: Any, started: dict[str, subprocess.Popen[str]]) -> None:
    """It ends well, says what it promises, and its updates are on the service."""
    _, last, updates = CASES[name]
    if packages := missing(name):
        pytest.skip(f"{packages[0]} is not installed: pip install -e '.[integrations]'")
    out, err = started[name].communicate(timeout=200)
    assert started[name].returncode == 0, err
    assert out.splitlines()[-1].startswith(last), out
    with EmaClient(server.url) as client:
        assert client.run(run_of(name)).num_updates == updates
