"""Averages of any length of a run on several hosts, through the gateway: byte for byte what one server sends.

Knows HTTP, and where hosts keep their files. Does not know how an average is worked out, or how hosts agree.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import EmaError, SynthesisRefused, VersionGone
from ema_client.hosts import direct
from ema_client.hosts.pulling import pull
from ema_client.protocol import HEADER_RECIPE, HEADER_TARGETS
from tests.service.cluster.launched import Launched
from tests.service.posthoc import as_state, walk
from tests.waiting import settled, wait_until

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

#: The first test waits for a cluster and a server, and both trainings.
pytestmark = pytest.mark.timeout(300)

UPDATES = 18
WALKED = walk(UPDATES + 60, size=200)
WISHES = {
    "a width": "sigma_rel=0.1",
    "a decay": "decay=0.8",
    "a half-life": "half_life=5",
    "a window": f"window=12:{UPDATES}&max_error=0.5",
    "cast": "sigma_rel=0.1&dtype=BF16",
    "some tensors": "sigma_rel=0.1&prefix=b",
    "a time of the ring": "sigma_rel=0.1&at=counter:12&max_error=0.5",
    "a snapshot": "sigma_rel=0.1&at=snapshot:middle&max_error=0.5",
}
#: Sums of snapshots, whose weights the reader gives.
SOUPS = {
    "a soup": "soup=middle:0.25,late:0.75",
    "a soup of some tensors, cast": "soup=middle:0.5,late:0.5&average=posthoc-0.03&dtype=BF16&prefix=b",
}


def train(client: EmaClient, run: str = "r", updates: int = UPDATES) -> None:
    """Make a run with a ring, and a snapshot in the middle; of the ring a few snapshots at a time are yet to come."""
    client.create_run(run, as_state(WALKED[0]), posthoc={"snapshots": 6})
    for step in range(1, updates + 1):
        client.push(run, as_state(WALKED[step]), step=step)
        if step % 6 == 0:
            settled(client, run)
        if step in (9, 15):
            client.snapshot(run, "middle" if step == 9 else "late")
    settled(client, run)


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]
) -> Iterator[tuple[Launched, ServerProcess]]:
    """Two hosts and one server, which were trained alike."""
    folder = tmp_path_factory.mktemp("both")
    cluster, server = Launched(folder / "all", "--local", "2").start(), server_class(folder, data_dir=folder / "data")
    try:
        with EmaClient(cluster.url) as ours, EmaClient(server.start().url) as theirs:
            for client in (ours, theirs):
                train(client)
        yield cluster, server
    finally:
        cluster.end()
        server.kill()


def sent(url: str, query: str, **more: Any) -> httpx.Response:
    return httpx.get(f"{url}/v1/runs/r/weights?{query}", timeout=60, **more)


def facts(answer: httpx.Response) -> dict[str, str]:
    own = ("ema-shards", "ema-recipe")
    return {name: value for name, value in answer.headers.items() if name.startswith("ema-") and name not in own}


@pytest.mark.parametrize("wish", [*WISHES, *SOUPS])
def test_bytes_are_those_of_one_server(both: tuple[Launched, ServerProcess], wish: str) -> None:
    """Header, metadata and every value; the same facts; and a part is had by Range, and known by its tag."""
    cluster, server = both
    query = {**WISHES, **SOUPS}[wish]
    ours, theirs = sent(cluster.url, query), sent(server.url, query)
    assert (ours.status_code, theirs.status_code) == (200, 200), ours.text
    assert ours.content == theirs.content
    assert facts(ours) == facts(theirs)
    rest = sent(cluster.url, query, headers={"Range": "bytes=100-", "If-Range": ours.headers["etag"]})
    assert (rest.status_code, rest.content) == (206, ours.content[100:])
    known = sent(cluster.url, query, headers={"If-None-Match": ours.headers["etag"]})
    assert known.status_code == 304


def test_what_no_soup_is_made_of(both: tuple[Launched, ServerProcess]) -> None:
    """Refused in the words of one server."""

    def refused(url: str, query: str) -> tuple[int, str]:
        answer = sent(url, query)
        return answer.status_code, answer.json()["code"]

    cluster, server = both
    for query in ("soup=none:1", "soup=middle", "soup=middle:1,middle:2", "soup=", "soup=middle:1&min_step=3"):
        assert refused(cluster.url, query) == refused(server.url, query), query


def test_what_is_told_is_what_one_server_tells(both: tuple[Launched, ServerProcess]) -> None:
    """The ring's times, how an average would be worked out, and why one is refused."""
    cluster, server = both

    def told(url: str, path: str) -> Any:
        answer = httpx.get(f"{url}/v1/runs/r{path}", timeout=60)
        return answer.status_code, {name: value for name, value in answer.json().items() if name != "request_id"}

    late = "/weights?window=1:7777"
    for path in ("/profiles?sigma_rel=0.1", "/profiles?sigma_rel=0.01", late):
        assert told(cluster.url, path) == told(server.url, path)
    assert told(cluster.url, late)[1]["code"] == "synthesis_refused"
    ours, theirs = (told(url, "")[1]["ring"] for url in (cluster.url, server.url))
    assert (ours["times"], ours["begin"], ours["trouble"]) == (theirs["times"], theirs["begin"], None)
    assert ours["bytes"] > theirs["bytes"]  # each host has headers of its own
    assert sent(cluster.url, "sigma_rel=0.1&average=ema").json()["code"] == "invalid_request"


def test_hosts_follow_one_recipe(both: tuple[Launched, ServerProcess]) -> None:
    """A host that lacks what the recipe names says so, and sends nothing; what is no recipe is refused."""
    cluster, _ = both
    with cluster.http() as http:
        first, second = (each["address"] for each in http.get("/v1/runs/r/shards").json()["shards"])
    text = sent(first, "sigma_rel=0.1").headers[HEADER_RECIPE]
    assert sent(second, "sigma_rel=0.1", params={"sigma_rel": "0.1", "recipe": text}).status_code == 200

    def changed(change: Callable[[list[Any]], object]) -> httpx.Response:
        said = json.loads(zlib.decompress(base64.urlsafe_b64decode(text)))
        change(said)
        other = base64.urlsafe_b64encode(zlib.compress(json.dumps(said).encode())).decode()
        return sent(second, "", params={"sigma_rel": "0.1", "recipe": other})

    def rename(said: list[Any]) -> None:
        said[5][0][1] = "1.7777"

    gone = changed(rename)
    assert (gone.status_code, gone.json()["code"]) == (409, "version_gone")
    assert "1.7777" in gone.json()["detail"]
    assert changed(lambda said: said.__setitem__(1, "1.2")).json()["code"] == "version_gone"
    assert changed(lambda said: said[6][0].append(1.0)).json()["code"] == "invalid_request"
    assert changed(lambda said: said[6][0].__setitem__(0, float("nan"))).json()["code"] == "invalid_request"
    assert changed(lambda said: said[6].append(said[6][0])).json()["code"] == "invalid_request"
    for wrong in ("x", "AAAA", base64.urlsafe_b64encode(zlib.compress(b"[]")).decode()):
        answer = sent(second, "", params={"sigma_rel": "0.1", "recipe": wrong})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert sent(second, "sigma_rel=0.1&version=1.2").json()["code"] == "version_gone"
    assert sent(second, "version=1.2").json()["code"] == "invalid_request"


def test_a_version_that_is_held_stays(both: tuple[Launched, ServerProcess]) -> None:
    """For those who follow a recipe of it, though the run goes on, and for those who hold it again; else it is gone."""
    cluster, _ = both
    steps = iter(range(1, len(WALKED)))
    with EmaClient(cluster.url) as client, cluster.http() as http:
        client.create_run("held", as_state(WALKED[0]), posthoc={"snapshots": 3})
        host = http.get("/v1/runs/held/shards").json()["shards"][1]["address"]

        def push() -> str:
            client.push("held", as_state(WALKED[step := next(steps)]), step=step)
            return str(client.run("held").version)

        def ask(path: str, **query: str) -> httpx.Response:
            return httpx.get(f"{host}/v1/runs/held/{path}", params=query, timeout=60)

        def worked_out(**query: str) -> httpx.Response:
            return ask("weights", sigma_rel="0.1", max_error="1", **query)

        def follows() -> bool:
            """A machine that is busy for a second with something else takes another turn."""
            version = push()
            settled(client, "held")
            before = worked_out()
            recipes.append(before.headers[HEADER_RECIPE])
            assert ask("version", hold="true").json()["version"] == version
            assert push() != version
            found = worked_out(recipe=recipes[-1]), worked_out(version=version), ask("version", version=version)
            return [each.status_code for each in found] == [200] * 3 and found[0].content == before.content

        recipes: list[str] = []
        wait_until(follows, "a version to stay")
        wait_until(lambda: worked_out(recipe=recipes[-1]).status_code == 409, "the version to be gone")
        assert worked_out(recipe=recipes[-1]).json()["code"] == "version_gone"
        assert ask("version", hold="true", version="1.1").json()["code"] == "version_gone"


@pytest.mark.parametrize("wish", [name for name in WISHES if name not in ("cast", "some tensors")])
def test_a_snapshot_is_that_of_one_server(both: tuple[Launched, ServerProcess], wish: str) -> None:
    """Of an average that is worked out: byte for byte, once for a key and for an average, and for that alone."""
    found, name = [], f"kept-{list(WISHES).index(wish)}"
    path, key = f"/snapshots/{name}", {"Idempotency-Key": f"{name}-of-a-test"}
    for each in both:
        with httpx.Client(base_url=f"{each.url}/v1/runs/r", timeout=60) as http:
            made = http.put(f"{path}?{WISHES[wish]}", headers=key)
            assert made.status_code == 201, made.text
            again = [http.put(f"{path}?{WISHES[wish]}", headers=more) for more in (key, {})]
            assert [(one.status_code, one.json()) for one in again] == [(200, made.json())] * 2
            for other in ("?sigma_rel=0.12", ""):
                assert http.put(path + other).json()["code"] == "snapshot_exists"
            weights, said = http.get(f"{path}/weights"), made.json()
            back = http.post("/rewind", json={"snapshot": name}).json()
            lines = [one for one in http.get("/timeline").json()["entries"] if name in one["text"]]
            told = [(one["kind"], one["step"], one["num_updates"], one["text"]) for one in lines]
            found.append((said.pop("bytes") > 0, said.pop("created_at") > 0, said, weights.content, facts(weights)))
            found.append((back["code"], back["detail"], told))
            assert http.delete(path).status_code == 204
    assert found[:2] == found[2:]


def test_a_killed_host_follows_one_that_knows_more(both: tuple[Launched, ServerProcess]) -> None:
    """SIGKILL: of the steps between updates since the newest snapshot the host knows the number alone; what is read
    after is what one server sends that was never ended."""
    bodies = []
    for each in both:
        with EmaClient(each.url) as client:
            client.create_run("uneven", as_state(WALKED[0]), decay_per="step", posthoc={"snapshots": 3})
            for step in (1, 2, 5, 6, 10, 11, 16, 18, 19):
                client.push("uneven", as_state(WALKED[step]), step=step)
            settled(client, "uneven")
            ring = client.run("uneven").ring
            assert ring
            assert ring.times[-1] == 16
        path = f"{each.url}/v1/runs/uneven/weights?sigma_rel=0.1&max_error=1"
        if isinstance(each, Launched):
            each.kill("host 1")
            wait_until(lambda path=path: httpx.get(path, timeout=60).status_code == 200, "the host to be back")
        swept = httpx.get(f"{each.url}/v1/runs/uneven/sweep?sigma_rel=0.1,0.2&max_error=1", timeout=60)
        bodies.append((httpx.get(path, timeout=60).content, swept.content))
    assert bodies[0] == bodies[1]


def even(step: int) -> dict[str, Tensor]:
    """Parameters that are all the same number: so is every value of what is worked out, on all hosts."""
    return {"a": torch.full((40, 3), 1.0 + step % 17), "b": torch.full((60,), 1.0 + step % 17)}


def is_even(found: Mapping[str, Tensor]) -> bool:
    values = torch.cat([tensor.flatten() for tensor in found.values()])
    return float(values.max() - values.min()) < 1e-5


@contextlib.contextmanager
def updates_going_on(cluster: Launched, run: str) -> Iterator[EmaClient]:
    """Within the block a run with a ring is trained with even(), whoever is killed; gives a client beside."""
    ended = threading.Event()
    with EmaClient(cluster.url) as client, EmaClient(cluster.url) as reader:
        client.create_run(run, even(0), posthoc={"snapshots": 4})
        client.push(run, even(1), step=1)

        def push() -> None:
            step = 2
            while not ended.is_set():
                with contextlib.suppress(EmaError):
                    client.push(run, even(step), step=step)
                    step += 1

        thread = threading.Thread(target=push)
        thread.start()
        try:
            yield reader
        finally:
            ended.set()
            thread.join()


def test_agreements_have_no_updates_sent_again(both: tuple[Launched, ServerProcess]) -> None:
    """Hosts receive each update once, though they agree on a ring meanwhile, and take snapshots by name; but for one or
    two of forty, which come just as a change is committed."""
    cluster, _ = both

    def state(step: int) -> dict[str, Tensor]:
        return {"a": torch.full((40, 3), float(step)), "b": torch.full((60,), float(step))}

    with EmaClient(cluster.url) as client, EmaClient(cluster.url) as other, cluster.http() as http:
        client.create_run("sent", state(0), posthoc=True)
        hosts = [each["address"] for each in http.get("/v1/runs/sent/shards").json()["shards"]]
        before = [_counted(host) for host in hosts]
        taker = threading.Thread(target=lambda: [other.snapshot("sent", f"s{number}") for number in range(4)])
        taker.start()
        for step in range(1, 41):
            client.push("sent", state(step), step=step)
        taker.join()
        settled(client, "sent")
        ring = client.run("sent").ring
        assert ring
        assert len(ring.times) > 10
    added = [
        {name: now[name] - then[name] for name in now} for then, now in zip(before, map(_counted, hosts), strict=True)
    ]
    assert all(each["received"] <= 42 * 4 * 90 and each["superseded"] <= 2 for each in added), added


def _counted(host: str) -> dict[str, int]:
    """What a host has received, in bytes, and how many requests it had come again for another write."""
    text = httpx.get(f"{host}/metrics", timeout=60).text
    names = {"received": "ema_received_bytes_total ", "superseded": 'ema_errors_total{code="superseded"} '}
    found = {key: re.search(f"^{re.escape(name)}(\\S+)", text, re.MULTILINE) for key, name in names.items()}
    return {key: int(float(each[1])) if each else 0 for key, each in found.items()}


def test_one_version_while_updates_go_on(both: tuple[Launched, ServerProcess]) -> None:
    """What is read is of one version, on all hosts."""
    cluster, _ = both
    seen = set[int | None]()
    with updates_going_on(cluster, "even") as reader:
        while len(seen) < 6:  # each a step that the pull before did not see
            found = reader.pull("even", sigma_rel=0.2, max_error=1.0)
            assert is_even(found), found.info
            seen.add(found.info.step)


def test_snapshots_while_updates_go_on(both: tuple[Launched, ServerProcess]) -> None:
    """Each is of one version; nothing is left of one that is refused, on any host."""
    cluster, _ = both
    with updates_going_on(cluster, "even-kept") as reader:
        for number in range(4):
            taken = reader.snapshot("even-kept", f"s-{number}", sigma_rel=0.2, max_error=1.0)
            found = reader.pull("even-kept", snapshot=taken.name)
            assert is_even(found), found.info
            assert (found.info.step, found.info.target) == (taken.step, "sigma_rel 0.2")
        with pytest.raises(SynthesisRefused):
            reader.snapshot("even-kept", "refused", window=(1, 1 << 40))
    folders = [cluster.folder.glob(f"host-{place}/runs/even-kept.*/snapshots/*") for place in range(2)]
    assert [sorted(path.name for path in each) for each in folders] == [[f"s-{number}" for number in range(4)]] * 2


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_snapshots_whoever_is_killed(both: tuple[Launched, ServerProcess]) -> None:
    """Each is whole and of one version on all hosts, or nowhere: hosts, coordinator and gateway are killed all the
    time."""
    cluster, _ = both
    random, ended, taken = Random(7), threading.Event(), 0

    def kill() -> None:
        while not ended.wait(8 * random.random()):
            cluster.kill(random.choice(["host 0", "host 1", "coordinator", "gateway"]))

    thread = threading.Thread(target=kill)
    with updates_going_on(cluster, "killed") as reader:
        thread.start()
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until:
                with contextlib.suppress(EmaError):
                    taken += bool(reader.snapshot("killed", f"s-{taken}", sigma_rel=0.2, max_error=1.0))
        finally:
            ended.set()
            thread.join()
        found: list[str] = []
        wait_until(lambda: found.extend(_listed(reader, "killed")) or bool(found), "all to be back")
        assert {f"s-{number}" for number in range(taken)} <= set(found)
        assert taken > 3
        for name in found:
            wait_until(lambda name=name: _is_whole(reader, name), f"snapshot {name}")


def _listed(client: EmaClient, run: str) -> list[str]:
    with contextlib.suppress(EmaError):
        return [each.name for each in client.snapshots(run)]
    return []


def _is_whole(client: EmaClient, name: str) -> bool:
    try:
        found = client.pull("killed", snapshot=name)
    except EmaError as fault:
        if not fault.retryable:
            raise
        return False
    assert is_even(found), found.info
    return True


def test_a_host_without_a_file_is_named(both: tuple[Launched, ServerProcess], tmp_path: Path) -> None:
    """Nothing is mixed of what the hosts have left; and by themselves the hosts go on without that snapshot."""
    cluster, _ = both
    with EmaClient(cluster.url) as client:
        train(client, "damaged", 9)
        ring = client.run("damaged").ring
        assert ring
        middle = ring.times[2]
        for path in cluster.folder.glob(f"host-1/runs/damaged.*/ring/1.{middle}/posthoc*"):
            path.rename(tmp_path / path.name)
        assert list(tmp_path.iterdir())
        with httpx.Client(base_url=cluster.url, timeout=60) as http:
            told = http.get(f"/v1/runs/damaged/weights?sigma_rel=0.25&at=counter:{middle}&max_error=1").json()
            assert (told["code"], "host 1" in told["detail"]) == ("snapshot_damaged", True), told

            def goes_without() -> bool:
                found = client.run("damaged").ring
                return found is not None and middle not in found.times

            wait_until(goes_without, "a ring without the snapshot, though no update comes")
            client.push("damaged", as_state(WALKED[10]), step=10)
            body = http.get("/v1/runs/damaged/weights?sigma_rel=0.1&max_error=1")
            assert body.status_code == 200
            assert load(body.content).keys() == {"w", "b", "none"}


@pytest.mark.parametrize("more", ["", "&dtype=BF16", "&at=counter:12"])
def test_a_sweep_is_that_of_one_server(both: tuple[Launched, ServerProcess], more: str) -> None:
    """Heads and pieces, byte for byte; and where one of the averages is refused all are."""
    cluster, server = both

    def swept(url: str, lengths: str) -> httpx.Response:
        return httpx.get(f"{url}/v1/runs/r/sweep?sigma_rel={lengths}{more}&max_error=0.9", timeout=60)

    ours, theirs = (swept(url, "0.05,0.1,0.2") for url in (cluster.url, server.url))
    assert (ours.status_code, ours.headers[HEADER_TARGETS]) == (200, "3"), ours.text
    assert ours.content == theirs.content
    refused = swept(cluster.url, "0.1,0.29").json()
    assert refused["code"] == swept(server.url, "0.1,0.29").json()["code"] == "synthesis_refused"


def test_pieces_go_over_the_bounds_of_hosts(both: tuple[Launched, ServerProcess]) -> None:
    """Of averages of more than a piece a host, of lengths that are no pieces."""
    cluster, server = both

    def state(step: int) -> dict[str, Tensor]:
        return {"w": torch.arange(700_000, dtype=torch.float32).reshape(-1, 1) * (1 + step), "b": torch.ones(3)}

    bodies = []
    for url in (cluster.url, server.url):
        with EmaClient(url) as client:
            client.create_run("wide", state(0), posthoc={"snapshots": 2, "sigma_rel": [0.1]})
            for step in range(1, 4):
                client.push("wide", state(step), step=step)
                settled(client, "wide")
            bodies.append(httpx.get(f"{url}/v1/runs/wide/sweep?sigma_rel=0.1,0.2&max_error=1", timeout=60).content)
            client.delete_run("wide")
    assert bodies[0] == bodies[1]
    assert len(bodies[0]) > 2 * 2_800_000


def test_what_sweeps_found_is_kept(both: tuple[Launched, ServerProcess]) -> None:
    """By our client: averages from the gateway, results to it, and from it to whoever looks."""
    cluster, server = both
    found = []
    for url in (cluster.url, server.url):
        with EmaClient(url) as client:
            swept = client.sweep("r", _size, sigma_rel=[0.1, 0.15, 0.2], max_error=0.9, name="bytes")
            [kept] = client.sweeps("r")
            assert [point.value for point in kept.points] == [0.1, 0.15, 0.2]
            assert [entry.kind for entry in client.timeline("r").entries].count("sweep") == 1
            found.append((swept, kept.points, kept.name, kept.version, kept.num_updates))
    assert found[0] == found[1]


def _size(path: Path, _: object) -> float:
    return float(path.stat().st_size)


def test_large_averages_come_straight_from_the_hosts(
    both: tuple[Launched, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one recipe, bit for bit what one server sends, in tensors of the caller's too; and where a host does not
    follow it, by way of the gateway."""
    cluster, server = both
    straight: list[bool] = []

    def noted(*args: Any, **more: Any) -> Any:
        if len(straight) == 2:
            raise VersionGone("a host has another ring by now")
        found = pull(*args, **more)
        straight.append(found is not None and args[1].recipe is not None)
        return found

    def state(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {"w": torch.randn(700, 1000, generator=generator), "b": torch.randn(9, generator=generator)}

    monkeypatch.setattr(direct, "pull", noted)
    pulled: list[dict[str, Tensor]] = []
    for url in (cluster.url, server.url):
        with EmaClient(url) as client:
            client._pulls._pulls._split_above = 1 << 20
            client.create_run("large", state(0), posthoc={"snapshots": 3, "sigma_rel": [0.05, 0.25]})
            for step in range(1, 6):
                client.push("large", state(step), step=step)
                settled(client, "large")
            out = {name: torch.empty_like(each) for name, each in state(0).items()}
            client.pull("large", sigma_rel=0.1, max_error=0.9, out=out)
            pulled += [out, dict(client.pull("large", half_life=2, max_error=0.9))]
            if url == cluster.url:
                pulled.append(dict(client.pull("large", half_life=2, max_error=0.9)))
                assert straight == [True, True]
    first, second, by_gateway, *theirs = pulled
    for ours, other in zip((first, second, by_gateway), (*theirs, theirs[1]), strict=True):
        assert all(torch.equal(ours[name], each) for name, each in other.items())
