"""Soups: the weighted sum of snapshots over HTTP, against a sum of what was downloaded.

Knows HTTP and safetensors. Does not know how a sum is worked out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import InvalidRequest, SnapshotNotFound, UsageError

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess


def tensors(seed: int) -> dict[str, Tensor]:
    """Several dtypes and sizes, of which some are not whole pieces."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "wide": made(900, 1000),
        "double": made(7, 3).double(),
        "half": made(33).half(),
        "brain": made(5, 5).bfloat16(),
        "none": made(0, 4),
        "one": made(),
    }


@pytest.fixture
def run(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> PlainRun:
    """With three snapshots of three updates."""
    made = plain_run(server, tensors(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.1}])
    for step in (1, 2, 3):
        made.push(step, tensors(step)).raise_for_status()
        made.http.put(f"{made.path}/snapshots/s{step}").raise_for_status()
    return made


def snapshot(run: PlainRun, name: str, **query: str) -> dict[str, Tensor]:
    answer = run.http.get(f"{run.path}/snapshots/{name}/weights", params=query)
    answer.raise_for_status()
    return load(answer.content)


def by_hand(run: PlainRun, weights: dict[str, float], **query: str) -> dict[str, Tensor]:
    parts = {name: snapshot(run, name, **query) for name in weights}
    return {
        key: sum(weight * parts[name][key].double() for name, weight in weights.items()).to(first.dtype)  # type: ignore[union-attr]
        for key, first in parts["s1"].items()
    }


@pytest.mark.parametrize("average", ["slow", "fast"])
def test_sum_of_snapshots(run: PlainRun, average: str) -> None:
    """Each tensor is the float64 sum of the snapshots', rounded once; the header says what was summed."""
    answer = run.pull(soup="s1:0.5,s2:0.75,s3:-0.25", average=average)
    expected = by_hand(run, {"s1": 0.5, "s2": 0.75, "s3": -0.25}, average=average)

    found = load(answer.content)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert answer.headers["ema-version"] == "1.3"
    assert b'"ema_soup":"s1:0.5,s2:0.75,s3:-0.25"' in answer.content[:4000]


def test_one_snapshot_is_itself(run: PlainRun) -> None:
    """A soup of a single snapshot has the snapshot's bytes."""
    found, expected = load(run.pull(soup="s2:1").content), snapshot(run, "s2")

    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_of_a_soup(run: PlainRun) -> None:
    """Any range of bytes is that of the whole, so a broken download goes on; the ETag names the same bytes later."""
    whole = run.pull(soup="s1:0.5,s2:0.5")
    etag = whole.headers["etag"]
    for start, stop in [(0, 9), (8, 4000), (len(whole.content) - 77, len(whole.content)), (1_500_001, 2_700_003)]:
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": etag}
        part = run.http.get(f"{run.path}/weights", params={"soup": "s1:0.5,s2:0.5"}, headers=headers)
        assert (part.status_code, part.content) == (206, whole.content[start:stop])
    kept = run.http.get(f"{run.path}/weights", params={"soup": "s1:0.5,s2:0.5"}, headers={"If-None-Match": etag})
    assert kept.status_code == 304
    other = run.pull(soup="s1:0.25,s2:0.75").headers["etag"]
    run.http.delete(f"{run.path}/snapshots/s1").raise_for_status()
    run.http.put(f"{run.path}/snapshots/s1").raise_for_status()
    assert len({etag, other, run.pull(soup="s1:0.5,s2:0.5").headers["etag"]}) == 3


def test_cast_and_selected(run: PlainRun) -> None:
    """dtype and prefix mean what they mean elsewhere."""
    found = load(run.pull(soup="s1:0.5,s3:0.5", dtype="F16", prefix="w").content)

    assert list(found) == ["wide"]
    assert torch.equal(found["wide"], by_hand(run, {"s1": 0.5, "s3": 0.5})["wide"].half())


@pytest.mark.parametrize(
    ("soup", "status", "says"),
    [
        ("", 422, "is not NAME:WEIGHT"),
        ("s1", 422, "is not NAME:WEIGHT"),
        ("s1:", 422, "is not NAME:WEIGHT"),
        ("s1:nan,s2:1", 422, "is not NAME:WEIGHT"),
        ("s1:0.5,../s2:0.5", 422, "is not NAME:WEIGHT"),
        ("s1:0.5,s1:0.5", 422, "twice"),
        ("s1:1,s2:1", 422, "divided by their sum they are 0.5, 0.5"),
        ("s1:1,s2:-1", 422, "must sum to 1"),
        (",".join(f"s{n}:0.01" for n in range(100)), 422, "64 are possible"),
        ("s1:0.5,gone:0.5", 404, "no snapshot 'gone'"),
    ],
)
def test_soups_that_cannot_be(soup: str, status: int, says: str, run: PlainRun) -> None:
    """What is wrong with a soup is said; no file stays open."""
    answer = run.pull(soup=soup)

    assert answer.status_code == status
    assert says in answer.json()["detail"]


def test_from_python_and_the_command_line(run: PlainRun, server: ServerProcess, tmp_path: Path) -> None:
    """pull, copy_to and download give the same soup; mistakes are named before anything is asked."""
    model = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    expected = by_hand(run, {"s1": 0.5, "s2": 0.5})
    with EmaClient(server.url) as client:
        pulled = client.pull(run.name, soup={"s1": 0.5, "s2": 0.5})
        client.copy_to(run.name, model, soup={"s1": 0.5, "s2": 0.5})
        info = client.download(run.name, tmp_path / "soup.safetensors", soup={"s1": 0.5, "s2": 0.5})
        for found in (pulled, load_file(tmp_path / "soup.safetensors")):
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(torch.equal(model[name], expected[name].to(model[name].dtype)) for name in expected)
        assert pulled.info.soup == info.soup == "s1:0.5,s2:0.5"
        with pytest.raises(UsageError, match="both"):
            client.pull(run.name, snapshot="s1", soup={"s1": 1.0})
        with pytest.raises(InvalidRequest, match="sum to 1"):
            client.pull(run.name, soup={"s1": 0.7, "s2": 0.7})
        with pytest.raises(SnapshotNotFound):
            client.pull(run.name, soup={"gone": 1.0})
