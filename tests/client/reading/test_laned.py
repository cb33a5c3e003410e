"""Large weights over several connections: the same tensors, of one version, and the same errors.

Knows a real service, and a transport that notes, disturbs or breaks its downloads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.errors import ConnectionLost, Overloaded, UsageError
from ema_client.http.downloads import Download
from ema_client.http.pace import PULLS, Paces
from ema_client.http.transport import Transport
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls
from tests.waiting import wait_until

#: Of 48 MiB: one tensor is most of it, none ends where a stretch does.
SIZES = {"a": 1_000_003, "b": 7, "c": 8_000_001, "d": 0, "e": 3_000_000, "f": 582_901}
STATE = {
    name: torch.randn(size, generator=torch.Generator().manual_seed(size)) for name, size in SIZES.items()
}  # fmt: skip
LANES = 4


class Watched(Transport):
    """A transport that notes which parts are asked for, and lets a test meddle with each download."""

    def __init__(self, url: str, *, attempts: int = 1, lanes: int | None = LANES) -> None:
        super().__init__(url, retry=RetryPolicy(attempts=attempts, base=0.01), lanes=lanes)
        self.asked: list[tuple[int, int | None]] = []
        self.threads: set[str] = set()
        self.before: Callable[[str | None], None] = lambda _etag: None
        self.after: Callable[[Download], Any] = lambda download: download

    def download(self, path: str, *, start: int = 0, stop: int | None = None, **more: Any) -> Download:
        self.before(more.get("etag"))
        self.asked.append((start, stop))
        self.threads.add(threading.current_thread().name)
        found: Download = self.after(super().download(path, start=start, stop=stop, **more))
        return found


@pytest.fixture(scope="module")
def run(server: Any) -> str:
    """A run of STATE, which no test changes."""
    with EmaClient(server.url) as made:
        made.create_run("laned", STATE, decay=0.0, use_num_updates=False)
    return "laned"


@pytest.fixture
def transport(server: Any) -> Iterator[Watched]:
    with contextlib.closing(Watched(server.url)) as made:
        yield made


@pytest.fixture
def pulls(transport: Watched) -> Pulls:
    return Pulls(transport, split_above=1 << 20, check_large=True)


def zeros(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.zeros(size, dtype=dtype) for name, size in SIZES.items()}


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("given", [False, True])
def test_stretches(pulls: Pulls, transport: Watched, run: str, given: bool) -> None:
    """Into new tensors or given ones, in the order of the stream, on the first pull and on later ones; each stretch is
    asked for once, by as many lanes as were asked for."""
    for _ in range(2):
        transport.asked.clear()
        transport.threads.clear()
        out = zeros() if given else None
        weights = pulls.pull(Asked(run), out)

        assert same(weights, STATE)
        assert weights.info.version == "1.0"
        assert out is None or same(out, STATE)
        parts = sorted((start, stop or 0) for start, stop in transport.asked)
        assert all(0 <= one[1] - other[0] < 2 << 20 for one, other in pairwise(parts[:2]))
        assert all(one[1] == other[0] for one, other in pairwise(parts[1:]))
    assert 2 <= len(transport.threads) <= LANES


def test_lanes_that_are_alike(server: Any, run: str) -> None:
    """Lanes that want all processors of the one host bring an even part each, by a request each; a single lane brings
    all by one."""
    with contextlib.closing(Watched(server.url, lanes=None)) as transport:
        width = Paces.of(transport.url, same_host=True)._widths[PULLS]
        pulls = Pulls(transport, split_above=1 << 20, check_large=False)
        pulls.pull(Asked(run))
        for crowded in (True, False):
            transport.asked.clear()
            lanes: list[int] = []  # as a pull begins with: other lanes may be tried as it ends
            transport.before = lambda _, lanes=lanes: lanes.append(width.lanes)
            width.crowded = crowded
            assert same(pulls.pull(Asked(run)), STATE)
            # Without that, stretches follow the lanes' rates.
            assert (len(transport.asked) == lanes[0]) == crowded
    with contextlib.closing(Watched(server.url, lanes=1)) as transport:
        pulls = Pulls(transport, split_above=1 << 20, check_large=False)
        pulls.pull(Asked(run))
        transport.asked.clear()
        assert same(pulls.pull(Asked(run)), STATE)
        assert len(transport.asked) == 1


def test_tensors_that_are_not_received_in_place(pulls: Pulls, run: str) -> None:
    """What is cast, what lies apart in memory, and a parameter of a model, whichever lane brings it."""
    out = zeros(torch.float64)
    out["c"] = torch.zeros(2 * SIZES["c"])[::2]
    out["e"] = torch.nn.Parameter(torch.zeros(SIZES["e"], dtype=torch.bfloat16))
    version = out["e"]._version
    pulls.pull(Asked(run), out)

    assert all(torch.equal(out[name], tensor.to(out[name].dtype)) for name, tensor in STATE.items())
    assert out["e"]._version > version


def test_small_weights_are_one_request(transport: Watched, run: str) -> None:
    """On the calling thread, also when they are asked for again."""
    pulls = Pulls(transport)
    for _ in range(2):
        assert same(pulls.pull(Asked(run, prefix="a")), {"a": STATE["a"]})

    assert len(transport.asked) == 2
    assert transport.threads == {threading.current_thread().name}


def test_a_header_that_grew(server: Any, pulls: Pulls, run_name: str) -> None:
    """Longer numbers in it than at the latest pull, or another layout under the same name: all is right again."""
    with EmaClient(server.url) as client:
        client.create_run(run_name, STATE, decay=0.0, use_num_updates=False)
        pulls.pull(Asked(run_name))
        client.push(run_name, {name: tensor + 1 for name, tensor in STATE.items()}, step=1234567890123)
        assert torch.equal(pulls.pull(Asked(run_name))["c"], STATE["c"] + 1)
        client.delete_run(run_name)
        many = {"c": STATE["c"]} | {f"many.{i}": torch.ones(1) for i in range(1000)}
        client.create_run(run_name, many)
    assert len(pulls.pull(Asked(run_name))) == 1001


def test_updates_meanwhile(server: Any, pulls: Pulls, transport: Watched, run_name: str) -> None:
    """Stretches of a version that is being read are there though the run has moved on, and the whole is one version: so
    it is where each stretch is asked for within a second of the one before."""
    with EmaClient(server.url) as client:
        client.create_run(run_name, STATE, decay=0.0, use_num_updates=False)
        pulls.pull(Asked(run_name))
        ones = {name: torch.ones_like(tensor) for name, tensor in STATE.items()}
        steps, lock, waiting = iter(range(1, 100_000)), threading.Lock(), [0]

        def push(etag: str | None) -> None:
            """Two updates, so that the run has no version left of those that it had; more would make stretches late."""
            with lock:
                if etag and waiting[0]:
                    waiting[0] -= 1
                    client.push(run_name, ones, step=next(steps))

        def is_as_it_began() -> bool:
            transport.before = lambda _: None
            client.push(run_name, STATE, step=next(steps))
            version = client.run(run_name).version
            transport.before, waiting[0] = push, 2
            transport.asked.clear()
            weights = pulls.pull(Asked(run_name))
            assert client.run(run_name).version != version
            return weights.info.version == version and same(weights, STATE)

        wait_until(is_as_it_began, "a pull of the version that it began with")

    assert len(transport.asked) > 2
    assert len([part for part in transport.asked if part[0] == 0]) == 1


class Broken:
    """A download that does something before its read number ``reads``."""

    def __init__(self, download: Download, reads: int, then: Callable[[], None]) -> None:
        self.url, self.length = download.url, download.length
        self.headers, self.status = download.headers, download.status
        self._download = download
        self._reads = reads
        self._then = then

    def readinto(self, view: memoryview) -> None:
        if self._reads == 0:
            self._then()
        self._reads -= 1
        self._download.readinto(view)

    def drain(self) -> None:
        self._download.drain()

    def hand_over(self) -> None:
        self._download.hand_over()

    def __enter__(self) -> Broken:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._download.__exit__(kind)


def gone() -> None:
    raise ConnectionLost("gone")


@pytest.mark.parametrize("which", ["first", "other"])
def test_a_lane_that_breaks_off(which: str, pulls: Pulls, transport: Watched, run: str) -> None:
    """Its stretch is fetched again alone: one try, and one request more."""
    broken = []

    def break_one(download: Download) -> Any:
        first = download.headers["content-range"].startswith("bytes 0-")
        if broken or first != (which == "first"):
            return download
        broken.append(download)
        # The header's length and the header are read before the tensors of the first stretch.
        return Broken(download, 4, gone)

    pulls.pull(Asked(run))
    whole = len(transport.asked)
    transport.asked.clear()
    transport.after = break_one
    seen: list[int] = []
    assert same(pulls.pull(Asked(run), progress=lambda come, _: seen.append(come)), STATE)

    assert len(broken) == 1
    assert len(transport.asked) <= whole + 3
    assert max(seen) == seen[-1] == 4 * sum(SIZES.values())


def test_lanes_that_are_refused(pulls: Pulls, transport: Watched, run: str) -> None:
    """A service that takes no more connections: the lanes that are left carry everything."""

    def refuse(etag: str | None) -> None:
        if etag and threading.current_thread() is not threading.main_thread():
            raise Overloaded("no more", retry_after=0.01)

    transport.before = refuse
    assert same(pulls.pull(Asked(run)), STATE)


def test_all_lanes_break(server: Any, run: str) -> None:
    """The error of a whole; the next try goes on with what has come, and nothing writes to the tensors in between."""
    with contextlib.closing(Watched(server.url, attempts=2)) as transport:
        pulls = Pulls(transport, split_above=1 << 20)
        weights = pulls.pull(Asked(run))
        transport.asked.clear()
        broken: list[int] = []

        def refuse(etag: str | None) -> None:
            if etag and len(broken) < 2 * LANES:
                broken.append(1)
                gone()

        transport.before = refuse
        out = zeros()
        assert same(pulls.pull(Asked(run), out), weights)
        assert len([part for part in transport.asked if part[0] == 0]) == 1

        transport.before = lambda etag: gone() if etag else None
        with pytest.raises(ConnectionLost, match="gone"):
            pulls.pull(Asked(run), zeros())


def test_a_version_that_is_gone(server: Any, pulls: Pulls, transport: Watched, run_name: str) -> None:
    """A service that answers with another version, as one that does not keep versions: the whole is read anew."""
    moved = {name: tensor + 1 for name, tensor in STATE.items()}
    with EmaClient(server.url) as client:
        client.create_run(run_name, STATE, decay=0.0, use_num_updates=False)
        pulls.pull(Asked(run_name))
        pushed: list[int] = []

        def other_version(download: Download) -> Any:
            if not pushed and not download.headers["content-range"].startswith("bytes 0-"):
                pushed.append(1)
                client.push(run_name, moved, step=1)
                download.status = 200
            return download

        transport.after = other_version
        weights = pulls.pull(Asked(run_name))
    assert (weights.info.version, same(weights, moved)) == ("1.1", True)


def test_ctrl_c(pulls: Pulls, transport: Watched, run: str) -> None:
    """No lane is at work any more when the call ends."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    pulls.pull(Asked(run))
    transport.after = lambda download: (
        Broken(download, 4, interrupt)
        if download.headers["content-range"].startswith("bytes 0-")
        else Broken(download, 4, lambda: time.sleep(0.2))
    )
    with pytest.raises(KeyboardInterrupt):
        pulls.pull(Asked(run))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ema lane")]


def test_tensors_that_do_not_fit(pulls: Pulls, run: str) -> None:
    """Are told before a byte is written, wherever in the stream they stand."""
    for wrong in ({"f": torch.zeros(1)}, {"more": torch.zeros(1)}):
        out: dict[str, Tensor] = zeros() | wrong
        with pytest.raises(UsageError):
            pulls.pull(Asked(run), out)
        assert not any(tensor.any() for tensor in out.values())
