"""The unit for systemd: what systemd says of it, and what the server tells the service manager.

systemd itself does not run here: its own checker reads the unit, and a socket plays the manager.
"""

from __future__ import annotations

import configparser
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

UNIT = Path(__file__).parents[2] / "docker" / "systemd" / "ema-service.service"


@pytest.fixture
def analyze(tmp_path: Path) -> Callable[..., str]:
    """Have systemd-analyze look at the unit, with a program that is there in the place of the installed one."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze, of the package systemd, is not installed")
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/opt/ema-service/bin/ema-service", sys.executable))

    def run(*words: str) -> str:
        done = subprocess.run([program, *words, here], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_unit_is_one(analyze: Callable[..., str]) -> None:
    """systemd takes every line of the unit; its own measure calls the exposure of the service low."""
    assert "ema-service" not in analyze("verify")
    if "--offline" in subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True, check=True).stdout:
        analyze("security", "--offline=true", "--threshold=40", "--no-pager")


def test_command_is_one(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """The unit's command, in folders of the test's, starts a server; nothing that the server needs is denied."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    (tmp_path / "ema-service").mkdir()
    words = shlex.split(service["ExecStart"].replace("%S", str(tmp_path)).replace("%t", str(tmp_path)))
    assert words[:2] == ["/opt/ema-service/bin/ema-service", "serve"]
    server = start_server(*words[2:])
    assert (tmp_path / "ema-service" / "address").read_text().startswith("unix://")
    assert (tmp_path / "ema-service" / "catalog.db").exists()
    assert server.stop() == 0
    assert {"MemoryDenyWriteExecute", "PrivateDevices", "DynamicUser", "PrivateIPC"}.isdisjoint(service)


@pytest.mark.parametrize("abstract", [False, True])
def test_manager_is_told(
    start_server: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    """The server says that it is ready once it listens, and that it stops; a manager that is gone ends no server."""
    name = f"@ema-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(30)
        manager.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        server = start_server(memory=True)
        assert manager.recv(4096).decode() == f"READY=1\nSTATUS=listens on {server.url}"
        with server.http() as http:
            assert http.get("/readyz").status_code == 200
        if not abstract:
            assert server.stop() == 0
            assert manager.recv(4096).startswith(b"STOPPING=1\n")
    if abstract:
        assert server.stop() == 0
        assert "the service manager cannot be told" in server.log
