"""TLS between all programs of a cluster, with real certificates: the flags, what is said of a certificate that is not
accepted and of HTTP where TLS is spoken, and a certificate that is renewed.

Knows the programs' command lines and logs. Does not know the TLS of a server alone (tests/service/api/test_tls.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from torch import Tensor
from typer.testing import CliRunner

from ema_client import EmaClient
from ema_client.errors import Overloaded
from ema_service.cluster import Arrival, Change, ClusterToken
from ema_service.cluster.gateway.hosts import Hosts as GatewayHosts
from ema_service.cluster.hosting.asking import Asking
from ema_service.cluster.hosting.link import Link
from ema_service.cluster_cli import cluster as commands
from ema_service.tls import trusting
from tests.service.cluster.launched import Launched
from tests.service.cluster.test_launched import assert_is
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import Certificate, LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]

TOKEN = ClusterToken("a-token-of-the-tests")


@pytest.fixture
def trusted(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, and those that it starts, trust the authority of the tests."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    trusting.cache_clear()
    yield
    trusting.cache_clear()


def issued(authority: trustme.CA, folder: Path, *names: str, days: int = 1) -> tuple[str, ...]:
    """The flags of a certificate for these names, which the authority has signed."""
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    made = authority.issue_cert(*names, not_after=until)
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    return "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)


@contextlib.contextmanager
def coordinator(folder: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """The URL and the process of a coordinator, within the block."""
    token, log = folder / "token", folder / "coordinator.log"
    token.write_text(f"{TOKEN.header.split()[1]}\n")
    command = ["-m", "ema_service", "cluster", "coordinator", "--port", "0", "--cluster-token-file", str(token), *flags]
    with log.open("w") as out, subprocess.Popen([sys.executable, "-u", *command], stdout=out, stderr=out) as process:
        try:
            wait_until(lambda: "listens on" in log.read_text() or process.poll() is not None, "the coordinator")
            found = re.search(r"listens on (\S+)", log.read_text())
            assert found, log.read_text()
            yield found[1], process.pid
        finally:
            process.kill()


# --- all of a cluster ------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    made: list[Launched] = []

    def make(*flags: str, **more: Path) -> Launched:
        made.append(Launched(tmp_path / "c", *flags, **more))
        return made[-1].start()

    yield make
    for each in made:
        each.end()


def trained(url: str, run: str, model: Model, oracle: LitEmaOracle) -> None:
    """A run that is LitEma's, with small bodies and, past the gateway, large ones."""
    with EmaClient(url) as client:
        client.create_run(run, model(0), decay=0.9)
        for step in (1, 2):
            client._pushes._stretched_above = client._pulls._pulls._split_above = 1 << (step * 4)
            client.push(run, model(step), step=step)
            oracle.update(model(step))
            assert_is(client, run, oracle)
        assert client._hosts.known(run), "nothing went past the gateway"


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("trusted")
def test_a_cluster_that_speaks_tls_alone(
    launched: Callable[..., Launched],
    certificate: Certificate,
    run_name: str,
    model: Model,
    litema: type[LitEmaOracle],
) -> None:
    """All of its addresses are https://, and whoever is not told to trust its authority is told how."""
    found = launched("--local", "2", *certificate.flags)
    assert found.url.startswith("https://127.0.0.1:")
    trained(found.url, run_name, model, litema(model(0), decay=0.9))
    assert len(re.findall(r"listens on https://", found.log)) == 5  # four programs, and the cluster
    assert "listens on http://" not in found.log
    assert "listens to the coordinator https://" in found.log


@pytest.mark.usefixtures("trusted")
@pytest.mark.soak
def test_replicas_speak_tls(certificate: Certificate, launched: Callable[..., Launched], model: Model) -> None:
    """To the coordinator, to their hosts, and to whoever reads them: they are listed once they are filled."""
    cluster = launched("--local", "2", "--replicas", "1", *certificate.flags)
    with EmaClient(cluster.url) as client:
        client.create_run("r", model(0))
        context = ssl.create_default_context(cafile=certificate.authority)

        def replicas() -> list[str]:
            with urllib.request.urlopen(f"{cluster.url}/v1/runs/r/shards", context=context) as answer:
                return [url for shard in json.load(answer)["shards"] for url in shard["replicas"]]

        wait_until(lambda: len(replicas()) == 2, "both replicas")
        assert all(url.startswith("https://") for url in replicas())


@pytest.mark.usefixtures("trusted")
@pytest.mark.soak
def test_a_twin_is_filled_over_tls(certificate: Certificate, launched: Callable[..., Launched], model: Model) -> None:
    """A host whose disk is lost copies what its twin has."""
    cluster = launched("--local", "2", "--twins", *certificate.flags)
    with EmaClient(cluster.url) as client:
        client.create_run("r", model(0))
        cluster.kill("host 1", wait=False)
        shutil.rmtree(cluster.folder / "host-1", ignore_errors=True)
        wait_until(lambda: "run r is filled from its twin" in cluster.log, "the filled host", 60)
        client.push("r", model(1), step=1)


@pytest.mark.soak
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("trusted")
def test_hosts_of_other_machines(
    launched: Callable[..., Launched],
    certificate: Certificate,
    tmp_path: Path,
    run_name: str,
    model: Model,
    litema: type[LitEmaOracle],
) -> None:
    """They get certificate and authority on their command line, for their environment is their own, and are known by
    the names that their certificates are for."""
    reach, command = tmp_path / "reach", tmp_path / "bin" / "ema-service"
    command.parent.mkdir()
    reach.write_text('#!/bin/sh\nshift\nunset SSL_CERT_FILE\nexec sh -c "$*"\n')
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ema_service "$@"\n')
    for each in (reach, command):
        each.chmod(0o700)
    flags = ["--hosts", "localhost,localhost", "--through", str(reach), "--announce", "localhost", *certificate.flags]
    found = launched(*flags, "--", "--insecure-no-auth", programs=command.parent)
    trained(found.url, run_name, model, litema(model(0), decay=0.9))
    assert len(re.findall(r"host \d \| ema-service \S+ listens on https://localhost:", found.log)) == 2


def test_a_launcher_that_does_not_trust_its_gateway(certificate: Certificate, tmp_path: Path) -> None:
    """Ends, with what to do, and leaves nobody running; it does not wait for what can never come."""
    command = Launched(tmp_path / "c", "--local", "1", *certificate.flags).command()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "SSL_CERT_FILE=/path/to/ca.pem" in ended.stderr.splitlines()[-1]


# --- what is said where TLS fails ------------------------------------------------------------------------------------


def of_nobody_trusted(folder: Path) -> tuple[str, ...]:
    return issued(trustme.CA(), folder, "localhost", "127.0.0.1")


def out_of_date(folder: Path) -> tuple[str, ...]:
    return issued(_authority(folder), folder, "localhost", "127.0.0.1", days=-1)


def for_another(folder: Path) -> tuple[str, ...]:
    return issued(_authority(folder), folder, "elsewhere.example")


def plain(_: Path) -> tuple[str, ...]:
    return ()


def right(folder: Path) -> tuple[str, ...]:
    return issued(_authority(folder), folder, "localhost", "127.0.0.1")


def _authority(folder: Path) -> trustme.CA:
    """An authority that this process trusts from here on, and alone."""
    authority = trustme.CA()
    folder.mkdir(exist_ok=True)
    (folder / "authority.pem").write_bytes(authority.cert_pem.bytes())
    os.environ["SSL_CERT_FILE"] = str(folder / "authority.pem")
    trusting.cache_clear()
    return authority


FAULTS = pytest.mark.parametrize(
    ("flags", "scheme", "said"),
    [
        (of_nobody_trusted, "https", "SSL_CERT_FILE=/path/to/ca.pem"),
        (out_of_date, "https", "certificate is out of date (certificate has expired): renew it"),
        (for_another, "https", "certificate is for other names"),
        (plain, "https", "no TLS is spoken there: say http:// instead of https://"),
        (right, "http", "if TLS is spoken there, say https:// instead of http://"),
    ],
)


@FAULTS
@pytest.mark.usefixtures("trusted")
def test_where_tls_fails(
    flags: Callable[[Path], tuple[str, ...]],
    scheme: str,
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A host's listening and asking, and a gateway, each say it in one line, with what to do, and go on trying."""
    caplog.set_level(logging.INFO)
    with coordinator(tmp_path, *flags(tmp_path / "tls")) as (url, _):
        url = re.sub(r"^https?", scheme, url)
        tries: list[Arrival] = []

        def arrival() -> Arrival:
            tries.append(Arrival(0, 2, "a"))
            return tries[-1]

        link = Link(url, "r", arrival, TOKEN, lambda _: None)
        link.start()
        wait_until(lambda: len(tries) > 3, "some tries")
        link.close()
        told = [each.message for each in caplog.records]
        assert len(told) == 1
        assert said in told[0]
        with pytest.raises(Overloaded) as asked:
            asyncio.run(_change(url))
        assert said in asked.value.detail
        with pytest.raises(Overloaded) as mapped:
            asyncio.run(_map(url))
        assert said in mapped.value.detail
        assert [said in each.message for each in caplog.records[1:] if "where the hosts are" in each.message] == [True]


async def _change(url: str) -> None:
    asking = Asking([url], TOKEN, seconds=0.5)
    try:
        await asking.change("r", Change("k", "{}"))
    finally:
        await asking.close()


async def _map(url: str) -> None:
    hosts = GatewayHosts([url], TOKEN)
    try:
        for _ in range(2):
            with contextlib.suppress(Overloaded):
                await hosts.all()
        await hosts.all()
    finally:
        await hosts.close()


# --- certificates that change, and flags -----------------------------------------------------------------------------


def test_a_renewed_certificate(tmp_path: Path) -> None:
    """Is shown from SIGHUP on, to who comes without a name of the server too; and one that cannot be used changes
    nothing."""
    authority = trustme.CA()
    flags = issued(authority, tmp_path / "tls", "127.0.0.1")
    with coordinator(tmp_path, *flags) as (url, pid):
        first = _shown(url)
        issued(authority, tmp_path / "tls", "127.0.0.1", days=2)
        assert _shown(url) == first
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: _shown(url) != first, "the new certificate")
        renewed = _shown(url)
        Path(flags[3]).write_text("no key")
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: "the certificate stays" in (tmp_path / "coordinator.log").read_text(), "a line")
        assert _shown(url) == renewed


def _shown(url: str) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = url.partition("//")[2].partition(":")
    with socket.create_connection((host, int(port)), 10) as sock, context.wrap_socket(sock) as secure:
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")


@pytest.mark.parametrize("flag", ["--ssl-certfile", "--ssl-keyfile"])
@pytest.mark.parametrize(
    "words",
    [["coordinator"], ["gateway", "--coordinator", "https://h:1"], ["up", "--local", "1", "--dir", "/nowhere/at/all"]],
)
def test_one_without_the_other(words: list[str], flag: str, certificate: Certificate, tmp_path: Path) -> None:
    """A certificate without its key, or a key without its certificate, is a mistake of the command line."""
    (tmp_path / "token").write_text("a-token-of-the-tests\n")
    token = [] if words[0] == "up" else ["--cluster-token-file", str(tmp_path / "token")]
    ended = CliRunner().invoke(commands, [*words, *token, flag, str(certificate.cert)])
    assert ended.exit_code == 2
    assert "come together" in ended.stderr


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """End the start in one line."""
    (tmp_path / "token").write_text("a-token-of-the-tests\n")
    words = ["coordinator", "--cluster-token-file", str(tmp_path / "token"), "--ssl-certfile", "/no", "--ssl-keyfile"]
    ended = CliRunner().invoke(commands, [*words, "/no"])
    assert ended.exit_code == 1
    assert ended.stderr.splitlines() == ["ema-service: --ssl-certfile /no: No such file or directory"]
