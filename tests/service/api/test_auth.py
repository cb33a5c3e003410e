"""Tokens: who has none, a wrong one, or one for something else is refused before anything is read.

Knows tokens as a client has them and the file as an operator has it. Does not know how they are compared.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from ema_client import EmaClient
from ema_client.errors import Forbidden, Unauthorized
from ema_service.tokens import SCOPES, TokenFileError, create_token, read_token_file

STATE = {"w": torch.ones(3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, str]:
    """One token of each kind, all in one file."""
    file = folder / "tokens"
    return {
        "push": create_token(file, ["push"], "alpha*"),
        "pull": create_token(file, ["pull"], "alpha*"),
        "snapshot": create_token(file, ["snapshot"], "alpha*"),
        "both": create_token(file, ["push", "pull"], "*"),
        "train": create_token(file, ["train"], "alpha*"),
        "admin": create_token(file, ["admin"], "*"),
    }


@pytest.fixture(scope="module")
def url(folder: Path, tokens: dict[str, str], server_class: Callable[..., object]) -> Iterator[str]:
    assert tokens
    server = server_class(folder, ("--token-file", str(folder / "tokens")), folder / "data").start()  # type: ignore[attr-defined]
    with EmaClient(server.url, token=tokens["both"]) as client:
        client.create_run("alpha-1", STATE)
        client.create_run("beta-1", STATE)
    yield server.url
    log = server.log
    server.stop()
    assert not [token for token in tokens.values() if token in log], "a token stands in the log"


#: (method, path, scopes that are enough), on the run alpha-1
ROUTES = [
    ("GET", "/v1/runs", {"pull"}),
    ("GET", "/v1/runs/alpha-1", {"pull"}),
    ("GET", "/v1/runs/alpha-1/layout", {"pull"}),
    ("GET", "/v1/runs/alpha-1/weights", {"pull"}),
    ("GET", "/v1/runs/alpha-1/updates/1", {"pull"}),
    ("GET", "/v1/runs/alpha-1/snapshots", {"pull"}),
    ("PUT", "/v1/runs/alpha-1/snapshots/s", {"snapshot", "push"}),
    ("GET", "/v1/runs/alpha-1/sweeps", {"pull"}),
    ("POST", "/v1/runs/alpha-1/sweeps", {"snapshot", "push"}),
    ("GET", "/metrics", {"pull"}),
    ("POST", "/v1/runs", {"push"}),
    ("PUT", "/v1/runs/alpha-1/weights", {"push"}),
    ("PUT", "/v1/runs/alpha-1/updates/1", {"push"}),
    ("PATCH", "/v1/runs/alpha-1", {"push"}),
    ("POST", "/v1/runs/alpha-1/reset-num-updates", {"push"}),
    ("POST", "/v1/runs/alpha-1/averages", {"push"}),
    ("DELETE", "/v1/runs/alpha-1/averages/none", set()),
    ("DELETE", "/v1/runs/alpha-1/snapshots/none", set()),
    ("DELETE", "/v1/runs/alpha-0", set()),
]


@pytest.mark.parametrize(
    ("method", "path", "enough"), ROUTES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_route_wants_its_scope(url, tokens, method, path, enough):
    """With the scope the request gets through to its route; without it 403; without a token 401."""
    for kind in ("push", "pull", "snapshot", "train", "admin"):
        status = httpx.request(method, url + path, headers={"Authorization": f"Bearer {tokens[kind]}"}).status_code
        assert (status != 403) == (kind in enough or kind == "admin" or (kind == "train" and bool(enough))), kind
    answer = httpx.request(method, url + path)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic {token}", "{token}", "Bearer {token}x", "Bearer {hash}"]
)
def test_what_is_no_token(url, tokens, header):
    """Nothing, another scheme, a wrong token, and the hash that stands in the file: 401."""
    digest = hashlib.sha256(tokens["admin"].encode()).hexdigest()
    value = header.format(token=tokens["admin"], hash=digest)
    answer = httpx.get(f"{url}/v1/runs", headers={"Authorization": value} if header else {})
    assert answer.status_code == 401
    assert tokens["admin"] not in answer.text


def test_two_tokens_in_one_request_are_none(url, tokens):
    """A request that says two things about itself is not believed either."""
    headers = [("Authorization", f"Bearer {tokens['push']}"), ("Authorization", f"Bearer {tokens['admin']}")]
    assert httpx.get(f"{url}/v1/runs", headers=headers).status_code == 401


def test_a_token_is_for_the_runs_it_names(url, tokens):
    """Another run is 403, whether it exists or not, also where its name stands in the body; lists leave it out."""
    with EmaClient(url, token=tokens["pull"]) as reader:
        assert [info.run for info in reader.runs()] == ["alpha-1"]
        assert set(reader.pull("alpha-1")) == {"w"}
        for name in ("beta-1", "beta-none"):
            with pytest.raises(Forbidden, match=name):
                reader.run(name)
    with EmaClient(url, token=tokens["push"]) as writer:
        with pytest.raises(Forbidden, match="beta-2"):
            writer.create_run("beta-2", STATE)
        writer.create_run("alpha-2", STATE)
        assert writer.push("alpha-2", STATE, step=1).applied


def test_the_client_raises_what_was_refused(url):
    """Without a token the client raises Unauthorized, which says where tokens come from."""
    with EmaClient(url) as client, pytest.raises(Unauthorized, match="EMA_SERVICE_TOKEN"):
        client.runs()


def test_pages_and_liveness_are_open(url):
    """The empty pages and the health checks need no token: they say nothing of any run."""
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz"):
        assert httpx.get(url + path).status_code == 200, path
    assert httpx.post(f"{url}/").status_code == 401


def test_server_tells_more_to_who_has_a_token(url, tokens):
    """Without a token name and version; with any, the rest, and the scopes it has; a wrong token is refused."""
    said = httpx.get(f"{url}/v1/server").json()
    assert {name for name, value in said.items() if value} == {"name", "version"}
    for kind, scopes in (("snapshot", ["snapshot"]), ("train", ["train", "push", "pull", "snapshot"])):
        said = httpx.get(f"{url}/v1/server", headers={"Authorization": f"Bearer {tokens[kind]}"}).json()
        assert (said["scopes"], bool(said["memory_limit_bytes"])) == (scopes, True)
    assert httpx.get(f"{url}/v1/server", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_metrics_name_the_runs_of_the_token(url, tokens):
    """A token for some runs sees the others counted, and not their names."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {tokens['pull']}"}).text
    assert 'ema_run_status{run="alpha-1"' in text
    assert "beta" not in text
    assert 'run="beta-1"' in httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {tokens['admin']}"}).text


def test_refusal_comes_before_the_body(url, tokens):
    """A push that is not allowed is answered while its body is still to come."""
    head = f"PUT /v1/runs/alpha-1/updates/9 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {tokens['pull']}\r\n"
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


def test_command_prints_the_token_once(tmp_path):
    """`ema-service token create` prints a token; only its hash is kept, in a file that only the owner reads."""
    file = tmp_path / "tokens"
    command = [sys.executable, "-m", "ema_service", "token", "create", "--scope", "push", "--run", "cogview*"]
    done = subprocess.run([*command, "--token-file", str(file)], capture_output=True, text=True, timeout=60, check=True)
    token = done.stdout.strip()
    assert token not in file.read_text()
    [grant] = read_token_file(file)
    assert (grant.digest, grant.scopes, grant.runs) == (hashlib.sha256(token.encode()).digest(), {"push"}, "cogview*")
    assert file.stat().st_mode & 0o777 == 0o600
    wrong = subprocess.run([*command, "--scope", "all"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert wrong.returncode == 1
    assert "'all' is no scope" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("secret push *", "line 1: expected the SHA-256"),
        (f"{'0' * 64} push", "line 1: expected the SHA-256"),
        (f"{'0' * 64} read *", "'read' is no scope"),
        (f"{'0' * 64} pull * expires=soon", "'soon' is no moment"),
    ],
)
def test_a_wrong_token_file_is_refused(tmp_path, line, fault):
    """A token file that cannot be read is refused, with the line that is wrong."""
    file = tmp_path / "tokens"
    file.write_text(line + "\n")
    with pytest.raises(TokenFileError, match=fault):
        read_token_file(file)


def test_the_server_does_not_start_with_a_wrong_token_file(tmp_path):
    """It ends at once, and says which line is wrong."""
    file = tmp_path / "tokens"
    file.write_text("secret push *\n")
    command = [sys.executable, "-m", "ema_service", "serve", "--memory", "--port", "0", "--token-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "line 1: expected the SHA-256" in done.stderr
    assert "Traceback" not in done.stderr


def test_beyond_loopback_only_with_tokens():
    """An address that others reach is refused without tokens, and the refusal says what to do."""
    command = [sys.executable, "-m", "ema_service", "serve", "--memory", "--port", "0", "--host", "0.0.0.0"]
    env = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2
    assert "--token-file" in done.stderr
    assert SCOPES == ("train", "push", "pull", "snapshot", "admin")


def test_reader_cannot_end_a_series(url: str, tokens: dict[str, str]) -> None:
    """A token that may only take snapshots takes none that lets older ones go."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {tokens['snapshot']}"}) as http:
        assert http.put("/v1/runs/alpha-1/snapshots/kept-1").status_code == 201
        refused = http.put("/v1/runs/alpha-1/snapshots/kept-2", params={"keep": 1})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {tokens['pull']}"}) as http:
        names = [each["name"] for each in http.get("/v1/runs/alpha-1/snapshots").json()["snapshots"]]
        assert "kept-1" in names
