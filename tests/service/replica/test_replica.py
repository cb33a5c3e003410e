"""A replica of another server, both processes of their own: it has the original's versions bit for bit, follows what is
done to runs, refuses writes, and outlives the original.

Knows the original and its replicas by their addresses. Does not know how a replica reads.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import EmaError, ReadOnlyReplica
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.reading.holders import Holders
from ema_service.tokens import create_token
from tests.conftest import Certificate, LitEmaOracle, PlainRun, ServerProcess
from tests.relays import Relay
from tests.waiting import wait_until

_SECONDS = 30.0
#: So many steps are remembered to compare pulls with.
_REMEMBERED = 500
DECAY = 0.9
AVERAGES = [{"name": "ema"}, {"name": "short", "schedule": "half_life", "half_life": 3.0}]


def model(seed: int, rows: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(33, generator=generator).to(torch.bfloat16)
    return {"w": torch.randn(rows, 50, generator=generator), "b": torch.randn(7, generator=generator), "h": half}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


class Pair:
    """An original and a replica of it, as processes. original, replica: the run at both, by plain HTTP."""

    def __init__(self, start: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun], name: str) -> None:
        self.start = start
        self._plain_run = plain_run
        self.name = name
        self.origin = start()
        self.copy = start("--replica-of", self.origin.url, memory=True)

    def run(self, name: str | None = None) -> tuple[PlainRun, PlainRun]:
        """A run at both. name: of another run than the test's own."""
        given = {} if name is None else {"name": name}
        return self._plain_run(self.origin, **given), self._plain_run(self.copy, **given)

    def meets(self, name: str | None = None) -> None:
        """Wait until the replica has what the original has."""
        there, here = self.run(name)
        wait_until(lambda: etag(here) == etag(there) != None, "the replica", _SECONDS)  # noqa: E711


def etag(run: PlainRun, **query: Any) -> str | None:
    answer = run.http.head(f"{run.path}/weights", params=query)
    return answer.headers.get("etag") if answer.status_code == 200 else None


@pytest.fixture
def pair(start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun], run_name: str) -> Pair:
    return Pair(start_server, plain_run, run_name)


def test_it_has_every_version_bit_for_bit(pair: Pair, litema: type[LitEmaOracle]) -> None:
    """Every average, cast, prefix and stretch is the original's, under the original's ETags; LitEma is the judge."""
    oracle = litema(model(0), decay=DECAY)
    there, here = pair.run()
    there.create(model(0), decay=DECAY, averages=AVERAGES).raise_for_status()
    there.begin(model(0)).raise_for_status()
    for step in (1, 2, 3):
        there.push(step, model(step)).raise_for_status()
        oracle.update(model(step))
        pair.meets()
        assert same(here.weights(), oracle.shadow)
        queries: list[dict[str, Any]] = [{}, {"average": "short"}, {"dtype": "BF16"}, {"prefix": "w"}]
        for query in queries:
            ours, theirs = here.pull(**query), there.pull(**query)
            assert (ours.content, ours.headers["etag"]) == (theirs.content, theirs.headers["etag"])
            assert ours.headers.get("ema-digest") == theirs.headers.get("ema-digest")
    whole = there.pull()
    ranged = {"Range": "bytes=100-299", "If-Range": whole.headers["etag"]}
    part = here.http.get(f"{here.path}/weights", headers=ranged)
    assert (part.status_code, part.content) == (206, whole.content[100:300])
    known = here.http.get(f"{here.path}/weights", headers={"If-None-Match": whole.headers["etag"]})
    assert known.status_code == 304
    told, expected = here.info(), there.info()
    assert (told["replica"]["of"], told["replica"]["reached"]) == (pair.origin.url, True)
    alike = ("version", "step", "num_updates", "decay", "effective_decay", "averages", "created_at", "updated_at")
    assert {name: told[name] for name in alike} == {name: expected[name] for name in alike}


def test_it_follows_what_is_done_to_runs(pair: Pair) -> None:
    """A decay, a reset, an average more and less, a rewind, weights given anew, a deletion, and a run of the name."""
    there, here = pair.run()
    there.create(model(0), decay=DECAY).raise_for_status()
    wait_until(lambda: here.http.get(here.path).status_code == 200, "the run without weights", _SECONDS)
    assert here.info()["status"] == "awaiting_weights"
    there.begin(model(0)).raise_for_status()
    first = str(there.info()["version"])
    there.http.put(f"{there.path}/weights", params={"replaces": first}, content=there.pull().content)
    pair.meets()
    there.push(1, model(1)).raise_for_status()
    there.http.put(f"{there.path}/snapshots/s").raise_for_status()
    there.http.patch(there.path, json={"decay": 0.5}).raise_for_status()
    pair.meets()
    assert here.info()["decay"] == 0.5
    there.http.post(f"{there.path}/reset-num-updates").raise_for_status()
    pair.meets()
    assert here.info()["num_updates"] == 0
    there.http.post(f"{there.path}/averages", json={"name": "more"}).raise_for_status()
    there.push(2, model(2)).raise_for_status()
    wait_until(lambda: etag(here, average="more") == etag(there, average="more") != None, "it", _SECONDS)  # noqa: E711
    there.http.delete(f"{there.path}/averages/more").raise_for_status()
    wait_until(lambda: here.pull(average="more").status_code == 404, "its end", _SECONDS)
    there.http.post(f"{there.path}/rewind", json={"snapshot": "s"}).raise_for_status()
    pair.meets()
    assert here.info()["version"].startswith("2.")
    number = there.http.post(f"{there.path}/writers").raise_for_status().json()["writer"]
    wait_until(lambda: here.info()["writer"] == number, "the trainer", _SECONDS)
    there.http.delete(there.path).raise_for_status()
    wait_until(lambda: here.http.get(here.path).status_code == 404, "the deletion", _SECONDS)
    there.create(model(9, rows=3)).raise_for_status()
    there.begin(model(9, rows=3)).raise_for_status()
    pair.meets()
    assert same(here.weights(), {name: each.float() for name, each in model(9, rows=3).items()})


def test_writes_are_refused_and_say_where_they_go(pair: Pair) -> None:
    """Whatever is no read of a version is 421, names the original, and has changed nothing there."""
    there, here = pair.run()
    there.create(model(0)).raise_for_status()
    there.begin(model(0)).raise_for_status()
    pair.meets()
    before = there.info()
    refused = [
        here.push(1, model(1)),
        here.begin(model(1)),
        here.create(model(1)),
        here.http.delete(here.path),
        here.http.patch(here.path, json={"decay": 0.5}),
        here.http.put(f"{here.path}/snapshots/s"),
        here.http.get(f"{here.path}/snapshots"),
        here.http.get(f"{here.path}/updates/1"),
        here.http.get(f"{here.path}/history"),
        here.pull(soup="s:1"),
    ]
    for answer in refused:
        assert (answer.status_code, answer.json()["code"]) == (421, "read_only_replica")
        assert pair.origin.url in answer.json()["detail"]
        assert answer.headers["content-type"] == "application/problem+json"
    assert there.info() == before
    with EmaClient(pair.copy.url) as client, pytest.raises(ReadOnlyReplica):
        client.push(pair.name, model(1), step=1)


def test_the_original_goes_and_comes_back(pair: Pair) -> None:
    """A replica serves what it has, and says that the original is away; after that it goes on."""
    there, here = pair.run()
    there.create(model(0)).raise_for_status()
    there.begin(model(0)).raise_for_status()
    pair.meets()
    wait_until(lambda: here.http.get("/readyz").status_code == 200, "readiness", _SECONDS)
    had = here.pull().content
    url = pair.origin.url
    pair.origin.kill()
    wait_until(lambda: not here.info()["replica"]["reached"], "the loss to be told", _SECONDS)
    assert here.pull().content == had
    assert here.http.get("/readyz").status_code == 200
    assert "ema_replica_original_away 1.0" in here.http.get("/metrics").text
    assert url in here.http.get("/v1/server").json()["replica"]["fault"]
    pair.origin.arguments = ("--port", url.rpartition(":")[2])
    pair.origin.start()
    with pair.origin.http() as http:
        again = PlainRun(http, pair.name)
        again.push(1, model(1)).raise_for_status()
        wait_until(lambda: etag(here) == etag(again), "the replica to go on", _SECONDS)
        assert here.pull().content == again.pull().content
    wait_until(lambda: "ema_replica_original_away 0.0" in here.http.get("/metrics").text, "it to be told", _SECONDS)


def test_a_replica_that_is_killed_takes_the_newest(pair: Pair) -> None:
    """Nothing of it is kept, and it is not ready before it has all runs again."""
    there, _ = pair.run()
    there.create(model(0)).raise_for_status()
    there.begin(model(0)).raise_for_status()
    pair.meets()
    pair.copy.kill()
    there.push(1, model(1)).raise_for_status()
    pair.copy.start()
    with pair.copy.http() as http:
        wait_until(lambda: http.get("/readyz").status_code == 200, "readiness", _SECONDS)
        assert PlainRun(http, pair.name).pull().content == there.pull().content


def test_it_is_not_ready_without_an_original(start_server: Callable[..., ServerProcess]) -> None:
    """A replica whose original was never there starts, and says what it waits for."""
    replica = start_server("--replica-of", "http://127.0.0.1:9", memory=True)
    with replica.http() as http:
        answer = http.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert "original" in answer.json()["detail"]


def test_tokens_and_tls(
    start_server: Callable[..., ServerProcess],
    certificate: Certificate,
    run_name: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads with a reader's token over TLS, which it trusts as the machine does; runs of others it does not see."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    tokens, reader = tmp_path / "tokens", tmp_path / "reader"
    writer = create_token(tokens, ["train", "admin"], "*")
    reader.write_text(create_token(tokens, ["pull"], "run-*") + "\n")
    origin = start_server("--token-file", str(tokens), *certificate.flags)
    replica = start_server(
        "--replica-of", origin.url, "--replica-token-file", str(reader), "--token-file", str(tokens), memory=True
    )
    with EmaClient(origin.url, token=writer) as client, EmaClient(replica.url, token=writer) as read:
        for name in (run_name, "hidden"):
            client.create_run(name, model(0), decay=DECAY)
        client.push(run_name, model(1), step=1)
        wait_until(lambda: [each.version for each in read.runs()] == ["1.1"], "the replica", _SECONDS)
        assert same(read.pull(run_name), client.pull(run_name))
    with httpx.Client(base_url=replica.url) as http:
        assert http.get(f"/v1/runs/{run_name}/weights").status_code == 401


@contextlib.contextmanager
def trained(run: PlainRun, oracle: LitEmaOracle, shadows: dict[int, dict[str, Tensor]], rows: int) -> Iterator[None]:
    """Within the block updates go on, as fast as they are taken. shadows: of each step, as LitEma has them."""
    stop, models = threading.Event(), [model(seed, rows) for seed in range(5)]

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            oracle.update(models[step % 5])
            shadows[step] = {name: each.clone() for name, each in oracle.shadow.items()}
            shadows.pop(step - _REMEMBERED, None)
            run.push(step, models[step % 5]).raise_for_status()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def pulled(run: PlainRun, shadows: Mapping[int, Mapping[str, Tensor]]) -> int | None:
    """Pull once, and check that the weights are those of one version, whole. The step; None where nobody answered."""
    try:
        answer = run.pull()
        if answer.status_code != 200:
            return None
        body = answer.content
    except httpx.TransportError:
        return None
    step = int(answer.headers.get("ema-step", 0))
    assert same(load(body), shadows[step]), f"step {step}"
    return step


def test_pulls_are_of_one_version_while_updates_go_on(pair: Pair, litema: type[LitEmaOracle]) -> None:
    """Each pull from the replica is one version, whole; none goes back; a slow replica has skipped some."""
    rows = 2000
    there, here = pair.run()
    there.create(model(0, rows), decay=DECAY).raise_for_status()
    there.begin(model(0, rows)).raise_for_status()
    pair.meets()
    oracle = litema(model(0, rows), decay=DECAY)
    shadows = {0: {name: each.clone() for name, each in oracle.shadow.items()}}
    steps = []
    with trained(there, oracle, shadows, rows):
        wait_until(lambda: bool(steps.append(pulled(here, shadows)) or (steps[-1] or 0) > 30), "updates", _SECONDS)
    found = [step for step in steps if step is not None]
    assert found == sorted(found)
    pair.meets()
    assert pulled(here, shadows) == max(shadows)


def _kills(pair: Pair, litema: type[LitEmaOracle], seconds: float) -> int:
    """Pull from a replica that is killed now and then, while updates go on. How many pulls were answered."""
    rows, pulls = 2000, 0
    there, _ = pair.run()
    there.create(model(0, rows), decay=DECAY).raise_for_status()
    there.begin(model(0, rows)).raise_for_status()
    oracle = litema(model(0, rows), decay=DECAY)
    shadows = {0: {name: each.clone() for name, each in oracle.shadow.items()}}
    until = time.monotonic() + seconds
    with trained(there, oracle, shadows, rows):
        number = 0
        while time.monotonic() < until or number < 2:
            number += 1
            for _ in range(10 * (number % 3)):
                with pair.copy.http() as http, contextlib.suppress(EmaError):
                    pulls += pulled(PlainRun(http, pair.name), shadows) is not None
            pair.copy.kill()  # while it fills, where it was not pulled from
            pair.copy.start()
    with pair.copy.http() as http:
        wait_until(lambda: pulled(PlainRun(http, pair.name), shadows) == max(shadows), "the newest", _SECONDS)
    return pulls


@pytest.mark.parametrize("seconds", [2, pytest.param(120, marks=pytest.mark.soak)])
def test_a_replica_that_is_killed_never_serves_a_torn_version(
    pair: Pair, litema: type[LitEmaOracle], seconds: float
) -> None:
    """SIGKILL of a replica while it fills and while it serves, with updates going on."""
    assert _kills(pair, litema, seconds)


class Slow(Relay):
    """Carries what a server sends at some megabytes a second."""

    def carry(self, source: socket.socket, target: socket.socket, way: str, _: Any) -> None:
        while data := source.recv(1 << 18):
            if way == "down":
                time.sleep(len(data) / 20e6)
            target.sendall(data)


class Flipping(Relay):
    """Changes one byte of each answer that is longer than a head, while it is told to."""

    flips = True

    def carry(self, source: socket.socket, target: socket.socket, way: str, _: Any) -> None:
        come = 0
        while data := bytearray(source.recv(1 << 16)):
            if way == "down" and self.flips and come < 100_000 <= come + len(data):
                data[100_000 - come] ^= 1
            come += len(data)
            target.sendall(data)


@contextlib.contextmanager
def behind(relay: Relay, start: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """A replica that reads its original through a relay."""
    try:
        yield start("--replica-of", relay.url, memory=True)
    finally:
        relay.close()


def test_a_slow_replica_skips(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun], litema: type[LitEmaOracle]
) -> None:
    """It never queues: of many versions it holds few, each of them whole, and the newest in the end."""
    rows, origin = 20_000, start_server()
    there = plain_run(origin)
    there.create(model(0, rows), decay=DECAY).raise_for_status()
    there.begin(model(0, rows)).raise_for_status()
    oracle = litema(model(0, rows), decay=DECAY)
    shadows = {0: {name: each.clone() for name, each in oracle.shadow.items()}}
    with behind(Slow(origin.url), start_server) as replica:
        here = plain_run(replica)
        wait_until(lambda: etag(here) is not None, "the replica", _SECONDS)
        held = set()
        with trained(there, oracle, shadows, rows):
            until = time.monotonic() + 2.0
            while time.monotonic() < until or not 1 < len(held) < len(shadows) / 2:
                assert time.monotonic() < until + _SECONDS, (held, len(shadows))
                held.add(pulled(here, shadows))
        wait_until(lambda: here.info()["step"] == max(shadows), "the newest", _SECONDS)
        assert pulled(here, shadows) == max(shadows)
        assert here.info()["replica"]["behind_seconds"] == 0.0


def test_flipped_bytes_are_never_served(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """A version whose weights came changed does not count; it is pulled again, and the replica says why."""
    origin = start_server()
    there = plain_run(origin)
    there.create(model(0, 2000)).raise_for_status()
    there.begin(model(0, 2000)).raise_for_status()
    relay = Flipping(origin.url)
    with behind(relay, start_server) as replica:
        here = plain_run(replica)
        wait_until(lambda: here.http.get("/v1/server").json()["replica"]["fault"], "the fault", _SECONDS)
        assert "other weights came" in here.http.get("/v1/server").json()["replica"]["fault"]
        assert here.pull().status_code == 409
        relay.flips = False
        wait_until(lambda: etag(here) == etag(there), "the replica", _SECONDS)
        assert here.pull().content == there.pull().content


def test_an_original_that_is_killed_while_it_is_read(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """What the replica had is served whole, before and after."""
    origin = start_server()
    there = plain_run(origin)
    there.create(model(0, 200_000)).raise_for_status()
    there.begin(model(0, 200_000)).raise_for_status()
    with behind(Slow(origin.url), start_server) as replica:
        here = plain_run(replica)
        wait_until(lambda: etag(here) is not None, "the replica", _SECONDS)
        had = here.pull().content
        there.push(1, model(1, 200_000)).raise_for_status()
        time.sleep(0.1)  # of the 2 s that the version takes
        origin.kill()
        wait_until(lambda: not here.info()["replica"]["reached"], "the loss to be told", _SECONDS)
        assert here.pull().content == had
        assert here.info()["step"] is None


def test_all_averages_of_one_version(pair: Pair) -> None:
    """However fast updates come, a replica of a run with several averages has all of one version, and goes on."""
    there, here = pair.run()
    many = [{"name": f"a{number}", "schedule": "constant", "decay": number / 10} for number in range(8)]
    there.create(model(0), averages=many).raise_for_status()
    there.begin(model(0)).raise_for_status()
    pair.meets()
    ended = threading.Event()

    def train() -> None:
        step = 0
        while not ended.is_set():
            step += 1
            there.push(step, model(step % 5)).raise_for_status()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        seen = set()
        until = time.monotonic() + _SECONDS
        while len(seen) < 10 and time.monotonic() < until:
            seen.add(here.info()["version"])
    finally:
        ended.set()
        thread.join()
    assert len(seen) == 10


def test_a_stretch_comes_from_who_has_the_version(pair: Pair) -> None:
    """From server and replica in turn; from the server where the replica lacks the version or is gone, and from the
    replica where the server is gone."""
    there, _ = pair.run()
    there.create(model(0)).raise_for_status()
    there.begin(model(0)).raise_for_status()
    pair.meets()
    content, tag = there.pull().content, etag(there)
    once = RetryPolicy(attempts=1)

    def stretches(*urls: str, etag: str | None = tag, times: int = 4) -> list[str]:
        """Who sent the same stretch, one time after another."""
        with contextlib.ExitStack() as stack:
            transports = [Transport(url, retry=once) for url in urls]
            for each in transports:
                stack.callback(each.close)
            holders, found = Holders(transports[0], transports[1:]), []
            for _ in range(times):
                more = {"query": {}, "start": 100, "stop": 200, "patience": 0.0}
                with holders.download(f"{there.path}/weights", etag=etag, **more) as part:
                    view = memoryview(bytearray(100))
                    part.readinto(view)
                assert (part.status, bytes(view)) == (206, content[100:200])
                found.append(part.url)
            return found

    server, replica, nobody = pair.origin.url, pair.copy.url, "http://127.0.0.1:9"
    urls = sorted({url.partition("/v1")[0] for url in stretches(server, replica)})
    assert urls == sorted((server, replica))
    assert {url.partition("/v1")[0] for url in stretches(server, replica, etag=None)} == {server}
    assert {url.partition("/v1")[0] for url in stretches(server, nobody)} == {server}
    behind = pair.start()  # a server without the run
    assert {url.partition("/v1")[0] for url in stretches(server, behind.url)} == {server}
    pair.origin.kill()
    assert {url.partition("/v1")[0] for url in stretches(server, replica, etag=tag)} == {replica}
    with pytest.raises(EmaError, match=re.escape(server)):
        stretches(server, nobody)
