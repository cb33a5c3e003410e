"""The command ``ema-service``: what keeps a server from starting, said in one line.

Knows flags, exit statuses and printed text. Does not know a running server; two real ones that meet are in
tests/e2e/test_restart.py.
"""

from __future__ import annotations

import ipaddress
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from ema_service.addresses import announced, host_of
from ema_service.cli import app
from ema_service.storage import Store

if TYPE_CHECKING:
    from tests.conftest import ServerProcess


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """serve sets signal handlers; pytest wants its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (None, None),
        ("trainer-7.cluster", "http://trainer-7.cluster:"),
        ("fd00::7", "http://[fd00::7]:"),
        ("https://ema.example/behind/", "https://ema.example/behind"),
    ],
)
def test_announced_address(name: str | None, shown: str | None) -> None:
    """All addresses of a machine are announced as one that others can use, or as they were told to be."""
    found = announced("0.0.0.0", 8470, secure=False, name=name)
    if shown is None:
        address = ipaddress.ip_address(urlsplit(found).hostname or "")
        assert not address.is_unspecified
    else:
        assert found.startswith(shown)


def test_other_addresses_are_announced_as_they_are() -> None:
    """An address, and a name, that the server was told to listen on, is the one that is announced."""
    assert announced("127.0.0.1", 80, secure=True) == "https://127.0.0.1:80"
    assert announced("::1", 80, secure=False) == "http://[::1]:80"
    assert announced("node-3", 80, secure=False) == "http://node-3:80"
    assert "[::]" not in announced("::", 80, secure=False)
    assert [host_of(name) for name in ("a.b", "fd00::7", "https://ema.example:9/x")] == [
        "a.b",
        "fd00::7",
        "ema.example",
    ]


def test_announced_address_answers(start_server: Callable[..., ServerProcess]) -> None:
    """What a server on all addresses announces reaches the server, by name too, although no token is asked for."""
    server = start_server("--host", "0.0.0.0", "--insecure-no-auth", "--announce", "ema.example", memory=True)
    port = urlsplit(server.url).port
    assert server.url == f"http://ema.example:{port}"
    here = urlsplit(announced("0.0.0.0", port or 0, secure=False)).netloc
    assert httpx.get(f"http://{here}/v1/runs").status_code == 200
    assert httpx.get(f"http://{here}/v1/runs", headers={"Host": f"ema.example:{port}"}).status_code == 200
    assert httpx.get(f"http://{here}/v1/runs", headers={"Host": "other.example"}).status_code == 421


def test_each_option_reads_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of serve has a variable of its name, but for two that Kubernetes sets; a flag comes before it."""
    options = {each.name: each for each in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    named = {name: each.envvar for name, each in options.items() if name not in ("host", "port", "help")}
    assert named == {name: f"EMA_SERVICE_{name.upper()}" for name in named}
    assert (options["host"].envvar, options["port"].envvar) == (None, None)
    monkeypatch.setenv("EMA_SERVICE_DEVICE", "nonsense")
    assert_one_line(serve("--memory"), "nonsense")
    assert_one_line(serve("--memory", "--device", "cuda:63"), "cuda:63")


@pytest.mark.parametrize("size", ["0", "much", "1GiBB", "-1GiB"])
def test_sizes_that_are_none(size: str) -> None:
    """A size is written as people write sizes; what is none is refused, with how to write one."""
    ended = serve("--memory", f"--memory-limit={size}")
    assert ended.exit_code == 2
    assert "1GiB" in ended.stderr


def test_sizes_with_units() -> None:
    """1KiB of memory is understood, and is too little."""
    assert_one_line(serve("--memory", "--memory-limit", "1KiB"), "1024 bytes of memory")


# --- a host of a cluster --------------------------------------------------------------------------------------------

MEMBER = ("--shard=0/3", "--coordinator=http://127.0.0.1:1", "--cluster-token-file")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("a-token-of-the-tests\n")
    return path


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_flags_of_a_host_come_together(left_out: int, token_file: Path) -> None:
    """Of place, coordinators and the token's file none is given without the others; the error names what is missing."""
    flags = ["--shard=0/3", "--coordinator=http://127.0.0.1:1", f"--cluster-token-file={token_file}"]
    missing = flags.pop(left_out).partition("=")[0]
    ended = serve(*flags)
    assert (ended.exit_code, missing in ended.stderr) == (2, True), ended.stderr
    alone = serve("--cluster-address=http://h:1")
    assert (alone.exit_code, "--shard" in alone.stderr) == (2, True), alone.stderr


@pytest.mark.parametrize("shard", ["3/3", "0", "-1/3", "0/0", "a/b", "00/3"])
def test_places_that_are_none(shard: str, token_file: Path) -> None:
    """Which of how many hosts is written as 0/3."""
    ended = serve(f"--shard={shard}", MEMBER[1], f"{MEMBER[2]}={token_file}")
    assert (ended.exit_code, "0/3" in ended.stderr) == (2, True), ended.stderr


def test_host_keeps_runs_on_disk(token_file: Path) -> None:
    """A host with --memory would forget what it voted for."""
    ended = serve(*MEMBER[:2], f"{MEMBER[2]}={token_file}", "--memory")
    assert (ended.exit_code, "--memory" in ended.stderr) == (2, True), ended.stderr


def test_members_that_cannot_be(tmp_path: Path, token_file: Path) -> None:
    """A token file that is not there, or whose token is none and is not told, and a coordinator's address that is none
    are refused in one line."""
    assert_one_line(serve(*MEMBER[:2], f"{MEMBER[2]}={tmp_path / 'nothing'}"), "nothing")
    assert_one_line(serve(MEMBER[0], "--coordinator=ftp://h:1", f"{MEMBER[2]}={token_file}"), "http://HOST:PORT")
    for content in (b"too short", b"a token that has spaces in it", b"\xff" * 20):
        token_file.write_bytes(content)
        ended = serve(*MEMBER[:2], f"{MEMBER[2]}={token_file}")
        assert_one_line(ended, str(token_file))
        assert content.decode(errors="replace") not in ended.stderr


def test_data_dir_of_another_host(tmp_path: Path, token_file: Path) -> None:
    """A host's data dir is no other host's, and none of a server that decides alone; nor the other way round."""
    folder = tmp_path / "data"
    store = Store(folder)
    store.be_host((1, 3))
    store.close()
    member = (MEMBER[1], f"{MEMBER[2]}={token_file}", f"--data-dir={folder}")
    assert_one_line(serve("--shard=0/3", *member), "host 1 of 3", "--shard 1/3")
    assert_one_line(serve(f"--data-dir={folder}"), "host 1 of 3", "--shard 1/3")
    other = Store(tmp_path / "other")
    other.add_run("r", "{}", 1.5)
    other.close()
    assert_one_line(serve("--shard=0/3", *member[:2], f"--data-dir={tmp_path / 'other'}"), "another --data-dir")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--replica-token-file=t",), "--replica-of"),
        (("--replica-of=http://h:1", "--shard=0/3", *MEMBER[1:2], "--cluster-token-file={token}"), "--shard"),
        (("--replica-of=http://h:1", "--snapshot-store=s"), "--snapshot-store"),
        (("--replica-of=3/3", *MEMBER[1:2], "--cluster-token-file={token}"), "0/3"),
        (("--replica-of=0/3",), "--coordinator"),
    ],
)
def test_flags_that_make_no_replica(flags: tuple[str, ...], says: str, token_file: Path) -> None:
    """Each is refused with what is missing, or too much."""
    ended = serve(*(flag.format(token=token_file) for flag in flags))
    assert (ended.exit_code, says in ended.stderr) == (2, True), ended.stderr


def test_a_replica_of_a_host_takes_the_flags_of_hosts(tmp_path: Path, token_file: Path) -> None:
    """Launchers give all of them: it keeps no snapshots, and the store of its host's is none of its business."""
    flags = MEMBER[1], f"{MEMBER[2]}={token_file}", "--snapshot-store=nonsense://b", f"--token-file={tmp_path / 'none'}"
    assert_one_line(serve("--replica-of=0/3", *flags), str(tmp_path / "none"))


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h/path", "http://u:p@h"])
def test_urls_that_lead_to_no_original(url: str) -> None:
    """They are refused at the start, in one line."""
    assert_one_line(serve(f"--replica-of={url}"), "http://HOST:PORT")


def test_a_reader_token_that_is_none(tmp_path: Path) -> None:
    """A file that is not there, or holds no single word, is named and not quoted."""
    file = tmp_path / "reader"
    assert_one_line(serve("--replica-of=http://h:1", f"--replica-token-file={file}"), "reader")
    file.write_text("two words\n")
    ended = serve("--replica-of=http://h:1", f"--replica-token-file={file}")
    assert_one_line(ended, "reader", "one line with a token")
    assert "two words" not in ended.stderr
