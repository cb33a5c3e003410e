"""Routes of a run as a whole, over a real server.

Knows JSON and status codes. Does not know the server's code; hostile bodies are in tests/fuzz/attacks/.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]

#: LitEma's average before any update, as it is told.
LITEMA = {
    "name": "ema",
    "schedule": "litema",
    "decay": 0.9999,
    "effective_decay": None,
    "num_updates": 0,
    **dict.fromkeys(("start", "half_life", "sigma_rel", "gamma", "inv_gamma", "power", "min_decay")),
}
TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(5, dtype=torch.bfloat16), "s": torch.tensor(1.5)}


def test_create_answers_the_run(server: ServerProcess, plain_run: MakeRun) -> None:
    """A run created with a layout alone has LitEma's defaults and awaits its weights."""
    run = plain_run(server)
    before = time.time()
    answer = run.create(TENSORS)
    info = answer.json()

    assert answer.status_code == 201
    assert before - 1 <= info.pop("created_at") == info.pop("updated_at") <= time.time() + 1
    assert info == {
        "run": run.name,
        "status": "awaiting_weights",
        "decay": 0.9999,
        "num_updates": 0,
        "effective_decay": None,
        "use_num_updates": True,
        "decay_per": "update",
        "step": None,
        "version": None,
        "durable_step": None,
        "checkpoint_step": None,
        "versions_in": "memory files",
        "ring": None,
        "durability": "process",
        "reason": None,
        "remedy": "send the initial weights: the trainer that makes the run does so first",
        "writer": 0,
        "link": None,
        "copied": 0,
        "refused": None,
        "ended_at": None,
        "shard": None,
        "replica": None,
        "non_finite": "refuse",
        "averages": [LITEMA],
        "tensors": 3,
        "parameters": 12,
        "bytes": 48,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "shadow_dtype": "F32",
    }


def test_create_again(server: ServerProcess, plain_run: MakeRun) -> None:
    """The same configuration again is 200 and changes nothing, also once the run is at work; another is 409."""
    run = plain_run(server, TENSORS, decay=0.5)
    run.push(1, TENSORS)
    before = run.info()

    again = run.create(dict(reversed(TENSORS.items())), decay=0.5, averages=[{"name": "ema"}])
    assert (again.status_code, again.json()) == (200, before)
    other = run.create(TENSORS, decay=0.6)
    assert (other.status_code, other.json()["code"]) == (409, "run_exists")
    assert run.name in other.json()["detail"]
    assert run.info() == before


def test_config_is_taken_over(server: ServerProcess, plain_run: MakeRun) -> None:
    """Every field of the configuration shows in the run."""
    config: dict[str, Any] = {
        "decay": 0.25,
        "use_num_updates": False,
        "decay_per": "step",
        "non_finite": "allow",
        "durability": "disk",
        "averages": [{"name": "a"}, {"name": "b", "schedule": "constant", "decay": 0.75}],
    }
    info = plain_run(server, TENSORS, **config).info()

    averages = info.pop("averages")
    assert {key: info[key] for key in config if key != "averages"} == {
        k: v for k, v in config.items() if k != "averages"
    }
    assert [(a["name"], a["schedule"], a["decay"]) for a in averages] == [
        ("a", "litema", 0.25),
        ("b", "constant", 0.75),
    ]
    assert (info["num_updates"], info["bytes"]) == (-1, 96)


def test_copied_tensors_are_counted_and_kept(server: ServerProcess, plain_run: MakeRun) -> None:
    """The run says how many tensors are copied; an update gives those as they are. An unknown name is 422."""
    name = next(iter(TENSORS))
    run = plain_run(server, TENSORS, copied=[name])
    run.push(1, {key: tensor + 1 for key, tensor in TENSORS.items()}).raise_for_status()

    assert run.info()["copied"] == 1
    found = {key for key, value in run.weights().items() if torch.equal(value, TENSORS[key] + 1)}
    assert found == {name}
    refused = plain_run(server).create(TENSORS, copied=["nobody"])
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert "nobody" in refused.json()["detail"]


def test_runs_are_listed(server: ServerProcess, plain_run: MakeRun, run_name: str) -> None:
    """The list has each run as it stands, oldest first."""
    runs = [plain_run(server, TENSORS, name=f"{run_name}-{letter}") for letter in "cab"]
    listed = runs[0].http.get("/v1/runs").json()["runs"]

    mine = [info for info in listed if info["run"].startswith(f"{run_name}-")]
    assert mine == [run.info() for run in runs]


def test_list_that_the_reader_has(server: ServerProcess, plain_run: MakeRun) -> None:
    """The list is packed for who takes gzip, and comes without a body to who has it, until a run moves."""
    run = plain_run(server, TENSORS)

    def seen_twice() -> bool:
        """Whether no run moved meanwhile, as they do also by a checkpoint of what others pushed."""
        first = run.http.get("/v1/runs", headers={"Accept-Encoding": "gzip"})
        plain = run.http.get("/v1/runs", headers={"Accept-Encoding": "identity"})
        again["If-None-Match"] = first.headers["etag"]
        same = run.http.get("/v1/runs", headers=again)
        if same.status_code != 304:
            return False
        assert first.headers["content-encoding"] == "gzip"
        assert first.json() == plain.json()
        assert (same.content, same.headers["etag"]) == (b"", first.headers["etag"])
        return True

    again: dict[str, str] = {}
    wait_until(seen_twice, "a moment in which no run moves")
    run.push(1, TENSORS).raise_for_status()
    moved = run.http.get("/v1/runs", headers=again)
    assert (moved.status_code, moved.headers["etag"] == again["If-None-Match"]) == (200, False)


def test_runs_are_listed_by_page(server: ServerProcess, plain_run: MakeRun, run_name: str) -> None:
    """Pages follow each other by name, whatever is made or deleted in between; a wrong page is refused."""
    names = [f"{run_name}.{letter}" for letter in "dacb"]
    runs = {name: plain_run(server, TENSORS, name=name) for name in names}
    http = runs[names[0]].http

    def page(**query: object) -> list[str]:
        listed = http.get("/v1/runs", params=query).raise_for_status().json()["runs"]  # type: ignore[arg-type]
        return [info["run"] for info in listed if info["run"] in names]

    assert page() == names, "without a page all runs, oldest first"
    first = page(limit=2, after=run_name)
    assert first == sorted(names)[:2]
    http.delete(runs[first[-1]].path)
    assert page(limit=2, after=first[-1]) == sorted(names)[2:]
    assert page(after=sorted(names)[-1]) == []
    for query in ({"limit": 0}, {"limit": 10_001}, {"limit": "+1"}, {"after": "-x"}):
        assert http.get("/v1/runs", params=query).json()["code"] == "invalid_request"


def test_many_runs_hold_nobody_up(start_server: Callable[..., ServerProcess]) -> None:
    """While the list of many runs is made, others are answered within a moment."""
    server = start_server(memory=True)
    layout = [{"name": "w", "shape": [1], "dtype": "F32"}]
    with server.http() as http, server.http() as other, ThreadPoolExecutor(1) as thread:
        for number in range(400):
            http.post("/v1/runs", json={"run": f"r{number}", "layout": layout}).raise_for_status()

        def answered_meanwhile() -> int:
            listing, count = thread.submit(http.get, "/v1/runs"), 0
            while not listing.done():
                other.get("/healthz").raise_for_status()
                count += 1
            assert len(listing.result().json()["runs"]) == 400
            return count

        # On a busy machine whoever asks may get no turn while one list is made.
        assert any(answered_meanwhile() > 5 for _ in range(20))


def test_decay_is_changed_from_the_next_update_on(
    server: ServerProcess, plain_run: MakeRun, litema: type[LitEmaOracle]
) -> None:
    """PATCH changes the decay of the first or a named average; the next update uses it, bit for bit."""
    run = plain_run(server, TENSORS, decay=0.9, use_num_updates=False, averages=[{"name": "a"}, {"name": "b"}])
    before = run.weights()
    assert run.http.patch(run.path, json={"decay": 0.25}).json()["decay"] == 0.25
    info = run.http.patch(run.path, json={"decay": 0.5, "average": "b"}).json()
    assert [average["decay"] for average in info["averages"]] == [0.25, 0.5]
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())

    moved = {name: tensor + 1 for name, tensor in TENSORS.items()}
    run.push(1, moved).raise_for_status()
    for average, decay in (("a", 0.25), ("b", 0.5)):
        oracle = litema(TENSORS, decay, use_num_updates=False)
        oracle.update(moved)
        assert all(torch.equal(value, oracle.shadow[name]) for name, value in run.weights(average=average).items())


def test_decay_of_an_unknown_average(server: ServerProcess, plain_run: MakeRun) -> None:
    """PATCH of an average the run has not is 404 and names those it has."""
    run = plain_run(server, TENSORS)
    answer = run.http.patch(run.path, json={"decay": 0.5, "average": "none"})

    assert (answer.status_code, answer.json()["code"]) == (404, "average_not_found")
    assert "ema" in answer.json()["detail"]


@pytest.mark.parametrize(("counting", "after"), [(True, 0), (False, -1)])
def test_reset(counting: bool, after: int, server: ServerProcess, plain_run: MakeRun) -> None:
    """reset-num-updates begins the warm-up anew where the counter is on, and leaves it off where it is off."""
    run = plain_run(server, TENSORS, use_num_updates=counting)
    first = run.push(1, TENSORS).json()
    run.push(2, TENSORS)
    answer = run.http.post(f"{run.path}/reset-num-updates")

    assert (answer.status_code, answer.json()["num_updates"]) == (200, after)
    assert run.push(3, TENSORS).json()["effective_decay"] == first["effective_decay"]


def test_delete(server: ServerProcess, plain_run: MakeRun) -> None:
    """A deleted run is 404 everywhere and its name is free."""
    run = plain_run(server, TENSORS)
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    answer = run.http.delete(run.path)

    assert (answer.status_code, answer.content) == (204, b"")
    for gone in (run.http.get(run.path), run.pull(), run.push(1, TENSORS), run.http.delete(run.path)):
        assert (gone.status_code, gone.json()["code"]) == (404, "run_not_found")
    assert run.create({"other": torch.zeros(1)}).status_code == 201
    assert run.http.get(f"{run.path}/snapshots").json() == {"snapshots": []}


def test_run_created_again_is_not_mistaken_for_the_old(server: ServerProcess, plain_run: MakeRun) -> None:
    """What a reader holds of a deleted run is never answered 304, nor continued, from a new run of its name."""
    run = plain_run(server, TENSORS)
    old = run.pull()
    run.http.delete(run.path)
    plain_run(server, {name: tensor + 1 for name, tensor in TENSORS.items()})

    tag = old.headers["etag"]
    assert run.http.get(f"{run.path}/weights", headers={"If-None-Match": tag}).status_code == 200
    assert run.http.get(f"{run.path}/weights", headers={"Range": "bytes=9-", "If-Range": tag}).status_code == 200


def test_the_layout_of_a_run(server: ServerProcess, plain_run: MakeRun) -> None:
    """Names, shapes and dtypes of an update, in the order of the stream, and the names that are copied."""
    run = plain_run(server)
    name = f"{run.name}-2"
    layout = [{"name": "b", "shape": [2, 3], "dtype": "BF16"}, {"name": "a.w", "shape": [], "dtype": "F32"}]
    run.http.post("/v1/runs", json={"run": name, "layout": layout, "copied": ["b"]}).raise_for_status()

    answer = run.http.get(f"/v1/runs/{name}/layout")

    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    told_of_lanes = told.pop("block_bytes"), told.pop("lanes"), told.pop("shards")
    assert (len(bytes.fromhex(told.pop("digest"))), told_of_lanes) == (16, (8 << 20, 8, 1))
    assert told == {"run": name, "layout": [layout[1], layout[0]], "copied": ["b"]}


ROUTES = [
    ("GET", ""),
    ("GET", "/layout"),
    ("PATCH", ""),
    ("DELETE", ""),
    ("POST", "/reset-num-updates"),
    ("PUT", "/weights"),
    ("GET", "/weights"),
    ("HEAD", "/weights"),
    ("PUT", "/updates/1"),
    ("GET", "/updates/1"),
    ("GET", "/snapshots"),
    ("PUT", "/snapshots/s"),
    ("GET", "/snapshots/s"),
    ("DELETE", "/snapshots/s"),
    ("GET", "/snapshots/s/weights"),
    ("HEAD", "/snapshots/s/weights"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_knows_what_is_no_run(method: str, path: str, server: ServerProcess, plain_run: MakeRun) -> None:
    """Every route answers 404 run_not_found for an unknown run, and 422 for what is no name."""
    http = plain_run(server).http
    json = {"decay": 0.5} if method == "PATCH" else None
    unknown = http.request(method, f"/v1/runs/nobody{path}", json=json)
    no_name = http.request(method, f"/v1/runs/-x{path}", json=json)

    assert (unknown.status_code, no_name.status_code) == (404, 422)
    if method != "HEAD":
        assert unknown.json()["code"] == "run_not_found"
        assert "'nobody'" in unknown.json()["detail"]
        assert no_name.json()["code"] == "invalid_request"
