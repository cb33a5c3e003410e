"""How a run went, over HTTP: measurements, distances, the timeline; and what a restart keeps of them.

Knows the routes, by plain HTTP and by our client. Does not know how sums or series are made (their own tests do).
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import AverageNotFound, InvalidRequest, RunNotFound
from ema_client.protocol import Durability, History, HistoryColumns
from ema_client.schedules import litema, power
from ema_service.persistence.measured import StoredMeasurements
from ema_service.runs.measurements import group_names
from tests.waiting import wait_until

Model = dict[str, Tensor]


def parameters(seed: int) -> Model:
    random = torch.Generator().manual_seed(seed)
    shapes = {"body.0.weight": (70, 9), "body.0.bias": (9,), "body.1.weight": (600,), "head.weight": (300,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    with EmaClient(server.url) as client:
        yield client


def push(client: EmaClient, run: str, steps: range, model: Callable[[int], Model] = parameters) -> None:
    """Push updates, far enough apart for a row each."""
    for step in steps:
        client.push(run, model(step), step=step)
        rest(client, run)


def rest(client: EmaClient, run: str) -> None:
    """Wait until the next update is measured: on a busy machine, averaging a small model may take a while."""
    time.sleep(0.06 + 5 * (client.history(run).columns.seconds_average[-1:] or (0.0,))[0])


def burst(client: EmaClient, run: str, steps: range) -> None:
    """Push updates without a pause."""
    for step in steps:
        client.push(run, parameters(step), step=step)


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
    # A part of it: since a time, which is left out, or thinned, with the newest.
    assert client.history(run_name, since=columns.time[2]).columns.step == (4, 5)
    assert client.history(run_name, since=columns.time[-1]).columns.step == ()
    few = client.history(run_name, points=3).columns.step
    assert len(few) <= 3
    assert few[-1] == 5


def test_updates_close_in_time_share_a_row(client: EmaClient, run_name: str) -> None:
    """Of many updates at once few have a row, the newest does; the rate counts them all."""
    client.create_run(run_name, parameters(0))
    burst(client, run_name, range(1, 41))
    history = client.history(run_name)

    assert history.seen == 40
    assert history.columns.step[-1] == 40
    assert len(history.columns.step) <= 2 + (history.columns.time[-1] - history.columns.time[0]) / 0.05
    counted = zip(history.columns.rate[1:], itertools.pairwise(history.columns.time), strict=True)
    assert 1 + sum(rate * (after - before) for rate, (before, after) in counted) == pytest.approx(40, rel=1e-3)


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
    push(client, run_name, range(1, 8))
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
        push(client, run_name, range(8, 9))
        assert http.get(path, headers={"If-None-Match": plain.headers["ETag"]}).status_code == 200
        with pytest.raises(AverageNotFound):
            client._transport.json("GET", f"{path}?average=other")


def test_timeline_tells_what_was_done(client: EmaClient, run_name: str) -> None:
    """Whatever changes a run but for updates has its entry, with the step it was at; a part of them can be had."""
    client.create_run(run_name, parameters(0))
    client.push(run_name, parameters(1), step=7)
    client.snapshot(run_name, "best")
    client.snapshot(run_name, "best")  # there already: nothing is done
    writer = client.attach(run_name)
    client.detach(run_name, writer)
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
        "ended",
        "decay_changed",
        "reset",
        "average_added",
        "average_removed",
        "rewound",
        "snapshot_deleted",
    ]
    assert "4 tensors" in told.entries[0].text
    assert "best" in told.entries[1].text
    assert "0.5" in told.entries[4].text
    assert (told.entries[0].step, told.entries[4].step, told.entries[5].num_updates) == (None, 7, 0)
    assert client.timeline(run_name, limit=2).entries == told.entries[-2:]
    assert client.timeline(run_name, since=told.entries[-2].time).entries == told.entries[-1:]


def kept(server: Any, run: str) -> int:
    """How many measurements the latest checkpoint has."""
    files = list(server.data_dir.glob(f"runs/{run}.*/measurements"))
    return StoredMeasurements.load(files[0].read_bytes()).seen if files else 0


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restart_keeps_it(end: str, start_server: Callable[..., Any], run_name: str) -> None:
    """A clean stop keeps every row; kill -9 those up to the last checkpoint. Then rows follow, in order of time."""
    server = start_server("--checkpoint-interval", "0.1")
    with EmaClient(server.url) as client:
        client.create_run(run_name, parameters(0))
        push(client, run_name, range(1, 6))
        if end == "kill":
            wait_until(lambda: kept(server, run_name) == 5)
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
        burst(client, run_name, range(1, 3))
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


# --- distances ------------------------------------------------------------------------------------------------------


def norm(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def mixed(seed: int) -> Model:
    """A model of every dtype, one tensor of which is copied, and one empty."""
    random = torch.Generator().manual_seed(seed)
    dtypes = {"body.0.w": torch.float32, "body.0.b": torch.float32, "body.1.w": torch.bfloat16, "head.w": torch.float16}
    shapes = {"body.0.w": (700, 9), "body.0.b": (9,), "body.1.w": (1300,), "head.w": (300,)}
    made = {name: torch.randn(shape, generator=random).to(dtypes[name]) for name, shape in shapes.items()}
    wide = torch.randn(50, generator=random, dtype=torch.float64)
    return made | {"head.wide": wide, "stats.mean": torch.randn(7, generator=random), "none": torch.zeros(0)}


def test_distances_are_those_of_float64(client: EmaClient, run_name: str) -> None:
    """Of each update, of each group and tensor, whatever the dtype, as a loop of float64 has them, to 1e-6; a copied
    tensor has none, and is in no sum. Norms likewise."""
    client.create_run(run_name, mixed(0), decay=0.9, copied=["stats.mean"])
    averaged = [name for name in mixed(0) if name != "stats.mean"]
    expected = []
    for step in range(1, 5):
        client.push(run_name, mixed(step), step=step)
        shadow, given = client.pull(run_name), mixed(step)
        apart = {name: norm(shadow[name].double() - given[name].double()) for name in averaged}
        expected.append((apart, {name: norm(given[name]) for name in averaged}, norm(*map(shadow.get, averaged))))
        rest(client, run_name)
    history, told = client.history(run_name), client.distances(run_name)

    for at, (apart, parameters, shadow_norm) in enumerate(expected):
        whole = math.hypot(*parameters.values())
        assert history.columns.distance[at] == pytest.approx(math.hypot(*apart.values()) / whole, rel=2e-6)
        assert history.columns.parameter_norm[at] == pytest.approx(whole, rel=2e-6)
        assert history.columns.shadow_norm[at] == pytest.approx(shadow_norm, rel=2e-6)
        body = [name for name in averaged if name.startswith("body.0")]
        one = math.hypot(*(apart[name] for name in body)) / math.hypot(*(parameters[name] for name in body))
        assert _of_groups(history.groups, "body.0", at, parameters) == pytest.approx(one, rel=2e-6)
    apart, parameters, _ = expected[-1]
    assert (told.version, told.step) == ("1.4", 4)
    assert {name: told.tensors[name] for name in ("stats.mean", "none")} == {"stats.mean": None, "none": None}
    for name in set(averaged) - {"none"}:
        assert told.tensors[name] == pytest.approx(apart[name] / parameters[name], rel=2e-6), name


def _of_groups(groups: Mapping[str, Any], prefix: str, at: int, parameters: Any) -> float:
    """The distance of all groups that begin with a prefix, put together of theirs."""
    found = [name for name in groups if name.startswith(prefix)]
    squares = sum((groups[name][at] * parameters[name]) ** 2 for name in found)
    return math.sqrt(squares) / math.hypot(*(parameters[name] for name in found))


def test_frozen_and_runaway_averages_are_seen(client: EmaClient, run_name: str) -> None:
    """An EMA with decay 1 is left behind: its distance grows, its norm stays. A healthy one follows; one that begins to
    copy is at no distance at all."""
    directions = parameters(0)
    for name, decay in (("frozen", 1.0), ("healthy", 0.5), ("copying", 0.0)):
        run = f"{run_name}-{name}"
        client.create_run(run, directions, decay=decay, use_num_updates=False)
        push(client, run, range(1, 8), lambda step: {name: (1 + step) * each for name, each in parameters(0).items()})
    frozen, healthy, copying = (
        client.history(f"{run_name}-{name}").columns for name in ("frozen", "healthy", "copying")
    )
    assert frozen.shadow_norm == pytest.approx([norm(*directions.values())] * 7, rel=1e-5)
    assert frozen.distance == pytest.approx([step / (1 + step) for step in range(1, 8)], rel=1e-5)
    assert list(frozen.distance) == sorted(frozen.distance)
    assert healthy.distance[-1] < 0.2 < frozen.distance[-1]
    assert copying.distance == pytest.approx([0.0] * 7, abs=1e-6)
    assert list(healthy.shadow_norm) == sorted(healthy.shadow_norm)


def test_other_averages_have_no_distance(client: EmaClient, run_name: str) -> None:
    """Distances are of the run's first average; of another, and of an update that only copied, they are None."""
    client.create_run(run_name, parameters(0), averages=[litema(), power(0.1, name="long")])
    push(client, run_name, range(1, 3))
    reply = client._transport.json("GET", f"/v1/runs/{run_name}/history?average=long").parsed(History)
    assert reply.average == "long"
    assert (reply.columns.distance, reply.groups) == ((None, None), {})
    assert None not in reply.columns.parameter_norm
    assert None not in client.history(run_name).columns.distance
    client.add_average(run_name, "late")
    client.remove_average(run_name, "ema")
    push(client, run_name, range(3, 4))
    assert client.history(run_name).average == "long"


def test_groups_are_as_deep_as_a_chart_can_hold() -> None:
    """The deepest beginnings of names that make at most 24 groups; none where even the first components are more."""
    blocks = [f"model.layers.{n}.{part}" for n in range(12) for part in ("mlp.up", "mlp.down", "norm")]
    few = group_names([*blocks, "head"])
    assert set(few.values()) == {*(f"model.layers.{n}" for n in range(12)), "head"}
    assert set(group_names([f"model.layers.{n}.w" for n in range(80)]).values()) == {"model.layers"}
    assert len(set(group_names([f"w{n}" for n in range(100)]).values())) == 100


@pytest.mark.parametrize(("shared", "durability"), [(False, "disk"), (True, "process")])
def test_distances_of_a_model_of_several_blocks(
    shared: bool, durability: Durability, server: Any, run_name: str
) -> None:
    """Received piece by piece, or divided among threads, with and without digests of results: the same sums."""
    random = torch.Generator().manual_seed(7)
    shapes = {"a": (5, 7), "b": (1_500_003,), "c": (1_999_999,), "d": (3,), "e": (1_000_000,)}

    def model(scale: float) -> Model:
        return {name: scale * torch.randn(shape, generator=random) for name, shape in shapes.items()}

    first, second = model(1.0), model(3.0)
    with EmaClient(server.uds) as client:
        client.create_run(run_name, first, decay=0.9, durability=durability)
        client.push(run_name, client.shared_state(second) if shared else second, step=1)
        assert client.link == ("shared memory" if shared else "Unix socket")
        shadow, told = client.pull(run_name), client.distances(run_name).tensors
        client.delete_run(run_name)
    for name, param in second.items():
        assert told[name] == pytest.approx(norm(shadow[name] - param.double()) / norm(param), rel=2e-6), name
