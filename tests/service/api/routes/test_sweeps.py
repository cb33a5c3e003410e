"""What sweeps found, over HTTP: kept once each, the newest eight, beyond the server's end and not beyond the run's.

Knows the routes, by plain HTTP. Does not know what evaluates averages (tests/client/cli/test_sweep.py).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from tests.conftest import PlainRun, ServerProcess

MODEL = {"w": torch.zeros(3)}
JSON = {"Content-Type": "application/json"}
MakeRun = Callable[..., PlainRun]
#: Two results, and a length that was refused.
REPORT: dict[str, Any] = {
    "kind": "sigma_rel",
    "at": "epoch-1",
    "highest": False,
    "name": "FID",
    "points": [
        {"value": 0.06, "result": 0.5, "refused": None},
        {"value": 0.12, "result": 0.25, "refused": None},
        {"value": 0.28, "result": None, "refused": "not near enough"},
    ],
}


def report(run: PlainRun, key: str | None = None, **changed: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return run.http.post(f"{run.path}/sweeps", json={**REPORT, **changed}, headers=headers)


def kept(run: PlainRun) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.http.get(f"{run.path}/sweeps").raise_for_status().json()["sweeps"]
    return found


def told(run: PlainRun) -> list[str]:
    entries = run.http.get(f"{run.path}/timeline").json()["entries"]
    return [entry["text"] for entry in entries if entry["kind"] == "sweep"]


@pytest.mark.parametrize("memory", [False, True])
def test_sweeps_are_kept(start_server: Callable[..., ServerProcess], plain_run: MakeRun, memory: bool) -> None:
    """A report comes back as it was sent, with the run's version by then and a line in the timeline; the same write
    again is one report; of nine the oldest goes; a run of the same name made anew has none. Where there is a disk, a
    restart after kill -9 brings them back."""
    server = start_server(memory=memory)
    run = plain_run(server, MODEL)
    assert kept(run) == []
    assert run.push(1, MODEL).status_code == 200
    first = report(run, "one")
    assert (first.status_code, first.json()) == (201, {**REPORT, **first.json()})
    assert (first.json()["version"], first.json()["num_updates"]) == ("1.1", 1)
    assert report(run, "one", name="another").json() == first.json()
    assert kept(run) == [first.json()]
    assert told(run) == ["sweep of 3 lengths, best sigma_rel 0.12: FID 0.25"]
    assert report(run, highest=True, name=None, at=7).json()["at"] == 7
    assert told(run)[1] == "sweep of 3 lengths, best sigma_rel 0.06: 0.5"

    if not memory:
        before, lines = kept(run), told(run)
        server.kill()
        server.start()
        run = plain_run(server)
        assert (kept(run), told(run)) == (before, lines)
        assert report(run, "one").json() == first.json()  # the key as well
        assert kept(run) == before
    for k in range(9):
        assert report(run, f"k{k}", name=str(k)).status_code == 201
    assert [each["name"] for each in kept(run)] == [str(k) for k in range(1, 9)]
    assert [each["time"] for each in kept(run)] == sorted(each["time"] for each in kept(run))
    other = plain_run(server, MODEL, name="other")
    report(other)
    run.http.delete(run.path).raise_for_status()
    assert report(run).json()["code"] == run.http.get(f"{run.path}/sweeps").json()["code"] == "run_not_found"
    run.create(MODEL).raise_for_status()
    assert kept(run) == []
    assert report(run).json()["version"] is None  # before the initial weights
    assert len(kept(other)) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"points": []}, "points: "),
        ({"points": [{"value": 0.1}] * 65}, "points: "),
        ({"points": [{"value": 0.1, "result": "0.5"}]}, "points.0.result: "),
        ({"points": [{"value": 0.1, "result": True}]}, "points.0.result: "),
        ({"points": [{"value": 0.1}, {"value": None}]}, "points.1.value: "),
        ({"points": [{"result": 1.0}]}, "points.0.value: "),
        ({"points": [{"value": 0.1, "refused": "x" * 301}]}, "points.0.refused: "),
        ({"points": [{"value": 0.3}]}, "points: 0.3 is no sigma_rel, which is below 0.288675"),
        ({"kind": "decay", "points": [{"value": 0.9}, {"value": 1}]}, "points: 1 is no decay, which is below 1"),
        ({"kind": "window"}, "kind: "),
        ({"at": "../x"}, "at."),
        ({"at": 1.5}, "at."),
        ({"at": -1}, "at."),
        ({"highest": 1}, "highest: "),
        ({"name": 7}, "name: "),
        ({"version": "1.1"}, "version: "),
    ],
)
def test_reports_that_cannot_be(server: ServerProcess, content: dict[str, Any], says: str) -> None:
    """A report with a field that is none is refused before a run is looked for, and the answer names the field."""
    answer = httpx.post(f"{server.url}/v1/runs/none/sweeps", json={**REPORT, **content})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert says in answer.json()["detail"]


def test_text_that_is_none(server: ServerProcess) -> None:
    """Half of a surrogate pair, which JSON can write and no file can hold, is refused."""
    content = json.dumps({**REPORT, "name": "\ud800"})
    answer = httpx.post(f"{server.url}/v1/runs/none/sweeps", content=content, headers=JSON)
    assert (answer.status_code, "name: " in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e301"])
def test_results_that_are_no_numbers(server: ServerProcess, number: str) -> None:
    """What Python writes for a loss that is no number, and JSON has not, is refused, wherever it stands."""
    for point in (f'{{"value": 0.1, "result": {number}}}', f'{{"value": {number}}}'):
        body = f'{{"kind": "half_life", "points": [{point}]}}'
        url = f"{server.url}/v1/runs/none/sweeps"
        answer = httpx.post(url, content=body, headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert "points.0." in answer.json()["detail"]


def test_largest_report_and_a_larger_one(server: ServerProcess, plain_run: MakeRun) -> None:
    """64 points with a reason each are taken; a body of more bytes than any report is refused as too large."""
    run = plain_run(server, MODEL)
    assert report(run, points=[{"value": 0.1, "refused": "x" * 300}] * 64).status_code == 201
    assert kept(run)[0]["points"][63] == {"value": 0.1, "result": None, "refused": "x" * 300}
    assert told(run) == ["sweep of 64 lengths of sigma_rel, without a result"]
    assert report(run, name="x" * 70_000).json()["code"] == "body_too_large"


def test_catalog_that_does_not_answer(start_server: Callable[..., ServerProcess], plain_run: MakeRun) -> None:
    """While another process has the catalog locked, a report is refused as 503 and nothing is kept; once the lock is
    gone, the same write is taken. A catalog that cannot be read is 503 as well, and a damaged row costs its sweep."""
    server = start_server()
    run = plain_run(server, MODEL)
    report(run, "before")
    database = sqlite3.connect(server.data_dir / "catalog.db", isolation_level=None)  # type: ignore[operator]
    database.execute("BEGIN IMMEDIATE")
    refused = report(run, "during")
    database.execute("ROLLBACK")
    assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
    assert "was not kept: database is locked" in refused.json()["detail"]
    assert "Retry-After" in refused.headers
    assert len(kept(run)) == len(told(run)) == 1
    assert report(run, "during").status_code == 201
    assert len(kept(run)) == len(told(run)) == 2

    database.execute("UPDATE sweeps SET info = '{' WHERE key = 'before'")
    assert kept(run) == [report(run, "during").json()]
    assert report(run, "before").status_code == 201  # in its row's place
    assert len(kept(run)) == 2
    gone = plain_run(server, MODEL, name="gone")
    database.execute("DELETE FROM runs WHERE name = 'gone'")  # as a deletion that overtakes the report
    assert report(gone).json()["code"] == "run_not_found"
    database.execute("DROP TABLE sweeps")
    database.close()
    for answer in (report(run), run.http.get(f"{run.path}/sweeps")):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")
    assert run.push(1, MODEL).status_code == 200
