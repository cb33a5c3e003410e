"""Web pages: what a browser on the server's machine can be made to send changes nothing, and reads nothing.

Knows the headers that a browser sends for a page, and that programs send none of them. Does not know how they are
checked.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from ema_client import EmaClient
from ema_client.errors import ForeignHost
from ema_service.tokens import create_token

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.ones(4)}
#: Names that a page's owner can make mean this machine's address, and what is no name at all.
STRANGERS = [
    *("evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "evil"),
    *("127.0.0.1@evil.example", "", "127.0.0.1, evil.example", "[::1].evil.example", "127.0.0.1:{port}.evil.example"),
]
OURS = ["127.0.0.1:{port}", "127.0.0.1", "10.1.2.3:80", "[::1]:{port}", "localhost:{port}", "LOCALHOST", "a.localhost."]
#: Writes that need no token here: method, path, body.
WRITES = [
    ("POST", "{run}/reset-num-updates", None),
    ("POST", "{run}/writers", None),
    ("PATCH", "{run}", {"decay": 0.5}),
    ("POST", "{run}/averages", {"name": "other"}),
    ("DELETE", "{run}/averages/other", None),
    ("PUT", "{run}/snapshots/s", None),
    ("DELETE", "{run}", None),
]
FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:3000"},
    {"Origin": "https://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"},
]


@pytest.fixture
def run(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> PlainRun:
    return plain_run(server, TENSORS)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """A server that was told two names."""
    flags = ("--allowed-host", "ema.lab.example", "--allowed-host", "Ema:8470")
    running = server_class(tmp_path_factory.mktemp("named"), flags).start()
    yield running
    running.stop()


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "") if answer.content else ""


def with_port(host: str, server: ServerProcess) -> str:
    return host.format(port=urlsplit(server.url).port)


# --- the name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", STRANGERS)
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/runs"), ("GET", "/"), ("DELETE", "{run}")])
def test_strangers_name_is_refused(method: str, path: str, host: str, run: PlainRun, server: ServerProcess) -> None:
    """A name that may have been rebound to this address reads nothing and writes nothing."""
    headers = {"Host": with_port(host, server)}
    answer = run.http.request(method, path.format(run=run.path), headers=headers)

    assert code(answer) in [(421, "foreign_host"), (400, "bad_request")]  # 400: what is no host at all
    assert run.info()["run"] == run.name


@pytest.mark.parametrize("host", [*OURS, socket.gethostname(), socket.gethostname().partition(".")[0] + ":{port}"])
def test_own_names_and_addresses_are_answered(host: str, run: PlainRun, server: ServerProcess) -> None:
    """An IP address, localhost and the machine's host name, with or without a port."""
    assert run.http.get("/v1/runs", headers={"Host": with_port(host, server)}).status_code == 200


def test_allowed_names(named: ServerProcess) -> None:
    """--allowed-host adds names, and these alone; the refusal says so to a Python user as well."""
    for host, status in [("ema.lab.example", 200), ("EMA:8470", 200), ("x.ema.lab.example", 421), ("emma", 421)]:
        assert httpx.get(f"{named.url}/v1/runs", headers={"Host": host}).status_code == status, host
    with httpx.Client(base_url=named.url, headers={"Host": "evil.example"}) as http:
        assert "--allowed-host" in http.get("/v1/runs").json()["hint"]


def test_client_raises_the_refusal(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of this machine that the server was not told of raises ForeignHost, which says what to do."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **options: real("127.0.0.1", *rest, **options))
    url = f"http://node7.lab.example:{urlsplit(server.url).port}"
    with EmaClient(url) as client, pytest.raises(ForeignHost, match="--allowed-host"):
        client.runs()


def test_unix_socket_has_no_name(server: ServerProcess) -> None:
    """No browser connects to a Unix socket: any Host is right there."""
    transport = httpx.HTTPTransport(uds=server.uds.removeprefix("unix://"))
    with httpx.Client(transport=transport, base_url="http://anything.example") as http:
        assert http.get("/v1/runs").status_code == 200


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_page_of_another_origin_cannot_write(
    method: str, path: str, body: object, headers: dict[str, str], run: PlainRun
) -> None:
    """A write that a browser sends for another origin's page is 403 and changes nothing."""
    before = run.info()
    answer = run.http.request(method, path.format(run=run.path), json=body, headers=headers)

    assert code(answer) == (403, "foreign_origin")
    assert run.info() == before


def test_own_page_can_write(run: PlainRun, server: ServerProcess, named: ServerProcess) -> None:
    """The service's own pages (/docs tries routes out) may write, also behind a proxy that speaks TLS for it."""
    for headers in (
        {"Origin": server.url, "Sec-Fetch-Site": "same-origin"},
        {"Origin": server.url},
        {"Sec-Fetch-Site": "none"},
    ):
        assert run.http.post(f"{run.path}/writers", headers=headers).status_code == 201
    proxied = {"Host": "ema.lab.example", "Origin": "https://ema.lab.example"}
    answer = httpx.post(f"{named.url}/v1/runs/none/writers", headers=proxied)
    assert code(answer) == (404, "run_not_found")


def test_reading_is_told_by_the_name_alone(run: PlainRun) -> None:
    """A browser lets no page read another origin's answer, so a foreign Origin may be answered; no answer allows it."""
    answer = run.http.get("/v1/runs", headers={"Origin": "http://evil.example"})

    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_preflight_allows_nothing(run: PlainRun) -> None:
    """A browser that asks whether a page may PUT or send JSON gets no leave."""
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "PUT"}
    answer = run.http.request("OPTIONS", f"{run.path}/updates/1", headers=headers)

    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"]
)
def test_json_is_sent_as_json(kind: str | None, run: PlainRun) -> None:
    """A JSON body of another type, which a page may send to anyone without asking, creates and changes nothing."""
    headers = {} if kind is None else {"Content-Type": kind}
    config = b'{"run": "planted", "layout": [{"name": "w", "shape": [1], "dtype": "F32"}]}'

    for method, path, body in [("POST", "/v1/runs", config), ("PATCH", run.path, b'{"decay": 0.5}')]:
        assert code(run.http.request(method, path, content=body, headers=headers)) == (415, "unsupported_media_type")
    assert run.http.get("/v1/runs/planted").status_code == 404
    right = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert run.http.patch(run.path, content=b'{"decay": 0.5}', headers=right).status_code == 200


def test_with_tokens(
    tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess], plain_run_class: type[PlainRun]
) -> None:
    """Where tokens are asked for every name is answered, for a page has none; writes of other pages stay refused."""
    folder = tmp_path_factory.mktemp("tokens")
    token = create_token(folder / "tokens", ["admin"], "*")
    server = server_class(folder, ("--token-file", str(folder / "tokens"))).start()
    headers = {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(base_url=server.url, headers=headers) as http:
            plain_run_class(http, "r").create(TENSORS).raise_for_status()
            assert http.get("/v1/runs", headers={"Host": "ema.example"}).status_code == 200
            assert code(http.delete("/v1/runs/r", headers={"Origin": "http://evil.example"})) == (403, "foreign_origin")
    finally:
        server.stop()
