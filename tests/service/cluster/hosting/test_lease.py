"""Hosts that nobody hears, or that were replaced, end themselves: no data dir has two writers, and what was
acknowledged is LitEma's, bit for bit. SIGSTOP plays a link that is gone, and SIGCONT a host that comes back from the
dead.

Knows processes, their signals, and plain HTTP. Does not know messages.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from safetensors.torch import save
from torch import Tensor

from ema_service.cluster.hosting.lease import ENDED, Lease
from tests.conftest import ServerProcess
from tests.service.cluster.servers import Servers, cut
from tests.service.cluster.test_servers import assert_same
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]

_UNLOCKED = str(Path(__file__).parents[1] / "processes" / "unlocked.py")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Servers]:
    """Two hosts with leases of two seconds, which have not been started."""
    made = Servers(tmp_path, 2, "--lease=2")
    yield made
    made.end()


class Training:
    """A run on all hosts, and LitEma beside it."""

    def __init__(self, servers: Servers, model: Model, oracle: LitEmaOracle) -> None:
        self.servers, self.model, self.oracle, self.step = servers, model, oracle, 0
        servers.create(model(0), durability="disk")
        servers.push("weights", model(0), "k0")

    def go_on(self) -> None:
        """One update more, and a look at everything."""
        self.step += 1
        self.servers.push(f"updates/{self.step}", self.model(self.step), f"k{self.step}")
        self.oracle.update(self.model(self.step))
        assert_same(self.servers, self.oracle)


@pytest.fixture
def training(model: Model, litema: type[LitEmaOracle]) -> Callable[[Servers], Training]:
    """Begin a training on hosts that run."""
    return lambda servers: Training(servers, model, litema(model(0), decay=0.9999))


# --- the clock -------------------------------------------------------------------------------------------------------


def ended(lease: Callable[..., Lease], seconds: float) -> list[int]:
    """With which status a lease ended its process within so many seconds."""
    statuses, told = list[int](), threading.Event()

    def end(status: int) -> None:
        statuses.append(status)
        told.set()

    made = lease(end)
    made.start()
    told.wait(seconds)
    made.close()
    return statuses


def test_silence_ends_a_host() -> None:
    """After the lease, counted from the start where nobody was heard since."""
    began = time.monotonic()
    assert ended(lambda end: Lease(0.3, lambda: began - 100, str, end), 10) == [ENDED]
    assert time.monotonic() - began >= 0.3


def test_a_word_now_and_then_keeps_a_host() -> None:
    """Whoever is heard within the lease goes on, and so does a host without a lease that hears nobody."""
    assert ended(lambda end: Lease(0.3, time.monotonic, str, end), 1) == []
    assert ended(lambda end: Lease(None, lambda: 0.0, str, end), 1) == []


def test_who_was_replaced_ends() -> None:
    """Although the host is heard, and without a lease too."""
    assert ended(lambda end: Lease(None, time.monotonic, lambda: "by another", end), 10) == [ENDED]


def test_storage_that_is_away_keeps_no_host() -> None:
    """A look at it never ends, and the host, which nobody hears either, ends all the same."""
    over = threading.Event()

    def look() -> str:
        over.wait(60)
        return ""

    assert ended(lambda end: Lease(0.3, lambda: 0.0, look, end), 10) == [ENDED]
    over.set()


# --- hosts that are cut off ------------------------------------------------------------------------------------------


def test_a_host_without_a_word_ends(cluster: Servers, training: Callable[[Servers], Training]) -> None:
    """Both do, as both hear one coordinator alone; started again, they go on where they were."""
    run = training(cluster.start())
    run.go_on()
    cluster.coordinators._coordinator.send_signal(signal.SIGSTOP)
    for place in range(2):
        cluster.wait_for_end(place)
        assert cluster.hosts[place].process.poll() == ENDED
        assert "heard neither a coordinator nor what started it" in cluster.hosts[place].log
    cluster.coordinators._coordinator.send_signal(signal.SIGCONT)
    for place in range(2):
        cluster.host(place)
    run.go_on()


def test_a_word_of_what_started_the_host_keeps_it(cluster: Servers, tmp_path: Path) -> None:
    """A coordinator that is away ends no host whose engine is there; the engine's silence then does."""
    cluster.coordinate()
    token = f"--cluster-token-file={cluster.token_file}"
    flags = ["--shard=0/2", token, f"--coordinator=http://127.0.0.1:{cluster.coordinators.ports[0]}", "--lease=2"]
    words = ["-m", "ema_service.tether", "ema_service", "serve", "--port=0", f"--data-dir={tmp_path / 'data'}", *flags]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=log, stderr=log) as host,
    ):
        assert host.stdin is not None
        said = time.monotonic()
        cluster.coordinators.kill_coordinator()
        while time.monotonic() < said + 8 or "listens on" not in (tmp_path / "log").read_text():
            os.write(host.stdin.fileno(), b"\n")
            assert host.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        assert host.wait(30) == ENDED


# --- hosts that come back from the dead ------------------------------------------------------------------------------


def test_the_coordinator_hears_the_latest_process_alone(
    cluster: Servers, training: Callable[[Servers], Training]
) -> None:
    """A host that was taken for dead, and started elsewhere on its data, is told so when it comes back, and ends."""
    run = training(cluster.start())
    run.go_on()
    dead = cluster.hosts[0]
    dead.process.send_signal(signal.SIGSTOP)
    try:
        elsewhere = cluster.folder / "elsewhere"
        assert dead.data_dir is not None
        shutil.copytree(dead.data_dir, elsewhere)
        cluster.hosts[0] = _server(cluster, elsewhere)
        run.go_on()
        dead.process.send_signal(signal.SIGCONT)
        wait_until(lambda: dead.process.poll() is not None, "the end of who was replaced")
        assert dead.process.poll() == ENDED
        run.go_on()
    finally:
        dead.kill()


def test_a_later_server_of_the_data_dir_ends_the_earlier(
    cluster: Servers, training: Callable[[Servers], Training]
) -> None:
    """Where locks keep nobody out, as on a network's file system that is mounted so: one of the two writes."""
    cluster.start()
    cluster.kill(0)
    data = cluster.folder / "host-0" / "data"
    cluster.hosts[0] = dead = _server(cluster, data, _UNLOCKED)
    run = training(cluster)
    run.go_on()
    dead.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        cluster.hosts[0] = _server(cluster, data, _UNLOCKED)
        assert time.monotonic() - began >= 2  # for as long as a lease the earlier one may not have noticed
        cluster.coordinators.kill_coordinator()  # nobody but the data dir tells
        dead.process.send_signal(signal.SIGCONT)
        wait_until(lambda: dead.process.poll() is not None, "the end of who was replaced")
        assert dead.process.poll() == ENDED
        cluster.coordinate()
        run.go_on()
    finally:
        dead.kill()


@pytest.mark.parametrize("program", [pytest.param((_UNLOCKED,), marks=pytest.mark.soak), (_UNLOCKED, "starved")])
def test_who_wakes_up_writes_nothing(
    cluster: Servers, training: Callable[[Servers], Training], program: tuple[str, ...]
) -> None:
    """A host that stood still while another one was started on its data dir finds slices that came meanwhile: none of
    their bytes is written, nor a row, although no lock keeps the host out and no coordinator tells it; also where its
    own end is late."""
    cluster.start()
    cluster.kill(0)
    data = cluster.folder / "host-0" / "data"
    cluster.hosts[0] = dead = _server(cluster, data, *program)
    run = training(cluster)
    run.go_on()
    dead.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(4) as threads:
            body = save(cut(run.model(2), 2)[0])
            key = {"headers": {"Ema-Push": "late"}, "timeout": 60}
            late = [threads.submit(httpx.put, f"{dead.url}/v1/runs/r/updates/2", content=body, **key) for _ in range(4)]
            cluster.hosts[0] = _server(cluster, data, _UNLOCKED)
            cluster.coordinators.kill_coordinator()
            before = _written(data)
            dead.process.send_signal(signal.SIGCONT)
            if len(program) > 1:
                assert all("a later server has the data dir" in each.result(60).text for each in late)
                dead.kill()
            wait_until(lambda: dead.process.poll() is not None, "the end of who was replaced")
            assert _written(data) == before
        cluster.coordinate()
        if cluster.hosts[0].process.poll() is not None:  # a busy machine took longer than the lease
            cluster.hosts[0] = _server(cluster, data, _UNLOCKED)
        if cluster.hosts[1].process.poll() is not None:
            cluster.host(1)
        run.go_on()
    finally:
        dead.kill()


def test_who_goes_on_is_left_alone(cluster: Servers, training: Callable[[Servers], Training]) -> None:
    """Two launchers, on machines whose locks do not see each other, start one host: the second is told so, again and
    again, and updates go on at the first."""
    cluster.start()
    cluster.kill(0)
    data = cluster.folder / "host-0" / "data"
    cluster.hosts[0] = first = _server(cluster, data, _UNLOCKED)
    run = training(cluster)
    run.go_on()
    with pytest.raises(RuntimeError, match="another server uses the data dir"):
        _server(cluster, data, _UNLOCKED)
    run.go_on()
    assert first.process.poll() is None


def _written(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files under a folder but the lock, with when each was written last, and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes()) for path in files}


def _server(cluster: Servers, data: Path, *program: str) -> ServerProcess:
    """Host 0 with a data dir, as another process."""
    folder = cluster.folder / f"again-{len(list(cluster.folder.iterdir()))}"
    folder.mkdir()
    port = cluster.coordinators.ports[0]
    flags = ("--shard=0/2", f"--cluster-token-file={cluster.token_file}", f"--coordinator=http://127.0.0.1:{port}")
    made = ServerProcess(folder, (*flags, "--lease=2"), data, program or ("-m", "ema_service"))
    return made.start()
