"""How a run went, over HTTP: measurements, distances, the timeline; and what a restart keeps of them.

Knows the routes, by plain HTTP and by our client. Does not know how sums or series are made (their own tests do).
"""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import AverageNotFound, InvalidRequest, RunNotFound
from ema_client.protocol import HistoryColumns

Model = dict[str, Tensor]


def parameters(seed: int) -> Model:
    random = torch.Generator().manual_seed(seed)
    shapes = {"body.0.weight": (70, 9), "body.0.bias": (9,), "body.1.weight": (600,), "head.weight": (300,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    with EmaClient(server.url) as client:
        yield client


def push(client: EmaClient, run: str, steps: range, pause: float = 0.06) -> None:
    """Push updates, far enough apart for a row each."""
    for step in steps:
        client.push(run, parameters(step), step=step)
        time.sleep(pause)


def test_columns_tell_how_the_run_went(client: EmaClient, run_name: str) -> None:
    """Each update has its row: step, counter, decay, rate, bytes, times of its phases; the first has no rate."""
    client.create_run(run_name, parameters(0))
    assert client.history(run_name).columns.time == ()
    began = time.time()
    push(client, run_name, range(1, 6))
    history = client.history(run_name)
    columns, info = history.columns, client.run(run_name)

    assert (history.run, history.average, history.version, history.seen) == (run_name, "ema", "1.5", 5)
    assert history.begin == columns.time[0] == pytest.approx(began, abs=5)
    assert (columns.step, columns.num_updates) == ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5))
    assert columns.effective_decay[-1] == info.effective_decay
    assert list(columns.time) == sorted(columns.time)
    assert columns.rate[0] is None
    gaps = [after - before for before, after in itertools.pairwise(columns.time)]
    assert columns.rate[1:] == pytest.approx([1 / gap for gap in gaps], rel=1e-3)
    nbytes = 4 * info.parameters
    assert columns.bytes_per_second[1:] == pytest.approx([nbytes / gap for gap in gaps], rel=1e-3)
    assert columns.durable_lag == (0,) * 5
    for name in ("seconds_receive", "seconds_average", "seconds_commit"):
        assert all(0 <= value < 5 for value in getattr(columns, name)), name


def test_updates_close_in_time_share_a_row(client: EmaClient, run_name: str) -> None:
    """Of many updates at once few have a row, the newest does; the rate counts them all."""
    client.create_run(run_name, parameters(0))
    push(client, run_name, range(1, 41), pause=0.0)
    history = client.history(run_name)

    assert history.seen == 40
    assert history.columns.step[-1] == 40
    assert len(history.columns.step) < 40
    counted = zip(history.columns.rate[1:], itertools.pairwise(history.columns.time), strict=True)
    assert 1 + sum(rate * (after - before) for rate, (before, after) in counted) == pytest.approx(40, rel=1e-3)


def test_part_of_it(client: EmaClient, run_name: str) -> None:
    """``since`` leaves out what is older, ``points`` thins what is left; the newest stays."""
    client.create_run(run_name, parameters(0))
    push(client, run_name, range(1, 9))
    times = client.history(run_name).columns.time

    assert client.history(run_name, since=times[4]).columns.step == (6, 7, 8)
    assert client.history(run_name, since=times[-1]).columns.step == ()
    few = client.history(run_name, points=3).columns.step
    assert len(few) <= 3
    assert few[-1] == 8


@pytest.mark.parametrize(
    "query", [{"since": -1}, {"since": "nan"}, {"since": "x"}, {"points": 0}, {"points": 5001}, {"points": "1.5"}]
)
def test_what_cannot_be_asked(query: dict[str, Any], server: Any, client: EmaClient, run_name: str) -> None:
    """A wrong number is refused, naming it; the server's errors come as the client's classes."""
    client.create_run(run_name, parameters(0))
    with server.http() as http:
        refused = http.get(f"/v1/runs/{run_name}/history", params=query)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert next(iter(query)) in refused.json()["detail"]


def test_errors(client: EmaClient, run_name: str) -> None:
    """Nothing is told of a run, or an average, that is not there."""
    for ask in (client.history, client.distances, client.timeline):
        with pytest.raises(RunNotFound):
            ask(run_name)
    client.create_run(run_name, parameters(0))
    with pytest.raises(InvalidRequest, match="limit"):
        client.timeline(run_name, limit=0)


def test_readers_that_ask_again(server: Any, client: EmaClient, run_name: str) -> None:
    """The same answer again is 304 and empty, until the next update; who takes gzip has it packed."""
    client.create_run(run_name, parameters(0))
    push(client, run_name, range(1, 31), pause=0.0)
    path = f"/v1/runs/{run_name}/history"
    with server.http() as http:
        for path in (f"/v1/runs/{run_name}/history", f"/v1/runs/{run_name}/distances"):
            first = http.get(path, headers={"Accept-Encoding": "gzip;q=0"})
            known = {"If-None-Match": f'"x", {first.headers["ETag"]}'}
            same = http.get(path, headers=known)
            assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", first.headers["ETag"])
            assert "content-encoding" not in first.headers
        path = f"/v1/runs/{run_name}/history"
        plain = http.get(path, headers={"Accept-Encoding": ""})
        with http.stream("GET", path, headers={"Accept-Encoding": "br, gzip"}) as packed:
            raw = b"".join(packed.iter_raw())
        assert packed.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(raw) == plain.content
        assert json.loads(plain.content)["columns"].keys() == {each.name for each in fields(HistoryColumns)}
        push(client, run_name, range(31, 32))
        assert http.get(path, headers={"If-None-Match": plain.headers["ETag"]}).status_code == 200
        with pytest.raises(AverageNotFound):
            client._transport.json("GET", f"{path}?average=other")


def test_timeline_tells_what_was_done(client: EmaClient, run_name: str) -> None:
    """Whatever changes a run but for updates has its entry, with the step it was at; a part of them can be had."""
    client.create_run(run_name, parameters(0))
    client.push(run_name, parameters(1), step=7)
    client.snapshot(run_name, "best")
    client.snapshot(run_name, "best")  # there already: nothing is done
    client.attach(run_name)
    client.set_decay(run_name, 0.5)
    client.reset_num_updates(run_name)
    client.add_average(run_name, "long")
    client.remove_average(run_name, "long")
    client.rewind(run_name, "best")
    client.delete_snapshot(run_name, "best")
    told = client.timeline(run_name)

    assert [entry.kind for entry in told.entries] == [
        "created",
        "snapshot",
        "writer",
        "decay_changed",
        "reset",
        "average_added",
        "average_removed",
        "rewound",
        "snapshot_deleted",
    ]
    assert "4 tensors" in told.entries[0].text
    assert "best" in told.entries[1].text
    assert "0.5" in told.entries[3].text
    assert (told.entries[0].step, told.entries[3].step, told.entries[4].num_updates) == (None, 7, 0)
    assert client.timeline(run_name, limit=2).entries == told.entries[-2:]
    assert client.timeline(run_name, since=told.entries[-2].time).entries == told.entries[-1:]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restart_keeps_it(end: str, start_server: Callable[..., Any], run_name: str) -> None:
    """A clean stop keeps every row; kill -9 those up to the last checkpoint. Then rows follow, in order of time."""
    server = start_server("--checkpoint-interval", "0.1")
    with EmaClient(server.url) as client:
        client.create_run(run_name, parameters(0))
        push(client, run_name, range(1, 6))
        time.sleep(0.5 if end == "kill" else 0.0)
        before = client.history(run_name), client.distances(run_name), client.timeline(run_name)
    server.stop() if end == "stop" else server.kill()
    server.start()
    with EmaClient(server.url) as client:
        assert (client.history(run_name), client.distances(run_name), client.timeline(run_name)) == before
        client.snapshot(run_name, "s")
        push(client, run_name, range(6, 7))
        client.rewind(run_name, "s")
        push(client, run_name, range(6, 7))
        history = client.history(run_name)
    assert (history.seen, history.version) == (7, "2.1")
    assert history.columns.step == (1, 2, 3, 4, 5, 6, 6)
    assert history.columns.rate[5] is None
    assert list(history.columns.time) == sorted(history.columns.time)


def test_nothing_is_measured_where_it_is_off(start_server: Callable[..., Any], run_name: str) -> None:
    """--no-measurements: updates go on, and nothing is told of them; the timeline stays. Without a disk, too."""
    server = start_server("--no-measurements", memory=True)
    with EmaClient(server.url) as client:
        client.create_run(run_name, parameters(0))
        push(client, run_name, range(1, 3), pause=0.0)
        history = client.history(run_name)
        assert (history.seen, history.begin, history.version, history.columns.time) == (0, None, None, ())
        assert set(client.distances(run_name).tensors.values()) == {None}
        assert [entry.kind for entry in client.timeline(run_name).entries] == ["created"]


def test_damaged_file_is_left_out(start_server: Callable[..., Any]) -> None:
    """A file of measurements with a flipped bit, or cut short, costs the measurements alone, and the log says so."""
    server = start_server()
    with EmaClient(server.url) as client:
        for name in ("flipped", "cut"):
            client.create_run(name, parameters(0))
            push(client, name, range(1, 3))
    server.stop()
    for name, damage in (("flipped", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), ("cut", lambda raw: raw[:40])):
        [file] = server.data_dir.glob(f"runs/{name}.*/measurements")
        file.write_bytes(damage(file.read_bytes()))
    server.start()
    with EmaClient(server.url) as client:
        for name in ("flipped", "cut"):
            assert f"run {name}: its measurements are gone" in server.log
            assert client.history(name).seen == 0
            assert client.run(name).step == 2
            push(client, name, range(3, 4))
            assert client.history(name).columns.step == (3,)
