"""Averages added to a run and removed, over a real server: what is answered, and what a late average is.

Knows HTTP, the safetensors library and LitEma's arithmetic. Does not know how averages are kept.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Weights = dict[str, Tensor]

#: Of each kind one, and one that begins later than with its first update.
SCHEDULES: list[dict[str, Any]] = [
    {"name": "litema", "decay": 0.3},
    {"name": "half-life", "schedule": "half_life", "half_life": 4.0},
    {"name": "long", "schedule": "power", "sigma_rel": 0.1},
    {"name": "warm", "schedule": "inverse_gamma", "decay": 0.9, "power": 0.75},
    {"name": "later", "schedule": "constant", "decay": 0.5, "start": 2},
]
LONG: dict[str, Any] = {"name": "long", "schedule": "power", "sigma_rel": 0.1}


def params(seed: int, size: int = 1000) -> Weights:
    random = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(size, generator=random), "half": torch.randn(33, generator=random).bfloat16()}


def add(run: PlainRun, average: dict[str, Any], **headers: str) -> httpx.Response:
    return run.http.post(f"{run.path}/averages", json=average, headers=headers)


def remove(run: PlainRun, name: str, **headers: str) -> httpx.Response:
    return run.http.delete(f"{run.path}/averages/{name}", headers=headers)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name].to(value.dtype))] == []


@pytest.fixture
def run(server: ServerProcess, plain_run: MakeRun) -> PlainRun:
    """A run with one average, at step 2."""
    made = plain_run(server, params(0), decay=0.9)
    for step in (1, 2):
        made.push(step, params(step)).raise_for_status()
    return made


# --- a late average -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counting", [True, False])
def test_late_litema_is_one_made_then(
    counting: bool, server: ServerProcess, plain_run: MakeRun, litema: type[LitEmaOracle]
) -> None:
    """Bit for bit a LitEma that is constructed with the parameters of the next update and fed with those after it."""
    run = plain_run(server, params(0), use_num_updates=counting)
    run.push(1, params(1)).raise_for_status()
    answer = add(run, {"name": "late", "decay": 0.99})
    assert (answer.status_code, [each["name"] for each in answer.json()["averages"]]) == (201, ["ema", "late"])
    run.push(2, params(2)).raise_for_status()
    oracle = litema(params(2), 0.99, counting)
    assert_equal(run.weights(average="late"), oracle.shadow)
    for step in range(3, 30):
        run.push(step, params(step)).raise_for_status()
        oracle.update(params(step))
    assert_equal(run.weights(average="late"), oracle.shadow)
    assert run.info()["averages"][1]["num_updates"] == int(oracle.num_updates)


@pytest.mark.parametrize("decay_per", ["update", "step"])
def test_late_average_is_that_of_a_run_begun_then(decay_per: str, server: ServerProcess, plain_run: MakeRun) -> None:
    """With each schedule, over gaps of steps: the bits, counters and decays of a run whose initial weights are the
    parameters that the average begins with."""
    run = plain_run(server, params(0), decay_per=decay_per)
    run.push(7, params(7)).raise_for_status()
    for average in SCHEDULES:
        assert add(run, average).status_code == 201
    first = run.push(10, params(10)).raise_for_status().json()
    assert first["num_updates"] == (2 if decay_per == "update" else 4)  # no step was known before the first

    other = plain_run(server, name=f"{run.name}-then")
    other.create(params(10), averages=SCHEDULES, decay_per=decay_per).raise_for_status()
    other.begin(params(10), step=10).raise_for_status()
    for step in (11, 15, 16, 30, 31, 90):
        for each in (run, other):
            each.push(step, params(step)).raise_for_status()
        for average in SCHEDULES:
            name = str(average["name"])
            assert_equal(run.weights(average=name), other.weights(average=name))
        assert run.info()["averages"][1:] == other.info()["averages"]


def test_before_its_first_update(run: PlainRun) -> None:
    """It is listed, and has no weights: whoever asks for them, or for another decay, is told so by name. The others
    go on, with the version and the ETag that they had."""
    before = run.pull()
    assert add(run, LONG).status_code == 201
    info = run.info()
    assert (info["status"], info["version"], info["decay"]) == ("ready", "1.2", 0.9)
    told = info["averages"][1]
    assert told == {**told, "name": "long", "schedule": "power", "num_updates": 0, "effective_decay": None}
    answer = run.pull(average="long")
    assert code(answer) == (409, "awaiting_weights")
    assert "'long'" in answer.json()["detail"]
    assert "next update" in answer.json()["hint"]
    assert run.http.head(f"{run.path}/weights", params={"average": "long"}).status_code == 409
    late = run.http.patch(run.path, json={"decay": 0.5, "average": "long"})
    assert code(late) == (422, "invalid_request")
    assert "add an average whose schedule takes one" in late.json()["detail"]
    assert add(run, {"name": "late"}).status_code == 201
    assert code(run.http.patch(run.path, json={"decay": 0.5, "average": "late"})) == (409, "awaiting_weights")
    same = run.http.get(f"{run.path}/weights", headers={"If-None-Match": before.headers["etag"]})
    assert same.status_code == 304

    assert run.push(3, params(3)).json()["version"] == "1.3"
    assert_equal(run.weights(average="long"), params(3))


def test_wait_for_its_first_update(run: PlainRun) -> None:
    """Who waits for the next step has the average then."""
    add(run, LONG).raise_for_status()
    assert code(run.pull(average="long", min_step=3, wait=0.01)) == (409, "step_not_reached")
    run.push(3, params(3)).raise_for_status()
    assert run.pull(average="long", min_step=3, wait=5).headers["ema-num-updates"] == "0"


def test_awaiting_run(server: ServerProcess, plain_run: MakeRun) -> None:
    """On a run without weights it is one of those of the creation, which comes again all the same."""
    run = plain_run(server, None)
    run.create(params(0)).raise_for_status()
    assert add(run, LONG).status_code == 201
    assert run.create(params(0)).status_code == 200
    run.begin(params(0)).raise_for_status()
    assert_equal(run.weights(average="long"), params(0))


def test_initial_weights_anew(run: PlainRun, server: ServerProcess, plain_run: MakeRun) -> None:
    """Weights that come anew before the first update are no update: the average still begins with that."""
    run = plain_run(server, params(0), name=f"{run.name}-anew")
    add(run, LONG).raise_for_status()
    anew = run.http.put(f"{run.path}/weights", content=save(params(5)), params={"replaces": "1.0"})
    assert anew.raise_for_status().json()["version"] == "2.0"
    assert_equal(run.weights(), params(5))
    assert code(run.pull(average="long")) == (409, "awaiting_weights")
    run.push(1, params(1)).raise_for_status()
    assert_equal(run.weights(average="long"), params(1))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_same_and_others(run: PlainRun) -> None:
    """The same average again is answered 200; another of the name is refused, and so is what is no average."""
    assert add(run, LONG).status_code == 201
    assert add(run, LONG).status_code == 200
    assert code(add(run, {**LONG, "sigma_rel": 0.2})) == (409, "average_exists")
    assert code(add(run, {"name": "ema", "decay": 0.5})) == (409, "average_exists")
    for wrong in (
        {"name": "x", "schedule": "power"},
        {"name": "x", "half_life": 3.0},
        {"name": "x", "schedule": "none"},
        {"name": "../x"},
        {"name": "x", "unknown": 1},
        [],
    ):
        assert code(run.http.post(f"{run.path}/averages", json=wrong)) == (422, "invalid_request")
    assert len(run.info()["averages"]) == 2
    assert code(run.http.post("/v1/runs/nobody/averages", json=LONG)) == (404, "run_not_found")


def test_no_more_than_sixteen(run: PlainRun) -> None:
    """Sixteen averages, not one more; with one less there is room again."""
    for number in range(15):
        assert add(run, {"name": f"a{number}"}).status_code == 201
    refused = add(run, LONG)
    assert (*code(refused), "16" in refused.json()["detail"]) == (409, "too_many_averages", True)
    assert remove(run, "a3").status_code == 204
    assert add(run, LONG).status_code == 201
    run.push(3, params(3)).raise_for_status()
    assert_equal(run.weights(average="long"), params(3))


def test_what_cannot_be_removed(run: PlainRun) -> None:
    """What is not there, the last average, and the last one that has weights; the refusal says which and what to do."""
    assert code(remove(run, "long")) == (404, "average_not_found")
    assert code(remove(run, "ema")) == (409, "last_average")
    add(run, LONG).raise_for_status()
    refused = remove(run, "ema")
    assert code(refused) == (409, "last_average")
    assert "push an update first" in refused.json()["hint"]
    run.push(3, params(3)).raise_for_status()
    assert remove(run, "ema").status_code == 204
    assert code(remove(run, "ema")) == (404, "average_not_found")
    info = run.info()
    assert ([each["name"] for each in info["averages"]], info["decay"]) == (["long"], 1.0)
    assert_equal(run.weights(), params(3))
    assert code(run.http.delete("/v1/runs/nobody/averages/ema")) == (404, "run_not_found")


# --- beside others --------------------------------------------------------------------------------------------------


def test_reader_reads_on(server: ServerProcess, plain_run: MakeRun) -> None:
    """A download that has begun is whole when its average is removed in the middle, and updates go on."""
    size = 8 << 20
    run = plain_run(server, params(0, size), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    run.push(1, params(1, size)).raise_for_status()
    expected = run.weights(average="fast")
    with server.http() as http, http.stream("GET", f"{run.path}/weights", params={"average": "fast"}) as answer:
        chunks = answer.iter_raw()
        body = next(chunks)
        assert remove(run, "fast").status_code == 204
        for step in (2, 3, 4):
            run.push(step, params(step, size)).raise_for_status()
        body += b"".join(chunks)
    assert_equal(load(body), expected)
    assert code(run.pull(average="fast")) == (404, "average_not_found")


@pytest.mark.parametrize("change", ["add", "remove"])
def test_push_under_way(change: str, server: ServerProcess, plain_run: MakeRun) -> None:
    """An update that is received meanwhile is superseded, and applied when it comes again."""
    run = plain_run(server, params(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    body = save(params(1))
    address = urlsplit(server.url)
    with closing(socket.create_connection((address.hostname, address.port))) as connection:
        head = f"PUT {run.path}/updates/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:2000])
        wait_until(lambda: _staged(run) > 0)
        answer = add(run, LONG) if change == "add" else remove(run, "slow")
        assert answer.is_success
        connection.sendall(body[2000:])
        refused = connection.makefile("rb").read().decode()
    assert refused.startswith("HTTP/1.1 503")
    assert '"superseded"' in refused
    assert run.info()["version"] == "1.0"
    assert run.push(1, params(1)).json()["applied"]
    if change == "add":
        assert_equal(run.weights(average="long"), params(1))


def _staged(run: PlainRun) -> float:
    lines = run.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ema_staging_bytes ")))


def test_parts_under_way(run: PlainRun) -> None:
    """Parts that were answered before an average was added are not sent again: it begins with the whole update."""

    def part(index: int, tensors: Weights) -> httpx.Response:
        body = save(tensors, {"ema.slices": "{}"})
        return run.http.put(f"{run.path}/updates/3/parts/{index}", params={"of": 2}, content=body)

    new = params(3)
    assert part(0, {"w": new["w"]}).status_code == 202
    assert add(run, LONG).status_code == 201
    assert add(run, {"name": "fast", "decay": 0.5}).status_code == 201
    assert remove(run, "ema").status_code == 409
    answer = part(1, {"half": new["half"]})
    assert (answer.status_code, answer.json()["applied"]) == (200, True)
    assert_equal(run.weights(average="long"), new)
    assert_equal(run.weights(average="fast"), new)
    assert part(0, {"w": params(4)["w"]}).status_code != 200


def test_parts_under_way_at_a_removal(server: ServerProcess, plain_run: MakeRun) -> None:
    """The others are averaged with all parts once they are there."""
    run = plain_run(server, params(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    twin = plain_run(server, params(0), name=f"{run.name}-twin", averages=[{"name": "fast", "decay": 0.5}])
    new = params(1)
    for index, name in enumerate(new):
        body = save({name: new[name]}, {"ema.slices": "{}"})
        run.http.put(f"{run.path}/updates/1/parts/{index}", params={"of": 2}, content=body).raise_for_status()
        if index == 0:
            assert remove(run, "slow").status_code == 204
    twin.push(1, new).raise_for_status()
    assert_equal(run.weights(), twin.weights())


# --- snapshots, events, keys ----------------------------------------------------------------------------------------


def test_snapshots_and_rewind(run: PlainRun, server: ServerProcess, plain_run: MakeRun) -> None:
    """Snapshots have the averages that had weights, and keep those that are removed since; a rewind has those that the
    run has, and begins the rest anew. A run may branch where the snapshot has all of its averages."""
    run.http.put(f"{run.path}/snapshots/before").raise_for_status()
    add(run, LONG).raise_for_status()
    run.push(3, params(3)).raise_for_status()
    assert run.http.put(f"{run.path}/snapshots/after").json()["averages"] == ["ema", "long"]
    kept = run.weights(average="ema")
    remove(run, "ema").raise_for_status()
    of_snapshot = run.http.get(f"{run.path}/snapshots/after/weights", params={"average": "ema"})
    assert_equal(load(of_snapshot.raise_for_status().content), kept)

    refused = run.http.post(f"{run.path}/rewind", json={"snapshot": "before"})
    assert code(refused) == (404, "average_not_found")
    add(run, {"name": "fast", "decay": 0.5}).raise_for_status()
    back = run.http.post(f"{run.path}/rewind", json={"snapshot": "after"}).raise_for_status().json()
    assert (back["version"], [each["name"] for each in back["averages"]]) == ("2.0", ["long", "fast"])
    assert_equal(run.weights(), params(3))
    assert code(run.pull(average="fast")) == (409, "awaiting_weights")
    run.push(4, params(4)).raise_for_status()
    assert_equal(run.weights(average="fast"), params(4))

    other = plain_run(server, None, name=f"{run.name}-other")
    other.create(params(0), averages=[LONG]).raise_for_status()
    branch = {"snapshot": "after", "run": run.name}
    assert other.http.post(f"{other.path}/rewind", json=branch).status_code == 200
    assert_equal(other.weights(), params(3))
    add(other, {"name": "fast"}).raise_for_status()
    assert code(other.http.post(f"{other.path}/rewind", json=branch)) == (404, "average_not_found")


@pytest.mark.parametrize("durability", ["memory", "process", "disk"])
def test_outlives_the_server(durability: str, start_server: Callable[..., ServerProcess], plain_run: MakeRun) -> None:
    """After SIGKILL the averages are those decided on last, whatever the durability of the weights, and a write that
    comes again with its key changes nothing."""
    server = start_server("--checkpoint-interval", "1000")
    run = plain_run(server, params(0), averages=[{"name": "slow"}, {"name": "fast"}], durability=durability)
    run.push(1, params(1)).raise_for_status()
    key, other = {"Idempotency-Key": "one"}, {"Idempotency-Key": "two"}
    assert add(run, LONG, **key).status_code == 201
    assert add(run, LONG, **key).status_code == 200
    assert remove(run, "slow", **other).status_code == 204
    run.push(2, params(2)).raise_for_status()
    server.kill()
    server.start()
    again = plain_run(server)
    info = again.info()
    assert [each["name"] for each in info["averages"]] == ["fast", "long"]
    # A run of durability memory is back at what the removal brought to the disk.
    assert (info["status"], info["step"]) == ("ready", 1 if durability == "memory" else 2)
    assert remove(again, "slow", **other).status_code == 204
    remove(again, "long").raise_for_status()
    assert add(again, LONG, **key).status_code == 200
    assert [each["name"] for each in again.info()["averages"]] == ["fast"]
    assert again.push(3, params(3)).json()["applied"]


def test_without_a_disk(start_server: Callable[..., ServerProcess], plain_run: MakeRun) -> None:
    """A server that keeps nothing on disk adds and removes averages as well."""
    run = plain_run(start_server(memory=True), params(0))
    assert add(run, LONG).status_code == 201
    run.push(1, params(1)).raise_for_status()
    assert remove(run, "ema").status_code == 204
    assert_equal(run.weights(), params(1))
