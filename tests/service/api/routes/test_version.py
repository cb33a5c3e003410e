"""The facts of a version, and that its weights stay for who was told of it.

Knows the route. Does not know replicas.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ema_service.api.reading import LINGER_SECONDS
from tests.conftest import PlainRun, ServerProcess

AVERAGES = [{"name": "ema"}, {"name": "short", "schedule": "half_life", "half_life": 3.0}]


def begun(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> PlainRun:
    run = plain_run(server, {"w": torch.ones(50)}, averages=AVERAGES)
    run.push(1, {"w": torch.zeros(50)}).raise_for_status()
    return run


def version(run: PlainRun, **query: Any) -> dict[str, Any]:
    told: dict[str, Any] = run.http.get(f"{run.path}/version", params=query).raise_for_status().json()
    return told


def test_facts(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Everything but the weights, of the run that is meant; before the initial weights no version."""
    run = begun(server, plain_run)
    told, info = version(run), run.info()
    alike = ("run", "created_at", "version", "step", "num_updates", "updated_at", "writer", "ended_at", "shard")
    assert {name: told[name] for name in alike} == {name: info[name] for name in alike}
    assert told["lineage"]
    assert [each["config"]["name"] for each in told["averages"]] == ["ema", "short"]
    assert [each["decay"] for each in told["averages"]] == [each["decay"] for each in info["averages"]]
    assert version(run, created_at=repr(told["created_at"])) == told
    assert run.http.get(f"{run.path}/version", params={"created_at": 1.5}).status_code == 404
    bare = plain_run(server, name=f"{run.name}-bare")
    bare.create({"w": torch.ones(2)}).raise_for_status()
    told = version(bare, hold=True)
    assert (told["version"], told["lineage"], told["averages"][0]["has_weights"]) == (None, None, False)


def test_the_weights_stay_for_a_second(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Of every average, though the run goes on; without ``hold`` they go with the next update, as always."""
    run = begun(server, plain_run)

    def etags() -> dict[str, str]:
        names = ("ema", "short")
        return {name: run.http.head(f"{run.path}/weights", params={"average": name}).headers["etag"] for name in names}

    def statuses(tags: dict[str, str]) -> list[int]:
        found = []
        for name, tag in tags.items():
            headers = {"Range": "bytes=0-", "If-Range": tag}
            answer = run.http.get(f"{run.path}/weights", params={"average": name}, headers=headers)
            found.append(answer.status_code)
        return found

    first = etags()
    version(run, hold=True)
    run.push(2, {"w": torch.ones(50)}).raise_for_status()
    assert statuses(first) == [206, 206]
    second = etags()
    version(run)
    run.push(3, {"w": torch.zeros(50)}).raise_for_status()
    assert statuses(second) == [200, 200]
    third = etags()
    version(run, hold=True)
    run.push(4, {"w": torch.ones(50)}).raise_for_status()
    time.sleep(LINGER_SECONDS + 0.5)
    assert statuses(third) == [200, 200]
