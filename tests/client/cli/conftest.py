"""The command ``ema`` in this process.

Knows how a command is called and what it prints. Does not know any command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_client.cli import main

Ema = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ema(server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ema:
    """Run the command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("EMA_SERVICE_URL", server.url)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ema", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (int(code) if code else 0, *capsys.readouterr())

    return run
