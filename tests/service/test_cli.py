"""The command ``ema-service``: what keeps a server from starting, said in one line.

Knows flags, exit statuses and printed text. Does not know a running server; two real ones that meet are in
tests/e2e/test_restart.py.
"""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ema_service.cli import app


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """serve sets signal handlers; pytest wants its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", "--port", "0", *arguments])


def assert_one_line(ended: Result, *words: str) -> None:
    """It ended with status 1 and said why in one line, without a traceback."""
    assert isinstance(ended.exception, SystemExit), f"not foreseen: {ended.exception!r}"
    assert ended.exit_code == 1
    assert ended.stderr.startswith("ema-service: ")
    assert all(word in ended.stderr for word in words), ended.stderr


@pytest.mark.parametrize("device", ["cuda:63", "nonsense"])
def test_device_that_is_not_there(device: str) -> None:
    """A device this machine lacks, or that is none, is refused."""
    assert_one_line(serve("--memory", "--device", device))


def test_catalog_of_a_newer_version(tmp_path: Path) -> None:
    """A data dir of a newer version is refused, naming the catalog and what to do."""
    database = sqlite3.connect(tmp_path / "catalog.db")
    database.execute("PRAGMA user_version = 1000")
    database.close()

    assert_one_line(serve("--data-dir", str(tmp_path)), str(tmp_path), "1000", "upgrade")


def test_catalog_that_is_none(tmp_path: Path) -> None:
    """A catalog that is no database is refused by name."""
    (tmp_path / "catalog.db").write_bytes(b"this is no database" * 1000)

    assert_one_line(serve("--data-dir", str(tmp_path)), str(tmp_path))


def test_data_dir_that_cannot_be_made(tmp_path: Path) -> None:
    """A data dir inside a file is refused by name."""
    (tmp_path / "file").touch()

    assert_one_line(serve("--data-dir", str(tmp_path / "file" / "data")), str(tmp_path / "file"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_loopback_is_refused(host: str) -> None:
    """Listening beyond loopback without tokens is a wrong use of the flag, unless one says --insecure-no-auth."""
    ended = serve("--memory", "--host", host)

    assert ended.exit_code == 2
    assert "--insecure-no-auth" in " ".join(ended.stderr.split())


def test_address_that_is_not_ours() -> None:
    """Said so, an address that this machine has not is refused all the same, naming it."""
    assert_one_line(serve("--memory", "--host", "192.0.2.1", "--insecure-no-auth"), "192.0.2.1", "--host")
