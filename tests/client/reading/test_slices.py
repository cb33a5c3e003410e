"""Slices of weights by ranges, against a server of scripted versions. Knows streams as bytes; no socket is open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save

from ema_client.errors import UsageError
from ema_client.reading.asked import Asked
from ema_client.reading.slices import Wanted, fetch
from ema_client.wire import box_shape

ASKED = Asked("r")


class Version:
    """One body, as a service answers for it."""

    def __init__(self, number: int, width: int = 50_000) -> None:
        self.tensors = {"a": torch.full((9, width), float(number)), "b": torch.full((5,), float(number))}
        self.tensors["a"][:, 0] += torch.arange(9.0)
        info = {"run": "r", "average": "ema", "version": f"1.{number}", "num_updates": number, "decay": 0.9}
        self.body = save(self.tensors, {f"ema_{key}": str(value) for key, value in info.items()})
        self.etag = f'"{number}"'


class Answer:
    """What a Download is, of bytes."""

    url = "http://x"

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.status, self.headers, self.length = status, headers, len(body)
        self._rest = memoryview(body)

    def readinto(self, view: memoryview) -> None:
        view[:] = self._rest[: len(view)]
        self._rest = self._rest[len(view) :]

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Service:
    """Answers range requests; after each one the next of ``versions`` is current, the last one for good."""

    def __init__(self, versions: Iterator[Version]) -> None:
        self._versions = versions
        self._current = next(versions)
        self.asked: list[tuple[int, int | None]] = []

    def __call__(self, start: int, stop: int | None, etag: str | None) -> Any:
        version, self._current = self._current, next(self._versions, self._current)
        self.asked.append((start, stop))
        whole = stop is None or (etag is not None and etag != version.etag)
        part = version.body if whole else version.body[start:stop]
        headers = {"etag": version.etag, "content-range": f"bytes {start}-{stop}/{len(version.body)}"}
        return Answer(200 if whole else 206, part, headers)


def wanted(box: Any) -> dict[str, Wanted]:
    shapes = {"a": (9, 50_000), "b": (5,)}
    target = torch.empty(box_shape(box), dtype=torch.float64)
    return {"a": Wanted(shapes["a"], (box,), target), "b": Wanted(shapes["b"], (((0, 5),),), torch.empty(5))}


@pytest.mark.parametrize("box", [((2, 4), (0, 50_000)), ((0, 9), (0, 3)), ((1, 3), (7, 9))])
def test_slices_by_ranges(box: Any) -> None:
    """Rows, columns and corners come right, cast to the target's dtype, and rows without the bytes of others."""
    version = Version(1)
    service, want = Service(iter([version])), wanted(box)
    info = fetch(ASKED, service, want)

    assert torch.equal(want["a"].target, version.tensors["a"][tuple(slice(*b) for b in box)].double())
    assert torch.equal(want["b"].target, version.tensors["b"])
    assert info.version == "1.1"
    if box[1] == (0, 50_000):
        assert sum(stop - start for start, stop in service.asked if stop) <= 65536 + 2 * 200_000 + 20


@pytest.mark.parametrize("moves", [1, 3, 20])
def test_version_moves_on(moves: int) -> None:
    """Where the version moves on between ranges the slices are of one version all the same, however often it does."""
    service = Service(Version(number) for number in range(moves + 1))
    want = wanted(((2, 4), (0, 50_000)))
    number = fetch(ASKED, service, want).num_updates

    expected = Version(number)
    assert torch.equal(want["a"].target, expected.tensors["a"][2:4].double())
    assert torch.equal(want["b"].target, expected.tensors["b"])


def test_long_header() -> None:
    """A header longer than the first request is fetched to its end."""
    tensors = {f"layer.{i}.{'x' * 200}": torch.full((2,), float(i)) for i in range(400)}
    version = Version(0)
    info = {"run": "r", "average": "ema", "version": "1.0", "num_updates": 0, "decay": 0.9}
    version.body = save(tensors, {f"ema_{key}": str(value) for key, value in info.items()})
    assert len(json.dumps([*tensors])) > 1 << 16
    name = [*tensors][123]
    target = torch.empty(1)
    fetch(ASKED, Service(iter([version])), {name: Wanted((2,), (((1, 2),),), target)})

    assert target.tolist() == [123.0]


@pytest.mark.parametrize(("name", "shape"), [("c", (5,)), ("b", (6,))])
def test_other_weights(name: str, shape: tuple[int, ...]) -> None:
    """A tensor that the weights do not have so is refused before anything is written."""
    target = torch.zeros(shape)
    with pytest.raises(UsageError, match=repr(name)):
        fetch(ASKED, Service(iter([Version(1)])), {name: Wanted(shape, (((0, shape[0]),),), target)})
    assert target.tolist() == [0.0] * shape[0]
