"""Two hosts for each shard, all of it processes: any one of them is lost with all it had, and nothing is.

LitEma is the judge: a run goes on bit for bit as LitEma does, and a host that was lost is filled from its twin, so that
the twin may be lost next.

Knows the command, and what is printed. Does not know what hosts and coordinators say to each other.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import httpx
import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import AverageNotFound, EmaError
from ema_client.protocol import Durability
from tests.conftest import LitEmaOracle, ServerProcess
from tests.service.cluster.launched import Launched
from tests.waiting import settled, wait_until

T = TypeVar("T")

DECAY = 0.9
#: Seconds within which an update is applied after a host is lost.
BOUND = 20.0


class Twins:
    """A cluster of some shards, each on two hosts, with a run, and LitEma beside it."""

    def __init__(self, folder: Path, shards: int = 2) -> None:
        self.folder = folder / "all"
        self.ram = folder / "ram"
        flags = ["--local", str(shards), "--twins", "--", "--ram-dir", str(self.ram)]
        self.cluster = Launched(self.folder, *flags).start()
        self.client = EmaClient(self.cluster.url)
        self.oracle = LitEmaOracle(model(0), decay=DECAY)
        self.step = 0
        self.bound = BOUND
        self.client.create_run("r", model(0), decay=DECAY)

    def push(self, times: int = 1) -> None:
        """Push updates, each until it is applied."""
        for _ in range(times):
            self.step += 1
            self.oracle.update(model(self.step))
            applied = self.again(lambda: self.client.push("r", model(self.step), step=self.step), self.bound)
            assert applied.step == self.step
            self.check()

    def again(self, act: Callable[[], T], seconds: float = 3 * BOUND) -> T:
        """What a call of the client returns, made again while hosts are away."""
        until = time.monotonic() + seconds
        while True:
            try:
                return act()
            except EmaError as fault:
                if not fault.retryable:
                    raise
            assert time.monotonic() < until, self.cluster.log
            time.sleep(0.1)

    def check(self) -> None:
        """What is pulled is what LitEma has, bit for bit."""
        found = self.client.pull("r")
        assert found.info.step == self.step
        for name, tensor in self.oracle.shadow.items():
            assert torch.equal(found[name], tensor), name

    def lose(self, *places: int) -> None:
        """SIGKILL a host, or some at once, and remove all that it had on disk and in memory."""
        pids = {f"host {place}": self.cluster.processes()[f"host {place}"] for place in places}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        for place in places:
            shutil.rmtree(self.ram / self.nonce(place), ignore_errors=True)
            shutil.rmtree(self.folder / f"host-{place}", ignore_errors=True)
        wait_until(lambda: not pids.items() & self.cluster.processes().items(), "the end of the hosts")

    def nonce(self, place: int) -> str:
        """The name of the folder of a host's memory files."""
        lines = [line for line in self.cluster.log.splitlines() if line.startswith(f"host {place} |   memory")]
        return Path(lines[-1].split("memory", 1)[1].split(",")[0].strip()).name

    def addresses(self, place: int) -> list[str]:
        """Where a host has listened, the latest last."""
        return re.findall(rf"host {place} \| .*listens on (\S+)", self.cluster.log)

    def hosts(self) -> list[dict[str, Any]]:
        """What the page of hosts says, once its gateway is there, which may just have been killed."""
        until = time.monotonic() + BOUND
        while True:
            try:
                with self.cluster.http() as http:
                    return http.get("/v1/hosts").raise_for_status().json()["hosts"]
            except httpx.TransportError:
                assert time.monotonic() < until, self.cluster.log
                time.sleep(0.1)

    def left_behind(self) -> set[int]:
        """The hosts that are said to be left behind."""
        return {each["place"] for each in self.hosts() if "left behind" in (each["fault"] or "")}

    def first_answer(self, place: int, run: str) -> dict[str, Any]:
        """What a host says of a run, asked by itself, once it says anything: it has to be filled first."""
        until = time.monotonic() + 3 * BOUND
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                found = httpx.get(f"{self.hosts()[place]['address']}/v1/runs/{run}")
                assert found.status_code in (200, 503), found.text
                if found.status_code == 200:
                    return found.json()
            time.sleep(0.02)
        pytest.fail(self.cluster.log)

    def wait_whole(self) -> None:
        """Wait until each shard lies on two hosts again."""
        wait_until(lambda: all(each["server"] and not each["fault"] for each in self.hosts()), "all hosts", 60.0)

    def lose_and_go_on(self, place: int) -> None:
        """A host is lost; the others go on within the bound, and it is filled."""
        told = self.cluster.log.count(f"host {place} has its shard again")
        self.lose(place)
        began = time.monotonic()
        self.push()
        assert time.monotonic() - began < BOUND
        assert f"goes on without host {place}" in self.cluster.log
        again = f"host {place} has its shard again"
        wait_until(lambda: self.cluster.log.count(again) >= told + 2, "both talks to have the host", 60.0)
        self.wait_whole()


class Averages:
    """A run whose averages come and go, and LitEma beside each of them."""

    def __init__(self, twins: Twins, run: str, durability: Durability) -> None:
        self.twins, self.run, self.step = twins, run, 0
        self.oracles: dict[str, LitEmaOracle | None] = {"ema": LitEmaOracle(model(0), decay=DECAY)}
        twins.again(lambda: twins.client.create_run(run, model(0), decay=DECAY, durability=durability, exist_ok=True))

    def add(self, name: str) -> None:
        """One more average, which begins with the next update."""
        self.twins.again(lambda: self.twins.client.add_average(self.run, name, decay=0.5))
        self.oracles[name] = None

    def remove(self, name: str) -> None:
        """One average less."""

        def remove() -> None:
            with contextlib.suppress(AverageNotFound):  # a try before this one may have done it
                self.twins.client.remove_average(self.run, name)

        self.twins.again(remove)
        del self.oracles[name]

    def push(self) -> None:
        """An update, and a look at all averages."""
        self.step += 1
        self.twins.again(lambda: self.twins.client.push(self.run, model(self.step), step=self.step))
        for name, oracle in self.oracles.items():
            if oracle:
                oracle.update(model(self.step))
            else:
                self.oracles[name] = LitEmaOracle(model(self.step), decay=0.5)
        self.check()

    def check(self) -> None:
        """Each average that the run is to have is what LitEma has, bit for bit."""
        told = self.twins.again(lambda: self.twins.client.run(self.run))
        assert [each.name for each in told.averages] == list(self.oracles)
        for name, oracle in self.oracles.items():
            found = self.twins.again(lambda name=name: self.twins.client.pull(self.run, average=name))
            assert oracle
            assert all(torch.equal(found[each], tensor) for each, tensor in oracle.shadow.items()), name


def model(seed: int) -> dict[str, Tensor]:
    """Parameters whose rows lie on both shards."""
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(40, 8, generator=generator), "v": torch.randn(90, generator=generator)}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    """One cluster, of which each test leaves all hosts in step, or is the last one."""
    found = Twins(tmp_path_factory.mktemp("twins"))
    yield found
    found.client.close()
    found.cluster.end()


@pytest.mark.timeout(120)
def test_any_host_is_lost(twins: Twins) -> None:
    """The first host, then its twin, which has everything from that one's successor by then; each loss is told, and
    costs no update. Snapshots are there as well, and of another run, each of whose versions is on disk, the averages
    that came and went."""
    twins.push(2)
    other = Averages(twins, "averages", "disk")
    other.add("long")
    other.push()
    twins.client.snapshot("r", "s-1")
    before = twins.client.pull("r", snapshot="s-1")
    twins.lose_and_go_on(0)
    twins.push(2)
    twins.client.snapshot("r", "s-2", keep=1)
    then = copy.deepcopy(twins.oracle)
    other.remove("ema")
    other.add("late")
    other.push()
    twins.lose_and_go_on(2)
    other.push()
    twins.client.delete_run(other.run)
    twins.push(2)
    assert [each.name for each in twins.client.snapshots("r")] == ["s-2"]
    found = twins.client.pull("r", snapshot="s-2")
    assert not all(torch.equal(found[name], tensor) for name, tensor in before.items())
    twins.client.rewind("r", "s-2")
    twins.oracle = then
    twins.push()


@pytest.mark.timeout(120)
def test_a_host_is_ready_once_it_is_filled(twins: Twins) -> None:
    """Not when it hears a coordinator: whoever goes by readiness would take down its twin next, which stands still here
    and lends nothing meanwhile."""
    twin = twins.cluster.processes()["host 3"]
    os.kill(twin, signal.SIGSTOP)
    try:
        before = twins.addresses(1)
        twins.lose(1)
        wait_until(lambda: len(twins.addresses(1)) > len(before), "the host to listen", 60.0)
        address = twins.addresses(1)[-1]
        wait_until(lambda: "does not count yet" in httpx.get(f"{address}/readyz").text, "the reason", 60.0)
        assert httpx.get(f"{address}/readyz").status_code == 503
    finally:
        os.kill(twin, signal.SIGCONT)
    wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200, "the host to be filled", 60.0)
    twins.push()


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_random_losses_while_averages_come_and_go(twins: Twins) -> None:
    """For two minutes a host is killed, or lost, at any moment of a change, once all of them are in step."""
    random, until = Random(11), time.monotonic() + 120.0
    run = Averages(twins, "random", random.choice(["process", "disk"]))
    names = (f"a{number}" for number in range(1 << 20))
    run.push()
    while time.monotonic() < until:
        twins.wait_whole()
        place = random.randrange(4)
        hit = random.choice(
            [lambda place=place: twins.lose(place), lambda place=place: twins.cluster.kill(f"host {place}", wait=False)]
        )
        timer = threading.Timer(random.uniform(0.0, 0.05), hit)
        timer.start()
        for _ in range(random.randrange(1, 4)):
            if len(run.oracles) > 1 and random.random() < 0.5:
                run.remove(random.choice(list(run.oracles)))
            else:
                run.add(next(names))
            run.push()
        timer.join()
    twins.wait_whole()
    run.push()
    twins.client.delete_run(run.run)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_all_hosts_are_ready_after_the_power_of_all(twins: Twins) -> None:
    """Each of them lost its memory, and none has a twin to be filled from: they go back together, and none waits for
    another one's readiness."""
    twins.push()
    pids = [twins.cluster.processes()[f"host {place}"] for place in range(4)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(twins.ram)
    wait_until(lambda: not set(pids) & set(twins.cluster.processes().values()), "the end of all hosts")
    wait_until(lambda: httpx.get(f"{twins.cluster.url}/readyz", timeout=60).status_code == 200, "all hosts", 60.0)
    assert twins.client.run("r").status in ("ready", "awaiting_weights")
    twins.client.delete_run("r")
    twins.client.create_run("r", model(0), decay=DECAY)
    twins.oracle, twins.step = LitEmaOracle(model(0), decay=DECAY), 0
    twins.wait_whole()  # two that lost what they had are filled: of the others none may be lost before
    twins.push()


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_host_that_stands_still_is_left_behind(twins: Twins) -> None:
    """It keeps its connections and says nothing; once it goes on it has missed updates, and copies them. The
    coordinator is killed meanwhile: the next one learns from the others who counts."""
    twins.push()
    stopped = twins.cluster.processes()["host 3"]
    os.kill(stopped, signal.SIGSTOP)
    try:
        began = time.monotonic()
        twins.push()
        assert time.monotonic() - began < BOUND
        twins.cluster.kill("coordinator")
        twins.push(2)
        assert twins.left_behind() == {3}
    finally:
        os.kill(stopped, signal.SIGCONT)
    twins.wait_whole()
    twins.lose_and_go_on(1)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_two_hosts_of_one_machine_are_lost(tmp_path: Path) -> None:
    """Of three shards, with all that they had; and then two others stand still, with the coordinator gone as well, so
    that the next one hears neither."""
    three = Twins(tmp_path, shards=3)
    try:
        three.push(2)
        three.lose(0, 4)
        three.push(2)
        three.wait_whole()
        stopped = [three.cluster.processes()[f"host {place}"] for place in (3, 1)]
        for each in stopped:
            os.kill(each, signal.SIGSTOP)
        try:
            three.cluster.kill("coordinator")
            three.bound = 120.0  # a coordinator waits a minute for hosts that it never heard
            three.push(2)
            assert three.left_behind() == {3, 1}
        finally:
            for each in stopped:
                os.kill(each, signal.SIGCONT)
        three.wait_whole()
        three.push()
    finally:
        three.client.close()
        three.cluster.end()


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_random_losses(twins: Twins) -> None:
    """For two minutes any host is lost at any moment, once all of them are in step, and others are killed meanwhile."""
    random, until = Random(7), time.monotonic() + 120.0
    while time.monotonic() < until:
        twins.push(random.randrange(1, 20))
        place = random.randrange(4)
        if random.random() < 0.5:
            twins.cluster.kill(random.choice(["coordinator", f"host {random.randrange(4)}"]), wait=False)
            twins.push()
            twins.wait_whole()
        twins.lose(place)
        twins.push(3)
        twins.wait_whole()
        twins.push()


@pytest.mark.soak
def test_parts_go_to_both_hosts(twins: Twins) -> None:
    """Of two ranks, each with half of the tensors, at a run that was made while a host was away: where the host is
    filled after a part came, it lacks that, and the rank sends what is not there any more. Then its twin is lost."""
    twins.push()
    twins.lose(1)
    assert twins.first_answer(1, "r")["step"] == twins.step
    client, tensors = twins.client, {name: torch.randn(9, 3) for name in "abcd"}
    halves = [{name: tensors[name] for name in names} for names in ("ab", "cd")]
    twins.again(lambda: client.create_run("parts", tensors, decay=DECAY, exist_ok=True))

    def applied() -> bool:
        status = twins.again(lambda: client.update_status("parts", 1))
        for rank in {0, 1} - {*status.parts} if status.state != "applied" else ():
            part = partial(client.push_part, "parts", halves[rank], slices={}, step=1, part=rank, of=2, group="g")
            twins.again(part)
        return status.state == "applied"

    wait_until(applied, "the parts", 3 * BOUND)
    twins.wait_whole()
    twins.lose(3)
    assert twins.again(lambda: client.pull("parts")).info.step == 1


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_a_ring_is_on_both_hosts(twins: Twins) -> None:
    """A host is lost with its disk, and then its twin: what the ring gives is what it gave, of snapshots that the
    filled host has copied, and goes on; so of what was worked out and kept as a snapshot, by both hosts."""
    twins.wait_whole()
    client = twins.client
    client.create_run("ring", model(0), posthoc={"snapshots": 4, "sigma_rel": [0.05, 0.25]})
    for step in range(1, 10):
        client.push("ring", model(step), step=step)
    settled(client, "ring")

    def worked_out() -> dict[str, Tensor]:
        return twins.again(lambda: dict(client.pull("ring", sigma_rel=0.1, max_error=1.0)))

    before, ring = worked_out(), client.run("ring").ring
    client.snapshot("ring", "kept", sigma_rel=0.1, max_error=1.0)
    for place in (1, 3):
        twins.lose(place)
        found = worked_out()
        assert all(torch.equal(found[name], each) for name, each in before.items())
        assert twins.first_answer(place, "ring")["step"] == 9
        twins.wait_whole()
        kept = client.pull("ring", snapshot="kept")
        assert all(torch.equal(kept[name], each) for name, each in before.items())
    assert ring
    assert client.run("ring").ring == ring
    client.push("ring", model(10), step=12)
    settled(client, "ring")
    after = client.run("ring").ring
    assert after
    assert (after.times[-1], after.trouble) == (10, None)


@pytest.mark.parametrize("twin", [True, False])
def test_an_empty_host_does_not_say_that_there_is_no_run(
    twin: bool, tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    """Of twins a host may have lost what it had: before it was told which runs there are it says so, for a trainer that
    hears of no run ends. A host without a twin has its runs, or they are nowhere."""
    token = tmp_path / "token"
    token.write_text("a-token-of-the-tests\n")
    nowhere = ["--coordinator", "http://127.0.0.1:1", "--cluster-token-file", str(token)]
    server = start_server("--shard", "0/4", *(["--twins"] if twin else []), *nowhere)
    with server.http() as http:
        found = [http.get(path) for path in ("/v1/runs/r", "/v1/runs/r/weights", "/v1/runs")]
    assert [each.status_code for each in found] == ([503, 503, 503] if twin else [404, 404, 200])
    assert all(each.json()["code"] == "overloaded" for each in found if twin)
