"""Snapshots over a real server.

Knows HTTP and the safetensors library. Does not know how a snapshot is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Model = Callable[[int], dict[str, Tensor]]


@pytest.fixture
def run(server: ServerProcess, plain_run: MakeRun, model: Model) -> PlainRun:
    """A run with two averages at step 7."""
    run = plain_run(server, model(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    run.push(7, model(7)).raise_for_status()
    return run


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_snapshot_is_taken(run: PlainRun) -> None:
    """PUT answers 201 with what was copied; again 200 with the same; GET shows it, and the list has it."""
    path = f"{run.path}/snapshots/s"
    answer = run.http.put(path)
    info = answer.json()
    assert answer.status_code == 201
    assert {key: info[key] for key in ("run", "name", "version", "step", "num_updates", "averages")} == {
        "run": run.name, "name": "s", "version": "1.1", "step": 7, "num_updates": 1, "averages": ["slow", "fast"],
    }  # fmt: skip

    again = run.http.put(path)
    assert (again.status_code, again.json()) == (200, info)
    assert run.http.get(path).json() == info
    assert run.http.get(f"{run.path}/snapshots").json() == {"snapshots": [info]}


def test_snapshot_never_changes(run: PlainRun, model: Model) -> None:
    """A snapshot's weights are the run's at its time, in every average, cast and selection, whatever comes after."""
    queries: list[dict[str, str]] = [{}, {"average": "fast"}, {"dtype": "BF16"}, {"prefix": "conv", "dtype": "F16"}]
    before = [run.weights(**query) for query in queries]
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    run.push(8, model(8)).raise_for_status()

    for query, expected in zip(queries, before, strict=True):
        answer = run.http.get(f"{run.path}/snapshots/s/weights", params=query)
        assert same(load(answer.content), expected)
        assert (answer.headers["ema-version"], answer.headers["ema-step"]) == ("1.1", "7")
        assert answer.headers["ema-average"] == query.get("average", "slow")


def test_name_of_another_version(run: PlainRun, model: Model) -> None:
    """A name that stands for another version is 409 and keeps its own; a new name takes the present one."""
    path = f"{run.path}/snapshots/s"
    first = run.http.put(path).json()
    run.push(8, model(8))
    refused = run.http.put(path)

    assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_exists")
    assert run.http.get(path).json() == first
    assert run.http.put(f"{run.path}/snapshots/t").json()["version"] == "1.2"
    assert [s["name"] for s in run.http.get(f"{run.path}/snapshots").json()["snapshots"]] == ["s", "t"]


def test_snapshot_is_a_plain_file(server: ServerProcess, run: PlainRun) -> None:
    """On the server's disk a snapshot is one file for each average that safetensors.torch.load_file opens."""
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    assert server.data_dir is not None
    files = {path.stem: path for path in Path(server.data_dir).glob(f"runs/{run.name}.*/snapshots/s/*")}

    assert files.keys() == {"slow", "fast"}
    for average, path in files.items():
        assert path.suffix == ".safetensors"
        assert same(load_file(path), run.weights(average=average))


def test_download_goes_on_where_it_stopped(run: PlainRun) -> None:
    """A snapshot's weights have an ETag, 304, HEAD, ranges and 416 as the run's have."""
    path = f"{run.path}/snapshots/s/weights"
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    whole = run.http.get(path)
    etag = whole.headers["etag"]
    parts = [
        run.http.get(path, headers={"Range": f"bytes={at}-{at + 99}", "If-Range": etag})
        for at in range(0, len(whole.content), 100)
    ]

    assert {part.status_code for part in parts} == {206}
    assert b"".join(part.content for part in parts) == whole.content
    assert run.http.get(path, headers={"If-None-Match": etag}).status_code == 304
    assert run.http.head(path).headers["content-length"] == str(len(whole.content))
    assert run.http.get(path, headers={"Range": "bytes=99999-"}).status_code == 416
    assert run.http.get(path, headers={"Range": "bytes=0-0", "If-Range": '"other"'}).status_code == 200


def test_refusals_and_unread_answers_close_their_file(server: ServerProcess, run: PlainRun) -> None:
    """304, HEAD, 416 and refused queries leave no file open in the server."""
    path = f"{run.path}/snapshots/s/weights"
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    etag = run.http.get(path).headers["etag"]

    def ask() -> None:
        run.http.head(path)
        run.http.get(path, headers={"If-None-Match": etag})
        run.http.get(path, headers={"Range": "bytes=99999-"})
        run.http.get(path, params={"dtype": "I8"})
        run.http.get(path, params={"prefix": "nothing"})
        run.http.get(path).raise_for_status()

    def open_files() -> int:
        links = Path(f"/proc/{server.process.pid}/fd").iterdir()
        return sum(".safetensors" in str(link.readlink()) for link in links if link.is_symlink())

    for _ in range(5):
        ask()
    # The last body is all here a moment before the server is done with its answer.
    deadline = time.monotonic() + 10
    while open_files() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_files() == 0
    assert "ResourceWarning" not in server.log


def test_delete(run: PlainRun) -> None:
    """A deleted snapshot is gone from the list, its weights are 404, and its name is free."""
    path = f"{run.path}/snapshots/s"
    run.http.put(path)
    answer = run.http.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")

    for gone in (run.http.get(path), run.http.get(f"{path}/weights"), run.http.delete(path)):
        assert (gone.status_code, gone.json()["code"]) == (404, "snapshot_not_found")
        assert "'s'" in gone.json()["detail"]
    assert run.http.put(path).status_code == 201


def test_snapshot_of_an_unknown_average(run: PlainRun) -> None:
    """An average the snapshot has not is 404."""
    run.http.put(f"{run.path}/snapshots/s")
    answer = run.http.get(f"{run.path}/snapshots/s/weights", params={"average": "none"})

    assert (answer.status_code, answer.json()["code"]) == (404, "average_not_found")


def test_damaged_snapshot_is_the_servers_fault(server: ServerProcess, run: PlainRun) -> None:
    """A snapshot whose file is damaged is no 422: the reader is told which snapshot, and not to send another body."""
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    assert server.data_dir is not None
    [path] = Path(server.data_dir).glob(f"runs/{run.name}.*/snapshots/s/slow.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    answer = run.http.get(f"{run.path}/snapshots/s/weights")

    assert answer.status_code in (409, 500)
    assert answer.json()["code"] != "malformed_body"
    assert "'s'" in answer.json()["detail"]


def test_no_snapshots_in_memory(start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model) -> None:
    """A server with --memory says so when asked for snapshots; everything else works."""
    run = plain_run(start_server(memory=True), model(0))
    run.push(1, model(1)).raise_for_status()

    for method, path in (("PUT", "/s"), ("GET", ""), ("GET", "/s"), ("GET", "/s/weights"), ("DELETE", "/s")):
        answer = run.http.request(method, f"{run.path}/snapshots{path}")
        assert (answer.status_code, answer.json()["code"]) == (409, "storage_disabled")
        assert "--memory" in answer.json()["detail"]
    assert run.info()["durable_step"] is None
