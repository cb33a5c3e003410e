"""Averages worked out afterwards, over HTTP, against averages that were tracked in numpy.

Knows HTTP, safetensors and the formulas. Does not know how weights are found or stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load

from tests.service.posthoc import (
    Floats,
    as_state,
    constant_average,
    distance,
    flat,
    gamma_of,
    power_average,
    walk,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

UPDATES = 400
WALKED = walk(UPDATES)


def settled(run: PlainRun) -> dict[str, Any]:
    """The ring, once the snapshots that are due are written."""

    def ring() -> dict[str, Any]:
        found: dict[str, Any] = run.info()["ring"]
        return found

    wait_until(lambda: ring()["waiting"] == 0)
    return ring()


@pytest.fixture(scope="module")
def trained(server: ServerProcess, plain_run_at: Callable[..., PlainRun]) -> Iterator[PlainRun]:
    """A run after UPDATES updates, with a snapshot in the middle."""
    with server.http() as http:
        run = plain_run_at(http, "posthoc", as_state(WALKED[0]), posthoc={})
        for n in range(1, UPDATES + 1):
            run.push(n, as_state(WALKED[n])).raise_for_status()
            if n == 300:
                http.put(f"{run.path}/snapshots/middle").raise_for_status()
        settled(run)
        yield run
        http.delete(run.path)


def ask(run: PlainRun, route: str = "weights", **query: object) -> httpx.Response:
    return run.http.get(f"{run.path}/{route}", params={key: str(value) for key, value in query.items()})


@pytest.mark.parametrize("sigma_rel", [0.015, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25])
def test_power_average(trained: PlainRun, sigma_rel: float) -> None:
    """Weights by sigma_rel are those of the average that would have been tracked; the headers say how exactly."""
    answer = ask(trained, sigma_rel=sigma_rel)
    expected = power_average(WALKED, sigma_rel, range(1, UPDATES + 1))

    assert distance(flat(load(answer.content)), expected, WALKED) < 2e-3
    assert float(answer.headers["ema-profile-error"]) < 0.009
    assert 0.0 < float(answer.headers["ema-amplification"]) < 7.0
    assert answer.headers["ema-version"] == "1.400"
    assert answer.headers["ema-num-updates"] == "400"
    said = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])["__metadata__"]
    assert said["ema_target"] == f"sigma_rel {sigma_rel:g}"
    assert (said["ema_schedule"], float(said["ema_sigma_rel"])) == ("power", sigma_rel)
    assert float(said["ema_gamma"]) == pytest.approx(gamma_of(sigma_rel), rel=1e-9)
    assert float(said["ema_profile_error"]) == float(answer.headers["ema-profile-error"])


def test_tracked_average_gives_itself(trained: PlainRun) -> None:
    """The width of a tracked average gives that average's own weights, to the bit."""
    for sigma_rel in (0.015, 0.03, 0.25):
        tracked = load(ask(trained, average=f"posthoc-{sigma_rel}").content)
        found = load(ask(trained, sigma_rel=sigma_rel).content)
        assert all(torch.equal(found[name], tracked[name]) for name in tracked)
        dry = ask(trained, "profiles", sigma_rel=sigma_rel).json()
        assert dry["error"] < 1e-12
        assert [(each["average"], each["current"]) for each in dry["sources"]] == [(f"posthoc-{sigma_rel}", True)]


@pytest.mark.parametrize("decay", [0.95, 0.99, 0.999, 0.9999])
def test_constant_decay(trained: PlainRun, decay: float) -> None:
    """A decay gives what it would have given at every update, from the initial weights on."""
    answer = ask(trained, decay=decay)
    assert distance(flat(load(answer.content)), constant_average(WALKED, decay, UPDATES), WALKED) < 4e-3
    assert float(answer.headers["ema-decay"]) == decay


def test_half_life(trained: PlainRun) -> None:
    """A half-life is the constant decay by which a weight halves in so many updates."""
    expected = constant_average(WALKED, 2.0 ** (-1 / 70), UPDATES)
    assert distance(flat(load(ask(trained, half_life=70).content)), expected, WALKED) < 4e-3


def test_window(trained: PlainRun) -> None:
    """A window whose edges are times of the ring is the mean of the parameters of its updates."""
    first = next(time for time in trained.info()["ring"]["times"] if time >= 200)
    answer = ask(trained, window=f"{first}:{UPDATES}")
    expected = WALKED[first + 1 : UPDATES + 1].mean(axis=0)
    assert distance(flat(load(answer.content)), expected, WALKED) < 4e-3


def test_earlier_time(trained: PlainRun) -> None:
    """``at`` gives the average as it would have been at a snapshot, by name, or at a time of the ring."""
    named = ask(trained, sigma_rel=0.15, at="middle", max_error=0.1)
    expected = power_average(WALKED, 0.15, range(1, 301))
    assert distance(flat(load(named.content)), expected, WALKED[:301]) < 1e-2
    assert (named.headers["ema-version"], named.headers["ema-num-updates"]) == ("1.300", "300")

    time = trained.info()["ring"]["times"][-3]
    then = ask(trained, sigma_rel=0.15, at=time, max_error=0.1)
    expected = power_average(WALKED, 0.15, range(1, time + 1))
    assert distance(flat(load(then.content)), expected, WALKED[: time + 1]) < 1e-2
    assert then.headers["ema-version"] == f"1.{time}"
    assert then.headers["ema-step"] == str(time)


def test_body_is_like_any_weights(trained: PlainRun) -> None:
    """ETag, If-None-Match, Range and If-Range, HEAD, dtype and prefix hold as for a tracked average."""
    path, query = f"{trained.path}/weights", {"sigma_rel": "0.07"}
    whole = ask(trained, sigma_rel=0.07)
    etag = whole.headers["etag"]
    assert ask(trained, sigma_rel=0.07).content == whole.content
    assert ask(trained, sigma_rel=0.08).headers["etag"] != etag
    assert trained.http.get(path, params=query, headers={"If-None-Match": etag}).status_code == 304
    head = trained.http.head(path, params=query)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole.content)))
    assert head.headers["ema-profile-error"] == whole.headers["ema-profile-error"]
    for start, stop in ((0, 10), (5, 900), (901, 902), (len(whole.content) - 3, len(whole.content))):
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": etag}
        part = trained.http.get(path, params=query, headers=headers)
        assert (part.status_code, part.content) == (206, whole.content[start:stop])
    half = load(ask(trained, sigma_rel=0.07, dtype="BF16", prefix="b").content)
    assert list(half) == ["b"]
    assert torch.equal(half["b"], load(whole.content)["b"].bfloat16())


def test_time_of_digits_alone(trained: PlainRun) -> None:
    """Is the counter where there is one, else a snapshot's name, and refused where they are two times; "snapshot:" and
    "counter:" say which is meant."""
    time = str(max(time for time in trained.info()["ring"]["times"] if time < UPDATES))
    counter, now = (ask(trained, sigma_rel=0.1, **at).content for at in ({"at": time}, {}))
    names = [time, "77", str(UPDATES)]
    for name in names:
        trained.http.put(f"{trained.path}/snapshots/{name}").raise_for_status()
    try:
        refused = ask(trained, sigma_rel=0.1, at=time)
        assert (refused.status_code, refused.json()["code"]) == (422, "synthesis_refused")
        assert refused.json()["hint"] == f"ask for at=counter:{time} or at=snapshot:{time}"
        assert ask(trained, sigma_rel=0.1, at=f"counter:{time}").content == counter
        for at in (f"snapshot:{time}", "77", "snapshot:77", str(UPDATES), f"snapshot:{UPDATES}", f"counter:{UPDATES}"):
            found = ask(trained, sigma_rel=0.1, at=at)
            assert (found.status_code, found.headers["ema-num-updates"]) == (200, str(UPDATES)), at
            assert torch.allclose(flat(load(found.content)), flat(load(now))), at
        assert "neither a snapshot" in ask(trained, sigma_rel=0.1, at="counter:77").json()["detail"]
        assert "neither a snapshot" in ask(trained, sigma_rel=0.1, at="snapshot:78").json()["detail"]
    finally:
        for name in names:
            trained.http.delete(f"{trained.path}/snapshots/{name}")


def test_profiles(trained: PlainRun) -> None:
    """The dry run names sources whose weights, times their contents, make the average, and sum to 1."""
    dry = ask(trained, "profiles", sigma_rel=0.1).json()
    assert dry["refused"] is None
    assert (dry["target"], dry["version"], dry["num_updates"]) == ("sigma_rel 0.1", "1.400", 400)
    assert sum(each["weight"] for each in dry["sources"]) == pytest.approx(1.0, abs=1e-12)
    ring = trained.info()["ring"]
    assert {each["time"] for each in dry["sources"]} <= {*ring["times"], UPDATES, 0}
    assert dry["error"] == pytest.approx(float(ask(trained, sigma_rel=0.1).headers["ema-profile-error"]))
    far = ask(trained, "profiles", sigma_rel=0.1, max_error=1e-9).json()
    assert "error of" in far["refused"]
    assert far["error"] == dry["error"]


def test_sweep(trained: PlainRun) -> None:
    """A sweep is the bodies of its averages: every head, then a mebibyte of each in turn."""
    widths = ["0.02", "0.07", "0.2"]
    answer = ask(trained, "sweep", sigma_rel=",".join(widths))
    singles = [ask(trained, sigma_rel=width).content for width in widths]

    assert answer.headers["ema-targets"] == "3"
    heads = [single[: 8 + int.from_bytes(single[:8], "little")] for single in singles]
    data = b"".join(single[len(head) :] for single, head in zip(singles, heads, strict=True))
    assert answer.content == b"".join(heads) + data


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"sigma_rel": "0.28868"}, "the widest that can be had is 0.2886"),
        ({"sigma_rel": "0"}, "sigma_rel must be above 0"),
        ({"decay": "1"}, "decay must be above 0 and below 1"),
        ({"sigma_rel": "0.1", "at": "never"}, "is neither a snapshot of run 'posthoc' nor a time of its ring"),
        ({"sigma_rel": "0.1", "at": "299"}, "is neither a snapshot of run 'posthoc' nor a time of its ring"),
        ({"window": "211:399"}, "the nearest that can be had is window"),
        ({"window": "9:9"}, "must begin at 0 or later and end after that"),
        ({"window": "100:401"}, "ends after the newest snapshot, 400"),
        ({"sigma_rel": "0.1", "max_error": "0.00001"}, "above 1e-05"),
        ({"sigma_rel": "0.0002"}, "the nearest that can be had is sigma_rel"),
    ],
)
@pytest.mark.parametrize("route", ["weights", "sweep"])
def test_refusals(trained: PlainRun, route: str, query: dict[str, str], said: str) -> None:
    """What cannot be had is refused with the numbers, and with what can be had instead."""
    answer = ask(trained, route, **query)
    assert (answer.status_code, answer.json()["code"]) == (422, "synthesis_refused")
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    "query",
    [
        {"sigma_rel": "x"},
        {"sigma_rel": "nan"},
        {"sigma_rel": "0.1", "decay": "0.9"},
        {"window": "5"},
        {"at": "middle"},
        {"max_error": "0.1"},
        {"sigma_rel": "0.1", "max_error": "0"},
        {"sigma_rel": "0.1,0.2"},
        {"sigma_rel": "0.1", "average": "ema"},
        {"sigma_rel": "0.1", "soup": "middle:1"},
        {"sigma_rel": "0.1", "min_step": "5"},
        {"sigma_rel": ",".join(["0.1"] * 9)},
    ],
)
def test_malformed(trained: PlainRun, query: dict[str, str]) -> None:
    """A query that says nothing, or two things, is refused by name."""
    answer = ask(trained, **query)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_run_without_ring(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A run that keeps nothing for it says what it would have needed."""
    run = plain_run(server, as_state(WALKED[0]))
    for route in ("weights", "profiles", "sweep"):
        answer = ask(run, route, sigma_rel=0.1)
        assert (answer.status_code, answer.json()["code"]) == (422, "synthesis_refused")
        assert "posthoc" in answer.json()["hint"]
    assert run.info()["ring"] is None


def test_before_the_first_update(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """There is no average of no update."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={"snapshots": 4})
    answer = ask(run, sigma_rel=0.1)
    assert (answer.status_code, answer.json()["code"]) == (422, "synthesis_refused")
    assert "no update" in answer.json()["detail"]


def test_version_decides_the_bytes(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """What is asked for while the ring is still being stored is what is asked for later: the ranks of a trainer, which
    read one slice after the other, have slices of one sum."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={})
    for n in range(1, 31):
        run.push(n, as_state(WALKED[n])).raise_for_status()
        if n % 10 == 0:
            first = ask(run, sigma_rel=0.1, max_error=0.9)
            settled(run)
            later = ask(run, sigma_rel=0.1, max_error=0.9)
            assert first.headers["etag"] == later.headers["etag"]
            assert first.content == later.content


def test_kept_as_snapshot(trained: PlainRun) -> None:
    """An average that was worked out can be kept: pulled by name, once for each call, and never rewound to."""
    path = f"{trained.path}/snapshots/best"
    made = trained.http.put(path, params={"sigma_rel": "0.12"})
    assert (made.status_code, made.json()["averages"], made.json()["target"]) == (201, ["posthoc"], "sigma_rel 0.12")
    assert trained.http.put(path, params={"sigma_rel": "0.12"}).status_code == 200
    assert trained.http.put(path, params={"sigma_rel": "0.11"}).json()["code"] == "snapshot_exists"
    assert trained.http.put(path).json()["code"] == "snapshot_exists"

    kept, worked_out = trained.http.get(f"{path}/weights"), ask(trained, sigma_rel=0.12)
    found, expected = load(kept.content), load(worked_out.content)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    refused = trained.http.post(f"{trained.path}/rewind", json={"snapshot": "best"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert "worked out afterwards" in refused.json()["detail"]
    assert ask(trained, sigma_rel=0.1, at="best").json()["code"] == "synthesis_refused"
    trained.http.delete(path).raise_for_status()


def test_steps_between_updates(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """With a decay for each step, and steps that are skipped at random, an average is that of the same updates."""
    counters = [n for n in range(1, UPDATES + 1) if (n * 2654435761) % 7 < 2 or n == UPDATES]
    run = plain_run(server, as_state(WALKED[0]), posthoc={}, decay_per="step")
    for n in counters:
        run.push(n, as_state(WALKED[n])).raise_for_status()
    settled(run)
    # The first update of a run counts for one step, whatever its number.
    seen = [1, *(1 + later - counters[0] for later in counters[1:])]
    brought = WALKED[[0, *counters]]
    widened = brought[[0, *(max(i for i, n in enumerate((0, *seen)) if n <= m) for m in range(1, seen[-1] + 1))]]
    for sigma_rel in (0.05, 0.12, 0.2):
        found = flat(load(ask(run, sigma_rel=sigma_rel).content))
        assert distance(found, power_average(widened, sigma_rel, seen), WALKED) < 4e-3


def test_rewind_leaves_the_other_branch_out(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Snapshots of updates that a rewind went back over are not used, and go; their names are refused as a time."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={})
    for n in range(1, 201):
        run.push(n, as_state(WALKED[n])).raise_for_status()
        if n in (100, 180):
            run.http.put(f"{run.path}/snapshots/at-{n}").raise_for_status()
    run.http.post(f"{run.path}/rewind", json={"snapshot": "at-100"}).raise_for_status()
    other = walk(200, seed=1) + WALKED[100] - walk(200, seed=1)[100]
    for n in range(101, 221):
        run.push(n, as_state(other[min(n, 200)])).raise_for_status()
    ring = settled(run)
    line: Floats = other[[min(n, 200) for n in range(221)]].copy()
    line[:101] = WALKED[:101]

    assert len(set(ring["times"])) == len(ring["times"])
    for sigma_rel in (0.03, 0.15, 0.25):
        found = flat(load(ask(run, sigma_rel=sigma_rel).content))
        assert distance(found, power_average(line, sigma_rel, range(1, 221)), line) < 4e-3
    refused = ask(run, sigma_rel=0.1, at="at-180")
    assert (refused.status_code, refused.json()["code"]) == (422, "synthesis_refused")
    assert "did not lead to version 2.120" in refused.json()["detail"]
    assert ask(run, sigma_rel=0.1, at="at-100", max_error=0.3).status_code == 200


def test_reset_begins_anew(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """After the counters were reset, averages begin with the next update, and so does the ring."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={})
    for n in range(1, 101):
        run.push(n, as_state(WALKED[n])).raise_for_status()
    run.http.post(f"{run.path}/reset-num-updates").raise_for_status()
    assert ask(run, sigma_rel=0.1).json()["code"] == "synthesis_refused"
    for n in range(101, 301):
        run.push(n, as_state(WALKED[n])).raise_for_status()
    assert max(settled(run)["times"]) <= 200
    found = flat(load(ask(run, sigma_rel=0.15).content))
    assert distance(found, power_average(WALKED[100:301], 0.15, range(1, 201)), WALKED[:301]) < 4e-3


def test_average_that_began_elsewhere(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Weights given with a counter have the mass of all updates before."""
    run = plain_run(server, None, posthoc={})
    run.create(as_state(WALKED[0]), posthoc={}).raise_for_status()
    run.begin(as_state(WALKED[0]), num_updates=100).raise_for_status()
    for n in range(1, 201):
        run.push(n, as_state(WALKED[n])).raise_for_status()
    settled(run)
    line: Floats = WALKED[[0] * 100 + list(range(201))]
    for sigma_rel in (0.05, 0.2):
        found = flat(load(ask(run, sigma_rel=sigma_rel).content))
        assert distance(found, power_average(line, sigma_rel, range(100, 301)), line) < 4e-3


def test_branch_goes_on(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A run that goes on from another's snapshot works out averages over both trainings."""
    run, branch = (plain_run(server, None) for _ in range(2))
    for each in (run, branch):
        each.create(as_state(WALKED[0]), posthoc={}).raise_for_status()
    run.begin(as_state(WALKED[0])).raise_for_status()
    for n in range(1, 101):
        run.push(n, as_state(WALKED[n])).raise_for_status()
    run.http.put(f"{run.path}/snapshots/s").raise_for_status()
    branch.http.post(f"{branch.path}/rewind", json={"snapshot": "s", "run": run.name}).raise_for_status()
    for n in range(101, 401):
        branch.push(n, as_state(WALKED[n])).raise_for_status()
    settled(branch)
    found = flat(load(ask(branch, sigma_rel=0.1).content))
    assert distance(found, power_average(WALKED, 0.1, range(1, 401)), WALKED) < 4e-3


@pytest.mark.parametrize("dtype", ["BF16", pytest.param("F64", marks=pytest.mark.soak)])
def test_other_dtypes(server: ServerProcess, plain_run: Callable[..., PlainRun], dtype: str) -> None:
    """Snapshots may be stored narrower or wider; sums of bf16 are damped, so that its rounding does not grow."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={"dtype": dtype, "snapshots": 32})
    for n in range(1, 201):
        run.push(n, as_state(WALKED[n])).raise_for_status()
    settled(run)
    answer = ask(run, sigma_rel=0.1)
    expected = power_average(WALKED, 0.1, range(1, 201))
    limit = 2e-3 if dtype == "F64" else 3e-2
    assert distance(flat(load(answer.content)), expected, WALKED[:201]) < limit
    assert run.info()["ring"]["dtype"] == dtype


def test_copied_tensors_are_the_newest(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A tensor that is copied, not averaged, comes as it is at the time that is asked for."""
    made = {"a": torch.zeros(5), "count": torch.zeros(3), "z": torch.zeros(4)}
    run = plain_run(server, made, posthoc={"snapshots": 4}, copied=["count"])
    for n in range(1, 31):
        run.push(n, {"a": torch.full((5,), n * 1.0), "count": torch.full((3,), n * 1.0), "z": torch.ones(4)})
    found = load(ask(run, sigma_rel=0.2, max_error=0.9).content)
    assert torch.equal(found["count"], torch.full((3,), 30.0))
    assert 1.0 < float(found["a"][0]) < 30.0


def test_configuration(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """posthoc adds averages behind those of the run; the same configuration again is the same run."""
    run = plain_run(server, None)
    state = as_state(WALKED[0])
    posthoc = {"snapshots": 8, "sigma_rel": [0.05, 0.2]}
    assert run.create(state, posthoc=posthoc).status_code == 201
    assert run.create(state, posthoc=posthoc).status_code == 200
    run.begin(state).raise_for_status()
    assert run.create(state).json()["code"] == "run_exists"
    info = run.info()
    names = [each["name"] for each in info["averages"]]
    assert names == ["ema", "posthoc-0.05", "posthoc-0.2"]
    assert [each["sigma_rel"] for each in info["averages"][1:]] == [0.05, 0.2]
    assert info["ring"]["snapshots"] == 8
    for wrong in (
        {"snapshots": 1},
        {"snapshots": 65},
        {"dtype": "I8"},
        {"sigma_rel": []},
        {"sigma_rel": [0.1, 0.1]},
        {"sigma_rel": [0.3]},
        {"every": 5},
    ):
        answer = plain_run(server, None).create(state, posthoc=wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), wrong
        assert "posthoc" in answer.json()["detail"]


def test_averages_of_the_ring_stay(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Other averages come and go beside the ring; what it is made of cannot be removed."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={"snapshots": 4})
    for n in range(1, 101):
        run.push(n, as_state(WALKED[n])).raise_for_status()
        if n == 30:
            added = run.http.post(f"{run.path}/averages", json={"name": "late", "schedule": "constant"})
            assert added.status_code == 201
        if n == 60:
            run.http.delete(f"{run.path}/averages/ema").raise_for_status()
    refused = run.http.delete(f"{run.path}/averages/posthoc-0.03")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert "ring" in refused.json()["detail"]
    settled(run)
    found = flat(load(ask(run, sigma_rel=0.25).content))
    assert distance(found, power_average(WALKED, 0.25, range(1, 101)), WALKED[:101]) < 1e-5


def test_needs_a_disk(start_server: Callable[..., ServerProcess], plain_run_at: Callable[..., PlainRun]) -> None:
    """A server without a disk refuses, and says what to do."""
    server = start_server(memory=True)
    with server.http() as http:
        answer = plain_run_at(http, "r").create(as_state(WALKED[0]), posthoc={})
        assert (answer.status_code, answer.json()["code"]) == (409, "storage_disabled")


def test_never_more_than_one_too_many(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """While updates come, there are at most as many times on disk as were asked for, and one being written."""
    run = plain_run(server, as_state(WALKED[0]), posthoc={"snapshots": 6})
    seen = []
    for n in range(1, 201):
        run.push(n, as_state(WALKED[n])).raise_for_status()
        seen.append(run.info()["ring"]["times"])
    assert max(map(len, seen)) <= 7
    assert all(list(times) == sorted(set(times)) for times in seen)
    assert len(set().union(*seen)) > 20
