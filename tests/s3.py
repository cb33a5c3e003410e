"""A server that speaks S3, for tests of what is kept there: moto's, as a program of its own.

Knows moto, which forgets everything when it ends. Does not know what is kept.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["S3Server", "named_by_the_environment", "needs_s3"]

_LISTENS = re.compile(r"Running on (http://127\.0\.0\.1:(\d+))")
_START_SECONDS = 60.0


def needs_s3() -> None:
    """Skip the test where the server, or what speaks to it, is not installed."""
    for package in ("s3fs", "moto"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[publish,test]'")


class S3Server:
    """moto's server as a process. url: where it listens. environ: what AWS' tools are told of it by."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._port = 0
        self.start()
        self.environ = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start it, again at the port that it had; nothing is kept there then."""
        with self._log.open("wb") as out:
            words = ("-c", f"from moto.server import main; main(['-p', '{self._port}'])")
            self._process = subprocess.Popen((sys.executable, *words), stdout=out, stderr=out)
        deadline = time.monotonic() + _START_SECONDS
        while not (found := _LISTENS.search(self._log.read_text())):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)
        self.url, self._port = found[1], int(found[2])

    def pause(self) -> None:
        """SIGSTOP: connections stay, and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def refuse(self) -> None:
        """Answer 403 to everybody from now on: as of a key that is not, or no longer, known."""
        self._ask_for_keys_after("0")

    def accept(self) -> None:
        """Take any key, as at the start."""
        self._ask_for_keys_after("inf")

    def _ask_for_keys_after(self, requests: str) -> None:
        plain = {"Content-Type": "text/plain"}
        asked = urllib.request.Request(f"{self.url}/moto-api/reset-auth", requests.encode(), plain)
        with urllib.request.urlopen(asked, timeout=_START_SECONDS) as answer:
            answer.read()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def named_by_the_environment(running: S3Server) -> Iterator[S3Server]:
    """For a fixture: the server, which the environment names until the end."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in running.environ.items():
            patched.setenv(name, value)
        patched.delenv("AWS_PROFILE", raising=False)
        yield running
    assert os.environ.get("AWS_ENDPOINT_URL") != running.url
