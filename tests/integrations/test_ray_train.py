"""The example of Ray Train beside a cluster that Ray has placed: found by name, bit for bit LitEma. Needs ray[train].

Knows commands and what they print. Does not know Ray, or how the example trains.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MISSING = [name for name in ("ray", "pandas", "pyarrow") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason="Ray Train is not installed: pip install 'ray[train]>=2.50'"),
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore"),  # of Ray's own modules
    pytest.mark.timeout(400),
]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a Ray of this process' own, with a cluster of two hosts."""
    from ema_service.cluster.launching.ray_launcher import local_ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with local_ray(cpus=8) as found:
            try:
                cluster("up", found, "--shards", "2", "--host", "127.0.0.1", "--dir", str(tmp_path / "data"))
                yield found
            finally:
                cluster("down", found)


def cluster(what: str, address: str, *words: str) -> None:
    """``ema-service cluster up`` or ``down``."""
    command = [sys.executable, "-m", "ema_service", "cluster", what, "--ray", address, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_workers_of_ray_train(address: str, tmp_path: Path) -> None:
    """Two workers send their own shards of an FSDP2 model; the EMA is that of LitEma in process."""
    home = {"HOME": str(tmp_path), "RAY_ADDRESS": address, "CUDA_VISIBLE_DEVICES": "", "EMA_SERVICE_URL": "ray://ema"}
    if (secret := Path.home() / ".ray" / "auth_token").exists():  # Ray's own, where its clusters ask for one
        home["RAY_AUTH_TOKEN_PATH"] = str(secret)
    command = [sys.executable, str(HERE / "programs" / "witnessed_ray_train.py"), "r", str(tmp_path / "verdict")]
    environment = {**os.environ, **home}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "verdict").read_text() == "10 updates, 4 tensors: bit-identical"
    assert done.stdout.splitlines()[-1] == "num_updates: 10, 4 tensors"
