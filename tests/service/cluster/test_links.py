"""Links that go down and come back, between the machines of a cluster: nothing that was answered is lost, all of it is
LitEma's, bit for bit, and nobody waits for a machine that was replaced.

Needs root and iproute2; skipped where they are not. Knows links. Does not know messages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import EmaError
from ema_service.cluster.hosting.lease import ENDED
from tests.benchmarks.namespaces import Network, why_no_network
from tests.service.cluster.linked import CORE, SPARE, TRAINER, Linked
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

REASON = why_no_network()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "-"), pytest.mark.timeout(120)]

DECAY = 0.9
#: Megabits a second of each link: the model below takes 0.6 seconds, so that a link can be cut in the middle.
RATE = 100
Started = Callable[..., Linked]


def model(seed: int) -> dict[str, Tensor]:
    """Eight megabytes in 2000 rows."""
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(2000, 1000, generator=generator), "b": torch.randn(700, generator=generator)}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """Start a cluster of two hosts."""
    made: list[Linked] = []

    def start(**more: float) -> Linked:
        made.append(Linked(tmp_path, 2, rate=RATE, **more))
        return made[-1].__enter__()

    yield start
    for each in made:
        each.__exit__()


class Training:
    """A run on all hosts, and LitEma beside it."""

    def __init__(self, client: EmaClient, oracle: LitEmaOracle, durability: str = "process") -> None:
        self.client, self.oracle, self.step = client, oracle, 0
        client.create_run("r", model(0), decay=DECAY, durability=durability)
        assert client._hosts.of("r") is not None, "hosts are not reached"

    def update(self) -> float:
        """One update more, however often it has to be sent, and the seconds until it is answered."""
        self.step += 1
        pushed, began = model(self.step), time.monotonic()
        while True:
            try:
                result = self.client.push("r", pushed, step=self.step)
                break
            except EmaError as fault:
                if not fault.retryable:
                    raise
        assert result.step == self.step
        self.oracle.update(pushed)
        return time.monotonic() - began

    def check(self) -> None:
        """What is read is LitEma's, bit for bit."""
        found = self.client.pull("r")
        for name, tensor in self.oracle.shadow.items():
            assert torch.equal(found[name], tensor), name


def beside(act: Callable[[], object]) -> threading.Thread:
    """Do something on another thread, from now on."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def after(seconds: float, *acts: Callable[[], object], pause: float = 0.0) -> threading.Thread:
    """Do things one after the other, the first in so many seconds, with a pause between them."""

    def act() -> None:
        time.sleep(seconds)
        for each in acts:
            each()
            time.sleep(pause)

    return beside(act)


def told(what: str, seconds: float) -> None:
    print(f"{what}: the update was applied after {seconds:.1f} s")  # noqa: T201  # for whoever looks with -s


@pytest.mark.parametrize(
    "machine", ["host-1", *(pytest.param(each, marks=pytest.mark.soak) for each in (CORE, TRAINER))]
)
@pytest.mark.parametrize("gone", [1.0, pytest.param(7.0, marks=pytest.mark.soak)])
def test_a_link_goes_down_and_comes_back(
    started: Started, litema: type[LitEmaOracle], machine: str, gone: float
) -> None:
    """In the middle of an update: of a host, of coordinator and gateway, of the trainer whose slices are half sent. The
    update that was under way is applied, and what comes after."""
    linked = started()
    with linked.client() as client:
        training = Training(client, litema(model(0), decay=DECAY))
        training.update()
        switching = after(0.15, lambda: linked.network.cut(machine), lambda: linked.network.mend(machine), pause=gone)
        seconds = training.update()
        switching.join()
        told(f"{machine} gone for {gone:g} s", seconds)
        assert seconds < gone + 25
        training.update()
        training.check()
    assert all(process.poll() is None for process in linked.hosts.values()), "a host without a lease has ended"


@pytest.mark.soak
@pytest.mark.parametrize("straight", [True, False])
def test_a_host_is_replaced_while_its_link_is_down(
    started: Started, litema: type[LitEmaOracle], straight: bool
) -> None:
    """The host ends itself after its lease; its successor, elsewhere on the same storage, waits as long, and has all
    that was answered; the update that was under way is applied soon, for neither client nor gateway waits for the
    earlier one."""
    linked = started(lease=4.0)
    with linked.client(straight=straight) as client:
        training = Training(client, litema(model(0), decay=DECAY), "disk")
        training.update()
        dead, ended = linked.hosts[1], list[float]()
        began = time.monotonic()
        beside(lambda: (dead.wait(60), ended.append(time.monotonic())))

        def replace() -> None:
            linked.network.cut("host-1")
            time.sleep(3)  # three checks of a second each
            linked.host(1, SPARE)
            linked.ready(1)
            ready.append(time.monotonic())

        ready = list[float]()
        replacing = after(0.15, replace)
        seconds = training.update()
        replacing.join(60)
        wait_until(lambda: ended, "the end of the host that was replaced", 20)
        assert dead.poll() == ENDED
        assert ended[0] < ready[0], "two processes had one data dir"
        told(
            f"replaced; the host ended after {ended[0] - began:.1f} s, the other listened {ready[0] - began:.1f} s",
            seconds,
        )
        assert seconds <= 20
        assert began + seconds <= ready[0] + 9  # silence at the earlier one is waited for for ten
        linked.network.mend("host-1")
        training.update()
        training.check()


@pytest.mark.soak
def test_a_pull_in_the_middle(started: Started, litema: type[LitEmaOracle]) -> None:
    """A reader whose host is replaced meanwhile reads one version whole, and does not wait at the earlier one."""
    linked = started(lease=4.0)
    with linked.client() as client:
        training = Training(client, litema(model(0), decay=DECAY), "disk")
        training.update()
        training.check()

        def replace() -> None:
            linked.network.cut("host-1")
            time.sleep(3)
            linked.host(1, SPARE)

        began = time.monotonic()
        replacing = after(0.1, replace)
        while True:
            try:
                found = client.pull("r")
                break
            except EmaError as fault:
                if not fault.retryable:
                    raise
        seconds = time.monotonic() - began
        replacing.join()
        print(f"pulled after {seconds:.1f} s")  # noqa: T201  # for whoever looks with -s
        assert all(torch.equal(found[name], tensor) for name, tensor in training.oracle.shadow.items())
        assert seconds <= 25


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("iptables"), reason="iptables, which drops packets at random, is not installed")
def test_packets_are_lost(started: Started, litema: type[LitEmaOracle]) -> None:
    """One in a hundred, at every machine: slower, and the same."""
    linked = started()
    for machine in ("host-0", "host-1", CORE, TRAINER):
        linked.network.lose(machine, 0.01)
    with linked.client() as client:
        training = Training(client, litema(model(0), decay=DECAY))
        for _ in range(5):
            training.update()
            training.check()


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_links_at_random(started: Started, litema: type[LitEmaOracle]) -> None:
    """Two minutes in which any link is down for up to eight seconds, and updates go on."""
    linked, random, over = started(), Random(7), threading.Event()

    def disturb() -> None:
        while not over.wait(random.uniform(0.2, 3)):
            machine = random.choice(["host-0", "host-1", CORE, TRAINER])
            linked.network.cut(machine)
            over.wait(random.uniform(0.2, 8))
            linked.network.mend(machine)

    with linked.client() as client:
        training = Training(client, litema(model(0), decay=DECAY))
        disturbing, waited = beside(disturb), list[float]()
        while sum(waited) < 120:
            waited.append(training.update())
        over.set()
        disturbing.join()
        training.check()
    told(f"{len(waited)} updates under links that break, the slowest of them", max(waited))


def test_what_a_killed_process_left_is_removed() -> None:
    """Its namespaces go before the next network is made; those of a process that lives stay."""
    made = (
        "import time; from tests.benchmarks.namespaces import Network; Network({'m': 100}).__enter__(); print('made')"
    )
    command = [sys.executable, "-c", f"{made}; time.sleep(60)"]
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": root}) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            left = [Path(f"/run/netns/ema-{process.pid}-{name}") for name in ("m", "switch")]
            with Network({"m": None}):
                assert all(each.exists() for each in left)
        finally:
            process.kill()
    with Network({"m": None}):
        assert not any(each.exists() for each in left)
