"""The schedules of averages over HTTP: what a configuration may say, and what is told of an average.

Knows HTTP and decays of single steps. Does not know how a server keeps a counter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.ones(10)}
AVERAGES: list[dict[str, Any]] = [
    {"name": "litema"},
    {"name": "half-life", "schedule": "half_life", "half_life": 4.0},
    {"name": "sigma", "schedule": "power", "sigma_rel": 0.1},
    {"name": "mean", "schedule": "power", "gamma": 0.0},
    {"name": "warm", "schedule": "inverse_gamma", "decay": 0.9, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.1},
    {"name": "late", "schedule": "constant", "decay": 0.5, "start": 2},
]


def values(run: PlainRun) -> dict[str, float]:
    """The first element of every average."""
    return {each["name"]: run.weights(average=each["name"])["w"][0].item() for each in AVERAGES}


def by_hand(pushed: list[float]) -> dict[str, float]:
    """The averages of a walk that begins at 1, by their definitions, in float64."""
    found = dict.fromkeys((each["name"] for each in AVERAGES), 1.0)
    for n, value in enumerate(pushed, 1):
        decays = {
            "litema": min(0.9999, (1 + n) / (10 + n)),
            "half-life": 0.5**0.25,
            "sigma": (1 - 1 / n) ** 7.937203937,
            "mean": 1 - 1 / n,
            "warm": max(min(1 - (1 + (n - 1) / 2.0) ** -0.75, 0.9), 0.1) if n > 1 else 0.0,
            "late": 0.5 if n > 3 else 0.0,
        }
        found = {name: found[name] * decay + value * (1 - decay) for name, decay in decays.items()}
    return found


def test_every_schedule(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Pulled averages are those worked out by hand; the run tells of each its schedule, counter and latest decay."""
    run = plain_run(server, TENSORS, averages=AVERAGES)
    pushed = [3.0, -1.0, 2.0, 5.0, 0.5, 7.0]
    for step, value in enumerate(pushed, 1):
        assert run.push(step, {"w": torch.full((10,), value)}).status_code == 200

        assert values(run) == pytest.approx(by_hand(pushed[:step]), abs=1e-5)
    told = {each["name"]: each for each in run.info()["averages"]}
    assert told["sigma"]["gamma"] == pytest.approx(6.937203937)
    assert told["mean"]["sigma_rel"] == pytest.approx(12**-0.5)
    assert told["warm"]["inv_gamma"] == 2.0
    assert told["late"]["start"] == 2
    assert told["half-life"]["decay"] == told["half-life"]["effective_decay"] == pytest.approx(0.5**0.25)
    assert {each["num_updates"] for each in told.values()} == {6}


def test_counters_come_back_after_a_kill(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """Schedules that count go on after kill -9 where they were, in a run that itself counts nothing."""
    server = start_server()
    run = plain_run(server, TENSORS, averages=AVERAGES[1:], use_num_updates=False)
    pushed = [3.0, -1.0, 2.0, 5.0]
    for step, value in enumerate(pushed[:3], 1):
        run.push(step, {"w": torch.full((10,), value)}).raise_for_status()
    server.kill()
    server.start()
    run = plain_run(server)
    run.push(4, {"w": torch.full((10,), pushed[3])}).raise_for_status()

    expected = {name: value for name, value in by_hand(pushed).items() if name != "litema"}
    found = {name: run.weights(average=name)["w"][0].item() for name in expected}
    assert found == pytest.approx(expected, abs=1e-5)
    assert run.info()["num_updates"] == -1


def test_a_snapshot_keeps_each_counter(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """After a rewind each average goes on from the counter it had; its file says that counter."""
    run = plain_run(server, TENSORS, averages=AVERAGES)
    for step, value in enumerate([3.0, -1.0], 1):
        run.push(step, {"w": torch.full((10,), value)}).raise_for_status()
    run.http.put(f"{run.path}/snapshots/two").raise_for_status()
    run.push(3, {"w": torch.full((10,), 99.0)}).raise_for_status()
    run.http.post(f"{run.path}/rewind", json={"snapshot": "two"}).raise_for_status()
    run.push(3, {"w": torch.full((10,), 2.0)}).raise_for_status()

    assert values(run) == pytest.approx(by_hand([3.0, -1.0, 2.0]), abs=1e-5)
    headers = run.http.get(f"{run.path}/snapshots/two/weights", params={"average": "mean"}).headers
    assert headers["ema-num-updates"] == "2"


@pytest.mark.parametrize(
    ("average", "says"),
    [
        ({"schedule": "cosine"}, "schedule"),
        ({"schedule": "half_life"}, "half_life: is missing"),
        ({"schedule": "half_life", "half_life": 0.0}, "half_life"),
        ({"schedule": "half_life", "half_life": 5.0, "decay": 0.5}, "decay: has no meaning for schedule 'half_life'"),
        ({"schedule": "power"}, "sigma_rel, gamma: one of the two"),
        ({"schedule": "power", "gamma": 1.0, "sigma_rel": 0.1}, "sigma_rel, gamma: one of the two"),
        ({"schedule": "power", "sigma_rel": 0.2887}, "sigma_rel: 0.2887 is too large"),
        ({"schedule": "power", "sigma_rel": 0.5}, "sigma_rel"),
        ({"schedule": "power", "gamma": -0.5}, "gamma"),
        ({"schedule": "inverse_gamma", "inv_gamma": 0.0}, "inv_gamma"),
        ({"schedule": "inverse_gamma", "power": -1.0}, "power"),
        ({"schedule": "inverse_gamma", "decay": 0.5, "min_decay": 0.6}, "min_decay: 0.6 is above decay 0.5"),
        ({"schedule": "inverse_gamma", "gamma": 2.0}, "gamma: has no meaning for schedule 'inverse_gamma'"),
        ({"schedule": "litema", "half_life": 2.0}, "half_life: has no meaning for schedule 'litema'"),
        ({"start": -1}, "start"),
        ({"start": 1.5}, "start"),
    ],
)
def test_fields_that_do_not_go_together(
    average: dict[str, Any], says: str, server: ServerProcess, plain_run: Callable[..., PlainRun]
) -> None:
    """A field that a schedule does not take, lacks, or cannot use is refused by name, and no run is made."""
    run = plain_run(server)
    answer = run.create(TENSORS, averages=[average])

    assert answer.status_code == 422
    assert says in answer.text.replace('\\"', '"')
    assert run.http.get(run.path).status_code == 404


@pytest.mark.parametrize("name", ["half-life", "sigma", "mean"])
def test_no_decay_can_be_set(name: str, server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A schedule without a largest decay refuses one; one that has it takes it from the next update on."""
    run = plain_run(server, TENSORS, averages=AVERAGES)
    answer = run.http.patch(run.path, json={"decay": 0.5, "average": name})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert run.http.patch(run.path, json={"decay": 0.5, "average": "warm"}).json()["averages"][4]["decay"] == 0.5
