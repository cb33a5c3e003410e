"""Initial weights given anew before the first update, over a real server: who may, once, and what readers are told.

Knows bodies of the safetensors library and the answers. Does not know the server's code; a server that is killed
meanwhile is in tests/e2e/test_crash.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import AwaitingWeights, Fenced, WeightsExist
from tests.service.api.routes.test_parts import rows

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Model = Callable[[int], dict[str, Tensor]]


def anew(
    run: PlainRun, tensors: dict[str, Tensor], replaces: str = "1.0", writer: int | None = None, **query: Any
) -> httpx.Response:
    headers = {} if writer is None else {"Ema-Writer": str(writer)}
    query = {"replaces": replaces, **query}
    return run.http.put(f"{run.path}/weights", content=save(tensors), params=query, headers=headers)


def part(run: PlainRun, tensors: dict[str, Tensor], index: int, **query: Any) -> httpx.Response:
    query = {"of": 2, "replaces": "1.0", "group": "g", **query}
    return run.http.put(f"{run.path}/weights/parts/{index}", content=rows(tensors, index, 2), params=query)


def weights_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("durability", ["memory", "process", "disk"])
def test_they_take_the_place_of_the_first(
    server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle], durability: str
) -> None:
    """Of every average; step, counter and decays stay, and what follows is LitEma's that began with them."""
    averages = [{"name": "slow"}, {"name": "fast", "decay": 0.5}]
    run = plain_run(server)
    run.create(model(0), averages=averages, durability=durability)
    run.begin(model(0), num_updates=7, step=40)
    run.http.patch(run.path, json={"decay": 0.9}).raise_for_status()
    before, read = run.info(), run.pull()
    answer = anew(run, model(1)).raise_for_status().json()

    assert answer == run.info()
    assert answer["version"] == "2.0"
    moved = {"version", "updated_at", "link", "checkpoint_step", "durable_step"}
    assert {k: v for k, v in answer.items() if k not in moved} == {k: v for k, v in before.items() if k not in moved}
    again = run.http.get(f"{run.path}/weights", headers={"If-None-Match": read.headers["etag"]})
    assert (again.status_code, again.headers["ema-version"]) == (200, "2.0")
    oracles = {"slow": litema(model(1), 0.9), "fast": litema(model(1), 0.5)}
    for oracle in oracles.values():
        oracle.num_updates.fill_(7)
        oracle.update(model(2))
    assert run.push(41, model(2)).json()["version"] == "2.1"
    assert all(weights_equal(run.weights(average=name), oracle.shadow) for name, oracle in oracles.items())


def test_once(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """The same again change nothing, whatever they say they replace; a try that comes late replaces no later ones."""
    run = plain_run(server, model(0))
    assert anew(run, model(0)).json()["version"] == "1.0"
    for replaces in ("1.0", "1.0", "2.0"):
        assert anew(run, model(1), replaces).json()["version"] == "2.0"
    assert anew(run, model(2), "2.0").json()["version"] == "3.0"
    late = anew(run, model(1), "1.0")
    assert (late.status_code, late.json()["code"]) == (409, "weights_exist")
    assert "3.0, not 1.0" in late.json()["detail"]
    # Those of the creation as well.
    assert run.begin(model(0)).json()["code"] == "weights_exist"
    assert weights_equal(run.weights(), litema(model(2)).shadow)


def test_not_after_the_beginning(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """Not of a run that awaits its first ones, was updated, or went back to a snapshot: refused before the body."""
    run = plain_run(server)
    run.create(model(0))
    assert anew(run, model(1)).json()["code"] == "awaiting_weights"
    run.begin(model(0))
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    run.http.post(f"{run.path}/rewind", json={"snapshot": "s"}).raise_for_status()
    before = run.pull().content
    assert anew(run, model(1), "2.0").json()["code"] == "weights_exist"
    assert run.pull().content == before
    run.push(1, model(1)).raise_for_status()
    refused = run.http.put(f"{run.path}/weights", content=b"", params={"replaces": "2.1"})
    assert refused.json()["code"] == "weights_exist"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"replaces": "one"}, "invalid_request"),
        ({"step": 3}, "invalid_request"),
        ({"num_updates": 3}, "invalid_request"),
        ({"created_at": 1.5}, "run_not_found"),
    ],
)
def test_what_cannot_be_meant(
    query: dict[str, Any], code: str, server: ServerProcess, plain_run: MakeRun, model: Model
) -> None:
    run = plain_run(server, model(0))
    before = run.info()
    assert anew(run, model(1), **query).json()["code"] == code
    assert part(run, model(1), 0, **query).json()["code"] == code
    assert run.info() == before


def test_a_trainer_that_was_replaced(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """The writer's number fences, whole and in parts; the trainer that has taken over may."""
    run = plain_run(server, model(0))
    numbers = [run.http.post(f"{run.path}/writers").json()["writer"] for _ in range(2)]
    for number in (None, numbers[0]):
        assert anew(run, model(1), writer=number).json()["code"] == "fenced"
    assert part(run, model(1), 0).json()["code"] == "fenced"
    assert run.info()["version"] == "1.0"
    assert anew(run, model(1), writer=numbers[1]).json()["version"] == "2.0"


def test_bad_bodies_change_nothing(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    run = plain_run(server, model(0))
    before = run.pull().content
    bad = model(1)
    bad["conv.weight"][0] = float("nan")
    assert anew(run, bad).json()["code"] == "non_finite"
    assert anew(run, {"other": torch.zeros(1)}).json()["code"] == "layout_mismatch"
    assert run.pull().content == before


def test_raced(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """Of several that replace one version one does; the others are refused, or told to come again."""
    run = plain_run(server, model(0))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda seed: anew(run, model(seed)), range(1, 5)))
    taken = [seed for seed, answer in enumerate(answers, 1) if answer.status_code == 200]
    assert len(taken) == 1
    assert {a.json()["code"] for a in answers if a.status_code != 200} <= {"weights_exist", "superseded"}
    assert run.info()["version"] == "2.0"
    assert weights_equal(run.weights(), litema(model(taken[0])).shadow)


def test_in_parts(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """The parts of a sharded trainer make them as one; their sender learns what became of its part."""
    run = plain_run(server, model(0))

    def status() -> dict[str, Any]:
        answer: dict[str, Any] = run.http.get(f"{run.path}/updates/0", params={"first": "g"}).json()
        return answer

    assert status() == {"step": 0, "state": "unknown", "parts": [], "digest": None, "digests": []}
    assert part(run, model(1), 1).status_code == 202
    assert status() == {"step": 0, "state": "staged", "parts": [1], "digest": None, "digests": []}
    assert run.info()["version"] == "1.0"
    assert part(run, model(1), 0).json()["version"] == "2.0"
    assert status()["state"] == "applied"
    # The answer was lost, and the part comes again.
    assert part(run, model(1), 1).json()["version"] == "2.0"
    assert weights_equal(run.weights(), litema(model(1)).shadow)
    run.push(1, model(2)).raise_for_status()
    assert status()["state"] == "applied"
    assert part(run, model(1), 1).json()["code"] == "weights_exist"


def test_the_same_in_parts(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """Parts of the weights that the run has: nothing changes, and it is told as done."""
    run = plain_run(server, model(0))
    before = run.pull().content
    for index in (0, 1):
        part(run, model(0), index).raise_for_status()
    answer = run.http.get(f"{run.path}/updates/0", params={"first": "g"}).json()
    assert (answer["state"], run.info()["version"]) == ("applied", "1.0")
    assert run.pull().content == before


@pytest.mark.parametrize("durability", ["memory", "process", "disk"])
def test_outlive_the_server(
    start_server: Callable[..., ServerProcess],
    plain_run: MakeRun,
    model: Model,
    litema: type[LitEmaOracle],
    durability: str,
) -> None:
    """Once they are answered, kill -9 brings none of the others back, whatever the run's durability: a version's name
    and an ETag would stand for two states."""
    server = start_server("--checkpoint-interval", "3600")
    run = plain_run(server, model(0), durability=durability)
    anew(run, model(1)).raise_for_status()
    read = run.pull()
    server.kill()
    server.start()
    run = plain_run(server)
    assert weights_equal(run.weights(), litema(model(1)).shadow)
    again = run.pull()
    assert (again.headers["ema-version"] == "2.0") == (durability != "memory")
    assert (again.headers["etag"] == read.headers["etag"]) == (durability != "memory")


def test_snapshots_stay(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """What an evaluator kept before is what it was; one of that name again is another."""
    run = plain_run(server, model(0))
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    anew(run, model(1)).raise_for_status()
    kept = load(run.http.get(f"{run.path}/snapshots/s/weights").content)
    assert weights_equal(kept, litema(model(0)).shadow)
    assert run.http.put(f"{run.path}/snapshots/s").json()["code"] == "snapshot_exists"


def test_from_python(server: ServerProcess, run_name: str) -> None:
    """EmaClient.begin_anew(), for a training without a RemoteEma."""
    with EmaClient(server.url) as client:
        client.create_run(run_name, {"w": torch.zeros(3)})
        assert client.begin_anew(run_name, {"w": torch.ones(3)}).version == "2.0"
        assert client.begin_anew(run_name, {"w": torch.ones(3)}).version == "2.0"
        assert client.pull(run_name)["w"].tolist() == [1.0] * 3
        writer = client.attach(run_name)
        with pytest.raises(Fenced):
            client.begin_anew(run_name, {"w": torch.zeros(3)})
        client.begin_anew(run_name, {"w": torch.zeros(3)}, writer=writer)
        client.push(run_name, {"w": torch.ones(3)}, writer=writer)
        with pytest.raises(WeightsExist):
            client.begin_anew(run_name, {"w": torch.ones(3)}, writer=writer)


def test_from_python_too_early(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    run = plain_run(server)
    run.create(model(0))
    with EmaClient(server.url) as client, pytest.raises(AwaitingWeights):
        client.begin_anew(run.name, model(1))
