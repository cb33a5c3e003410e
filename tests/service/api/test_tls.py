"""TLS from end to end: the flags, real certificates, what clients say of one they do not trust.

Bodies cut anywhere, aborts and keep-alive over TLS are in transfer/test_filling.py. Knows the command, and clients of
it. Does not know the server's code.
"""

from __future__ import annotations

import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
import trustme
from typer.testing import CliRunner, Result

from ema_client import EmaClient
from ema_client.errors import ProtocolError
from ema_service.cli import app

if TYPE_CHECKING:
    from tests.conftest import Certificate, ServerProcess

#: Large enough to ask first (Expect: 100-continue) and to be no single TLS record.
STATE = {"w": torch.arange(1 << 20, dtype=torch.float32), "b": torch.ones(3)}


@pytest.fixture(scope="module")
def secure(
    tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess], certificate: Certificate
) -> Iterator[ServerProcess]:
    running = server_class(tmp_path_factory.mktemp("secure"), certificate.flags).start()
    yield running
    running.stop()


@pytest.fixture
def trusting(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSL_CERT_FILE names the authority, as a user of a private one would have it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))


def test_it_says_https(secure: ServerProcess) -> None:
    """The announced addresses are the ones that work."""
    assert re.fullmatch(r"https://127\.0\.0\.1:\d+", secure.url)
    assert f"dashboard  {secure.url}/" in secure.log


@pytest.mark.usefixtures("trusting")
def test_the_client_over_tls(secure: ServerProcess, run_name: str) -> None:
    """Control, pushes, pulls and downloads work with an authority named by SSL_CERT_FILE alone."""
    with EmaClient(secure.url) as client:
        client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
        assert client.push(run_name, {name: tensor + 2 for name, tensor in STATE.items()}, step=1).applied
        pulled = client.pull(run_name)

        assert client.run(run_name).step == 1
    for name, tensor in STATE.items():
        assert torch.equal(pulled[name], tensor - 0.5 * (tensor - (tensor + 2)))


def test_a_certificate_nobody_vouches_for(secure: ServerProcess, run_name: str) -> None:
    """Control and bulk connections both refuse an unknown authority, and say how to name one; nothing is sent."""
    with EmaClient(secure.url) as client:
        for ask in (client.runs, lambda: client.pull(run_name), lambda: client.push(run_name, STATE, step=1)):
            with pytest.raises(ProtocolError, match="SSL_CERT_FILE") as caught:
                ask()
            assert "verify failed" in caught.value.detail


@pytest.mark.usefixtures("trusting")
def test_a_certificate_for_another_host(secure: ServerProcess) -> None:
    """A certificate that is trusted but for somewhere else is refused, at once."""
    port = secure.url.rsplit(":", 1)[1]
    # The same address, by a name that the certificate does not have.
    with EmaClient(f"https://127.1:{port}") as client, pytest.raises(ProtocolError, match="verify failed") as caught:
        client.runs()
    assert "127.1" in caught.value.detail


def test_plain_http_at_a_tls_port(secure: ServerProcess) -> None:
    """Who forgets the s gets an error, and no word of any run."""
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        httpx.get(secure.url.replace("https", "http") + "/v1/runs")
    address = secure.url.rsplit("/", 1)[1].split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP/1.1" not in raw.recv(1000)


def test_the_unix_socket_beside_tls_is_plain(secure: ServerProcess, run_name: str) -> None:
    """The Unix socket never leaves the machine: no TLS, this user only, the same runs."""
    assert stat.S_IMODE((secure.folder / "ema.sock").stat().st_mode) == 0o600
    with EmaClient(secure.uds) as client:
        client.create_run(run_name, STATE)
        assert client.push(run_name, STATE, step=1).applied


def serve(*flags: object) -> Result:
    return CliRunner().invoke(app, ["serve", "--memory", "--port", "0", *map(str, flags)])


def unreadable(certificate: Certificate, _: Path) -> tuple[Path, Path]:
    return certificate.cert.with_name("nothing.pem"), certificate.key


def of_another(certificate: Certificate, folder: Path) -> tuple[Path, Path]:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(folder / "other.pem")
    return certificate.cert, folder / "other.pem"


def no_pem(certificate: Certificate, folder: Path) -> tuple[Path, Path]:
    (folder / "text.pem").write_text("this is no certificate")
    return folder / "text.pem", certificate.key


def exchanged(certificate: Certificate, _: Path) -> tuple[Path, Path]:
    return certificate.key, certificate.cert


def encrypted(certificate: Certificate, folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as to

    key = to.load_pem_private_key(certificate.key.read_bytes(), None)
    form, scheme = to.PrivateFormat.PKCS8, to.BestAvailableEncryption(b"secret")
    (folder / "locked.pem").write_bytes(key.private_bytes(to.Encoding.PEM, form, scheme))
    return certificate.cert, folder / "locked.pem"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (unreadable, "No such file"),
        (of_another, "is not the key of"),
        (no_pem, "PEM"),
        (exchanged, "PEM"),
        (encrypted, "encrypted"),
    ],
)
def test_files_that_cannot_be_used(
    make: Callable[[Certificate, Path], tuple[Path, Path]], word: str, certificate: Certificate, tmp_path: Path
) -> None:
    """A missing, mismatched, unreadable or locked file ends the start in one line that names it."""
    cert, key = make(certificate, tmp_path)
    ended = serve("--ssl-certfile", cert, "--ssl-keyfile", key)

    assert ended.exit_code == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("ema-service: ")
    assert word in ended.stderr
    assert str(cert) in ended.stderr or str(key) in ended.stderr


@pytest.mark.parametrize("flag", ["--ssl-certfile", "--ssl-keyfile"])
def test_one_without_the_other(flag: str, certificate: Certificate) -> None:
    """A certificate without its key, or a key without its certificate, is a mistake of the command line."""
    ended = serve(flag, certificate.cert)

    assert ended.exit_code == 2
    assert "come together" in ended.stderr
