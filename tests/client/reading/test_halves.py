"""Large weights over two connections: the same tensors, of one version, and the same errors.

Knows a real service and the public client; what is large is made small here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.errors import ConnectionLost, UsageError
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.reading import halves

#: Of uneven sizes: the middle of the body lies within a tensor.
STATE = {f"t{i:02}": torch.randn(100 + 37 * i, generator=torch.Generator().manual_seed(i)) for i in range(40)}


@pytest.fixture
def client(server: Any, run_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmaClient]:
    """With a run that was pulled once, so that its length is known."""
    monkeypatch.setattr(halves, "SPLIT_ABOVE", 1000)
    with EmaClient(server.url, retry=RetryPolicy(attempts=1)) as made:
        made.create_run(run_name, STATE, decay=0.0, use_num_updates=False)
        assert same(made.pull(run_name), STATE)
        yield made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """The parts that are asked for."""
    found: list[tuple[int, int | None]] = []
    download = Transport.download

    def noted(self: Transport, *args: Any, start: int = 0, stop: int | None = None, **more: Any) -> Download:
        found.append((start, stop))
        return download(self, *args, start=start, stop=stop, **more)

    monkeypatch.setattr(Transport, "download", noted)
    return found


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("given", [False, True])
def test_both_halves(client: EmaClient, run_name: str, asked: list[Any], given: bool) -> None:
    """Into new tensors or given ones, in the order of the stream; each part is asked for once."""
    out = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()} if given else None
    weights = client.pull(run_name, out=out)

    assert same(weights, STATE)
    assert weights.info.version == "1.0"
    assert out is None or same(out, STATE)
    [(begin, middle), (split, end)] = sorted(asked)
    assert begin == 0 < split <= middle < end
    assert 0.4 < split / end < 0.7


def test_cast_into_other_dtypes(client: EmaClient, run_name: str, asked: list[Any]) -> None:
    """What cannot be received in place is cast, in either half."""
    out = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in STATE.items()}
    client.pull(run_name, out=out)

    assert all(torch.equal(out[name], tensor.double()) for name, tensor in STATE.items())
    assert len(asked) == 2


def test_small_weights_are_one_part(
    client: EmaClient, run_name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when they are asked for again."""
    monkeypatch.setattr(halves, "SPLIT_ABOVE", 1 << 30)
    client.pull(run_name, prefix="t1")
    client.pull(run_name, prefix="t1")

    assert asked == [(0, None), (0, None)]


@pytest.mark.parametrize("sizes", [{"only": 1000}, {"a": 100, "b": 10_000, "c": 100}])
def test_one_tensor_is_most_of_it(sizes: dict[str, int], client: EmaClient, run_name: str, asked: list[Any]) -> None:
    """Then all is pulled at once: a half of it would be read for nothing."""
    state = {name: torch.randn(size) for name, size in sizes.items()}
    client.create_run(f"{run_name}-one", state)
    for _ in range(2):
        assert same(client.pull(f"{run_name}-one"), state)

    assert asked == [(0, None), (0, None)]


def test_a_header_that_grew(client: EmaClient, run_name: str, asked: list[Any]) -> None:
    """Longer numbers in it than when the weights were parted: still two halves, each asked for once."""
    moved = {name: tensor + 1 for name, tensor in STATE.items()}
    client.push(run_name, moved, step=1234567890123)

    assert same(client.pull(run_name), moved)
    assert len(asked) == 2


def test_a_version_that_moves_on(
    client: EmaClient, run_name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two questions: then the whole is pulled anew, of one version."""
    download, moved = Transport.download, {name: tensor + 1 for name, tensor in STATE.items()}

    def moving(self: Transport, *args: Any, **more: Any) -> Download:
        if more.get("etag"):
            client.push(run_name, moved, step=1)
        return download(self, *args, **more)

    monkeypatch.setattr(Transport, "download", moving)
    out = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    weights = client.pull(run_name, out=out)

    assert weights.info.version == "1.1"
    assert same(out, moved)
    assert [part for part in asked if part == (0, None)] == [(0, None)]


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_breaks_off(half: int, client: EmaClient, run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told as that of a whole; nothing writes to the tensors afterwards, and the next pull is right."""
    read_some: Callable[..., int] = Download.read_some
    broken = []

    def breaking(self: Download, view: memoryview) -> int:
        if (self.headers["content-range"].startswith("bytes 0-")) == (half == 0) and self.length > 100:
            broken.append(self)
            raise ConnectionLost("gone")
        return read_some(self, view)

    with monkeypatch.context() as change:
        change.setattr(Download, "read_some", breaking)
        with pytest.raises(ConnectionLost):
            client.pull(run_name, out={name: torch.zeros_like(tensor) for name, tensor in STATE.items()})

    assert broken
    assert same(client.pull(run_name), STATE)


def test_tensors_that_do_not_fit(client: EmaClient, run_name: str) -> None:
    """Are told before a byte is written, wherever in the stream they stand."""
    for wrong in ({"t39": torch.zeros(1)}, {"more": torch.zeros(1)}):
        out: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()} | wrong
        with pytest.raises(UsageError):
            client.pull(run_name, out=out)
        assert not any(tensor.any() for tensor in out.values())
