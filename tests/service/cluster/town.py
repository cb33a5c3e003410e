"""A run on several servers of this process, each with a data dir: shards, a coordinator, a trainer, and who is killed.

A *town* has k hosts. Messages between shards and coordinator are handed over one by one; a host or the coordinator may
be killed at any point between two steps, and comes back with what its data dir has.

Knows how a trainer, shards and a coordinator talk. Does not know what a test wants of them.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from ema_client.errors import EmaError, StorageFailed, Superseded
from ema_client.protocol import RunConfig, UpdateResult
from ema_service.cluster import (
    Answer,
    Arrival,
    Ask,
    Checkpoint,
    ClusterToken,
    Coordinator,
    Message,
    Propose,
    Refusal,
    Report,
    Resolve,
    encode,
)
from ema_service.cluster.hosting import ShardRun, reporting
from ema_service.runs import Parameters
from ema_service.runs.summing import Summing
from ema_service.storage import ShardRow
from tests.service.conftest import LocalRun, LocalServer, specs_of

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

__all__ = ["POINTS", "AtOnce", "Host", "Killed", "Town", "result", "slices"]

#: Points at which a shard's process may end: what is on disk by then, and what it was about to do. By name, the method
#: and whether the process ends after it.
POINTS = {
    "bytes written, no row": ("vote", False),
    "vote in the row, report not sent": ("vote", True),
    "report sent, verdict not read": ("send", True),
    "verdict read, no row": ("confirm", False),
    "commit in the row, not assigned": ("confirm", True),
    "assigned, not answered": ("put", True),
    "abort not in the row": ("discard", False),
    "abort in the row, not answered": ("discard", True),
    "term not in the row": ("promise", False),
    "term in the row, report not sent": ("promise", True),
}


_TOKEN = ClusterToken("a-token-of-the-tests")


class Killed(Exception):
    """The process of a host ends here, as by SIGKILL."""


def slices(tensors: Mapping[str, Tensor], hosts: int) -> list[dict[str, Tensor]]:
    """The part of each host: of a tensor some of its rows; a tensor with fewer rows than hosts is the first one's."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(hosts)]
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or len(tensor) < hosts:
            parts[0][name] = tensor
        else:
            for part, rows in zip(parts, torch.tensor_split(tensor, hosts), strict=True):
                part[name] = rows.contiguous()
    return parts


class AtOnce(Executor):
    """Does what is submitted before submit() returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        fn(*args, **kwargs)
        return Future()

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


class Wire:
    """In place of a shard's link: what is said goes to the town."""

    def __init__(self, host: Host) -> None:
        self.say = host.sent_by_shard


class Host:
    """A server with one shard. ``shard`` is None while its process is down."""

    def __init__(self, town: Town, place: int, folder: Path, config: Mapping[str, Any]) -> None:
        self.town, self.place = town, place
        self.server = LocalServer(folder, ram_dir=town.ram_dir)
        specs = specs_of(town.parts(0)[place])
        self.server.registry.create(RunConfig("r", specs, **config), ShardRow(place, town.hosts_count))
        self.shard: ShardRun | None = None
        #: From which the host is filled once it was left behind; from its next start on.
        self.twin: Any = None
        self.kill_at: str | None = None
        self.kills = self.lives = 0
        self.sent = 0
        self.start()

    @property
    def local(self) -> LocalRun:
        return self.server.run("r")

    def start(self) -> None:
        registry = self.server.registry
        versions, run, ring = registry.shard("r"), registry.get("r"), registry.ring("r")
        summing = Summing(run, registry.synthesiser("r"), AtOnce()) if ring else None
        arrival = Arrival(self.place, self.town.hosts_count, f"http://host-{self.place}")
        with patch.object(reporting, "Link", lambda *_: Wire(self)):
            self.shard = ShardRun(
                run,
                versions,
                registry.snapshots("r"),
                registry.source_of,
                registry.room_for_averages,
                arrival,
                ["http://coordinator"],
                _TOKEN,
                AtOnce(),
                AtOnce(),
                self.twin,
                ring,
                summing,
            )
        for name, after in set(POINTS.values()):
            if hasattr(versions, name):
                self._wrap(versions, name, after=after)
        run.changes.tell_always(lambda: self._reached("put", after=True))
        self.town.ask_one(self.place)
        registry.verify()

    def lines(self) -> list[tuple[str, int | None, int | None, str]]:
        """What the run's timeline has here, after its creation: kind, step, counter, and what is said."""
        lines = self.server.registry.timeline("r").lines(0.0, 99)
        return [(line.kind, line.step, line.num_updates, line.text) for line in lines[1:]]

    def medium(self) -> dict[str, bytes]:
        """The files of the catalog as they are: where nothing was synced since, what the machine's end may leave."""
        assert self.server.folder
        return {
            path.name: path.read_bytes() for path in self.server.folder.glob("catalog.db*") if "shm" not in path.name
        }

    def lose_power(self, medium: Mapping[str, bytes] | None = None) -> None:
        """The machine goes down, and comes up: memory is gone, and of the catalog there is what ``medium`` says; None
        for all of it."""
        assert self.server.store
        assert self.server.store.memory_files
        assert self.server.folder
        memory = self.server.store.memory_files.folder
        self.stop()
        shutil.rmtree(memory)
        if medium:
            for path in self.server.folder.glob("catalog.db*"):
                path.unlink()
            for name, content in medium.items():
                (self.server.folder / name).write_bytes(content)
        with contextlib.closing(sqlite3.connect(self.server.folder / "catalog.db")) as catalog, catalog:
            catalog.execute("UPDATE checkpoints SET state = json_set(state, '$.boot', 'another')")
        self.server.start()
        self.start()

    def damage(self) -> None:
        """Bits of the newest version flip, and of all that is in memory, while the process is down."""
        store = self.server.store
        memory = store.memory_files.folder if store and store.memory_files and self.town.ram_dir else None
        self.stop()
        files = [path for path in memory.iterdir() if path.name != "owner"] if memory else []
        in_slots = sorted(self.server.data_files("*/slots/*/*"), key=lambda each: each.stat().st_mtime_ns)
        for path in files or in_slots[-1:]:
            content = path.read_bytes()
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes(each ^ 1 for each in content[middle:]))
        self.server.start()
        self.start()

    def stop(self) -> None:
        self.server.crash()
        self.shard = None

    def restart(self) -> None:
        """Come back with the data dir as it is at this moment, which no end of a process has tidied up."""
        if self.shard and self.town.ram_dir:
            self.stop()  # memory files belong to a data dir by its path
        if self.shard:
            left = self.server.folder
            assert left
            self.lives += 1
            self.server.folder = left.with_name(f"{self.place}.{self.lives}")
            shutil.copytree(left, self.server.folder, ignore=shutil.ignore_patterns("*-shm"))
            self.stop()
        self.server.start()
        self.start()

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Within the block the host's process works; where it is killed it is down, and comes back at once."""
        try:
            yield
        except Killed:
            self.kills += 1
            self.restart()

    def sent_by_shard(self, message: Report | Refusal) -> None:
        self.sent += 1
        self.town.queue.append(("coordinator", message))
        if isinstance(message, Report) and message.record.vote:
            self._reached("send", after=True)

    def _wrap(self, versions: Any, name: str, *, after: bool) -> None:
        act = getattr(versions, name)

        def wrapped(*args: Any, **kwargs: Any) -> None:
            if not after:
                self._reached(name, after=False)
            act(*args, **kwargs)
            if after:
                self._reached(name, after=True)

        setattr(versions, name, wrapped)

    def _reached(self, name: str, *, after: bool) -> None:
        if self.kill_at and POINTS[self.kill_at] == (name, after):
            self.kill_at = None
            raise Killed


class Town:
    """The hosts of one run, their coordinator, and its trainer.

    queue: messages under way. coordinator_dies: after how many more messages of its own; None: never. dice: by which
    messages are lost, come twice, late, or out of order; None: none is.
    """

    def __init__(
        self,
        folder: Path,
        hosts: int,
        model: Callable[[int], dict[str, Tensor]],
        ram_dir: Path | None = None,
        **config: Any,
    ) -> None:
        """ram_dir: where versions of durability ``process`` lie; None for slots."""
        self.ram_dir = ram_dir
        self.hosts_count = hosts
        self.model = model
        self.queue: deque[tuple[str | int, Any]] = deque()
        self.late: list[tuple[str | int, Any]] = []
        self.dice: Random | None = None
        self.answers: list[Answer] = []
        self.coordinator_dies: int | None = None
        self.deaths = 0
        self._names = itertools.count()
        self.coordinator = self._new_coordinator()
        self.hosts = [Host(self, place, folder / str(place), config) for place in range(hosts)]
        self.ask()

    def parts(self, seed: int) -> list[dict[str, Tensor]]:
        return slices(self.model(seed), self.hosts_count)

    def close(self) -> None:
        for host in self.hosts:
            host.server.end()

    # --- messages ---------------------------------------------------------------------------------------------------

    def _new_coordinator(self) -> Coordinator:
        return Coordinator(f"c{next(self._names)}", self.hosts_count)

    def replace_coordinator(self) -> None:
        """Another coordinator takes over."""
        self.coordinator = self._new_coordinator()
        self.ask()

    def ask(self) -> None:
        self._say(self.coordinator.ask())
        self.deliver()

    def ask_one(self, place: int) -> None:
        """Ask a host that has come, as a coordinator does."""
        self._say([each for each in self.coordinator.ask() if each.shard == place])

    def _say(self, outputs: list[Any]) -> None:
        for output in outputs:
            if self.coordinator_dies == 0:
                self.coordinator_dies = None
                self.deaths += 1
                self.coordinator = self._new_coordinator()
                self._say(self.coordinator.ask())
                return
            if self.coordinator_dies:
                self.coordinator_dies -= 1
            if isinstance(output, Answer):
                self.answers.append(output)
            else:
                self.queue.append((output.shard, output))

    def deliver(self) -> None:
        """Hand over messages until none is under way."""
        if self.dice and self.late and self.dice.random() < 0.5:
            self.queue.append(self.late.pop(self.dice.randrange(len(self.late))))
        while self.queue:
            to, message = self._next(self.dice) if self.dice else self.queue.popleft()
            if to == "nowhere":
                continue
            if isinstance(to, str):
                self._say(self.coordinator.receive(message))
            else:
                self._hand_over(self.hosts[to], message)

    def _next(self, dice: Random) -> tuple[str | int, Any]:
        """Any message that is under way; to "nowhere" where it is lost, or late."""
        at = dice.randrange(len(self.queue))
        found = self.queue[at]
        fate = dice.random()
        if fate > 0.1:
            del self.queue[at]
        if 0.1 < fate < 0.2:
            self.late.append(found)
        return found if fate < 0.1 or fate > 0.3 else ("nowhere", None)

    def calm(self) -> None:
        """From here on nothing fails, and everything is said until it is known."""
        self.dice = None
        for host in self.hosts:
            host.kill_at = None
        for _ in range(3):
            self.say_again()

    def _hand_over(self, host: Host, message: Ask | Propose | Resolve) -> None:
        with host.living():
            if host.shard:
                host.shard.reporting.hear(message)

    def say_again(self) -> None:
        """The coordinator asks, and everyone says again what has no answer."""
        self.ask()

    def overdue(self) -> None:
        """What waits has waited for long."""
        for host in self.hosts:
            with host.living():
                if host.shard:
                    host.shard.reporting.insist()
        self.deliver()

    # --- the trainer, and who asks for changes ----------------------------------------------------------------------

    def send(self, step: int, key: str, place: int, seed: int | None = None) -> Future[Any] | None:
        """The slice of an update to one host; None where the host was killed over it, or says to send again."""
        host = self.hosts[place]
        with host.living():
            run, tensors = host.local, self.parts(step if seed is None else seed)[place]
            assert host.shard
            try:
                if step == 0:
                    return host.shard.initialise(Parameters(run.staged(tensors)), key)
                return host.shard.push(run.run.begin(step, run.staged(tensors)), key)
            except (Superseded, StorageFailed):
                return None
        return None

    def push(self, step: int, key: str | None = None, *, only: list[int] | None = None) -> list[Any]:
        """Send an update to all hosts, and again to those without an answer, until all have one.

        only: a trainer that sends these slices once, and is gone. The initial weights are step 0.
        """
        key = key or f"u{step}"
        if only is not None:
            for place in only:
                self.send(step, key, place)
            self.deliver()
            return []
        answers: dict[int, Any] = {}
        for _ in range(100):
            sent = {place: self.send(step, key, place) for place in range(self.hosts_count) if place not in answers}
            self.deliver()
            for place, future in sent.items():
                if future and future.done() and not isinstance(future.exception(), Superseded | StorageFailed):
                    answers[place] = future.exception() or future.result()
            if len(answers) == self.hosts_count:
                return [answers[place] for place in range(self.hosts_count)]
            self.say_again()
            self.overdue()
        raise AssertionError(
            f"step {step} has no answer: {answers}, {[h.shard and h.shard.record for h in self.hosts]}"
        )

    def checkpoint(self, key: str, settles: int = 0) -> Answer:
        """Have all hosts take a checkpoint of one revision."""
        return self.change(key, Checkpoint(), settles)

    def change(self, key: str, change: Message | str, settles: int = 0, *, mends: bool = False) -> Answer:
        """Ask the coordinator for a change, again until it has an answer."""
        for _ in range(100):
            text = change if isinstance(change, str) else encode(change)
            self._say(self.coordinator.propose(key, text, settles, mends=mends))
            self.deliver()
            if found := [each for each in self.answers if each.key == key]:
                return found[0]
            self.say_again()
        raise AssertionError(f"change {key} has no answer")

    # --- what there is ----------------------------------------------------------------------------------------------

    def assert_at(self, version: str, oracle: LitEmaOracle) -> None:
        """All hosts are at a version, which is LitEma's, and take updates; and so once all were killed."""
        for _ in range(2):
            assert self.versions() == [version] * self.hosts_count
            assert {host.local.info.status for host in self.hosts} == {"ready"}
            found = self.shadows()
            for name, shadow in oracle.shadow.items():
                assert torch.equal(found[name], shadow), name
            for host in self.hosts:
                host.restart()
            self.deliver()

    def versions(self) -> list[str]:
        return [str(host.local.version) for host in self.hosts]

    def shadows(self) -> dict[str, Tensor]:
        """The shadows of all hosts together."""
        parts = [host.local.shadows() for host in self.hosts]
        together = [name for name in parts[-1] if self.hosts_count > 1]
        whole = {name: torch.cat([part[name] for part in parts]) for name in together}
        return {**parts[0], **whole}


def result(answer: UpdateResult | EmaError) -> UpdateResult:
    """The result of an update that was not refused."""
    if isinstance(answer, EmaError):
        raise answer
    return answer
