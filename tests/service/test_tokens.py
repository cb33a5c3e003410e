"""The life of a token: made, listed, expired, revoked; read again by a server that runs. A certificate likewise.

Knows the command and the file as an operator has them, and clients. Does not know how a token is compared (test_auth).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import trustme
from typer.testing import CliRunner, Result

from ema_client import EmaClient, RemoteEma
from ema_client.errors import Forbidden
from ema_service.cli import app
from ema_service.tokens import TokenFileError, Tokens, create_token, read_token_file, revoke_token
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

README = Path(__file__).resolve().parents[2] / "README.md"


def typed(line: str, folder: Path) -> Result:
    """What the command answers to a line of a shell, in a folder."""
    program, *words = shlex.split(line, comments=True)
    assert program == "ema-service"
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, words)
    finally:
        os.chdir(before)


def status(server: ServerProcess, token: str) -> int:
    return httpx.get(f"{server.url}/v1/runs", headers={"Authorization": f"Bearer {token}"}).status_code


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """The README's lines about tokens."""
    return re.findall(r"^ema-service .*--token-file tokens.*$", README.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def trainers_token(lines: list[str], folder: Path) -> str:
    return typed(lines[0], folder).stdout.strip()


@pytest.fixture(scope="module")
def server(
    folder: Path, trainers_token: str, lines: list[str], server_class: type[ServerProcess]
) -> Iterator[ServerProcess]:
    """Started as the README says."""
    assert trainers_token
    assert lines[2] == "ema-service serve --token-file tokens"
    running = server_class(folder, ("--token-file", str(folder / "tokens")), folder / "data").start()
    yield running
    running.stop()


def test_readmes_token_trains(server: ServerProcess, trainers_token: str) -> None:
    """With the README's token alone a RemoteEma does all that it does: train, read, evaluate, checkpoint, resume."""
    torch.manual_seed(0)
    model, named = torch.nn.Linear(3, 2), {"url": server.url, "token": trainers_token, "decay": 0.5}
    with RemoteEma(model, run="cogview-1", **named) as ema:  # type: ignore[arg-type]
        ema(model)
        assert ema.num_updates == 1
        with ema.scope(model):
            pass
        state = ema.state_dict()
        ema(model)
    with RemoteEma(model, run="cogview-1", resume="auto", state=state, **named) as resumed:  # type: ignore[arg-type]
        resumed(model)
        resumed.copy_to(model)
        assert resumed.num_updates == 2
    with EmaClient(server.url, token=trainers_token) as client:
        client.snapshot("cogview-1", "kept")
        with pytest.raises(Forbidden, match="admin"):
            client.delete_run("cogview-1")
        with pytest.raises(Forbidden, match="other"):
            client.run("other")


def test_file_is_read_again(server: ServerProcess, trainers_token: str, folder: Path) -> None:
    """SIGHUP ends no server: a token made since is known, a revoked one is not, a broken file changes nothing, an
    empty one lets nobody in. Updates in hand go on, and the log says what was read."""
    file = folder / "tokens"
    kept = file.read_text()
    later = create_token(file, ["pull"], "*")
    assert (status(server, trainers_token), status(server, later)) == (200, 401)

    hangup = 0

    def reload() -> None:
        nonlocal hangup
        hangup += 1
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.log.count("tokens were read") + server.log.count("stay as they were") == hangup)

    reload()
    assert (status(server, trainers_token), status(server, later)) == (200, 200)
    names = {grant.scopes: grant.name for grant in read_token_file(file)}
    assert typed(f"ema-service token revoke {names[frozenset(['pull'])]} --token-file tokens", folder).exit_code == 0
    reload()
    assert (status(server, trainers_token), status(server, later)) == (200, 401)
    file.write_text(f"{kept}what is this\n")
    reload()
    assert status(server, trainers_token) == 200
    assert "line 2: expected the SHA-256" in server.log
    file.write_text("# nobody\n")
    reload()
    assert status(server, trainers_token) == 401
    file.write_text(kept)
    reload()
    assert status(server, trainers_token) == 200
    assert trainers_token not in server.log
    assert kept.split()[0] not in server.log


def test_certificate_is_read_again(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    """After SIGHUP new connections see the new certificate; one that is not its key's leaves the one before."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def issue() -> trustme.LeafCert:
        issued = trustme.CA().issue_cert("127.0.0.1")
        cert.write_bytes(issued.cert_chain_pems[0].bytes())
        return issued

    def shown() -> bytes:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        where = urlsplit(server.url)
        raw = socket.create_connection((where.hostname, where.port), timeout=10)
        with raw, context.wrap_socket(raw) as secure:
            return secure.getpeercert(binary_form=True) or b""

    key.write_bytes(issue().private_key_pem.bytes())
    server = start_server("--ssl-certfile", str(cert), "--ssl-keyfile", str(key), memory=True)
    first, issued = shown(), issue()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "the certificate stays as it was" in server.log)
    assert shown() == first
    key.write_bytes(issued.private_key_pem.bytes())
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "the certificate was read" in server.log)
    assert shown() == ssl.PEM_cert_to_DER_cert(cert.read_text())
    assert server.stop() == 0


def test_list_and_revoke(tmp_path: Path) -> None:
    """The list names tokens by what nobody can log in with; revoking takes the one that is named, and no other."""
    file = tmp_path / "tokens"
    made = "--scope pull --run 'cog*' --expires 30d --remark 'the cluster of Ann' --token-file tokens"
    token = typed(f"ema-service token create {made}", tmp_path).stdout.strip()
    create_token(file, ["train"], "*")
    lines = typed("ema-service token list --token-file tokens", tmp_path).stdout.splitlines()
    assert [line.split()[1:3] for line in lines[1:]] == [["pull", "cog*"], ["train", "*"]]
    assert lines[1].endswith("Z  the cluster of Ann")
    assert token not in "".join(lines)
    name = lines[1].split()[0]
    for wrong in ("zz", "0" * 64):
        refused = typed(f"ema-service token revoke {wrong} --token-file tokens", tmp_path)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert "token list" in refused.stderr
    assert typed(f"ema-service token revoke {name} --token-file tokens", tmp_path).exit_code == 0
    assert [grant.scopes for grant in read_token_file(file)] == [{"train"}]
    assert typed("ema-service token list", tmp_path).exit_code == 1
    assert typed("ema-service token create --scope pull --expires soon", tmp_path).exit_code == 2


def test_revoking_leaves_every_other_line(tmp_path: Path) -> None:
    """Comments, indented lines and the same token twice: all lines of one token go, no other byte changes."""
    file = tmp_path / "tokens"
    create_token(file, ["pull"], "a*")
    create_token(file, ["pull"], "b*")
    first, second = file.read_text().splitlines()
    file.write_text(f"# {first}\n  {first}\n\n{second}\n{first} once more\n")
    assert revoke_token(file, first[:12]).runs == "a*"
    assert file.read_text() == f"# {first}\n  #{first[1:]}\n\n{second}\n#{first[1:]} once more\n"


@pytest.mark.parametrize(
    ("runs", "remark"), [("", ""), ("a b", ""), ("*", "expires=2027-01-31T12:00:00Z"), ("*", "expires=never")]
)
def test_line_that_would_say_something_else(tmp_path: Path, runs: str, remark: str) -> None:
    """What would be read as another token than was meant is not written: such a file would start no server."""
    with pytest.raises(TokenFileError):
        create_token(tmp_path / "tokens", ["pull"], runs, remark=remark)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("line", ["", "# only a comment\n"])
def test_server_wants_a_token_at_the_start(tmp_path: Path, line: str) -> None:
    """A file without any token is refused at the start: nobody could ever ask for anything."""
    (tmp_path / "tokens").write_text(line)
    with pytest.raises(TokenFileError, match="token create"):
        Tokens(tmp_path / "tokens")


def test_token_expires(tmp_path: Path, start_server: Any) -> None:
    """A token is worth something until its moment, and the refusal says when that was."""
    file = tmp_path / "tokens"
    create_token(file, ["pull"], "*")
    short = create_token(file, ["pull"], "*", expires=int(time.time()) + 3600)
    past = create_token(file, ["pull"], "*", expires=1_000_000_000)
    server = start_server("--token-file", str(file), memory=True)
    assert status(server, short) == 200
    answer = httpx.get(f"{server.url}/v1/runs", headers={"Authorization": f"Bearer {past}"})
    assert (answer.status_code, answer.json()["detail"]) == (401, "this token expired at 2001-09-09T01:46:40Z")
