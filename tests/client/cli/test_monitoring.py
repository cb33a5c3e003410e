"""Commands that look after a service: doctor, top, du, history, timeline.

Knows answers of a real service, and of sick ones. Does not know how requests travel.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ema_client import EmaClient, __version__

Ema = Callable[..., tuple[int, str, str]]
STATE = {"w": torch.ones(1 << 19)}


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    """A run of 2 MiB with a snapshot, and an update since."""
    client.create_run(run_name, STATE, decay=0.5)
    client.snapshot(run_name, "begin")
    client.push(run_name, {"w": STATE["w"] + 1}, step=3)
    return run_name


def checks(out: str) -> dict[str, dict[str, Any]]:
    return {each["check"]: each for each in json.loads(out)}


@pytest.mark.usefixtures("run")
def test_doctor_of_a_healthy_service(ema: Ema) -> None:
    """Everything is looked at, nothing is changed, within five seconds; the exit code is 0."""
    begun = time.monotonic()
    code, out, err = ema("doctor", "--json")
    found = checks(out)

    assert time.monotonic() - begun < 5
    assert (code, err) == (0, "")
    assert {each["verdict"] for each in found.values()} <= {"ok", "warning"}  # a disk may be full, this one's too
    assert set(found) == {
        "client", "service", "versions", "token", "clock", "answers", "shared memory", "memory", "disk", "runs", "link",
    }  # fmt: skip
    assert found["versions"]["found"] == f"client {__version__}, server {__version__}"
    assert "/s (" in found["link"]["found"]
    assert "admin" in found["token"]["found"]


def healthy(**changed: Any) -> dict[str, Any]:
    return {
        "name": "ema-service", "version": __version__, "scopes": ["pull"], "time": time.time(), **changed
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "check", "verdict", "says"),
    [
        ({"version": "9.9.0"}, "versions", "warning", "install the same version"),
        ({"scopes": []}, "token", "failed", "EMA_SERVICE_TOKEN"),
        ({"time": 1e9}, "clock", "warning", "NTP"),
        ({"memory_bytes": 95, "memory_limit_bytes": 100}, "memory", "warning", "--memory-limit"),
        ({"disk_free_bytes": 4, "disk_total_bytes": 100}, "disk", "warning", "ema delete-snapshot"),
        (
            {"replica": {"of": "http://h", "reached": False, "behind_seconds": 3.0, "fault": "gone"}},
            *("replica", "warning", "look at the original"),
        ),
    ],
)
def test_doctor_says_what_to_mend(
    ema: Ema, scripted: Callable[..., Any], answer: dict[str, Any], check: str, verdict: str, says: str
) -> None:
    """Each thing that can be wrong is told with its remedy; what has failed makes the exit code 1."""

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.answer(200, {"runs": []} if request.target == "/v1/runs" else healthy(**answer))

    code, out, _ = ema("doctor", "--json", "--url", scripted(script).url)
    found = checks(out)[check]
    assert (found["verdict"], code) == (verdict, int(verdict == "failed"))
    assert says in found["remedy"]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")
@pytest.mark.parametrize(("hosts", "who"), [(None, "service"), (2, "a host of the cluster on this machine")])
def test_doctor_says_who_shares_memory(ema: Ema, scripted: Callable[..., Any], hosts: int | None, who: str) -> None:
    """A gateway has none, and hosts of its cluster have, where they are on this machine."""

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.answer(200, {"runs": []} if request.target == "/v1/runs" else healthy(hosts=hosts))

    found = checks(ema("doctor", "--json", "--url", scripted(script).url)[1])["shared memory"]
    assert found["verdict"] == "ok"
    assert f"where {who} and trainer are of one user" in found["found"]


def test_doctor_of_sick_runs(ema: Ema, scripted: Callable[..., Any], server: Any, run: str) -> None:
    """A degraded run is a failure, with its reason and remedy; a service without the route is told from none at all."""
    with server.http() as http:
        info = http.get(f"/v1/runs/{run}").json()
    info |= {"status": "degraded", "reason": "the disk is gone", "remedy": "give it a disk"}

    def script(peer: Any) -> None:
        while request := peer.request():
            if request.target == "/v1/server":
                peer.problem(404, "route_not_found")
            else:
                peer.answer(200, {"runs": [info]})

    code, out, _ = ema("doctor", "--json", "--url", scripted(script).url)
    found = checks(out)
    assert (code, found["service"]["verdict"]) == (1, "warning")
    assert (found[f"run {run}"]["found"], found[f"run {run}"]["remedy"]) == ("the disk is gone", "give it a disk")


def silent(peer: Any) -> None:
    """Take the request, and say nothing."""
    while peer.sock.recv(1 << 16):
        pass


def slow(peer: Any) -> None:
    """Answer each request after most of the time that a question may take."""
    while request := peer.request():
        time.sleep(1.2)
        peer.answer(200, {"runs": []} if request.target == "/v1/runs" else healthy())


def test_doctor_is_done_in_five_seconds(ema: Ema, scripted: Callable[..., Any], free_url: str) -> None:
    """Also where nobody listens, or somebody listens and never answers, or answers late."""
    for url, says in (
        (free_url, "failed\tservice: "),
        (scripted(silent).url, "failed\tservice: "),
        (scripted(slow).url, "warning\tanswers: in 1.2 s"),
    ):
        begun = time.monotonic()
        out = ema("doctor", "--url", url)[1]
        assert time.monotonic() - begun < 5
        assert says in out


def test_top_tells_rates(ema: Ema, run: str) -> None:
    """Each look is a line of JSON: how many updates came since the look before, and what is not durable yet."""
    code, out, _ = ema("top", "--json", "--count", 2, "--interval", 0.1)
    first, second = (next(row for row in json.loads(line) if row["run"] == run) for line in out.splitlines())

    assert code == 0
    assert (first["step"], first["status"], second["rate"]) == (3, "ready", 0)
    assert first["distance"] == second["distance"] == pytest.approx(1 / 11, rel=1e-6)


def test_du(ema: Ema, run: str, client: EmaClient) -> None:
    """What a run takes, by what takes it, and what the server has in all."""
    found = json.loads(ema("du", "--json")[1])
    [use] = [each for each in found["runs"] if each["run"] == run]
    [snapshot] = client.snapshots(run)

    assert (use["memory"], use["snapshots"], use["snapshot_count"]) == (2 * (2 << 20), snapshot.bytes, 1)
    assert use["disk"] == use["checkpoints"] + use["ring"] + use["snapshots"]
    assert found["server"]["memory_bytes"] >= use["memory"] // 2
    assert "\t4.0 MiB\t" in next(line for line in ema("du")[1].splitlines() if line.startswith(run))


def test_history_and_timeline(ema: Ema, run: str) -> None:
    """How a run went, a row for each measurement; and what was done to it."""
    head, *rows = (line.split("\t") for line in ema("history", run)[1].splitlines())
    assert head == ["time", "step", "num_updates", "decay", "distance", "updates/s", "lag"]
    assert rows[-1][1:3] == ["3", "1"]
    # The shadow has followed by 9/11 of the way from ones to twos.
    assert float(rows[-1][4]) == pytest.approx((2 - (1 + 9 / 11)) / 2, rel=1e-3)
    assert json.loads(ema("history", run, "--json", "--points", 1)[1])["columns"]["step"] == [3]
    assert "nothing was measured yet" in ema("history", run, "--hours", 0)[1]
    told = [line.split("\t")[-1] for line in ema("timeline", run)[1].splitlines()]
    assert any("snapshot begin" in text for text in told)
