"""The directory of one host, in this process: what is made for a proposal, until the verdict and after a restart.

Links are replaced by a list of what was said. Knows messages and data dirs. Does not know processes (test_servers).
"""

from __future__ import annotations

import base64
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ema_client.errors import EmaError, Overloaded, Superseded
from ema_client.protocol import Posthoc, RunConfig, ShardInfo, TensorSpec
from ema_service.cluster import (
    Arrival,
    Ask,
    ClusterToken,
    Creation,
    Deletion,
    LayoutMap,
    Proposal,
    Propose,
    Refusal,
    Report,
    Resolve,
    Term,
    Ticket,
    encode,
)
from ema_service.cluster.hosting import reporting
from ema_service.cluster.hosting.directory import Directory, creation_of, whole_config
from ema_service.cluster.reasons import MADE_BEFORE, error_of
from ema_service.memory import Layout
from ema_service.runs import Registry
from tests.service.conftest import LocalServer, specs_of

TERM = Term(1, "c")


class Now(ThreadPoolExecutor):
    """Returns when what was submitted is done."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        wait([future])
        return future


class Host:
    """Host 1 of 2, with its directory. said: to coordinators. came, went: the names of runs, in order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, ram_dir: Path) -> None:
        self.said: list[Any] = []
        self.came: list[str] = []
        self.went: list[str] = []
        monkeypatch.setattr(reporting, "Link", lambda *_: self)
        self.server = LocalServer(folder, ram_dir=ram_dir)
        self.store().be_host((1, 2))
        self.start()

    def say(self, message: Any) -> None:
        self.said.append(message)

    def store(self) -> Any:
        assert self.server.store
        return self.server.store

    def start(self) -> None:
        arrival, token = Arrival(1, 2, "http://h"), ClusterToken("a-token-of-the-tests")
        self.directory = Directory(
            self.server.registry,
            self.store(),
            arrival,
            ["http://c"],
            token,
            Now(1),
            self.came.append,
            self.went.append,
        )
        self.directory.reporting.hear(Ask(1, TERM))

    def restart(self) -> None:
        """As after a kill."""
        self.server.crash()
        self.server.start()
        self.start()

    def propose(self, change: Creation | Deletion, key: str = "k") -> Any:
        """What the host says to a proposal of the coordinator."""
        base = self.directory.reporting.record.revision
        proposal = Proposal(Ticket(base, None, key), encode(change))
        self.directory.reporting.hear(Propose(1, TERM, proposal))
        return self.said[-1]

    def resolve(self, *, committed: bool) -> None:
        edition = self.directory.reporting.record.edition
        self.directory.reporting.hear(Resolve(1, TERM, edition, committed))

    def folders(self) -> list[str]:
        return [path.name for path in self.server.data_files("*")]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ram_dir: Path) -> Iterator[Host]:
    made = Host(tmp_path / "data", monkeypatch, ram_dir)
    yield made
    made.server.end()


@pytest.fixture
def config(model: Callable[[int], dict[str, Tensor]]) -> RunConfig:
    return whole_config(RunConfig("r", specs_of(model(0)), decay=0.9), 2)


def refusal(said: Any) -> EmaError:
    assert isinstance(said, Refusal), said
    return error_of(said.reason)


def test_run_that_is_voted_for_is_made_and_not_found(host: Host, config: RunConfig) -> None:
    """With the vote the host's shard has its row, its files and its memory; it is found once all have voted."""
    said = host.propose(creation_of(config, 12.5))
    assert isinstance(said, Report)
    assert said.record.vote
    assert (host.folders(), host.server.registry.runs(), host.came) == (["r.1"], [], [])
    with pytest.raises(Superseded, match="being made"):
        host.server.registry.get("r")
    host.resolve(committed=True)
    run = host.server.registry.get("r")
    part = LayoutMap(Layout(config.layout), 2).shards[1].layout
    assert [entry.spec for entry in run.layout.params] == [entry.spec for entry in part.params]
    assert (run.created_at, run.shard and run.shard.birth, host.came) == (12.5, 1, ["r"])
    assert host.server.registry.whole("r") == config


def test_the_whole_run_is_counted_by_each_host(host: Host, config: RunConfig) -> None:
    """How many tensors the run has, of which this host has some: nobody asks for layouts to tell that."""
    host.propose(creation_of(replace(config, copied=(config.layout[0].name,)), 12.5))
    host.resolve(committed=True)
    for _ in range(2):
        told = host.server.registry.get("r").info()
        assert told.tensors < len(config.layout)
        assert told.shard == ShardInfo(1, 2, 1, len(config.layout), 1)
        host.restart()


@pytest.mark.parametrize("restarts", [False, True])
def test_room_is_taken_until_the_verdict(host: Host, *, restarts: bool) -> None:
    """Memory that a host has promised with its vote is nobody else's before the verdict, and free after an abort."""
    layout = (TensorSpec("w", (8 << 10, 512), "F32"),)  # of which this host has 8 MiB, once there are weights
    host.propose(creation_of(whole_config(RunConfig("r", layout, durability="disk"), 2), 1.5))
    if restarts:
        host.restart()
    host.server.registry.memory.budget.limit = 24 << 20
    other = RunConfig("other", (TensorSpec("w", (4 << 10, 512), "F32"),), durability="disk")
    with pytest.raises(Overloaded):
        host.server.registry.create(other)
    host.resolve(committed=False)
    host.server.registry.create(other)


@pytest.mark.parametrize("restarts", [False, True])
def test_aborted_run_leaves_nothing(host: Host, config: RunConfig, ram_dir: Path, *, restarts: bool) -> None:
    """An aborted creation gives everything back, also of a host that was killed meanwhile."""
    host.propose(creation_of(config, 12.5))
    if restarts:
        host.restart()
        assert host.folders() == ["r.1"]
    host.resolve(committed=False)
    assert (host.folders(), host.server.registry.runs(), host.store().runs()) == ([], [], [])
    assert not [path for path in ram_dir.rglob("1.*") if path.is_file()]
    assert host.server.registry.candidates() == []
    assert isinstance(host.propose(creation_of(config, 13.5), "again"), Report)
    host.resolve(committed=True)
    assert host.server.registry.get("r").created_at == 13.5


def test_vote_outlives_a_kill(host: Host, config: RunConfig) -> None:
    """A host that was killed with a vote has the run after the commit, and not before; a deletion likewise."""
    host.propose(creation_of(config, 12.5))
    host.restart()
    assert host.server.registry.runs() == []
    host.resolve(committed=True)
    assert (host.came, [run.config.run for run in host.server.registry.runs()]) == (["r"], ["r"])
    host.propose(Deletion("r", 1), "d")
    host.restart()
    assert [run.config.run for run in host.server.registry.runs()] == ["r"]
    host.resolve(committed=True)
    assert (host.went, host.server.registry.runs(), host.folders()) == (["r"], [], [])
    host.restart()
    assert (host.server.registry.runs(), host.directory.reporting.record.revision) == ([], 2)


def test_what_was_made_and_not_voted_for_goes(host: Host, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was killed between making a run and its vote has nothing of the run afterwards."""
    with monkeypatch.context() as patch:
        patch.setattr(host.store(), "keep_directory", failing)
        host.propose(creation_of(config, 12.5))
    assert (host.folders(), host.directory.reporting.record.vote) == (["r.1"], None)
    host.restart()
    assert (host.folders(), host.store().runs()) == ([], [])


def failing(*_: Any) -> None:
    raise sqlite3.OperationalError("disk I/O error")


def test_vote_that_could_not_be_kept_comes_again(
    host: Host, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the catalog cannot be written the host votes when it is asked again, for what it made."""
    with monkeypatch.context() as patch:
        patch.setattr(host.store(), "keep_directory", failing)
        host.propose(creation_of(config, 12.5))
    said = host.propose(creation_of(config, 12.5))
    assert said.record.vote
    with monkeypatch.context() as patch:
        patch.setattr(host.store(), "keep_directory", failing)
        host.resolve(committed=True)
    assert host.server.registry.runs() == []
    host.resolve(committed=True)
    assert (len(host.server.registry.runs()), host.folders()) == (1, ["r.1"])


def test_another_proposal_takes_the_place_of_one_without_a_vote(
    host: Host, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made for a proposal that was not voted for goes when another comes."""
    with monkeypatch.context() as patch:
        patch.setattr(host.store(), "keep_directory", failing)
        host.propose(creation_of(config, 12.5), "k")
    host.propose(creation_of(config, 13.5), "l")
    assert host.folders() == ["r.2"]
    host.resolve(committed=True)
    assert host.server.registry.get("r").created_at == 13.5


def test_proposal_behind_a_vote_comes_again(host: Host, config: RunConfig) -> None:
    """A host with a vote prepares nothing else, and votes for another proposal once the first is aborted."""
    host.propose(creation_of(config, 12.5), "k")
    other = RunConfig("other", config.layout, durability="process")
    host.propose(creation_of(other, 13.5), "l")
    assert host.folders() == ["r.1"]
    host.resolve(committed=False)
    said = host.propose(creation_of(other, 13.5), "l")
    assert said.record.vote
    assert said.record.vote.ticket.key == "l"


def test_refusals(host: Host, config: RunConfig) -> None:
    """A host refuses what it cannot make, with the user's error and its own number."""
    host.propose(creation_of(config, 12.5))
    host.resolve(committed=True)
    again = host.propose(creation_of(config, 13.5), "again")
    assert (type(again), again.reason) == (Refusal, MADE_BEFORE)
    other = refusal(host.propose(creation_of(whole_config(RunConfig("r", config.layout, decay=0.5), 2), 13.5), "o"))
    assert (other.code, other.detail[:8]) == ("run_exists", "host 1: ")
    fleeting = RunConfig("m", config.layout, durability="memory")
    assert refusal(host.propose(creation_of(fleeting, 13.5), "m")).code == "invalid_request"
    assert refusal(host.propose(Deletion("nobody", 1), "d")).code == "run_not_found"
    assert refusal(host.propose(Deletion("r", 7), "e")).code == "run_not_found", "another of its name is meant"
    assert len(host.server.registry.runs()) == 1


@pytest.mark.parametrize(
    "packed", ["%", base64.b64encode(b"no zlib").decode(), base64.b64encode(zlib.compress(b"{}")).decode()]
)
def test_configuration_that_is_none(host: Host, packed: str) -> None:
    """What is no configuration is refused."""
    assert refusal(host.propose(Creation(packed, 1.5))).code == "invalid_request"


def test_configuration_without_end(host: Host) -> None:
    """A megabyte of zlib is not unpacked to a gigabyte."""
    packed = base64.b64encode(zlib.compress(bytes(100 << 20))).decode()
    assert "bytes" in refusal(host.propose(Creation(packed, 1.5))).detail


def test_defect_is_answered(host: Host, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program fails at a change, whoever asked for the change learns so."""

    def failing_propose(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Registry, "propose", failing_propose)
    fault = refusal(host.propose(creation_of(config, 12.5)))
    assert (fault.code, "ZeroDivisionError" in fault.detail) == ("internal", True)


def test_runs_that_hosts_cannot_have(config: RunConfig) -> None:
    """A run that cannot be cut is refused before anyone is asked, and so is one with a ring of nothing."""
    with pytest.raises(EmaError, match="scalars"):
        whole_config(RunConfig("r", (TensorSpec("w", (), "F32"),)), 2)
    with pytest.raises(EmaError, match="posthoc"):
        whole_config(replace(config, posthoc=Posthoc(sigma_rel=())), 2)
    found = whole_config(replace(config, posthoc=Posthoc(sigma_rel=(0.1,))), 2)
    assert [average.name for average in found.averages] == ["ema", "posthoc-0.1"]
