"""The catalogue of hostile requests (attacks/): each is refused by name, and changes nothing.

Knows raw bytes on a socket, and what a run looked like before and after. Does not know the server's code.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest

from ema_client.errors import printable
from tests.fuzz.attacks.bodies import BODIES
from tests.fuzz.attacks.configs import CONFIGS
from tests.fuzz.attacks.forge import (
    CHUNKS,
    DATA,
    GOOD,
    HEADER,
    MALFORMED,
    STEP,
    TENSORS,
    Attack,
    bias,
    body,
    chunked,
    with_value,
)
from tests.fuzz.attacks.requests import REQUESTS

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

ANSWER_SECONDS = 20.0
CATALOGUE = [*BODIES, *REQUESTS, *CONFIGS]


class Connection:
    """One connection, spoken to in raw bytes."""

    def __init__(self, url: str, *, timeout: float = ANSWER_SECONDS) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=timeout)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        status = int(self._file.readline().split()[1])
        lines = iter(lambda: self._file.readline().decode("latin-1").strip(), "")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return status, headers, self._file.read(int(headers.get("content-length", 0)))


def exchange(url: str, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes and read one answer: status, headers, body."""
    with Connection(url) as connection:
        connection.send(request)
        return connection.answer()


def send_and_hang_up(url: str, request: bytes) -> None:
    with Connection(url) as connection:
        connection.send(request)


def staging_bytes(honest: httpx.Client) -> float:
    lines = honest.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ema_staging_bytes ")))


def await_no_push_in_flight(honest: httpx.Client) -> None:
    """Return when the server has let go of every push. Fails after a while."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while staging_bytes(honest):
        assert time.monotonic() < deadline, "a push that broke off still holds its staging"
        time.sleep(0.01)


# --- the run under attack -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client that means well."""
    with server.http() as client:
        yield client


@pytest.fixture(scope="module")
def target(honest: httpx.Client, plain_run_at: Callable[..., PlainRun]) -> PlainRun:
    """A run with two averages at step 7: every case leaves it as it was, so all cases share it."""
    averages = [{"name": "ema"}, {"name": "fast", "decay": 0.5, "schedule": "constant"}]
    run = plain_run_at(honest, "under-attack", TENSORS, averages=averages)
    for step in (3, STEP):
        run.push(step, {name: tensor * step for name, tensor in TENSORS.items()}).raise_for_status()
    return run


@pytest.fixture(scope="module")
def fresh(honest: httpx.Client, plain_run_at: Callable[..., PlainRun]) -> PlainRun:
    """A run that awaits its initial weights, and goes on waiting for them."""
    run = plain_run_at(honest, "never-begun")
    run.create(TENSORS).raise_for_status()
    return run


@pytest.fixture
def unchanged(server: ServerProcess, honest: httpx.Client, target: PlainRun, fresh: PlainRun) -> Iterator[None]:
    """After the test: both runs are what they were, byte for byte, and the server still answers."""

    def everything() -> tuple[object, ...]:
        pulls = [target.pull(average=average).raise_for_status().content for average in ("ema", "fast")]
        names = {run["run"] for run in honest.get("/v1/runs").json()["runs"]}
        # A checkpoint is taken when its time comes, attack or not.
        # What was refused is told, until an update is applied.
        infos = [{**run.info(), "checkpoint_step": None, "refused": None} for run in (target, fresh)]
        return (*pulls, *infos, names)

    before = everything()
    yield
    await_no_push_in_flight(honest)
    assert everything() == before
    assert exchange(server.url, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200


def test_the_forger_forges_well(plain_run: Callable[..., PlainRun], server: ServerProcess) -> None:
    """What the attacks vary is accepted as it stands: HEADER with DATA, with a length or in chunks."""
    run = plain_run(server, TENSORS)
    for step, (payload, headers) in enumerate(
        [
            (body(HEADER), None),
            (body(dict(reversed(HEADER.items()))), None),
            (body({**HEADER, "__metadata__": {"format": "pt"}}), None),
            (chunked(body(HEADER)), CHUNKS),
        ]
    ):
        attack = Attack("", 200, "", "", payload, path=f"/v1/runs/{{run}}/updates/{step}", headers=headers)
        status, _, answer = exchange(server.url, attack.request(run.name, ""))

        assert (status, json.loads(answer)["applied"]) == (200, True)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("attack", CATALOGUE, ids=lambda attack: attack.name)
def test_refused_and_nothing_changed(attack: Attack, server: ServerProcess, target: PlainRun, fresh: PlainRun) -> None:
    """The request is refused with its code, the detail names what was wrong, and no byte of any run has changed."""
    request = attack.request(target.name, fresh.name)
    if attack.hang_up:
        send_and_hang_up(server.url, request)
        return
    status, headers, answer = exchange(server.url, request)

    assert status == attack.status, answer[:500]
    if attack.code:
        problem = json.loads(answer)
        assert (headers["content-type"], problem["code"]) == ("application/problem+json", attack.code)
        assert printable(attack.word) in problem["detail"]


def test_names_are_unique() -> None:
    """Every case of the catalogue has a name of its own."""
    names = [attack.name for attack in CATALOGUE]

    assert len(set(names)) == len(names)


# --- a refused body and the connection ------------------------------------------------------------------------------


PING = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
AFTER_WHICH = {
    "NaN": Attack("", 422, "", "", with_value("emb", float("nan"))),
    "a body one byte short": Attack("", 422, "", "", GOOD[:-1]),
    "a lying header": Attack("", 422, "", "", bias(shape=[4])),
    "an older step": Attack("", 409, "", "", GOOD, path="/v1/runs/{run}/updates/1"),
    "bytes beyond the last chunk's data": Attack("", 422, "", "", chunked(GOOD + bytes(99)), headers=CHUNKS),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("what", AFTER_WHICH)
def test_connection_is_usable_after(what: str, server: ServerProcess, target: PlainRun) -> None:
    """What follows a refused body on its connection is read as the next request, not as a rest of the body."""
    attack = AFTER_WHICH[what]
    with Connection(server.url) as connection:
        connection.send(attack.request(target.name, "") + PING)

        assert connection.answer()[0] == attack.status
        assert connection.answer()[0] == 200


LARGE = body(HEADER, bytes(16 << 20))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("closes", [False, True], ids=["keep-alive", "close"])
@pytest.mark.parametrize(
    "attack",
    [
        Attack("known length", 413, "body_too_large", "", LARGE),
        Attack("in chunks", 422, MALFORMED, "", chunked(LARGE, 65536), headers=CHUNKS),
        Attack("refused early", 409, "stale_step", "", LARGE, path="/v1/runs/{run}/updates/1"),
    ],
    ids=lambda attack: attack.name,
)
def test_answer_reaches_a_sender_who_first_sends_all(
    attack: Attack, closes: bool, server: ServerProcess, target: PlainRun
) -> None:
    """Who sends a large wrong body to its end before reading gets the refusal, not a broken connection."""
    request = attack.request(target.name, "")
    if closes:
        request = request.replace(b"Host: localhost", b"Host: localhost\r\nConnection: close", 1)
    status, _, answer = exchange(server.url, request)

    assert (status, json.loads(answer)["code"]) == (attack.status, attack.code)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("path", "status"), [("/v1/runs/nobody/updates/1", 404), ("/v1/runs/{run}/updates/1", 409)], ids=["404", "409"]
)
def test_early_refusal_does_not_ask_for_the_body(
    path: str, status: int, server: ServerProcess, target: PlainRun
) -> None:
    """With Expect: 100-continue a request that cannot succeed is answered before its body is sent."""
    headers = (("Content-Length", str(len(GOOD))), ("Expect", "100-continue"))
    request = Attack("", status, "", "", b"", path=path, headers=headers).request(target.name, "")
    assert exchange(server.url, request)[0] == status


@pytest.mark.usefixtures("unchanged")
def test_header_out_of_proportion_is_not_waited_for(server: ServerProcess, target: PlainRun) -> None:
    """A header of 50 MB for four tensors is refused by its length: parsing it would stop the server for seconds."""
    claimed = 50_000_000
    headers = (("Content-Length", str(8 + claimed + len(DATA))),)
    attack = Attack("", 0, "", "", struct.pack("<Q", claimed), headers=headers)
    with Connection(server.url, timeout=3) as connection:
        connection.send(attack.request(target.name, ""))

        assert connection.answer()[0] in (413, 422)
