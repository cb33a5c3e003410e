"""Attaching and rewinding over a real server: who may push, and from where a run goes on.

Knows HTTP, the safetensors library and LitEma's arithmetic. Does not know how a state is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Model = Callable[[int], dict[str, Tensor]]

Degraded = tuple["ServerProcess", "PlainRun", dict[int, dict[str, Tensor]]]

DURABILITIES = ["memory", "process", "disk"]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def push(run: PlainRun, step: int, tensors: dict[str, Tensor], writer: int | None = None) -> httpx.Response:
    headers = {} if writer is None else {"Ema-Writer": str(writer)}
    return run.http.put(f"{run.path}/updates/{step}", content=save(tensors), headers=headers)


def folder_of(server: ServerProcess) -> Path:
    return Path(str(server.data_dir))


def attach(run: PlainRun) -> int:
    answer = run.http.post(f"{run.path}/writers")
    assert answer.status_code == 201
    assert answer.json()["run"] == run.name
    return int(answer.json()["writer"])


def rewind(run: PlainRun, snapshot: str | None) -> httpx.Response:
    return run.http.post(f"{run.path}/rewind", json={"snapshot": snapshot})


@pytest.fixture
def run(server: ServerProcess, plain_run: MakeRun, model: Model) -> PlainRun:
    """A run with its initial weights."""
    return plain_run(server, model(0))


# --- writers --------------------------------------------------------------------------------------------------------


def test_replaced_trainer_cannot_push(run: PlainRun, model: Model) -> None:
    """Once a second trainer has attached, the first one is fenced off, as is one that never attached."""
    first = attach(run)
    assert push(run, 1, model(1), first).json()["applied"]
    second = attach(run)
    assert second == first + 1
    before = run.weights(), run.info()

    for writer in (first, None):
        refused = push(run, 2, model(2), writer)
        assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (409, "fenced", False)
    assert same(run.weights(), before[0])
    assert run.info() == before[1]
    assert push(run, 2, model(2), second).json()["applied"]


def test_trainer_replaced_while_its_update_was_received(run: PlainRun, model: Model) -> None:
    """A trainer fenced off in the middle of its push changes nothing with it."""
    writer = attach(run)
    taken = []

    def body() -> object:
        data = save(model(1))
        yield data[: len(data) // 2]
        taken.append(attach(run))
        yield data[len(data) // 2 :]

    refused = run.http.put(f"{run.path}/updates/1", content=body(), headers={"Ema-Writer": str(writer)})  # type: ignore[arg-type]
    assert taken == [writer + 1]
    assert refused.json()["code"] == "fenced"
    assert run.info()["step"] is None


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_end_of_a_training(
    start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model, durability: str
) -> None:
    """A trainer says that it is done: the run, its timeline and the metrics tell, after a restart too, until a trainer
    goes on. A trainer that was replaced has no say, and nobody is refused for it."""
    server = start_server()
    run = plain_run(server, model(0), durability=durability)

    def end(writer: object) -> httpx.Response:
        return run.http.delete(f"{run.path}/writers/{writer}")

    def ended() -> tuple[bool, float]:
        told = next(line for line in run.http.get("/metrics").text.splitlines() if line.startswith("ema_run_ended{"))
        return run.info()["ended_at"] is not None, float(told.split()[-1])

    first = attach(run)
    second = attach(run)
    assert push(run, 1, model(1), second).json()["applied"]
    assert end(first).json()["ended_at"] is None  # replaced: it has no say
    assert (end(7).status_code, end(0).status_code, end("x").status_code) == (422, 422, 422)
    assert end(second).json()["ended_at"] >= run.info()["updated_at"]
    assert end(second).json() == run.info()
    assert ended() == (True, 1.0)
    assert [line["kind"] for line in run.http.get(f"{run.path}/timeline").json()["entries"]].count("ended") == 1

    if durability == "memory":
        server.stop()
    else:
        server.kill()
    server.start()
    run = plain_run(server)
    assert ended() == (True, 1.0)
    assert push(run, 2, model(2), second).json()["applied"]  # it had more to say after all
    assert ended() == (False, 0.0)
    assert end(second).json()["ended_at"] is not None
    attach(run)
    assert ended() == (False, 0.0)


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.0", "99999999999999999999"])
def test_number_that_is_none(run: PlainRun, model: Model, number: str) -> None:
    """A header that is no writer's number is a clear error."""
    answer = run.http.put(f"{run.path}/updates/1", content=save(model(1)), headers={"Ema-Writer": number})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_number_never_given(run: PlainRun, model: Model) -> None:
    """A number above the last one given is not taken for a newer trainer's."""
    attach(run)
    answer = push(run, 1, model(1), 7)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "7" in answer.json()["detail"]


def test_numbers_are_given_once(run: PlainRun) -> None:
    """Trainers that attach at the same time get different numbers."""
    with ThreadPoolExecutor(8) as threads:
        numbers = list(threads.map(lambda _: attach(run), range(16)))
    assert sorted(numbers) == list(range(1, 17))
    assert run.info()["writer"] == 16


@pytest.mark.parametrize("durability", DURABILITIES)
def test_numbers_outlive_the_server(
    durability: str, start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model
) -> None:
    """After kill -9 the fenced trainer is still fenced off, whatever the run's durability."""
    server = start_server()
    run = plain_run(server, model(0), durability=durability)
    old, new = attach(run), attach(run)
    if durability == "memory":  # nothing else of such a run outlives the server's end
        server.stop()
    else:
        server.kill()
    server.start()

    run = plain_run(server)
    assert run.info()["writer"] == new
    assert push(run, 1, model(1), old).json()["code"] == "fenced"
    assert push(run, 1, model(1), new).json()["applied"]


# --- rewind ---------------------------------------------------------------------------------------------------------


def test_goes_on_as_if_what_came_after_had_never_been(
    run: PlainRun, model: Model, litema: Callable[..., LitEmaOracle]
) -> None:
    """After a rewind, weights, step, counter and decay are the snapshot's, and the following updates are LitEma's."""
    oracle = litema(model(0))
    for step in (1, 2):
        oracle.update(model(step))
        push(run, step, model(step)).raise_for_status()
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    at_snapshot = run.weights(), run.info()
    run.http.patch(run.path, json={"decay": 0.5}).raise_for_status()
    for step in (3, 4, 5):
        push(run, step, model(step)).raise_for_status()

    answer = rewind(run, "s")
    assert answer.status_code == 200
    info = answer.json()
    assert same(run.weights(), at_snapshot[0])
    assert {key: info[key] for key in ("version", "step", "num_updates", "decay", "effective_decay", "status")} == {
        "version": "2.0", "step": 2, "num_updates": 2, "decay": at_snapshot[1]["decay"], "effective_decay": None,
        "status": "ready",
    }  # fmt: skip
    for step in (3, 4):
        oracle.update(model(10 + step))
        assert push(run, step, model(10 + step)).json()["applied"]
    assert same(run.weights(), oracle.shadow)
    assert run.info()["version"] == "2.2"


def test_updates_after_the_snapshot_are_forgotten(run: PlainRun, model: Model) -> None:
    """Steps applied after the snapshot are unknown again; those before it are not, nor can they come again."""
    push(run, 1, model(1))
    run.http.put(f"{run.path}/snapshots/s")
    push(run, 2, model(2))
    rewind(run, "s").raise_for_status()

    states = [run.http.get(f"{run.path}/updates/{step}").json()["state"] for step in (1, 2)]
    assert states == ["applied", "unknown"]
    assert push(run, 1, model(1)).json()["code"] == "stale_step"


def test_etag_of_before_does_not_fit(run: PlainRun, model: Model) -> None:
    """A reader that has the weights of before the rewind is not told that they are the present ones."""
    run.http.put(f"{run.path}/snapshots/s")
    push(run, 1, model(1))
    etag = run.pull().headers["etag"]
    rewind(run, "s")

    answer = run.http.get(f"{run.path}/weights", headers={"If-None-Match": etag})
    assert (answer.status_code, answer.headers["ema-version"]) == (200, "2.0")


def test_update_under_way_is_not_applied_to_the_rewound_run(run: PlainRun, model: Model) -> None:
    """A push begun before a rewind is refused as superseded; nothing of it is in the weights."""
    run.http.put(f"{run.path}/snapshots/s")
    expected = run.weights()

    def body() -> object:
        data = save(model(1))
        yield data[: len(data) // 2]
        rewind(run, "s").raise_for_status()
        yield data[len(data) // 2 :]

    answer = run.http.put(f"{run.path}/updates/1", content=body())  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (503, "superseded")
    assert same(run.weights(), expected)


def test_every_average_goes_back(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """All averages of a run are the snapshot's, with their decays."""
    run = plain_run(server, model(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    push(run, 1, model(1))
    run.http.put(f"{run.path}/snapshots/s")
    before = {name: run.weights(average=name) for name in ("slow", "fast")}
    push(run, 2, model(2))
    rewind(run, "s")

    for name, expected in before.items():
        assert same(run.weights(average=name), expected)
    assert [each["decay"] for each in run.info()["averages"]] == [0.9999, 0.5]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_outlives_the_server(
    durability: str, start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model
) -> None:
    """Once a rewind is answered, kill -9 does not bring back what it did away with, whatever the run's durability."""
    server = start_server()
    run = plain_run(server, model(0), durability=durability)
    push(run, 1, model(1))
    run.http.put(f"{run.path}/snapshots/s")
    expected = run.weights()
    push(run, 2, model(2))
    rewind(run, "s").raise_for_status()
    version = run.info()["version"]
    server.kill()
    server.start()

    run = plain_run(server)
    assert same(run.weights(), expected)
    info = run.info()
    assert (info["step"], info["durable_step"], info["num_updates"]) == (1, 1, 1)
    if durability != "memory":
        assert info["version"] == version
    assert push(run, 2, model(3)).json()["applied"]


def test_damaged_snapshot_is_not_taken_up(
    start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model
) -> None:
    """One flipped bit in the snapshot's file: the rewind is refused, and the run is as it was."""
    server = start_server()
    run = plain_run(server, model(0))
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    push(run, 1, model(1))
    expected, info = run.weights(), run.info()
    (file,) = folder_of(server).glob("runs/*/snapshots/s/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    answer = rewind(run, "s")
    assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_damaged")
    assert same(run.weights(), expected)
    assert run.info() == info


def test_what_cannot_be_gone_back_to(run: PlainRun) -> None:
    """An unknown snapshot, no snapshot on a run that is well, a bad name and an unknown field are clear errors."""
    cases = [
        ({"snapshot": "never"}, 404, "snapshot_not_found"),
        ({}, 422, "invalid_request"),
        ({"snapshot": "../s"}, 422, "invalid_request"),
        ({"snapshot": 3}, 422, "invalid_request"),
        ({"snapshots": "s"}, 422, "invalid_request"),
    ]
    for body, status, code in cases:
        answer = run.http.post(f"{run.path}/rewind", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), body
    answer = run.http.post("/v1/runs/never/rewind", json={"snapshot": "s"})
    assert (answer.status_code, answer.json()["code"]) == (404, "run_not_found")


def test_needs_a_disk(start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model) -> None:
    """A server without a data folder has no snapshots to go back to, and says so; attaching works there."""
    run = plain_run(start_server(memory=True), model(0))
    assert rewind(run, "s").json()["code"] == "storage_disabled"
    assert attach(run) == 1


# --- out of degraded ------------------------------------------------------------------------------------------------


@pytest.fixture
def degraded(start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model) -> Degraded:
    """A run of steps 1, 2 and 3 and a snapshot of step 1, whose newest version was damaged on disk."""
    server = start_server()
    run = plain_run(server, model(0), durability="disk")
    weights = {}
    for step in (1, 2, 3):
        push(run, step, model(step)).raise_for_status()
        weights[step] = run.weights()
        if step == 1:
            run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    server.kill()
    newest = max(folder_of(server).glob("runs/*/slots/*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    server.start()
    run = plain_run(server)
    assert run.info()["status"] == "degraded"
    return server, run, weights


def test_rewind_ends_degraded(degraded: Degraded, plain_run: MakeRun, model: Model) -> None:
    """A run with a damaged version refuses updates until it is rewound; then it goes on, also after another restart."""
    server, run, weights = degraded
    before = run.info()
    assert push(run, 4, model(4)).json()["code"] == "run_degraded"
    info = rewind(run, "s").json()

    assert (info["status"], info["reason"], info["step"]) == ("ready", None, 1)
    assert int(info["version"].split(".")[0]) > int(before["version"].split(".")[0])
    assert same(run.weights(), weights[1])
    server.kill()
    server.start()
    run = plain_run(server)
    assert run.info()["status"] == "ready"
    assert same(run.weights(), weights[1])
    assert push(run, 2, model(2)).json()["applied"]


def test_present_version_can_be_accepted(degraded: Degraded, plain_run: MakeRun, model: Model) -> None:
    """Without a snapshot, a degraded run goes on with the version that is there, also after another restart."""
    server, run, weights = degraded
    info = rewind(run, None).json()

    assert (info["status"], info["reason"], info["step"]) == ("ready", None, 2)
    server.kill()
    server.start()
    run = plain_run(server)
    assert (run.info()["status"], run.info()["version"]) == ("ready", info["version"])
    assert same(run.weights(), weights[2])
    assert push(run, 3, model(3)).json()["applied"]
