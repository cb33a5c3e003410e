"""Hostile stretches: wrong bounds, groups that mix, a run made anew in between, floods of stretches that never end.

Each is refused by name, changes nothing, and leaves no memory taken.

Knows the wire, and a server with tokens and small budgets. Does not know the server's code, nor our client's lanes.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
import xxhash
from safetensors.torch import save

from ema_client.protocol import DIGEST_FOLLOWS, HEADER_DIGEST, HEADER_LAYOUT, HEADER_SEGMENT, HEADER_WRITER
from ema_service.tokens import create_token
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

BLOCK = 8 << 20
#: Of a run under attack: two whole blocks, and a stretch of four bytes.
SIZE = 2 * BLOCK + 4
FIRST, SECOND, LAST = (0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, SIZE)
CONNECTIONS, BODY_TIMEOUT = 64, 3.0
#: Staging has room for so many updates of a run under attack.
ROOM = 4


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What may do everything; what may push to other runs; and the file that has both."""
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    made = {"admin": create_token(file, ["admin"], "*"), "stranger": create_token(file, ["push", "pull"], "others*")}
    return {**made, "file": str(file)}


@pytest.fixture(scope="module")
def server(
    tokens: dict[str, str], tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("attacked")
    flags = (
        *("--token-file", tokens["file"], "--max-connections", str(CONNECTIONS)),
        *("--body-timeout", str(BODY_TIMEOUT), "--staging-bytes", str(ROOM * (SIZE + (1 << 16)))),
    )
    running = server_class(folder, flags, folder / "data").start()
    yield running
    running.kill()


class Target:
    """A run under attack: how stretches of its updates are sent, whole or not, and what the run is."""

    def __init__(self, run: PlainRun, token: str) -> None:
        self.run, self.token = run, token
        #: The number of the trainer that is attached, where one is.
        self.writer: dict[str, str] = {}
        self.create()

    def create(self) -> None:
        self.run.create({"w": tensor(0)}).raise_for_status()
        self.run.begin({"w": tensor(0)}).raise_for_status()
        layout = self.run.http.get(f"{self.run.path}/layout").raise_for_status().json()
        assert layout["block_bytes"] == BLOCK
        self.layout = layout["digest"]

    def head(self, step: int, bounds: str, group: str, length: int, **headers: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}", HEADER_LAYOUT: self.layout, **headers}
        lines = [
            f"PUT {self.run.path}/updates/{step}/stretches/{bounds}?group={group} HTTP/1.1",
            f"Host: localhost\r\nContent-Length: {length}",
            *(f"{name}: {value}" for name, value in headers.items() if value),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def begin(self, step: int, bounds: tuple[int, int], group: str, share: bytes = b"") -> socket.socket:
        """A connection that has sent the head of a stretch, and a share of its bytes."""
        url = self.run.http.base_url
        connection = socket.create_connection((url.host, url.port or 80), timeout=30)
        start, stop = bounds
        connection.sendall(self.head(step, f"{start}-{stop}", group, stop - start) + share)
        return connection

    def send(
        self, step: int, bounds: tuple[int, int] | str, group: str, body: bytes, **headers: str
    ) -> tuple[int, str, str]:
        """Status, code and detail of the answer to a stretch; as code, of a success, what the answer says."""
        path = bounds if isinstance(bounds, str) else f"{bounds[0]}-{bounds[1]}"
        content = body if isinstance(bounds, str) else body[slice(*bounds)]
        given = {"Authorization": f"Bearer {self.token}", HEADER_LAYOUT: self.layout, **self.writer, **headers}
        # A connection of its own: one on which a body was refused unread does not last.
        with httpx.Client(base_url=self.run.http.base_url, timeout=60) as http:
            url = f"{self.run.path}/updates/{step}/stretches/{path}?group={group}"
            answer = http.put(url, content=content, headers=given)
        said = answer.json()
        if answer.status_code in (200, 202):
            return answer.status_code, said.get("state") or ("applied" if said["applied"] else "repeated"), ""
        return answer.status_code, said["code"], said["detail"]

    def state(self) -> tuple[bytes, object, object]:
        info = self.run.info()
        return self.run.pull().raise_for_status().content, info["version"], info["step"]

    def gauge(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.run.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def await_nothing_held(self) -> None:
        for name in ("ema_staging_bytes", "ema_lanes", "ema_partial_updates"):
            wait_until(lambda name=name: self.gauge(name) == 0)  # type: ignore[misc]


def tensor(seed: int) -> torch.Tensor:
    return torch.randn(SIZE // 4, generator=torch.Generator().manual_seed(seed))


def data(seed: int) -> bytes:
    return save({"w": tensor(seed)})[-SIZE:]


@pytest.fixture
def target(
    server: ServerProcess, tokens: dict[str, str], plain_run_class: type[PlainRun], run_name: str
) -> Iterator[Target]:
    """A run with weights. After the test the server holds nothing of any push."""
    # A connection for each request: an idle one is closed where others are wanted.
    fresh = httpx.Limits(max_keepalive_connections=0)
    admin = {"Authorization": f"Bearer {tokens['admin']}"}
    with httpx.Client(base_url=server.url, timeout=60, headers=admin, limits=fresh) as http:
        made = Target(plain_run_class(http, run_name), tokens["admin"])
        yield made
        made.await_nothing_held()
        http.delete(made.run.path).raise_for_status()


@pytest.fixture
def unchanged(target: Target) -> Iterator[None]:
    """After the test the run is what it was, byte for byte, and takes an update in stretches."""
    before = target.state()
    yield
    target.await_nothing_held()
    assert target.state() == before
    answers = [target.send(99, bounds, "honest", data(9))[1] for bounds in (FIRST, SECOND, LAST)]
    assert answers == ["staged", "staged", "applied"]


BOUNDS = {
    "no whole block at its end": (f"0-{BLOCK - 4}", 422, "multiples"),
    "no whole block at its beginning": (f"4-{BLOCK}", 422, "multiples"),
    "one byte": ("0-1", 422, "multiples"),
    "one byte behind the last": (f"{2 * BLOCK}-{SIZE + 1}", 422, "multiples"),
    "a block outside": (f"{3 * BLOCK}-{4 * BLOCK}", 422, "multiples"),
    "beyond the end": (f"0-{3 * BLOCK}", 422, "multiples"),
    "empty": (f"{BLOCK}-{BLOCK}", 422, "multiples"),
    "backwards": (f"{BLOCK}-0", 422, "stop"),
    "a negative start": (f"-{BLOCK}-{BLOCK}", 422, "start"),
    "a negative stop": (f"0--{BLOCK}", 422, "start"),
    "beyond 64 bits": (f"0-{2**64}", 422, "stop"),
    "a start beyond 64 bits": (f"{2**64}-{BLOCK}", 422, "start"),
    "of 5,000 digits": (f"0-{'8' * 5000}", 422, "stop"),
    "full-width digits": ("0-%EF%BC%98388608", 422, "stop"),
    "Arabic digits": ("%D9%A0-8388608", 422, "start"),
    "hexadecimal": ("0x0-0x800000", 422, "start"),
    "a fraction": ("0-8388608.0", 422, "stop"),
    "a plus": ("+0-8388608", 422, "start"),
    "a leading zero": ("00-8388608", 422, "start"),
    "an underscore": ("0-8_388_608", 422, "stop"),
    "a space": ("0-8388608%20", 422, "stop"),
    "three bounds": (f"0-{BLOCK}-{SIZE}", 422, "st"),
    "one bound": ("0", 404, ""),
    "none": ("-", 404, ""),
    "words": ("a-b", 422, "start"),
}


@pytest.mark.usefixtures("unchanged")
def test_bounds(target: Target) -> None:
    """Bounds that are none, or none of a stretch, are refused by name, before anything is taken."""
    for what, (bounds, status, word) in BOUNDS.items():
        found, code, detail = target.send(1, bounds, "g", b"\0" * 8)

        assert (found, code) == (status, "invalid_request" if status == 422 else "route_not_found"), (what, detail)
        assert word in detail, what
        assert target.gauge("ema_partial_updates") == 0, what


def test_overlapping_with_other_bytes(target: Target) -> None:
    """What overlaps a stretch of its group is a conflict, also once all are in; the update is of the stretches that
    were taken."""
    good, bad = data(1), data(2)
    assert target.send(1, FIRST, "g", good)[1] == "staged"
    for bounds in ((0, 2 * BLOCK), (0, SIZE), FIRST):
        assert target.send(1, bounds, "g", bad)[:2] == (409, "step_conflict")
    with target.begin(1, SECOND, "g", bad[BLOCK : BLOCK + 5000]):
        wait_until(lambda: target.gauge("ema_lanes") == 1)
        assert target.send(1, (BLOCK, SIZE), "g", bad)[:2] == (409, "step_conflict")
        assert target.send(1, SECOND, "g", good)[1] == "staged"
    assert target.send(1, LAST, "g", good)[1] == "applied"
    for bounds in ((0, 2 * BLOCK), LAST, (BLOCK, SIZE)):
        assert target.send(1, bounds, "g", bad)[:2] == (409, "step_conflict")

    info = target.run.info()
    assert (info["step"], info["num_updates"]) == (1, 1)
    assert target.run.push(1, {"w": tensor(1)}).json()["applied"] is False


def test_two_groups_interleaved(target: Target) -> None:
    """Of two tries of one step one becomes the update, all of it; the other is told so, stretch by stretch."""
    one, other = data(1), data(2)
    assert target.send(1, FIRST, "one", one)[1] == "staged"
    assert target.send(1, FIRST, "other", other)[1] == "staged"
    for bounds in (SECOND, FIRST, LAST):
        assert target.send(1, bounds, "one", one)[:2] == (503, "superseded")
    assert target.send(1, SECOND, "other", other)[1] == "staged"
    assert target.send(1, SECOND, "one", one)[:2] == (503, "superseded")
    assert target.send(1, LAST, "other", other)[1] == "applied"
    assert target.send(1, LAST, "one", one)[0] in (409, 503)

    assert target.run.info()["num_updates"] == 1
    assert target.run.push(1, {"w": tensor(2)}).json()["applied"] is False


def test_run_made_anew_between_stretches(target: Target) -> None:
    """Stretches of a run that was deleted do not count for the run of its name that came after, be they whole or on
    their way."""
    good = data(1)
    assert target.send(1, FIRST, "g", good)[1] == "staged"
    with target.begin(1, SECOND, "g", good[BLOCK : BLOCK + 5000]) as late:
        wait_until(lambda: target.gauge("ema_lanes") == 1)
        target.run.http.delete(target.run.path).raise_for_status()
        target.create()
        before = target.state()
        late.sendall(good[BLOCK + 5000 : 2 * BLOCK])
        answer = late.recv(4096)
        assert answer.startswith(b"HTTP/1.1 404"), answer
        assert b"run_not_found" in answer, answer
    assert target.send(1, SECOND, "g", good)[1] == "staged"
    assert target.send(1, LAST, "g", good)[1] == "staged"
    assert target.state() == before
    assert target.send(1, FIRST, "g", good)[1] == "applied"


@pytest.mark.usefixtures("unchanged")
def test_wrong_token_and_writer(target: Target, tokens: dict[str, str]) -> None:
    """Without the right to push to this run, and from a trainer that was replaced, nothing is taken of a stretch."""
    writer = target.run.http.post(f"{target.run.path}/writers").raise_for_status().json()["writer"]
    newer = target.run.http.post(f"{target.run.path}/writers").raise_for_status().json()["writer"]
    target.writer = {HEADER_WRITER: str(newer)}
    refused: dict[tuple[int, str], dict[str, str]] = {
        (401, "unauthorized"): {"Authorization": "Bearer wrong"},
        (403, "forbidden"): {"Authorization": f"Bearer {tokens['stranger']}"},
        (409, "fenced"): {HEADER_WRITER: str(writer)},
        (422, "layout_mismatch"): {HEADER_LAYOUT: "0" * 32},
    }
    for expected, headers in refused.items():
        for bounds in (FIRST, SECOND, LAST):
            assert target.send(1, bounds, "g", data(1), **headers)[:2] == expected
        assert target.gauge("ema_partial_updates") == 0


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("bounds", [FIRST, LAST], ids=["blocks", "four bytes"])
def test_flood_that_never_ends(
    bounds: tuple[int, int], target: Target, plain_run_class: type[PlainRun], run_name: str
) -> None:
    """Of two thousand stretches that are begun and never go on, connections and memory stay within their limits, and
    another run's pushes are applied all the while."""
    other = plain_run_class(target.run.http, f"{run_name}-other")
    other.create({"w": torch.zeros(1000)}).raise_for_status()
    other.begin({"w": torch.zeros(1000)}).raise_for_status()
    limit = target.gauge("ema_staging_limit_bytes")
    with ExitStack() as flood:
        for number in range(2000):
            flood.enter_context(target.begin(1 + number % 5, bounds, f"g{number}", b"\1" * 3))
            if number % 200 == 199:
                _push(other, number)
                assert target.gauge("ema_staging_bytes") <= limit
                assert target.gauge("ema_lanes") <= CONNECTIONS / 4
                assert target.gauge("ema_connections") <= CONNECTIONS
    assert other.info()["num_updates"] == 10
    target.await_nothing_held()


def _push(run: PlainRun, step: int) -> None:
    """Push as a patient trainer does: again where there was no room, or where the connection was given up."""
    end = time.monotonic() + 30
    while True:
        try:
            answer = run.push(step, {"w": torch.full((1000,), float(step))})
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return
        assert time.monotonic() < end, answer and answer.text
        time.sleep(0.1)


# --- stretches of parts ---------------------------------------------------------------------------------------------

#: Of two parts: the first has a block and a half, the second the rest.
PARTS = ((0, BLOCK + BLOCK // 2), (BLOCK + BLOCK // 2, SIZE))
ONE, TWO = (0, BLOCK), (BLOCK, BLOCK + BLOCK // 2)


class PartTarget:
    """A run under attack by stretches of parts."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def path(self, step: int, part: object, bounds: object, **query: object) -> str:
        said = {"of": 2, "group": "g", "size": PARTS[0][1], **query}
        asked = "&".join(f"{name}={value}" for name, value in said.items())
        return f"{self.target.run.path}/updates/{step}/parts/{part}/stretches/{bounds}?{asked}"

    def body(self, seed: int, start: int, stop: int) -> bytes:
        """A body of bytes ``start`` to ``stop`` of the run's only tensor."""
        first, last = start // 4, stop // 4
        return save({"w": tensor(seed)[first:last].clone()}, {"ema.slices": json.dumps({"w": [[[first, last]]]})})

    def send(self, path: str, body: bytes, **headers: str) -> tuple[int, str, str]:
        given = {"Authorization": f"Bearer {self.target.token}", **self.target.writer, **headers}
        with httpx.Client(base_url=self.target.run.http.base_url, timeout=60) as http:
            answer = http.put(path, content=body, headers=given)
        said = answer.json()
        if answer.status_code in (200, 202):
            return answer.status_code, said.get("state") or ("applied" if said["applied"] else "repeated"), ""
        return answer.status_code, said["code"], said["detail"]

    def stretch(self, step: int, seed: int, bounds: tuple[int, int], **query: object) -> tuple[int, str, str]:
        """Send a stretch of the first part, right in all that is not said otherwise."""
        return self.send(self.path(step, 0, f"{bounds[0]}-{bounds[1]}", **query), self.body(seed, *bounds))

    def other(self, step: int, seed: int) -> tuple[int, str, str]:
        """Send the second part, as one stretch."""
        size = SIZE - PARTS[0][1]
        return self.send(self.path(step, 1, f"0-{size}", size=size), self.body(seed, *PARTS[1]))


@pytest.fixture
def parts(target: Target) -> PartTarget:
    return PartTarget(target)


@pytest.mark.usefixtures("unchanged")
def test_part_bounds_and_sizes(parts: PartTarget) -> None:
    """Bounds, sizes and parts that are none are refused by name, before anything is taken."""
    first = f"0-{BLOCK}"
    wrong: dict[str, tuple[str, str]] = {
        **{bounds: ("multiples", parts.path(1, 0, bounds)) for bounds in ("0-8", f"8-{BLOCK}", f"{BLOCK}-8")},
        "beyond the part": ("multiples", parts.path(1, 0, f"{BLOCK}-{2 * BLOCK}")),
        "a size beyond the run": ("size", parts.path(1, 0, first, size=SIZE + 1)),
        "a size of nothing": ("size", parts.path(1, 0, first, size=0)),
        "a negative size": ("size", parts.path(1, 0, first, size=-BLOCK)),
        "a size of many digits": ("size", parts.path(1, 0, first, size="9" * 5000)),
        "a size in words": ("size", parts.path(1, 0, first, size="all")),
        "a part too many": ("part", parts.path(1, 2, first)),
        "a negative part": ("part", parts.path(1, -1, first)),
        "no parts": ("of", parts.path(1, 0, first, of=0)),
        "full-width digits": ("start", parts.path(1, 0, f"%EF%BC%90-{BLOCK}")),
    }
    for what, (word, path) in wrong.items():
        status, code, detail = parts.send(path, b"\0" * 8)

        assert (status, code) == (422, "invalid_request"), (what, detail)
        assert word in detail, (what, detail)
        assert parts.target.gauge("ema_partial_updates") == 0, what


def test_contradicting_stretches(parts: PartTarget) -> None:
    """Other bytes, overlaps, another size, the part as one body, elements twice, or of another part: each is refused,
    and the update is of what was taken."""
    one_body = parts.path(1, 0, "").replace("/stretches/", "")
    assert parts.stretch(1, 1, ONE)[1] == "staged"
    assert parts.stretch(1, 2, ONE)[:2] == (409, "step_conflict")
    assert parts.stretch(1, 2, (0, BLOCK + BLOCK // 2))[:2] == (409, "step_conflict")
    assert parts.stretch(1, 1, TWO, size=SIZE)[:2] == (422, "invalid_request")
    assert parts.stretch(1, 1, (BLOCK, 2 * BLOCK), size=2 * BLOCK)[:2] == (409, "step_conflict")
    assert parts.send(one_body, parts.body(2, *PARTS[0]))[:2] == (409, "step_conflict")
    assert parts.stretch(1, 1, TWO, of=3)[:2] == (409, "step_conflict")
    where = parts.path(1, 0, f"{TWO[0]}-{TWO[1]}")
    assert parts.send(where, parts.body(1, 0, BLOCK // 2))[:2] == (422, "layout_mismatch")
    assert parts.send(where, parts.body(1, BLOCK, BLOCK + 8))[:2] == (422, "malformed_body")
    assert parts.send(where, b"\xff" * 400)[:2] == (422, "malformed_body")
    assert parts.other(1, 1)[1] == "staged"
    assert parts.send(where, parts.body(1, BLOCK + 4, BLOCK + BLOCK // 2 + 4))[:2] == (422, "layout_mismatch")
    assert parts.stretch(1, 1, TWO)[1] == "applied"
    for bounds in (ONE, TWO):
        assert parts.stretch(1, 1, bounds)[1] == "repeated"
        assert parts.stretch(1, 2, bounds)[:2] == (409, "step_conflict")

    info = parts.target.run.info()
    assert (info["step"], info["num_updates"]) == (1, 1)
    assert parts.target.run.push(1, {"w": tensor(1)}).json()["applied"] is False


def test_parts_of_two_groups(parts: PartTarget) -> None:
    """Stretches of one start of a trainer are never completed by another's."""
    assert parts.stretch(1, 1, ONE, group="one")[1] == "staged"
    assert parts.stretch(1, 2, ONE, group="other")[1] == "staged"
    assert parts.stretch(1, 1, TWO, group="one")[1] == "staged"
    for bounds in (ONE, TWO):
        assert parts.stretch(1, 3, bounds)[1] == "staged"
    assert parts.other(1, 3)[1] == "applied"
    assert parts.target.run.push(1, {"w": tensor(3)}).json()["applied"] is False


@pytest.mark.usefixtures("unchanged")
def test_part_by_a_stranger(parts: PartTarget, tokens: dict[str, str]) -> None:
    """Without the right to push to this run, from a replaced trainer, or in shared memory, nothing is taken."""
    run = parts.target.run
    writers = [run.http.post(f"{run.path}/writers").raise_for_status().json()["writer"] for _ in range(2)]
    parts.target.writer = {HEADER_WRITER: str(writers[1])}
    refused: dict[tuple[int, str], dict[str, str]] = {
        (401, "unauthorized"): {"Authorization": "Bearer wrong"},
        (403, "forbidden"): {"Authorization": f"Bearer {tokens['stranger']}"},
        (409, "fenced"): {HEADER_WRITER: str(writers[0])},
        (422, "invalid_request"): {HEADER_SEGMENT: f"pid=1, fd=1, offset=0, length=8, secret={'0' * 64}"},
    }
    for expected, headers in refused.items():
        path = parts.path(1, 0, f"0-{BLOCK}")
        assert parts.send(path, parts.body(1, 0, BLOCK), **headers)[:2] == expected
        assert parts.target.gauge("ema_partial_updates") == 0


def test_damaged_stretch_of_a_part(parts: PartTarget) -> None:
    """A flipped bit is refused, though its block was averaged, and the stretch alone comes again."""
    where, good = parts.path(1, 0, f"0-{BLOCK}"), parts.body(1, *ONE)
    data = good[-BLOCK:]
    digest = xxhash.xxh3_128(xxhash.xxh3_128(data).digest()).digest()
    bad = bytearray(good)
    bad[-5] ^= 1
    assert parts.stretch(1, 1, TWO)[1] == "staged"
    assert parts.send(where, bytes(bad) + digest, **{HEADER_DIGEST: DIGEST_FOLLOWS})[:2] == (422, "digest_mismatch")
    assert parts.send(where, good + digest, **{HEADER_DIGEST: DIGEST_FOLLOWS})[1] == "staged"
    assert parts.other(1, 1)[1] == "applied"
    assert parts.target.run.push(1, {"w": tensor(1)}).json()["applied"] is False


def test_stretch_of_a_part_that_hangs(parts: PartTarget) -> None:
    """The same stretch over another connection takes its place, and no late byte of the first is in the update."""
    head = f"PUT {parts.path(1, 0, f'0-{BLOCK}')} HTTP/1.1\r\nHost: localhost\r\n"
    bad, url = parts.body(2, *ONE), parts.target.run.http.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=30) as hanging:
        token = f"Authorization: Bearer {parts.target.token}\r\nContent-Length: {len(bad)}\r\n\r\n"
        hanging.sendall((head + token).encode() + bad[: BLOCK // 2])
        wait_until(lambda: parts.target.gauge("ema_lanes") == 1)
        assert parts.stretch(1, 1, ONE)[1] == "staged"
        hanging.sendall(bad[BLOCK // 2 :])
        assert hanging.recv(4096).startswith(b"HTTP/1.1 503")
    assert parts.stretch(1, 1, TWO)[1] == "staged"
    assert parts.other(1, 1)[1] == "applied"
    assert parts.target.run.push(1, {"w": tensor(1)}).json()["applied"] is False


@pytest.mark.usefixtures("unchanged")
def test_flood_of_parts_that_never_ends(parts: PartTarget, plain_run_class: type[PlainRun], run_name: str) -> None:
    """Of two thousand stretches of as many parts, none of which goes on, connections and memory stay within their
    limits, and another run's pushes are applied all the while."""
    target = parts.target
    other = plain_run_class(target.run.http, f"{run_name}-other")
    other.create({"w": torch.zeros(1000)}).raise_for_status()
    other.begin({"w": torch.zeros(1000)}).raise_for_status()
    limit, url = target.gauge("ema_staging_limit_bytes"), target.run.http.base_url
    with ExitStack() as flood:
        for number in range(2000):
            connection = socket.create_connection((url.host, url.port or 80), timeout=30)
            flood.enter_context(connection)
            path = parts.path(1 + number % 5, number, f"0-{BLOCK}", of=2000)
            head = f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {target.token}\r\n"
            connection.sendall(f"{head}Content-Length: {BLOCK + 99}\r\n\r\n".encode() + b"\1" * 3)
            if number % 200 == 199:
                _push(other, number)
                assert target.gauge("ema_staging_bytes") <= limit
                assert target.gauge("ema_lanes") <= CONNECTIONS / 4
                assert target.gauge("ema_connections") <= CONNECTIONS
    assert other.info()["num_updates"] == 10
    target.await_nothing_held()


@pytest.mark.usefixtures("unchanged")
def test_share_of_a_part(parts: PartTarget) -> None:
    """A part has its share of an update's lanes, one at the least, and none of another part's."""
    head = f"PUT {parts.path(1, 0, f'0-{BLOCK}', of=8)} HTTP/1.1\r\nHost: localhost\r\n"
    url, size = parts.target.run.http.base_url, SIZE - PARTS[0][1]
    with socket.create_connection((url.host, url.port or 80), timeout=30) as coming:
        length = f"Authorization: Bearer {parts.target.token}\r\nContent-Length: {2 * BLOCK}\r\n\r\n"
        coming.sendall((head + length).encode())
        wait_until(lambda: parts.target.gauge("ema_lanes") == 1)
        status, code, detail = parts.stretch(1, 1, TWO, of=8)
        assert (status, code) == (503, "overloaded")
        assert "this part, one of 8" in detail
        path = parts.path(1, 1, f"0-{size}", of=8, size=size)
        assert parts.send(path, parts.body(1, *PARTS[1]))[1] == "staged"
