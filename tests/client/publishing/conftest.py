"""A server that speaks S3, for tests of what is published there.

Knows moto, which is a program of its own here. Does not know what is published.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_LISTENS = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
_START_SECONDS = 60.0


class S3Server:
    """moto's server as a process. url: where it listens. environ: what AWS' tools are told of it by."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as out:
            words = ("-c", "from moto.server import main; main(['-p', '0'])")
            self._process = subprocess.Popen((sys.executable, *words), stdout=out, stderr=out)
        deadline = time.monotonic() + _START_SECONDS
        while not (found := _LISTENS.search(log.read_text())):
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        self.url = found[1]
        self.environ = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def start_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], S3Server]]:
    """Start servers of S3, which are ended after the module's tests."""
    for package in ("s3fs", "moto"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[publish,test]'")
    started: list[S3Server] = []

    def start() -> S3Server:
        started.append(S3Server(tmp_path_factory.mktemp("s3") / "log"))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def s3(start_s3: Callable[[], S3Server]) -> Iterator[S3Server]:
    """One server of S3 for a module's tests, which the environment names while they run."""
    running = start_s3()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in running.environ.items():
            patched.setenv(name, value)
        patched.delenv("AWS_PROFILE", raising=False)
        yield running
    assert os.environ.get("AWS_ENDPOINT_URL") != running.url
