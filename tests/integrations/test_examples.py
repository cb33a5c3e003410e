"""The examples run as a reader would run them, each with its real framework beside a real server.

Knows their names, what each needs, and what each says at its end. Does not know frameworks.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
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


def test_every_example_is_run() -> None:
    """No example is left out here."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_example(name: str, server: Any, run_name: str, tmp_path: Path) -> None:
    """It ends well, says what it promises, and its updates are on the service."""
    needed, last, updates = CASES[name]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[integrations]'")
    env = {**os.environ, "EMA_SERVICE_URL": server.url, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name), run_name]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(last), done.stdout
    with EmaClient(server.url) as client:
        assert client.run(run_name).num_updates == updates
