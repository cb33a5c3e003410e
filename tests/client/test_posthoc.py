"""Averages of any length, from Python, against averages that the same run tracked directly.

Knows EmaClient, RemoteEma and their errors. Does not know how the service works an average out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_client import EmaClient, Posthoc, RemoteEma
from ema_client.errors import InvalidRequest, SnapshotExists, SynthesisRefused, UsageError
from ema_client.protocol import WeightsInfo
from ema_client.reading.slices import Wanted
from ema_client.reading.sweeping import Sweep, SweptPoint
from ema_client.schedules import constant, half_life, litema, power
from ema_client.targets import between, spread
from tests.waiting import settled

UPDATES = 150
#: Directly tracked -> the same average wished for after the fact.
TRACKED: dict[str, dict[str, float]] = {
    "tracked-0.1": {"sigma_rel": 0.1},
    "tracked-0.05": {"sigma_rel": 0.05},
    "tracked-decay": {"decay": 0.96},
    "tracked-life": {"half_life": 15.0},
}
AVERAGES = [
    litema(),
    power(0.1, name="tracked-0.1"),
    power(0.05, name="tracked-0.05"),
    constant(0.96, name="tracked-decay"),
    half_life(15, name="tracked-life"),
]


def walk(step: int) -> dict[str, Tensor]:
    """Parameters that wander, as those of a training do."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(3, 2000, generator=generator)
    weights = torch.tensor([math.sin(step / 9), math.cos(step / 23), math.log1p(step)])
    return {"w": weights @ directions, "b": torch.full((5,), step / 10)}


@pytest.fixture(scope="module")
def trained(server: Any) -> Iterator[tuple[EmaClient, str]]:
    """A client, and a run with a ring, a snapshot "middle" and averages tracked beside it."""
    with EmaClient(server.url) as client:
        client.create_run("posthoc-trained", walk(0), averages=AVERAGES, posthoc=True)
        for step in range(1, UPDATES + 1):
            client.push("posthoc-trained", walk(step), step=step)
            if step == 100:
                client.snapshot("posthoc-trained", "middle")
        settled(client, "posthoc-trained")
        yield client, "posthoc-trained"


def off(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The relative difference of two sets of weights."""
    difference = math.hypot(*(float((found[name].double() - expected[name].double()).norm()) for name in expected))
    return difference / math.hypot(*(float(tensor.double().norm()) for tensor in expected.values()))


@pytest.mark.parametrize("average", TRACKED)
def test_the_same_as_tracked(trained: tuple[EmaClient, str], average: str) -> None:
    """What is worked out afterwards is what was tracked, to a small part of a percent; another length is not."""
    client, run = trained
    wished: Any = TRACKED[average]
    found, tracked = client.pull(run, **wished), client.pull(run, average=average)

    assert off(found, tracked) < 2e-3
    assert off(client.pull(run, sigma_rel=0.2), tracked) > 2e-2
    assert found.info.average == "posthoc"
    assert found.info.target is not None
    assert 0 < (found.info.profile_error or 0) <= 0.05
    assert found.info.num_updates == UPDATES


def test_a_window(trained: tuple[EmaClient, str]) -> None:
    """The mean of the latest updates, whose edge is a time of the ring."""
    client, run = trained
    ring = client.run(run).ring
    assert ring is not None
    first = ring.times[-4]
    mean = {name: sum(walk(step)[name].double() for step in range(first + 1, UPDATES + 1)) for name in walk(0)}
    expected = {name: total / (UPDATES - first) for name, total in mean.items()}  # type: ignore[operator]

    found = client.pull(run, window=(first, UPDATES))

    assert off(found, expected) < 2e-3
    assert found.info.schedule == "window"


def test_at_a_snapshot(trained: tuple[EmaClient, str]) -> None:
    """``at`` names a snapshot, as of which the average is."""
    client, run = trained
    # The ring is thinned for the present: earlier times are had less exactly.
    found = client.pull(run, sigma_rel=0.1, at="middle", max_error=0.1)

    assert off(found, client.pull(run, average="tracked-0.1", snapshot="middle")) < 5e-3
    assert found.info.num_updates == 100


def test_every_way_to_read(trained: tuple[EmaClient, str], tmp_path: Path) -> None:
    """pull with out=, slices, copy_to and download give the same values; dtype and prefix mean what they mean else."""
    client, run = trained
    whole = client.pull(run, sigma_rel=0.1)
    out, model = ({name: torch.zeros_like(tensor) for name, tensor in whole.items()} for _ in range(2))
    part = torch.zeros(40)

    client.pull(run, sigma_rel=0.1, out=out)
    copied = client.copy_to(run, model, sigma_rel=0.1)
    client.download(run, tmp_path / "w.safetensors", sigma_rel=0.1)
    client.pull_slices(run, {"w": Wanted((2000,), (((1960, 2000),),), part)}, sigma_rel=0.1)

    for found in (out, model, load_file(tmp_path / "w.safetensors")):
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert torch.equal(part, whole["w"][1960:])
    assert copied.target == "sigma_rel 0.1"
    half = client.pull(run, sigma_rel=0.1, dtype="F16", prefix="w")
    assert (list(half), half["w"].dtype) == (["w"], torch.float16)
    assert torch.equal(half["w"], whole["w"].half())


def test_a_broken_download_goes_on(relay: Callable[..., Any], trained: tuple[EmaClient, str], tmp_path: Path) -> None:
    """The same bytes come again after a connection that broke in the middle."""
    client, run = trained
    between_them = relay(lambda request: "sigma_rel" in request.target, after=3000)
    with EmaClient(between_them.url) as broken:
        broken.download(run, tmp_path / "w.safetensors", sigma_rel=0.1)

    whole = client.pull(run, sigma_rel=0.1)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(tmp_path / "w.safetensors").items())


def test_profiles(trained: tuple[EmaClient, str]) -> None:
    """The dry run says how exact the average is and of what it is made, also where it would be refused."""
    client, run = trained
    info = client.profiles(run, sigma_rel=0.1)

    assert info.error == client.pull(run, sigma_rel=0.1).info.profile_error
    assert info.refused is None
    assert math.isclose(sum(source.weight for source in info.sources), 1.0, abs_tol=1e-9)
    refused = client.profiles(run, sigma_rel=0.285)
    assert refused.error > 0.05
    assert "nearest" in (refused.refused or "")
    with pytest.raises(UsageError, match="no average"):
        client.profiles(run)


def test_what_cannot_be_had(trained: tuple[EmaClient, str]) -> None:
    """Refusals name what could be had; max_error moves the bound; mistakes are seen before anything is sent."""
    client, run = trained
    with pytest.raises(SynthesisRefused, match="nearest that can be had is sigma_rel"):
        client.pull(run, sigma_rel=0.285)
    assert (client.pull(run, sigma_rel=0.285, max_error=0.9).info.profile_error or 0.0) > 0.05
    with pytest.raises(SynthesisRefused, match="neither a snapshot"):
        client.pull(run, sigma_rel=0.1, at=77)
    for other in ({"average": "ema"}, {"snapshot": "middle"}, {"soup": {"middle": 1.0}}):
        with pytest.raises(UsageError, match="wished for, and"):
            client.pull(run, sigma_rel=0.1, **other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sigmarel"):
        client.pull(run, sigmarel=0.1)  # type: ignore[call-arg]


def test_right_after_a_fast_training(client: EmaClient, run_name: str) -> None:
    """A training of a second is not refused because its ring is still on the way to the disk."""
    client.create_run(run_name, walk(0), posthoc=True)
    for step in range(1, 101):
        client.push(run_name, walk(step), step=step)

    assert (client.pull(run_name, sigma_rel=0.12).info.profile_error or 1.0) < 0.01


def test_a_run_without_a_ring(client: EmaClient, run_name: str) -> None:
    """A run that keeps no ring says so, and how one is made."""
    client.create_run(run_name, walk(0))
    client.push(run_name, walk(1))

    assert client.run(run_name).ring is None
    with pytest.raises((SynthesisRefused, InvalidRequest), match="posthoc"):
        client.pull(run_name, sigma_rel=0.1)


def test_a_snapshot_of_one(trained: tuple[EmaClient, str], tmp_path: Path) -> None:
    """The average stays as a snapshot, and can be pulled and downloaded as any other."""
    client, run = trained
    kept = client.snapshot(run, "kept", sigma_rel=0.07)
    whole = client.pull(run, sigma_rel=0.07)

    assert kept.averages == ("posthoc",)
    client.download(run, tmp_path / "kept.safetensors", snapshot="kept")
    for found in (client.pull(run, snapshot="kept"), load_file(tmp_path / "kept.safetensors")):
        assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    with pytest.raises(SnapshotExists):
        client.snapshot(run, "kept", sigma_rel=0.08)


# --- what a trainer asks --------------------------------------------------------------------------------------------


def test_from_a_trainer(make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str) -> None:
    """RemoteEma makes the ring, and copies any length into the model, in a scope too."""
    model = nn.Linear(30, 4)
    ema = make_ema(model, averages=[litema(), power(0.1, name="tracked")], posthoc={"snapshots": 8, "dtype": "F64"})
    for _ in range(60):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight) * 0.1)
        ema(model)
    ema.flush()
    settled(client, run_name)
    ring, trained = client.run(run_name).ring, model.weight.detach().clone()
    tracked = client.pull(run_name, average="tracked")["weight"]

    assert ring is not None
    assert (ring.snapshots, ring.dtype, ring.sigma_rel) == (8, "F64", (0.015, 0.03, 0.25))
    with ema.scope(model, sigma_rel=0.1):
        assert off({"w": model.weight.detach()}, {"w": tracked}) < 5e-3
    assert torch.equal(model.weight, trained)
    ema.copy_to(model, sigma_rel=0.1)
    assert off({"w": model.weight.detach()}, {"w": tracked}) < 5e-3
    with pytest.raises(UsageError, match=r"below 0\.288675"):
        ema.copy_to(model, sigma_rel=0.3)


def test_from_a_copy(make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str) -> None:
    """A copy reads averages of any length too, as of the step at which it was made where that is kept."""
    model = nn.Linear(30, 4)
    ema = make_ema(model, posthoc=True)

    def train() -> None:
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight) * 0.1)
        ema(model)

    for _ in range(40):
        train()
    ema.state_dict()
    settled(client, run_name)
    expected = client.pull(run_name, sigma_rel=0.1)["weight"]
    copied, other = copy.deepcopy(ema), copy.deepcopy(model)
    train()
    ema.flush()

    copied.copy_to(other, sigma_rel=0.1)
    assert off({"w": other.weight.detach()}, {"w": expected}) < 1e-3


def test_going_on_with_another_ring(make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str) -> None:
    """A run keeps the ring that it was made with: who asks for another is told, who asks for the same is not."""
    model = nn.Linear(3, 2)
    make_ema(model, posthoc=Posthoc(8)).close()

    make_ema(model, resume=True, posthoc=Posthoc(8)).close()
    make_ema(model, resume=True).close()
    with pytest.warns(UserWarning, match="posthoc of 8 snapshots in F32"):
        make_ema(model, resume=True, posthoc=True).close()
    client.delete_run(run_name)
    make_ema(model).close()
    with pytest.warns(UserWarning, match="without posthoc"):
        make_ema(model, resume=True, posthoc=True).close()


# --- sweeps ---------------------------------------------------------------------------------------------------------


class Curve:
    """An evaluation: how far an average is from that of ``at``, which it reads from the file."""

    def __init__(self, client: EmaClient, run: str, at: float) -> None:
        self.goal = client.pull(run, sigma_rel=at)
        self.seen: list[tuple[Path, WeightsInfo]] = []

    def __call__(self, path: Path, info: WeightsInfo) -> float:
        self.seen.append((path, info))
        return off(load_file(path), self.goal)


def test_sweep(trained: tuple[EmaClient, str]) -> None:
    """Twelve lengths are evaluated, of one version, and the best is found; nothing stays in the temporary folder."""
    client, run = trained
    curve, told = Curve(client, run, 0.06), list[SweptPoint]()
    values = spread("sigma_rel", 0.015, 0.25, 12)
    found = client.sweep(run, curve, sigma_rel=values, told=told.append)

    assert [point.value for point in found.points] == list(values)
    assert found.best is not None
    assert abs(math.log(found.best.value / 0.06)) < math.log(values[1] / values[0])
    assert {info.version for _, info in curve.seen} == {f"1.{UPDATES}"}
    assert [info.sigma_rel for _, info in curve.seen] == pytest.approx(values)
    assert not any(path.exists() or path.parent.exists() for path, _ in curve.seen)
    assert told == list(found.points)
    assert (found.at, found.at_edge) == (UPDATES, False)


def test_sweep_gives_what_pull_gives(trained: tuple[EmaClient, str]) -> None:
    """Each file of a sweep is that average's, bit for bit, whatever the dtype; the last pieces are short."""
    client, run = trained
    for dtype in (None, "F16"):

        def same(path: Path, info: WeightsInfo, dtype: str | None = dtype) -> float:
            whole = client.pull(run, sigma_rel=info.sigma_rel, dtype=dtype)
            return float(all(torch.equal(tensor, whole[name]) for name, tensor in load_file(path).items()))

        found = client.sweep(run, same, sigma_rel=[0.02, 0.05, 0.1], dtype=dtype)
        assert [point.result for point in found.points] == [1.0, 1.0, 1.0]


def test_refine(trained: tuple[EmaClient, str]) -> None:
    """Further evaluations come nearer to the best, and no length is looked at twice."""
    client, run = trained
    coarse = client.sweep(run, Curve(client, run, 0.06), sigma_rel=[0.015, 0.05, 0.25])
    curve = Curve(client, run, 0.06)
    fine = client.sweep(run, curve, sigma_rel=[0.015, 0.05, 0.25], refine=7)

    assert len(curve.seen) == len({info.sigma_rel for _, info in curve.seen}) == 10
    assert fine.best is not None
    assert coarse.best is not None
    assert abs(fine.best.value - 0.06) < 0.005 < abs(coarse.best.value - 0.06)


def test_refused_lengths_are_told_and_the_others_go_on(trained: tuple[EmaClient, str]) -> None:
    """A length that cannot be had is a point with its reason; where all are refused there is no best."""
    client, run = trained
    found = client.sweep(run, lambda _, info: info.sigma_rel, sigma_rel=[0.05, 0.1, 0.2884, 0.2885], highest=True)

    assert [point.refused is None for point in found.points] == [True, True, False, False]
    assert all("nearest" in (point.refused or "nearest") for point in found.points)
    assert found.best is not None
    assert found.best.value == 0.1
    none = client.sweep(run, lambda *_: 0.0, sigma_rel=[0.2885])
    assert (none.best, none.at) == (None, None)


@pytest.mark.parametrize("kind", ["decay", "half_life"])
def test_other_lengths(trained: tuple[EmaClient, str], kind: str) -> None:
    """Decays and half-lives are swept as well; a result of None or NaN is no best."""
    client, run = trained
    ends = {"decay": (0.93, 0.97), "half_life": (8, 25)}[kind]
    values = spread(kind, *ends, 4)
    results = dict(zip(values, [2.0, None, math.nan, 1.0], strict=True))

    def evaluate(_: Path, info: WeightsInfo) -> float | None:
        return next(result for value, result in results.items() if math.isclose(value, getattr(info, kind)))

    found = client.sweep(run, evaluate, **{kind: values})  # type: ignore[arg-type]
    assert found.best is not None
    assert found.best.value == ends[1]
    assert found.kind == kind


def test_a_run_that_goes_on(client: EmaClient, run_name: str) -> None:
    """A sweep is of one time: what would be of another is refused, and a snapshot holds the time."""
    client.create_run(run_name, walk(0), posthoc=True)
    for step in range(1, 71):
        client.push(run_name, walk(step), step=step)
    settled(client, run_name)

    def trains_on(*_: object) -> float:
        client.push(run_name, walk(71))
        return 1.0

    values = spread("sigma_rel", 0.05, 0.2, 12)
    found = client.sweep(run_name, trains_on, sigma_rel=values)
    assert [point.refused is None for point in found.points] == [True] * 8 + [False] * 4
    assert all("neither a snapshot" in (point.refused or "") for point in found.points[8:])

    client.snapshot(run_name, "still")
    found = client.sweep(run_name, trains_on, sigma_rel=values, at="still", max_error=0.2)
    assert all(point.refused is None for point in found.points)
    assert len({point.info.num_updates for point in found.points if point.info}) == 1


def test_sweeps_that_cannot_be(client: EmaClient) -> None:
    """Mistakes are seen before anything is asked; what an evaluation raises ends the sweep."""
    for wished in ({}, {"sigma_rel": [0.1], "decay": [0.9]}, {"sigma_rel": []}, {"sigma_rel": [0.3]}):
        with pytest.raises(UsageError):
            client.sweep("no-such-run", lambda *_: 0.0, **wished)  # type: ignore[arg-type]


def test_an_evaluation_that_raises(trained: tuple[EmaClient, str]) -> None:
    """The caller's own error is the caller's; the folder is gone."""
    client, run = trained
    seen = []

    def fails(path: Path, _: WeightsInfo) -> float:
        seen.append(path)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.sweep(run, fails, sigma_rel=[0.05, 0.1])
    assert not seen[0].parent.exists()


@pytest.mark.parametrize(
    ("kind", "first", "last"), [("sigma_rel", 0.015, 0.25), ("decay", 0.99, 0.99999), ("half_life", 10, 1e6)]
)
def test_lengths_grow_by_a_factor(kind: str, first: float, last: float) -> None:
    """The lengths between two ends are evenly spread on the scale on which averages differ; so is the middle of two."""
    values = spread(kind, first, last, 9)
    sizes = [1 - value if kind == "decay" else value for value in values]

    assert (values[0], values[-1]) == (first, last)
    ratios = [after / before for before, after in pairwise(sizes)]
    assert ratios == pytest.approx([ratios[0]] * 8, rel=2e-3)
    middle = between(kind, first, last)
    assert (1 - middle if kind == "decay" else middle) == pytest.approx(math.sqrt(sizes[0] * sizes[-1]), rel=1e-3)


def test_where_a_better_one_may_lie() -> None:
    """Beside the best, on both sides where it has neighbours with results; nowhere once all in between is known."""
    points = tuple(SweptPoint(value, result) for value, result in [(0.02, 3.0), (0.05, 1.0), (0.1, None), (0.25, 2.0)])
    sweep = Sweep("r", "sigma_rel", 9, points)

    assert sweep.around_best() == (between("sigma_rel", 0.02, 0.05), between("sigma_rel", 0.05, 0.25))
    assert Sweep("r", "sigma_rel", 9, points, highest=True).around_best() == (between("sigma_rel", 0.02, 0.05),)
    assert Sweep("r", "sigma_rel", 9, points[:1]).around_best() == ()
    assert Sweep("r", "sigma_rel", 9, (SweptPoint(0.1), SweptPoint(0.2, math.inf))).around_best() == ()
    close = (SweptPoint(0.1, 1.0), SweptPoint(0.1001, 2.0))
    assert Sweep("r", "sigma_rel", 9, close).around_best() == ()
