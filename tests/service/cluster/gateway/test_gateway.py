"""The gateway, in a process of its own, before servers of which each has a shard: to plain HTTP and to our client it is
a server that has the whole run.

Knows what a server answers. Does not know how hosts decide (test_cluster): here each server applies what it is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

import httpx
import pytest
import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor

from ema_client import EmaClient
from ema_client.http.digests import digests_of
from ema_client.protocol import (
    DIGEST_FOLLOWS,
    HEADER_DIGEST,
    HEADER_SEGMENT,
    RunLayout,
    TensorSpec,
    UpdateStatus,
    from_json,
)
from ema_client.training.beginning import parameters_data
from ema_service.cluster.gateway.asking import Asking
from ema_service.memory import Layout
from ema_service.tokens import create_token
from tests.conftest import LitEmaOracle, PlainRun, ServerProcess
from tests.service.cluster.plain_hosts import PlainHosts, pushed
from tests.service.cluster.ranks import digest_of
from tests.service.cluster.servers import cut
from tests.service.runs.gatherer import part_body, rows
from tests.waiting import wait_until

if TYPE_CHECKING:
    from fastapi import Request

    from ema_client.protocol import RunInfo
    from ema_service.cluster.gateway.hosts import Hosts

DECAY = 0.5


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[PlainHosts]:
    started: list[ServerProcess] = []

    def start() -> ServerProcess:
        folder = tmp_path_factory.mktemp("host")
        started.append(server_class(folder, data_dir=folder / "data").start())
        return started[-1]

    found = PlainHosts(tmp_path_factory.mktemp("cluster"), start, 3)
    yield found
    found.end()
    for server in started:
        server.kill()


@pytest.fixture
def shards(hosts: PlainHosts, run_name: str, model: Callable[[int], dict[str, Tensor]]) -> list[PlainRun]:
    """A run of a model with every dtype, a shard a server."""
    return hosts.runs(run_name, model(0), decay=DECAY)


@pytest.fixture
def run(hosts: PlainHosts, shards: list[PlainRun]) -> PlainRun:
    """The same run at the gateway."""
    return PlainRun(hosts.gateway, shards[0].name)


@pytest.fixture
def whole(
    server: ServerProcess, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]
) -> Iterator[PlainRun]:
    """A run of the same name and tensors on one server."""
    with server.http() as http:
        run = PlainRun(http, shards[0].name)
        assert run.create(model(0), decay=DECAY).status_code == 201
        run.begin(model(0)).raise_for_status()
        yield run


def test_a_run_is_told_as_one(run: PlainRun, whole: PlainRun) -> None:
    """What is told of the run is what one server tells, but for where it is."""
    expected, found = whole.info(), run.info()
    assert found["link"] == "a gateway to 3 hosts"
    # Here hosts do not know of how many tensors the whole run is: each has a run of its own.
    apart = ("created_at", "updated_at", "link", "versions_in", "writer", "shard", "tensors", "copied")
    assert {n: v for n, v in found.items() if n not in apart} == {n: v for n, v in expected.items() if n not in apart}
    listed = run.http.get("/v1/runs").raise_for_status().json()["runs"]
    assert [each for each in listed if each["run"] == run.name] == [run.info()]


def test_a_listing_asks_each_host_once(
    hosts: PlainHosts, run_name: str, model: Callable[[int], dict[str, Tensor]]
) -> None:
    """However many runs there are, of none of which the gateway has heard before."""
    for number in range(5):
        hosts.runs(f"{run_name}-{number}", model(0))

    def asked() -> list[dict[str, float]]:
        pattern = re.compile(r'ema_requests_total\{method="GET",route="(/v1/runs[^"]*)",status="200"\} (\S+)')
        texts = [httpx.get(f"{server.url}/metrics").text for server in hosts.servers]
        return [{route: float(count) for route, count in pattern.findall(text)} for text in texts]

    before = asked()
    listed = hosts.gateway.get("/v1/runs").raise_for_status().json()["runs"]
    assert {f"{run_name}-{number}" for number in range(5)} <= {each["run"] for each in listed}
    for once, found in zip(before, asked(), strict=True):
        assert found == {**once, "/v1/runs": once.get("/v1/runs", 0.0) + 1}


def test_layouts_are_remembered_by_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many runs as have so many tensors together; the run that was not asked for longest goes first. A layout of
    more than that is remembered alone."""
    monkeypatch.setattr("ema_service.cluster.gateway.asking._MOST_TENSORS", 6)
    sizes = {"a": 2, "b": 2, "c": 2, "d": 2, "large": 7}
    layouts = {run: tuple(TensorSpec(f"w{at}", (4,), "F32") for at in range(count)) for run, count in sizes.items()}
    asked: list[str] = []

    class Known(Asking):
        async def each(self, _request: object, path: str, _kind: object) -> list[Any]:
            run = path.split("/")[3]
            asked.append(run)
            return [RunLayout(run, specs, (), Layout(specs).digest) for specs in [layouts[run]]]

    async def ask(*runs: str) -> list[str]:
        asked.clear()
        for run in runs:
            await known.map_of(cast("RunInfo", SimpleNamespace(run=run, created_at=1.0)), cast("Request", None))
        return list(asked)

    known = Known(cast("Hosts", None))
    assert asyncio.run(ask("a", "b", "c", "a", "b", "c")) == ["a", "b", "c"]
    assert asyncio.run(ask("a", "d", "a", "c", "b")) == ["d", "b"]
    assert asyncio.run(ask("large", "large", "a")) == ["large", "a"]


def test_the_layout_is_the_whole(run: PlainRun, whole: PlainRun) -> None:
    """Tensors that were cut are told whole, and nobody is told of lanes."""
    found = run.http.get(f"{run.path}/layout").json()
    expected = whole.http.get(f"{whole.path}/layout").json()
    assert (found["layout"], found["digest"]) == (expected["layout"], expected["digest"])
    assert found["lanes"] == 1


@pytest.mark.parametrize("query", [{}, {"dtype": "BF16"}, {"prefix": "conv"}, {"prefix": "emb", "dtype": "F64"}])
def test_a_body_is_that_of_one_server(run: PlainRun, whole: PlainRun, query: dict[str, str]) -> None:
    """Byte for byte, and in every stretch of it; HEAD tells its length and its ETag."""
    body = whole.pull(**query).raise_for_status().content
    answer = run.pull(**query).raise_for_status()
    assert answer.content == body
    head = run.http.head(f"{run.path}/weights", params=query)
    assert (head.headers["etag"], head.headers["content-length"]) == (answer.headers["etag"], str(len(body)))
    for start, stop in [(0, 1), (7, 9), (3, len(body)), (len(body) - 1, len(body)), (len(body) // 3, len(body) // 2)]:
        part = run.http.get(f"{run.path}/weights", params=query, headers={"Range": f"bytes={start}-{stop - 1}"})
        assert (part.status_code, part.content) == (206, body[start:stop])
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(body)}"


def test_each_hosts_digest_of_an_update(
    run: PlainRun, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """Whoever has the update's data finds the digest of each host's slice of it; a change of one row is one host's."""
    pushed(shards, model(1), 1)
    layout = from_json(RunLayout, run.http.get(f"{run.path}/layout").json()).layout
    told = from_json(UpdateStatus, run.http.get(f"{run.path}/updates/1").json())

    def differing(tensors: dict[str, Tensor]) -> list[int]:
        data = parameters_data([tensors[spec.name] for spec in layout], layout, buffers=True)
        found = digests_of(data, [each.bytes for each in told.digests])
        return [at for at, (a, b) in enumerate(zip(found, told.digests, strict=True)) if a.hex() != b.digest]

    assert len(told.digests) == 3
    assert differing(model(1)) == []
    other = model(1)
    other["conv.weight"][-1] += 1
    assert len(differing(other)) == 1
    assert from_json(UpdateStatus, run.http.get(f"{run.path}/updates/2").json()).digests == ()


def test_a_range_beyond_the_end_is_refused(run: PlainRun) -> None:
    """With the length, as a server does."""
    answer = run.http.get(f"{run.path}/weights", headers={"Range": "bytes=999999999-"})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"].startswith("bytes */")


def test_conditions(run: PlainRun, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]) -> None:
    """A version that the reader has is not sent again; If-Range has a part of the version it names, or the next."""
    first = run.pull()
    etag = first.headers["etag"]
    assert run.http.get(f"{run.path}/weights", headers={"If-None-Match": etag}).status_code == 304
    part = {"Range": "bytes=100-", "If-Range": etag}
    assert run.http.get(f"{run.path}/weights", headers=part).content == first.content[100:]
    pushed(shards, model(1), 1)
    later = run.http.get(f"{run.path}/weights", headers={**part, "If-None-Match": etag})
    assert later.status_code == 200
    assert later.headers["etag"] != etag
    assert later.content == run.pull().content


def test_a_stretch_of_a_version_that_is_being_read_stays_to_be_had(hosts: PlainHosts, run_name: str) -> None:
    """A reader of several connections gets its version although updates come between its stretches."""
    tensors = {"w": torch.randn(300, 4000)}
    shards = hosts.runs(run_name, tensors, decay=DECAY)
    run = PlainRun(hosts.gateway, run_name)
    body = run.pull().content
    first = run.http.get(f"{run.path}/weights", headers={"Range": "bytes=0-99"})
    pushed(shards, {"w": torch.randn(300, 4000)}, 1)
    rest = {"Range": "bytes=100-", "If-Range": first.headers["etag"]}
    second = run.http.get(f"{run.path}/weights", headers=rest)
    assert (second.status_code, first.content + second.content) == (206, body)


def test_a_slow_reader_has_one_version(hosts: PlainHosts, run_name: str) -> None:
    """The versions of hosts whose turn comes late stay, though the run moves on meanwhile."""
    tensors = {"w": torch.randn(3000, 4000)}  # 16 MB a host: more than sockets hold
    shards = hosts.runs(run_name, tensors, decay=DECAY)
    path = f"/v1/runs/{run_name}/weights"
    with hosts.gateway.stream("GET", path) as answer:
        chunks = answer.iter_raw()
        body = next(chunks)
        for step in (1, 2, 3):
            pushed(shards, {"w": torch.randn(3000, 4000)}, step)
            threading.Event().wait(0.7)
        body += b"".join(chunks)
    assert torch.equal(load(body)["w"], tensors["w"])


def test_hosts_that_are_apart_are_no_version(
    run: PlainRun, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """While one host is a version behind nothing is sent, with a word of when to come again."""
    assert shards[1].push(1, cut(model(1), 3)[1]).status_code == 200
    answer = run.pull()
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert answer.headers["retry-after"] == "0"
    for place in (0, 2):
        assert shards[place].push(1, cut(model(1), 3)[place]).status_code == 200
    assert run.pull().status_code == 200


def test_pulls_under_updates_are_never_torn(
    hosts: PlainHosts, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]], litema: type[LitEmaOracle]
) -> None:
    """Whatever is read is one of the versions that there were, whole."""
    oracle, versions = litema(model(0), decay=DECAY), []
    versions.append({name: tensor.clone() for name, tensor in oracle.shadow.items()})
    for step in range(1, 41):
        oracle.update(model(step))
        versions.append({name: tensor.clone() for name, tensor in oracle.shadow.items()})
    read = threading.Event()

    def train() -> None:
        for step in range(1, 41):
            if step == 21:
                read.wait(60)
            pushed(shards, model(step), step)

    trainer = threading.Thread(target=train)
    trainer.start()
    seen = set()
    with EmaClient(hosts.url) as client:
        while max(seen, default=0) < 40:
            weights = client.pull(shards[0].name)
            seen.add(step := weights.info.step or 0)
            read.set()
            for name, tensor in versions[step].items():
                assert torch.equal(weights[name], tensor), f"{name} of step {step}"
    trainer.join()
    assert min(seen) <= 20


class Noting(BaseHTTPRequestHandler):
    """A host that passes what it is asked on to a server, and says that its run is a shard, created at 5.5.

    behind: the server. created_at: what it was asked weights of, each time.
    """

    behind: str
    created_at: list[str]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        given = dict(parse_qsl(query))
        if path.endswith("/weights"):
            self.created_at.append(given.pop("created_at", ""))
        headers = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        answer = httpx.get(self.behind + path, params=given, headers=headers)
        body = answer.content
        if path == "/v1/runs/r":
            shard = {"place": 0, "of": 1, "birth": 1}
            body = json.dumps({**answer.json(), "created_at": 5.5, "shard": shard}).encode()
        self.send_response(answer.status_code)
        for name in ("content-type", "content-range", "etag"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def test_hosts_are_asked_for_the_run_of_one_time(
    tmp_path: Path, server: ServerProcess, model: Callable[[int], dict[str, Tensor]]
) -> None:
    """Two runs of one name may have versions of one name, and where a name is used again hosts may have either."""

    class Host(Noting):
        behind, created_at = server.url, []

    with server.http() as http, ThreadingHTTPServer(("127.0.0.1", 0), Host) as host:
        threading.Thread(target=host.serve_forever).start()
        run = PlainRun(http, "r")
        hosts = PlainHosts(tmp_path, lambda: SimpleNamespace(url=f"http://127.0.0.1:{host.server_port}"), 1)
        try:
            run.create(model(0)).raise_for_status()
            run.begin(model(0)).raise_for_status()
            assert hosts.gateway.get("/v1/runs/r/weights").content == run.pull().content
        finally:
            hosts.end()
            host.shutdown()
            http.delete(run.path)
    assert set(Host.created_at) == {"5.5"}


# --- pushes ----------------------------------------------------------------------------------------------------------


def test_a_push_is_cut(run: PlainRun, whole: PlainRun, model: Callable[[int], dict[str, Tensor]]) -> None:
    """The hosts have together what one server has."""
    for step in (1, 2):
        expected, found = whole.push(step, model(step)).json(), run.push(step, model(step)).json()
        assert found == expected
    assert run.pull().content == whole.pull().content
    assert run.http.get(f"{run.path}/updates/2").json()["state"] == "applied"
    assert run.http.get(f"{run.path}/updates/3").json()["state"] == "unknown"


def _unordered(tensors: dict[str, Tensor]) -> bytes:
    """A body whose tensors come in another order than a layout's, with metadata."""
    from ema_client.wire import build_header, place
    from tests.service.conftest import specs_of

    specs: list[TensorSpec] = sorted(specs_of(tensors), key=lambda spec: spec.name, reverse=True)
    header = build_header(place(specs, sort=False), {"format": "pt"})
    data = b"".join(bytes(tensors[spec.name].contiguous().reshape(-1).view(torch.uint8).numpy()) for spec in specs)
    return header + data


def test_a_body_in_another_order_is_cut_too(
    run: PlainRun, whole: PlainRun, model: Callable[[int], dict[str, Tensor]]
) -> None:
    """And one of unknown length, which comes in small pieces."""
    whole.push(1, model(1)).raise_for_status()
    body = _unordered(model(1))
    pieces = (body[at : at + 17] for at in range(0, len(body), 17))
    answer = run.http.put(f"{run.path}/updates/1", content=pieces)
    assert answer.status_code == 200, answer.text
    assert run.pull().content == whole.pull().content


def test_a_digest_goes_along(run: PlainRun, model: Callable[[int], dict[str, Tensor]]) -> None:
    """A body whose bytes were flipped on their way to the gateway is refused, and one that was not is applied."""
    body = save(model(1))
    data = body[8 + int.from_bytes(body[:8], "little") :]
    digest = xxhash.xxh3_128(xxhash.xxh3_128(data).digest()).digest()
    headers = {HEADER_DIGEST: DIGEST_FOLLOWS}
    flipped = bytearray(body)
    flipped[-1] ^= 1
    refused = run.http.put(f"{run.path}/updates/1", content=bytes(flipped) + digest, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
    assert run.http.put(f"{run.path}/updates/1", content=body + digest, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda body: body[:-1], "malformed_body"),
        (lambda body: body + b"x", "malformed_body"),
        (lambda body: (1 << 40).to_bytes(8, "little") + body[8:], "malformed_body"),
        (lambda _: save({"other": torch.zeros(3)}), "layout_mismatch"),
        (lambda _: b"", "malformed_body"),
    ],
)
def test_bad_bodies_are_refused(
    run: PlainRun,
    model: Callable[[int], dict[str, Tensor]],
    change: Callable[[bytes], bytes],
    code: str,
) -> None:
    """As a server refuses them, and nobody waits."""
    answer = run.http.put(f"{run.path}/updates/1", content=change(save(model(1))))
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text


def test_tensors_of_another_run_are_named(run: PlainRun, model: Callable[[int], dict[str, Tensor]]) -> None:
    """In the words of the whole run, not of a shard."""
    other = {**model(1), "wide": model(1)["wide"].float()}
    pieces = iter([save(other)])
    answer = run.http.put(f"{run.path}/updates/1", content=pieces)
    assert (answer.status_code, answer.json()["code"]) == (422, "layout_mismatch")
    assert "wide is F32 [3], expected F64 [3]" in answer.json()["detail"]


def test_a_run_that_was_made_anew_is_cut_anew(hosts: PlainHosts, run_name: str) -> None:
    """Though the gateway knew the one before, and was not told."""
    run = PlainRun(hosts.gateway, run_name)
    for size in (30, 90):
        shards = hosts.runs(run_name, {"w": torch.randn(size, 5)}, decay=0.0)
        tensors = {"w": torch.randn(size, 5)}
        run.push(1, tensors).raise_for_status()
        torch.testing.assert_close(run.weights()["w"], tensors["w"])
        for shard in shards:
            assert shard.http.delete(shard.path).status_code == 204


def test_a_hosts_refusal_is_passed_on(run: PlainRun, model: Callable[[int], dict[str, Tensor]]) -> None:
    """With its status and code, before the rest of the body was sent anywhere."""
    run.push(5, model(5)).raise_for_status()
    answer = run.push(3, model(3))
    assert (answer.status_code, answer.json()["code"]) == (409, "stale_step")


def test_parts(
    hosts: PlainHosts, run_name: str, model: Callable[[int], dict[str, Tensor]], litema: type[LitEmaOracle]
) -> None:
    """Parts of sharded ranks reach each host, with the rows that it has; applied is what a host applied, and until then
    those parts are told that all have."""
    hosts.runs(run_name, model(0), begun=False, decay=DECAY)
    run, oracle = PlainRun(hosts.gateway, run_name), litema(model(0), decay=DECAY)
    for step, path in [(0, "weights"), (1, "updates/1")]:
        bodies = [part_body(model(step), rows(model(step), rank, 2)) for rank in range(2)]
        digest = {HEADER_DIGEST: DIGEST_FOLLOWS}
        first = run.http.put(
            f"{run.path}/{path}/parts/0?of=2&group=g", content=bodies[0] + digest_of(bodies[0]), headers=digest
        )
        assert (first.status_code, first.json()) == (
            202,
            {"step": step, "state": "staged", "parts": [0], "digest": None, "digests": []},
        )
        told = run.http.get(f"{run.path}/updates/{step}", params={} if step else {"first": "g"}).json()
        assert (told["state"], told["parts"]) == ("staged", [0])
        last = run.http.put(f"{run.path}/{path}/parts/1?of=2&group=g", content=bodies[1])
        assert (last.status_code, last.json()["run" if step == 0 else "applied"]) == (
            200,
            run_name if step == 0 else True,
        )
    oracle.update(model(1))
    found = load(run.pull().raise_for_status().content)
    assert all(torch.equal(found[name], shadow) for name, shadow in oracle.shadow.items())
    flipped = run.http.put(f"{run.path}/updates/2/parts/0?of=1&group=g", content=bodies[0] + bytes(16), headers=digest)
    assert (flipped.status_code, flipped.json()["code"]) == (422, "digest_mismatch")
    foreign = run.http.put(f"{run.path}/updates/2/parts/0?of=1&group=h", content=save({"x": torch.ones(3)}))
    assert (foreign.status_code, foreign.json()["code"]) == (422, "layout_mismatch")


def test_memory_is_not_shared_with_a_gateway(run: PlainRun) -> None:
    """A client that offers it is told to send the bytes."""
    answer = run.http.put(f"{run.path}/updates/1", headers={HEADER_SEGMENT: "pid=1"})
    assert (answer.status_code, answer.json()["code"]) == (409, "segment_unusable")


def test_what_is_not_offered_is_refused(run: PlainRun) -> None:
    """By name, and what no server has as no route."""
    for method, path in [
        ("PUT", "/updates/1/stretches/0-8"),
        ("PUT", "/updates/1/parts/0/stretches/0-8"),
    ]:
        answer = run.http.request(method, run.path + path)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), path
        assert "on several hosts" in answer.json()["detail"]
    assert run.pull(soup="a:1").json()["code"] == "snapshot_not_found"
    assert run.pull(created_at="1.0").json()["code"] == "invalid_request"
    assert run.http.get(f"{run.path}/nothing").json()["code"] == "route_not_found"
    assert run.http.get("/v1/runs/no%3Fname").json()["code"] == "invalid_request"


def test_a_browsers_page_is_turned_away(run: PlainRun, model: Callable[[int], dict[str, Tensor]]) -> None:
    """By the hosts, which are told of it as if it had come to them."""
    page = {"Origin": "http://elsewhere.example"}
    answer = run.http.put(f"{run.path}/updates/1", content=save(model(1)), headers=page)
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
    answer = run.http.get(run.path, headers={"Host": "elsewhere.example"})
    assert (answer.status_code, answer.json()["code"]) == (421, "foreign_host")


# --- our client ------------------------------------------------------------------------------------------------------


def test_our_client_works_unchanged(
    hosts: PlainHosts, run_name: str, model: Callable[[int], dict[str, Tensor]], litema: type[LitEmaOracle]
) -> None:
    """Pushes, pulls, and reads its own updates, bit-identical to LitEma."""
    hosts.runs(run_name, model(0), decay=DECAY)
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(hosts.url) as client:
        for step in range(1, 5):
            client.push(run_name, model(step), step=step)
            oracle.update(model(step))
            found = client.pull(run_name)
            assert found.info.step == step
            for name, tensor in oracle.shadow.items():
                assert torch.equal(found[name], tensor), name
        assert client.run(run_name).num_updates == 4
        assert client.layout(run_name).lanes == 1
        assert client.server().name == "ema-service"


def test_large_bodies_of_our_client(hosts: PlainHosts, run_name: str) -> None:
    """What would go in lanes and in shared memory goes over one connection."""
    tensors = {"w": torch.randn(4096, 2560), "v": torch.randn(33)}  # 40 MiB
    hosts.runs(run_name, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, decay=0.0)
    with EmaClient(hosts.url) as client:
        client.push(run_name, client.shared_state(tensors), step=1)
        found = client.pull(run_name)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# --- who is away -----------------------------------------------------------------------------------------------------


def test_who_is_away(
    tmp_path: Path, start_server: Callable[..., ServerProcess], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """Without the coordinator reads go on; a host that is gone is named; one that is back elsewhere is found."""
    hosts = PlainHosts(tmp_path, start_server, 2)
    try:
        hosts.runs("r", model(0))
        run = PlainRun(hosts.gateway, "r")
        body = run.pull().raise_for_status().content
        victim = hosts.servers[1]
        address = victim.url
        victim.kill()
        answer = run.pull()
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert f"host 1 ({address})" in answer.json()["detail"]
        assert hosts.gateway.get("/readyz").status_code == 503
        assert hosts.gateway.get("/healthz").status_code == 200
        victim.start()
        hosts.arrive(1)
        wait_until(lambda: run.pull().status_code == 200, "the host's new address")
        assert run.pull().content == body
        hosts.coordinator.kill()
        hosts.coordinator.wait(30)
        threading.Event().wait(2.2)  # longer than a map is good for
        assert run.pull().content == body
    finally:
        hosts.end()


def test_a_gateway_without_a_coordinator_says_so(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    """And by which address it looked."""
    hosts = PlainHosts(tmp_path, start_server, 1)
    try:
        flags = ["--cluster-token-file", str(hosts.token_file), "--coordinator", "http://127.0.0.1:9"]
        _, url = hosts.program("gateway", "--port", "0", *flags)
        answer = httpx.get(f"{url}/v1/runs")
        assert answer.status_code == 503
        assert "http://127.0.0.1:9" in answer.json()["detail"]
        assert "TOKEN" not in answer.text
    finally:
        hosts.end()


def test_beyond_loopback_tokens_are_asked_for(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    """A gateway that others can reach answers nobody for hosts that ask for no tokens, unless told so."""
    hosts = PlainHosts(tmp_path, start_server, 1)
    try:
        flags = ["--cluster-token-file", str(hosts.token_file), "--coordinator", hosts.coordinator_url]
        _, url = hosts.program("gateway", "--host", "0.0.0.0", "--port", "0", *flags)
        answer = httpx.get(f"http://127.0.0.1:{url.rpartition(':')[2]}/v1/runs")
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        _, url = hosts.program("gateway", "--host", "0.0.0.0", "--port", "0", "--insecure-no-auth", *flags)
        assert httpx.get(f"http://127.0.0.1:{url.rpartition(':')[2]}/v1/runs").status_code == 200
    finally:
        hosts.end()


def test_tokens_are_the_hosts(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    """A gateway passes them on, and lets in whom the hosts let in, also from other machines."""
    tokens = tmp_path / "tokens"
    token = create_token(tokens, ["admin"], "*")
    hosts = PlainHosts(tmp_path, partial(start_server, "--token-file", str(tokens)), 2)
    try:
        flags = ["--cluster-token-file", str(hosts.token_file), "--coordinator", hosts.coordinator_url]
        _, url = hosts.program("gateway", "--host", "0.0.0.0", "--port", "0", *flags)
        for base in (hosts.url, f"http://127.0.0.1:{url.rpartition(':')[2]}"):
            stranger = httpx.get(f"{base}/v1/runs/r")
            assert (stranger.status_code, stranger.headers["www-authenticate"]) == (401, "Bearer")
            known = httpx.get(f"{base}/v1/runs/r", headers={"Authorization": f"Bearer {token}"})
            assert (known.status_code, known.json()["code"]) == (404, "run_not_found")
    finally:
        hosts.end()


# --- how it went -----------------------------------------------------------------------------------------------------


def test_the_past_is_told(run: PlainRun, shards: list[PlainRun], model: Callable[[int], dict[str, Tensor]]) -> None:
    """History, distances and timeline have a server's shape, and a reader who has them is sent nothing."""
    for step in range(1, 4):
        pushed(shards, model(step), step)
    found = run.http.get(f"{run.path}/history", params={"points": 50}).raise_for_status().json()
    assert (found["run"], found["columns"]["step"][-1], found["seen"]) == (run.name, 3, 3)
    one = shards[0].http.get(f"{shards[0].path}/history").json()
    assert found["columns"].keys() == one["columns"].keys()
    distances = run.http.get(f"{run.path}/distances").raise_for_status()
    assert set(distances.json()["tensors"]) == set(model(0))
    entries = run.http.get(f"{run.path}/timeline").raise_for_status().json()["entries"]
    assert [each["text"] for each in entries] == ["created on 3 hosts"]
    known = {"If-None-Match": distances.headers["etag"]}
    assert run.http.get(f"{run.path}/distances", headers=known).status_code == 304
    for wrong in ("history?points=0", "timeline?limit=x", "history?average=.."):
        assert run.http.get(f"{run.path}/{wrong}").json()["code"] == "invalid_request"
