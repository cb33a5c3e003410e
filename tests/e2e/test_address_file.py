"""A server that says in a file where it is, and programs that look there. Knows processes and the public client."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_service.address_file import AddressFile
from ema_service.addresses import announced

if TYPE_CHECKING:
    from tests.conftest import Certificate, LitEmaOracle, ServerProcess


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shared" / "address"


@pytest.fixture
def start(start_server: Callable[..., ServerProcess], file: Path) -> Callable[..., ServerProcess]:
    """A server with the file; one that asks nobody for a token."""
    file.parent.mkdir()
    return lambda *flags, **options: start_server("--address-file", str(file), "--insecure-no-auth", *flags, **options)


def test_trainer_finds_a_server_that_moved(
    start: Callable[..., ServerProcess], file: Path, litema: type[LitEmaOracle], run_name: str
) -> None:
    """A training goes on bit for bit over a killed server's end, and one's that stopped, each back at another port."""
    server = start()
    model = nn.Linear(6, 5)
    oracle = litema(dict(model.named_parameters()))
    with RemoteEma(model, run=run_name, url=file.as_uri()) as ema:
        places = [server.url]
        for end in (server.kill, server.stop, None):
            for _ in range(3):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += torch.randn_like(parameter)
                ema(model)
                oracle.update(dict(model.named_parameters()))
            if end:
                ema.flush()
                end()
                assert file.exists() == (end == server.kill)
                places.append(server.start().url)
        assert len(set(places)) == 3
        assert ema.num_updates == 9
        assert ema.stats.failed == 0
    with EmaClient(file.as_uri()) as client:
        for name, tensor in client.pull(run_name).items():
            assert torch.equal(tensor, oracle.shadow[name])


def test_address_is_the_one_for_most_clients(
    start: Callable[..., ServerProcess], file: Path, certificate: Certificate
) -> None:
    """The file has the URL for other machines, with the scheme that is spoken; on loopback the socket: it is faster."""
    server = start(memory=True)
    assert file.read_text() == f"{server.uds}\n"
    assert "for clients on this machine" in server.log
    assert [path.name for path in file.parent.iterdir()] == ["address"]
    server.stop()
    assert not list(file.parent.iterdir())

    server = start("--host", "0.0.0.0", *certificate.flags, memory=True)
    assert file.read_text() == f"{server.url}\n"
    assert server.url.startswith("https://")
    assert server.url.rpartition(":")[0] == announced("0.0.0.0", 1, secure=True).rpartition(":")[0]

    other = start("--announce", "https://ema.example/behind", memory=True)
    assert file.read_text() == "https://ema.example/behind\n"
    server.stop()
    assert file.exists(), "the file is another server's by now"
    other.stop()


def test_permissions_are_those_of_the_umask(file: Path) -> None:
    """Others may read the file, which holds no secret, as far as the umask of the server's user says."""
    file.parent.mkdir()
    told = AddressFile(file, "http://node-7:8470")
    told.show()
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    told.withdraw()


def test_file_that_cannot_be_written(start: Callable[..., ServerProcess], file: Path) -> None:
    """A server that could not tell where it is does not start, and says which file it is about."""
    file.parent.rmdir()
    with pytest.raises(RuntimeError, match=r"the address file .*/address cannot be written: No such file"):
        start(memory=True)


def test_file_of_a_killed_server_misleads_nobody(start: Callable[..., ServerProcess], file: Path) -> None:
    """A start that fails after its address was known leaves no file, not even an earlier server's."""
    start(memory=True).kill()
    assert file.exists()
    with pytest.raises(RuntimeError, match="device"):
        start("--device", "cuda:99", memory=True)
    assert not list(file.parent.iterdir())
