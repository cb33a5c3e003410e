"""Idempotency-Key over plain HTTP: what comes again with its key is answered and not applied, also by another server.

Knows HTTP and SIGKILL. Does not know where keys are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.conftest import ServerProcess

STATE = save({"w": torch.ones(4)})
LAYOUT = [{"name": "w", "shape": [4], "dtype": "F32"}]


def created(http: httpx.Client, **options: Any) -> str:
    run = {"run": "r", "layout": LAYOUT, "decay": 0.9, **options}
    assert http.post("/v1/runs", json=run).status_code == 201
    assert http.put("/v1/runs/r/weights", content=STATE, params={"step": 0}).is_success
    push(http, 1, 2)
    return "/v1/runs/r"


def push(http: httpx.Client, *steps: int) -> None:
    for step in steps:
        assert http.put(f"/v1/runs/r/updates/{step}", content=STATE).json()["applied"]


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_keys_outlive_the_server(start_server: Callable[..., ServerProcess], durability: str) -> None:
    """A reset, a decay and a rewind that were applied are not applied again by the server that comes after a kill."""
    server = start_server()
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/reset-num-updates", None),
        ("PATCH", "", {"decay": 0.5}),
        ("POST", "/rewind", {"snapshot": "s"}),
        ("PUT", "/snapshots/t", None),
    ]
    with server.http() as http:
        path = created(http, durability=durability)
        assert http.put(f"{path}/snapshots/s").status_code == 201
        for number, (method, route, body) in enumerate(calls):
            headers = {"Idempotency-Key": f"key-{number}"}
            assert http.request(method, path + route, json=body, headers=headers).is_success
            push(http, *range(10 * number + 10, 10 * number + 13))
        before = http.get(path).json()
    server.kill()
    server.start()
    with server.http() as http:
        for number, (method, route, body) in enumerate(calls):
            answer = http.request(method, path + route, json=body, headers={"Idempotency-Key": f"key-{number}"})
            assert answer.is_success, answer.text
        after = http.get(path).json()

    kept = ("version", "step", "num_updates", "decay", "averages")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_other_keys_and_none_are_other_writes(start_server: Callable[..., ServerProcess]) -> None:
    """A key names one call; a call without a key is applied each time; a key that is none is refused."""
    server = start_server(memory=True)
    with server.http() as http:
        path = created(http)
        for headers in ({"Idempotency-Key": "a"}, {"Idempotency-Key": "b"}, {}, {}):
            assert http.post(f"{path}/reset-num-updates", headers=headers).json()["num_updates"] == 0
            push(http, http.get(path).json()["step"] + 1)
        refused = http.post(f"{path}/reset-num-updates", headers={"Idempotency-Key": "a b"})

    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


def test_delete_of_another_time(start_server: Callable[..., ServerProcess]) -> None:
    """A delete that says when what it means was created deletes nothing else."""
    server = start_server()
    with server.http() as http:
        path = created(http)
        snapshot = http.put(f"{path}/snapshots/s").json()
        for route, found in ((path, http.get(path).json()), (f"{path}/snapshots/s", snapshot)):
            other = http.delete(route, params={"created_at": found["created_at"] - 1})
            assert other.status_code == 404
            assert http.get(route).is_success
        for route, found in ((f"{path}/snapshots/s", snapshot), (path, http.get(path).json())):
            assert http.delete(route, params={"created_at": repr(found["created_at"])}).status_code == 204
