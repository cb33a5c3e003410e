"""The places of a cluster as an engine runs them, with a test for the engine: its words, its silence, and a coordinator
that comes back elsewhere.

Knows processes, and what a server promises. Does not know Ray (test_on_ray).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import ReadOnlyReplica
from ema_service.cluster.launching.agent import Agent, Task
from ema_service.cluster.launching.launcher import Tls
from tests.conftest import Certificate, LitEmaOracle
from tests.service.cluster.test_launched import assert_is, patient
from tests.waiting import wait_until

Model = Callable[[int], dict[str, Tensor]]

TOKEN = "a-token-of-the-tests"
DECAY = 0.9


class Engine:
    """Runs agents in this process, whose programs are processes of their own, and says a word a moment to each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.silent = folder, list[str](), set[int]()
        self.coordinator: Agent | None = None
        self.tls: Tls | None = None
        self.hosts: dict[int, Agent] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()

    def start(self, place: int | None, of: int = 2, *flags: str) -> Agent:
        task = Task(place, of, self.folder, TOKEN, "127.0.0.1", 0, flags, 3.0, self.tls)
        agent = Agent(task, "127.0.0.1", self.lines.append)
        agent.start()
        if place is None:
            self.coordinator = agent
        else:
            self.hosts[place] = agent
        return agent

    def all_ready(self) -> bool:
        return all(agent.state().ready for agent in self.hosts.values())

    def pid(self, place: int) -> int:
        """The process of a host: it alone has this data dir on its command line."""
        data = str(self.folder / f"host-{place}")
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = entry.read_text().split("\0")
                if "--data-dir" in words and words[words.index("--data-dir") + 1] == data:
                    return int(entry.parent.name)
        return 0

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        for agent in self.hosts.values():
            agent.end()
        if self.coordinator:
            self.coordinator.end()

    def _speak(self) -> None:
        while not self._ended.wait(0.2):
            if self.coordinator:
                self.coordinator.word()
            url = self.coordinator.url if self.coordinator else None
            for place, agent in list(self.hosts.items()):
                if place not in self.silent:
                    agent.word(url)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(tmp_path / "cluster")
    yield made
    made.end()


def ready(engine: Engine) -> None:
    """Wait until all hosts take requests."""
    wait_until(engine.all_ready, "the cluster to be ready")


def test_a_coordinator_elsewhere_is_found(engine: Engine, model: Model, litema: type[LitEmaOracle]) -> None:
    """Hosts and gateway read where it is by now; nobody but the coordinator is started anew, and no update is lost."""
    engine.start(None), engine.start(0), engine.start(1)
    ready(engine)
    oracle = litema(model(0), decay=DECAY)
    pids = [engine.pid(place) for place in range(2)]
    with EmaClient((engine.folder / "gateway").as_uri()) as client:
        client.create_run("r", model(0), decay=DECAY)
        for step in (1, 2):
            client.push("r", model(step), step=step)
            oracle.update(model(step))
            before = engine.coordinator
            assert before is not None
            engine.start(None)
            before.end()
        patient(lambda: client.push("r", model(3), step=3))
        oracle.update(model(3))
        assert_is(client, "r", oracle)
    assert [engine.pid(place) for place in range(2)] == pids


@pytest.mark.soak
def test_a_replica_in_a_hosts_place(engine: Engine, model: Model) -> None:
    """An agent may run a replica of a host, whose address is then the place's; it leaves nothing in the folder, and is
    started again as a host is."""
    engine.start(None), engine.start(0, 1)
    ready(engine)
    task = Task(0, 1, engine.folder, TOKEN, "127.0.0.1", replica=0)
    agent = engine.hosts[-1] = Agent(task, "127.0.0.1", engine.lines.append)  # heard as hosts are
    agent.start()
    ready(engine)
    before = {path.name for path in engine.folder.iterdir()}
    with EmaClient(engine.hosts[0].url) as client:
        client.create_run("r", model(0))
        client.push("r", model(1), step=1)
    _, first = agent.state().pids
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: first not in agent.state().pids and agent.state().ready, "a replica that is ready again")
    with EmaClient(agent.url) as reader:
        wait_until(lambda: [each.step for each in reader.runs()] == [1], "the newest version")
        with pytest.raises(ReadOnlyReplica):
            reader.push("r", model(2), step=2)
    assert {path.name for path in engine.folder.iterdir()} == before == {"gateway", "host-0"}
    assert (engine.folder / "gateway").read_text().strip() == engine.hosts[0].url


@pytest.mark.soak
def test_places_that_speak_tls(
    engine: Engine, model: Model, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All programs do, at addresses that say so, and an agent finds them ready by their certificates."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    engine.tls = Tls(certificate.cert, certificate.key, str(certificate.authority))
    coordinator, *_ = engine.start(None), engine.start(0), engine.start(1)
    ready(engine)
    assert all(agent.url.startswith("https://") for agent in (coordinator, *engine.hosts.values()))
    with EmaClient((engine.folder / "gateway").as_uri()) as client:
        client.create_run("r", model(0))
        assert client.push("r", model(1), step=1).applied
    assert not [line for line in engine.lines if "listens on http://" in line]


@pytest.mark.soak
def test_nothing_is_started_while_the_engine_is_not_heard(engine: Engine, model: Model) -> None:
    """An agent that is cut off may have been replaced: its host, once ended, stays so until the engine is heard."""
    engine.start(None), engine.start(0), engine.start(1)
    ready(engine)
    first = engine.pid(0)
    engine.silent.add(0)
    wait_until(lambda: not engine.hosts[0]._is_heard(), "the engine to be held for silent")
    os.kill(first, signal.SIGKILL)
    with pytest.raises(AssertionError):
        wait_until(lambda: engine.pid(0) not in (0, first), "a host that should not be", 3)
    engine.silent.clear()
    ready(engine)
    assert engine.pid(0) not in (0, first)
    with EmaClient(engine.hosts[1].url) as client:
        client.create_run("r", model(0))
        assert client.push("r", model(1), step=1).applied


def test_a_data_dir_that_cannot_be_had_is_waited_for(engine: Engine) -> None:
    """Nothing is raised: the place is not ready, and says why, until the data dir is there."""
    engine.folder.mkdir()
    in_the_way = engine.folder / "host-0"
    in_the_way.write_text("")
    engine.start(None)
    agent = engine.start(0, 1)
    wait_until(lambda: "FileExistsError" in agent.state().said.get("agent", ""), "what is in the way")
    assert not agent.state().ready
    in_the_way.unlink()
    ready(engine)


def test_no_process_outlives_its_agent(engine: Engine) -> None:
    """And none is seen with the cluster's token on its command line."""
    engine.start(None), engine.start(0, 1)
    ready(engine)
    pid = engine.pid(0)
    assert TOKEN not in Path(f"/proc/{pid}/cmdline").read_text()
    engine.hosts[0].end()
    assert engine.pid(0) == 0
    assert not engine.hosts[0].state().ready
