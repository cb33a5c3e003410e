"""The sockets a server listens on.

Knows files and ports. Does not know the application behind them.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ema_service.api.server import CannotListen, _tcp, _unix


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ema.sock"


def test_unix_socket_is_private_and_removed(path: Path) -> None:
    """Only this user may connect, and the file is gone when the server is."""
    with _unix(path):
        assert path.is_socket()
        assert path.stat().st_mode & 0o077 == 0

    assert not path.exists()


def test_unix_socket_of_a_dead_server_is_replaced(path: Path) -> None:
    """A socket left behind by a killed server does not keep the next one from starting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()

    with _unix(path) as alive:
        alive.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))


def test_unix_socket_of_a_living_server_is_left_alone(path: Path) -> None:
    """A socket on which someone answers is refused by name and stays."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(CannotListen, match=r"ema\.sock.*--uds"), _unix(path):
            pass

        assert path.is_socket()


def test_file_in_the_place_of_a_socket_is_left_alone(path: Path) -> None:
    """A file that is no socket is never removed."""
    path.write_text("precious")

    with pytest.raises(CannotListen), _unix(path):
        pass
    assert path.read_text() == "precious"


def test_port_in_use_is_named() -> None:
    """A port on which someone listens is refused by number, with what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=rf"port {port}.*--port"), _tcp("127.0.0.1", port):
            pass
