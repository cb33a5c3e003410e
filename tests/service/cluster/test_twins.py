"""Two hosts for each shard, all of it processes: any one of them is lost with all it had, and nothing is.

LitEma is the judge: a run goes on bit for bit as LitEma does, and a host that was lost is filled from its twin, so that
the twin may be lost next.

Knows the command, and what is printed. Does not know what hosts and coordinators say to each other.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import EmaError
from tests.conftest import LitEmaOracle, ServerProcess
from tests.service.cluster.launched import Launched
from tests.waiting import settled, wait_until

DECAY = 0.9
#: Seconds within which an update is applied after a host is lost.
BOUND = 20.0


class Twins:
    """A cluster of two shards on four hosts, with a run, and LitEma beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "all"
        self.ram = folder / "ram"
        self.cluster = Launched(self.folder, "--local", "2", "--twins", "--", "--ram-dir", str(self.ram)).start()
        self.client = EmaClient(self.cluster.url)
        self.oracle = LitEmaOracle(model(0), decay=DECAY)
        self.step = 0
        self.client.create_run("r", model(0), decay=DECAY)

    def push(self, times: int = 1) -> None:
        """Push updates, each until it is applied."""
        for _ in range(times):
            self.step += 1
            self.oracle.update(model(self.step))
            until = time.monotonic() + BOUND
            while True:
                try:
                    assert self.client.push("r", model(self.step), step=self.step).step == self.step
                    break
                except EmaError:
                    assert time.monotonic() < until, self.cluster.log
            self.check()

    def check(self) -> None:
        """What is pulled is what LitEma has, bit for bit."""
        found = self.client.pull("r")
        assert found.info.step == self.step
        for name, tensor in self.oracle.shadow.items():
            assert torch.equal(found[name], tensor), name

    def lose(self, place: int) -> None:
        """SIGKILL a host, and remove all that it had on disk and in memory."""
        pid = self.cluster.processes()[f"host {place}"]
        ram = self.ram / self.nonce(place)
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(ram, ignore_errors=True)
        shutil.rmtree(self.folder / f"host-{place}", ignore_errors=True)
        wait_until(lambda: self.cluster.processes().get(f"host {place}") != pid, "the end of the host")

    def nonce(self, place: int) -> str:
        """The name of the folder of a host's memory files."""
        lines = [line for line in self.cluster.log.splitlines() if line.startswith(f"host {place} |   memory")]
        return Path(lines[-1].split("memory", 1)[1].split(",")[0].strip()).name

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
    costs no update. Snapshots are there as well."""
    twins.push(2)
    twins.client.snapshot("r", "s-1")
    before = twins.client.pull("r", snapshot="s-1")
    twins.lose_and_go_on(0)
    twins.push(2)
    twins.client.snapshot("r", "s-2", keep=1)
    then = copy.deepcopy(twins.oracle)
    twins.lose_and_go_on(2)
    twins.push(2)
    assert [each.name for each in twins.client.snapshots("r")] == ["s-2"]
    found = twins.client.pull("r", snapshot="s-2")
    assert not all(torch.equal(found[name], tensor) for name, tensor in before.items())
    twins.client.rewind("r", "s-2")
    twins.oracle = then
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


def test_parts_go_to_both_hosts(twins: Twins) -> None:
    """Of two ranks, each with half of the tensors; and an update of a run that was made while a host was away."""
    twins.lose(1)
    assert twins.first_answer(1, "r")["step"] == twins.step
    tensors = {name: torch.randn(9, 3) for name in "abcd"}
    halves = [{name: tensors[name] for name in names} for names in ("ab", "cd")]
    until = time.monotonic() + 3 * BOUND  # of a try of the client's alone half a minute, where others are busy
    while True:
        try:
            twins.client.create_run("parts", tensors, decay=DECAY, exist_ok=True)
            break
        except EmaError:
            assert time.monotonic() < until, twins.cluster.log
    for rank, half in enumerate(halves):
        twins.client.push_part("parts", half, slices={}, step=1, part=rank, of=2, group="g")
    wait_until(lambda: twins.client.update_status("parts", 1).state == "applied", "the parts")
    twins.wait_whole()
    twins.lose(3)
    wait_until(lambda: {3} == twins.left_behind(), "the loss of the twin")
    assert twins.client.pull("parts").info.step == 1


@pytest.mark.timeout(240)
def test_a_ring_is_on_both_hosts(twins: Twins) -> None:
    """A host is lost with its disk, and then its twin: what the ring gives is what it gave, of snapshots that the
    filled host has copied, and goes on."""
    twins.wait_whole()
    client = twins.client
    client.create_run("ring", model(0), posthoc={"snapshots": 4, "sigma_rel": [0.05, 0.25]})
    for step in range(1, 10):
        client.push("ring", model(step), step=step)
    settled(client, "ring")

    def worked_out() -> dict[str, Tensor]:
        until = time.monotonic() + 3 * BOUND
        while True:
            try:
                return dict(client.pull("ring", sigma_rel=0.1, max_error=1.0))
            except EmaError:
                assert time.monotonic() < until, twins.cluster.log

    before, ring = worked_out(), client.run("ring").ring
    for place in (1, 3):
        twins.lose(place)
        found = worked_out()
        assert all(torch.equal(found[name], each) for name, each in before.items())
        assert twins.first_answer(place, "ring")["step"] == 9
        twins.wait_whole()
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
