"""Large weights over two connections: the same tensors, of one version, and the same errors.

Knows a real service, and a transport that notes, disturbs or breaks its downloads; what is large is made small here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy, Weights
from ema_client.errors import ConnectionLost, UsageError
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls

#: Of uneven sizes: the middle of the body lies within a tensor.
STATE = {f"t{i:02}": torch.randn(100 + 37 * i, generator=torch.Generator().manual_seed(i)) for i in range(40)}


class Watched(Transport):
    """A transport that notes which parts are asked for, and lets a test meddle with each download."""

    def __init__(self, url: str) -> None:
        super().__init__(url, retry=RetryPolicy(attempts=1))
        self.asked: list[tuple[int, int | None]] = []
        self.before: Callable[[str | None], None] = lambda _etag: None
        self.after: Callable[[Download], Download] = lambda download: download

    def download(self, path: str, *, start: int = 0, stop: int | None = None, **more: Any) -> Download:
        self.before(more.get("etag"))
        self.asked.append((start, stop))
        return self.after(super().download(path, start=start, stop=stop, **more))


@pytest.fixture
def client(server: Any, run_name: str) -> Iterator[EmaClient]:
    """With a run, whose shadow is always the latest push."""
    with EmaClient(server.url, retry=RetryPolicy(attempts=1)) as made:
        made.create_run(run_name, STATE, decay=0.0, use_num_updates=False)
        yield made


@pytest.fixture
def transport(server: Any) -> Iterator[Watched]:
    with contextlib.closing(Watched(server.url)) as made:
        yield made


Pull = Callable[..., Weights]


@pytest.fixture
def pull(client: EmaClient, transport: Watched, run_name: str) -> Pull:  # noqa: ARG001 - the client makes the run
    """Pull the run, which was pulled once, so that it is known where its weights can be parted."""
    pulls = Pulls(transport, split_above=1000)

    def pull(run: str = run_name, out: dict[str, Tensor] | None = None) -> Weights:
        return pulls.pull(Asked(run), out)

    assert same(pull(), STATE)
    transport.asked.clear()
    return pull


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("given", [False, True])
def test_both_halves(pull: Pull, transport: Watched, given: bool) -> None:
    """Into new tensors or given ones, in the order of the stream; each part is asked for once."""
    out = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()} if given else None
    weights = pull(out=out)

    assert same(weights, STATE)
    assert weights.info.version == "1.0"
    assert out is None or same(out, STATE)
    [(begin, middle), (split, end)] = sorted(transport.asked)
    assert begin == 0 < split <= middle < end
    assert 0.4 < split / end < 0.7


def test_cast_into_other_dtypes(pull: Pull, transport: Watched) -> None:
    """What cannot be received in place is cast, in either half."""
    out = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in STATE.items()}
    pull(out=out)

    assert all(torch.equal(out[name], tensor.double()) for name, tensor in STATE.items())
    assert len(transport.asked) == 2


def test_small_weights_are_one_part(pull: Pull, transport: Watched, run_name: str) -> None:
    """Also when they are asked for again."""
    del pull
    pulls = Pulls(transport)
    for _ in range(2):
        pulls.pull(Asked(run_name, prefix="t1"))

    assert transport.asked == [(0, None), (0, None)]


@pytest.mark.parametrize("sizes", [{"only": 1000}, {"a": 100, "b": 10_000, "c": 100}])
def test_one_tensor_is_most_of_it(
    sizes: dict[str, int], client: EmaClient, pull: Pull, transport: Watched, run_name: str
) -> None:
    """Then all is pulled at once: a half of it would be read for nothing."""
    state = {name: torch.randn(size) for name, size in sizes.items()}
    client.create_run(f"{run_name}-one", state)
    for _ in range(2):
        assert same(pull(f"{run_name}-one"), state)

    assert transport.asked == [(0, None), (0, None)]


def test_a_header_that_grew(client: EmaClient, pull: Pull, transport: Watched, run_name: str) -> None:
    """Longer numbers in it than when the weights were parted: still two halves, each asked for once."""
    moved = {name: tensor + 1 for name, tensor in STATE.items()}
    client.push(run_name, moved, step=1234567890123)

    assert same(pull(), moved)
    assert len(transport.asked) == 2


def test_a_version_that_moves_on(client: EmaClient, pull: Pull, transport: Watched, run_name: str) -> None:
    """Between the two requests: then the whole is pulled anew, of one version."""
    moved = {name: tensor + 1 for name, tensor in STATE.items()}

    def push(etag: str | None) -> None:
        if etag:
            client.push(run_name, moved, step=1)

    transport.before = push
    out = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    weights = pull(out=out)

    assert weights.info.version == "1.1"
    assert same(out, moved)
    assert [part for part in transport.asked if part == (0, None)] == [(0, None)]


class Broken:
    """A download that breaks off after so many reads."""

    def __init__(self, download: Download, reads: int) -> None:
        self.url, self.length = download.url, download.length
        self.headers, self.status = download.headers, download.status
        self._download = download
        self._reads = reads

    def readinto(self, view: memoryview) -> None:
        if self._reads == 0:
            raise ConnectionLost("gone")
        self._reads -= 1
        self._download.readinto(view)

    def __enter__(self) -> Broken:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._download.__exit__(kind)


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_breaks_off(half: int, pull: Pull, transport: Watched) -> None:
    """Is told as that of a whole; nothing writes to the tensors afterwards, and the next pull is right."""
    broken = []

    def break_half(download: Download) -> Any:
        if download.headers["content-range"].startswith("bytes 0-") != (half == 0):
            return download
        broken.append(download)
        # The header's length and the header are read before the tensors of the first half.
        return Broken(download, 2 if half == 0 else 0)

    transport.after = break_half
    with pytest.raises(ConnectionLost):
        pull(out={name: torch.zeros_like(tensor) for name, tensor in STATE.items()})
    transport.after = lambda download: download

    assert len(broken) == 1
    assert same(pull(), STATE)


def test_tensors_that_do_not_fit(pull: Pull) -> None:
    """Are told before a byte is written, wherever in the stream they stand."""
    for wrong in ({"t39": torch.zeros(1)}, {"more": torch.zeros(1)}):
        out: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()} | wrong
        with pytest.raises(UsageError):
            pull(out=out)
        assert not any(tensor.any() for tensor in out.values())
