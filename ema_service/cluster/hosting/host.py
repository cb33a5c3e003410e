"""A server as one host of a cluster: it has one shard of each run, and asks coordinators for whatever all must do.

    PUT a slice          -> ShardRun       votes; the request waits for the verdict, without a thread
    POST, PATCH, DELETE  -> Asking         a change, which coordinators bring to all hosts, this one among them

The directory says which runs there are; each of them has a ShardRun here, and a talk of its own.

Lives on the event loop, but for what the directory calls. Knows which talks a host has. Does not know what is decided
(decisions), how a shard votes (shard_run), or HTTP's requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ema_client.errors import (
    EmaError,
    InvalidRequest,
    Overloaded,
    RunNotFound,
    SnapshotNotFound,
    Stopping,
    StorageFailed,
)
from ema_client.protocol import HEADER_COPIES, AverageConfig, RunConfig, RunInfo, SnapshotInfo, Writer, to_json
from ema_service import tether
from ema_service.cluster.encoding import encode
from ema_service.cluster.hosting.asking import Asking
from ema_service.cluster.hosting.borrowing import Twin
from ema_service.cluster.hosting.directory import Directory, creation_of, same_run, whole_config
from ema_service.cluster.hosting.lease import Lease
from ema_service.cluster.hosting.reporting import Reporting
from ema_service.cluster.hosting.rings import Rings
from ema_service.cluster.hosting.shard_run import ShardRun, check_held
from ema_service.cluster.hosting.shard_snapshots import ShardSnapshots
from ema_service.cluster.hosting.waiting import Waiting
from ema_service.cluster.layout_map import LayoutMap
from ema_service.cluster.messages import (
    DIRECTORY,
    Adjustment,
    Answer,
    Arrival,
    AverageAdded,
    AverageRemoved,
    Change,
    Checkpoint,
    Deletion,
    Rewind,
    SnapshotBegun,
    SnapshotGone,
    SnapshotTaken,
)
from ema_service.cluster.reasons import MADE_BEFORE, error_of
from ema_service.cluster.token import ClusterToken
from ema_service.memory import Layout
from ema_service.persistence import ShardRing
from ema_service.runs import Registry, Run, State
from ema_service.runs.recipes import Recipe, text_of
from ema_service.runs.summing import Summing
from ema_service.storage import Store
from ema_service.threads import Threads, cores, use_cores

__all__ = ["Host", "Membership"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that nobody waits for the answer to a change: Asking has an end of its own before, which says more.
_CHANGE_SECONDS = 60.0
#: Checkpoints that are asked for, or written, at once.
_CHECKPOINTS_AT_ONCE = 4
#: Seconds that other runs wait for the checkpoint of one to be written: a disk may hang.
_WRITING_SECONDS = 600.0
#: Seconds between two questions whether all hosts have written a snapshot, at first and at most: each has an update
#: that is under way sent again.
_WRITTEN_PAUSE, _MOST_PAUSE = 0.02, 2.0
#: Seconds for which the request that completes a set of parts waits for all hosts. Longer than a decision takes where
#: no host is away; and its sender, who waits, may have to send another host a part again before anything is decided.
_SOON_SECONDS = 1.0
#: Retry-After of a host that is not ready: a coordinator has to come, or a shard to be copied.
_READY_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Membership:
    """Which host of which cluster a server is.

    place: from 0, among ``of`` hosts. address: a URL at which others reach the server. coordinators: URLs. lease:
    seconds as in Lease(). twins: whether the later half of the hosts are twins of the earlier half.
    """

    place: int
    of: int
    address: str
    coordinators: tuple[str, ...]
    token: ClusterToken
    lease: float | None = None
    twins: bool = False

    @property
    def shards(self) -> int:
        """How many shards a run has."""
        return self.of // 2 if self.twins else self.of

    @property
    def shard(self) -> int:
        """Which of them is here."""
        return self.place % self.shards

    @property
    def twin(self) -> Twin | None:
        """The other host of the shard."""
        other = (self.place + self.shards) % self.of
        return Twin(other, self.coordinators, self.token) if self.twins else None


class Host:
    """One host of a cluster. Made on the event loop; start(), then close().

    More than twenty methods: one for each thing that users ask of all hosts, and what several of them do.

    Raises, in its making, what Directory() and ShardRun() raise.
    """

    def __init__(self, registry: Registry, store: Store, membership: Membership) -> None:
        self._registry = registry
        # Whatever this process says to a coordinator carries its number: a later process of this host is heard then.
        self._membership = membership = replace(membership, token=membership.token.of_number(store.number))
        self._asking = Asking(membership.coordinators, membership.token)
        #: Threads that judge changes: of runs, for microseconds; of the directory, where memory is taken.
        self._judging = Threads(1, "ema-judge")
        self._making = Threads(1, "ema-make")
        #: Writes and reads files of runs, beside those of updates.
        self._saving = Threads(1, "ema-save")
        #: Work out averages that are kept as snapshots.
        self._summing = Threads(cores(), "ema-sum", use_cores, (1,))
        self._waiting = Waiting(lambda: self.linked)
        self._shards: dict[str, ShardRun] = {}
        self._rings = Rings(lambda: self._shards, self._turn_of, self._asking.change)
        self._directory = Directory(
            registry,
            store,
            self._arrival(),
            membership.coordinators,
            membership.token,
            self._making,
            self._begin,
            self._end,
            membership.twin,
        )
        for run in registry.runs():
            self._shards[run.config.run] = self._shard_of(run)
        self._lease = _lease(membership.lease, store, self._directory.reporting)

    @property
    def token(self) -> ClusterToken:
        """The cluster's."""
        return self._membership.token

    @property
    def linked(self) -> bool:
        """Whether a coordinator is heard."""
        return self._directory.reporting.linked

    def start(self) -> None:
        """Begin to look for coordinators."""
        for shard in self._shards.values():
            shard.reporting.start()
        self._lease.start()
        self._rings.start()
        # Last: from here on another thread begins and ends shards.
        self._directory.reporting.start()

    def stop_waiting(self) -> None:
        """Have all who wait for other hosts be told that the server stops."""
        self._waiting.stop()

    async def close(self) -> None:
        """End all talks. What has no verdict keeps its vote."""
        self.stop_waiting()
        await self._rings.close()
        await self._waiting.close()
        await self._asking.close()
        await asyncio.to_thread(self._close)

    # --- slices -----------------------------------------------------------------------------------------------------

    def shard(self, run: Run) -> ShardRun:
        """What votes for a run's writes. Raises Overloaded where the run has just been made, or is just gone."""
        found = self._shards.get(run.config.run)
        if found is None or not found.is_of(run):
            raise Overloaded(f"run {run.config.run!r} is only just there, or just gone", retry_after=0.1)
        return found

    def check_counts(self, name: str | None) -> None:
        """Whether what this host has is what the cluster has: of a run, or of which runs there are (None). Raises
        Overloaded where the twin of this host went on without it, or may have."""
        shard = self._shards.get(name) if name else None
        talk = shard.reporting if shard else self._directory.reporting
        if self._membership.twins and not talk.counts and (shard is None or shard.is_whole() or talk.absent):
            raise Overloaded(
                "this host was left behind, and is filled from its twin, which answers meanwhile", retry_after=0.1
            )

    def check_ready(self) -> None:
        """Whether the host takes what is asked for and, of twins, whether its own twin may be taken down: that one has
        nothing alone. Raises Overloaded, with the reason."""
        if not self.linked:
            raise Overloaded(
                "this host of a cluster hears no coordinator: its runs are read, and not written",
                hint="is the coordinator up, and does its address lead there from here?",
                retry_after=_READY_RETRY_SECONDS,
            )
        if self._membership.twins and (why := self._behind_twin()):
            raise Overloaded(
                f"this host does not count yet: {why}",
                hint="take its twin down only once this host is ready: what the twin has is nowhere else",
                retry_after=_READY_RETRY_SECONDS,
            )

    def _behind_twin(self) -> str:
        """Why the twin of this host cannot be done without, empty where it can. Names no run: a stranger may ask."""
        if not self._directory.reporting.counts:
            return "it was left behind, or no coordinator has said since its start that it was not"
        talks = [(shard.reporting, shard) for shard in list(self._shards.values())]
        behind = sum(not (talk.linked and talk.counts and shard.is_whole()) for talk, shard in talks)
        return f"its twin alone has the latest version of {behind} of {len(talks)} runs" if behind else ""

    def check_copies(self, shard: ShardRun, headers: Mapping[str, str]) -> None:
        """Whether a slice is sent to both hosts of its shard, where both count. headers: of the request, which says to
        how many (HEADER_COPIES), or means one. Raises Overloaded where a host has come back that the sender does not
        know of yet."""
        member = self._membership
        pair = {member.place, (member.place + member.shards) % member.of}
        if member.twins and headers.get(HEADER_COPIES, "1") == "1" and not pair & shard.record.seating.absent:
            raise Overloaded("the twin of this host has come back: a slice is sent to both", retry_after=0.1)

    async def decided(self, answer: Future[T]) -> T:
        """The answer to what this host has voted for, once all hosts have decided. Holds neither thread nor lock.

        Raises what the future raises; Overloaded after some seconds; Stopping.
        """
        return await self._waiting.until(asyncio.wrap_future(answer), "the update was")

    async def decided_soon(self, vote: Awaitable[Future[T]]) -> T | None:
        """As decided(), of a vote that is yet to be cast, and is whoever waits. None where the decision takes longer
        than a second: senders of parts ask for it. Raises what ``vote`` raises."""

        async def decided() -> T:
            return await self.decided(await vote)

        return await self._waiting.soon(decided(), _SOON_SECONDS)

    # --- changes ----------------------------------------------------------------------------------------------------

    # key, wherever a method takes it: of the change, which is made once however often it comes; None draws one.

    async def create(self, config: RunConfig) -> tuple[Run, bool]:
        """The run of this configuration, on all hosts, and whether it is new. A ``durability`` left out is that of the
        run if it exists.

        Raises RunExists, InvalidRequest, what a host refuses it for, and as _ask().
        """
        if config.durability is None:
            with contextlib.suppress(RunNotFound):
                config = replace(config, durability=self._registry.get(config.run).config.durability)
        config = await asyncio.to_thread(whole_config, config, self._membership.shards)
        if found := await asyncio.to_thread(same_run, self._registry, config):
            return found, False
        change = await asyncio.to_thread(creation_of, config, time.time())
        made = await self._change_directory(encode(change))
        found = await asyncio.to_thread(same_run, self._registry, config)
        if found is None:
            raise RunNotFound(f"run {config.run!r} was deleted meanwhile")
        return found, made

    async def delete(self, name: str, created_at: float | None) -> None:
        """Delete a run on all hosts. Raises RunNotFound, and as _ask()."""
        shard = self._registry.get(name, created_at).shard
        if shard is None:
            raise RunNotFound(f"run {name!r} is no run of the cluster")
        await self._change_directory(encode(Deletion(name, shard.birth)))

    async def adjust(self, name: str, change: Adjustment, key: str | None) -> RunInfo:
        """Change a decay, or reset the counter, on all hosts. Raises as Run.amend(), and as _ask()."""
        run = self._registry.get(name)
        key = key or secrets.token_hex(16)

        def info() -> RunInfo | None:
            return run.info() if run.ledger.writable().made_by(key) else None

        return await self._made(run, encode(change), key, info)

    async def attach(self, name: str, key: str | None) -> Writer:
        """As Registry.attach(), on all hosts. Raises as that, and as _ask()."""
        run = self._registry.get(name)
        key = key or secrets.token_hex(16)

        def number() -> int | None:
            given = run.ledger.next_writer(key)
            return given if given <= run.ledger.writer else None

        found = await self._made(run, encode(Adjustment("writer")), key, number)
        return Writer(name, found)

    async def add_average(self, name: str, average: AverageConfig, key: str | None) -> tuple[RunInfo, bool]:
        """As Registry.add_average(), on all hosts. Raises as that, and as _ask()."""
        run = self._registry.get(name)
        key = key or secrets.token_hex(16)

        def info() -> RunInfo | None:
            succession = run.ledger.succession
            has = run.ledger.setup.made_by(key) or succession.with_average(average, "", None) is None
            return run.info() if has else None

        run.ledger.check_writable()
        if found := info():
            return found, False
        change = AverageAdded(json.dumps(to_json(average)), secrets.token_hex(4))
        return await self._made(run, encode(change), key, info), True

    async def remove_average(self, name: str, average: str, key: str | None) -> None:
        """As Registry.remove_average(), on all hosts. Raises as that, and as _ask()."""
        run = self._registry.get(name)
        key = key or secrets.token_hex(16)

        def told() -> bool | None:
            return run.ledger.setup.made_by(key) or None

        run.ledger.check_writable()
        if told():
            return
        run.ledger.succession.without_average(run.ledger.version, average, key)
        if run.state:  # what a loss of the machine leaves has another average then
            await self._settle(self.shard(run))
        await self._made(run, encode(AverageRemoved(average)), key, told)

    # --- snapshots --------------------------------------------------------------------------------------------------

    async def take_snapshot(
        self, name: str, snapshot: str, *, keep: int | None = None, key: str | None = None
    ) -> tuple[SnapshotInfo, bool]:
        """As Snapshots.take(), on all hosts. Raises as that, VersionGone where a host was started anew meanwhile, and
        as _ask()."""
        run, snapshots = self._registry.get(name), self._registry.snapshots(name)
        key = key or secrets.token_hex(16)
        version = str(run.ready_state().version)
        if found := await asyncio.to_thread(snapshots.taken, snapshot, version, key):
            return found, False
        begun = SnapshotBegun(snapshot, time.time(), key)

        async def taken() -> SnapshotTaken:
            gone = await asyncio.to_thread(snapshots.series, snapshot, keep)
            return SnapshotTaken(snapshot, begun.created_at, " ".join(gone))

        await self._take(self.shard(run), begun, taken)
        return await asyncio.to_thread(snapshots.find, snapshot), True

    async def keep_average(
        self, name: str, snapshot: str, recipe: Callable[[State], Awaitable[Recipe]], key: str | None = None
    ) -> tuple[SnapshotInfo, bool]:
        """As Snapshots.keep(), on all hosts, of an average that each works out of its ring. recipe: finds how, of a
        version of the run.

        Raises as Snapshots.keep(), VersionGone where a host lacks what the recipe names, as ``recipe``, and as _ask().
        """
        run, snapshots = self._registry.get(name), self._registry.snapshots(name)
        key = key or secrets.token_hex(16)
        if found := await asyncio.to_thread(snapshots.taken_by, snapshot, key):
            return found, False
        now = await recipe(run.ready_state())  # what cannot be had is refused before anything is begun
        if found := await asyncio.to_thread(snapshots.kept_before, snapshot, run.layout.shadows, now.info, key):
            return found, False
        shard, begun = self.shard(run), SnapshotBegun(snapshot, time.time(), key, held=True)

        async def taken() -> SnapshotTaken:
            found = await recipe(shard.snapshots.held(snapshot, begun.created_at))
            return SnapshotTaken(snapshot, begun.created_at, recipe=text_of([found]))

        await self._take(shard, begun, taken)
        return await asyncio.to_thread(snapshots.find, snapshot), True

    async def _take(self, shard: ShardRun, begun: SnapshotBegun, taken: Callable[[], Awaitable[SnapshotTaken]]) -> None:
        """Have all hosts take a snapshot, or none: nothing is left of one that a host could not write. taken: gives the
        second change, once the first is made. Raises as _ask(), and as ``taken``."""
        await self._ask(shard.talk, secrets.token_hex(16), encode(begun))
        try:
            await self._ask_when_written(shard, encode(await taken()))
        except EmaError:
            with contextlib.suppress(EmaError):  # nobody finds it, and it makes room for the next one
                gone = SnapshotGone(begun.name, begun.created_at, begun=True)
                await self._ask_when_written(shard, encode(gone))
            raise

    async def _ask_when_written(self, shard: ShardRun, change: str, settles: int = 0) -> None:
        """Ask for a change once no host is writing what it is about. settles: as in Change. Raises as _ask()."""
        key, pause = secrets.token_hex(16), _WRITTEN_PAUSE
        until = time.monotonic() + _WRITING_SECONDS
        while True:
            try:
                await self._ask(shard.talk, key, change, settles)
                return
            except Overloaded:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE)

    async def delete_snapshot(self, name: str, snapshot: str, created_at: float | None = None) -> None:
        """As Snapshots.delete(), on all hosts. Raises as that, and as _ask()."""
        run, snapshots = self._registry.get(name), self._registry.snapshots(name)
        info = await asyncio.to_thread(snapshots.find, snapshot, created_at)
        change = encode(SnapshotGone(snapshot, info.created_at))
        await self._ask(self.shard(run).talk, secrets.token_hex(16), change)

    async def rewind(
        self,
        name: str,
        snapshot: str,
        key: str | None = None,
        *,
        source: str | None = None,
        created_at: float | None = None,
    ) -> RunInfo:
        """As Registry.rewind(), on all hosts. Raises as that, and as _ask().

        When this returns, no loss of a machine takes the run back to where it was before. created_at: of the run.
        """
        run, snapshots = self._registry.get(name, created_at), self._registry.snapshots(source or name)
        key, shard = key or secrets.token_hex(16), self.shard(run)

        def told() -> RunInfo | None:
            version = run.ledger.version
            return run.info() if version and version.made_by(key) else None

        answer = told()
        if answer is None:  # else nothing is needed any more of what the rewind was made with
            info = await asyncio.to_thread(snapshots.find, snapshot)
            change = Rewind(snapshot, info.created_at, info.version, info.step, source)
            answer = await self._made(run, encode(change), key, told, mends=True)
        await self._settle(shard)
        return answer

    async def accept(self, name: str, key: str | None = None, *, created_at: float | None = None) -> RunInfo:
        """Have all hosts go on with the newest version that all can read, where one of them is degraded. created_at: of
        the run.

        Raises InvalidRequest where none is degraded, RunDegraded where they have nothing in common, and as _ask().
        """
        run = self._registry.get(name, created_at)
        key, shard = key or secrets.token_hex(16), self.shard(run)

        def told() -> RunInfo | None:
            version = run.ledger.version
            return run.info() if version and version.made_by(key) else None

        try:
            answer = await self._made(run, "", key, told, mends=True)
        except InvalidRequest:  # none is degraded any more, maybe by a try before this one
            if (found := told()) is None:
                raise
            answer = found
        await self._settle(shard)
        return answer

    async def _settle(self, shard: ShardRun) -> None:
        """Have all hosts keep the run's version, or a later one, on their disks for certain. Raises as _ask()."""
        if not shard.checkpoints.are_taken:
            return
        await self._take_checkpoint(shard)
        newest = shard.kept().newer
        if newest > shard.record.settled:
            try:
                await self._ask_when_written(shard, encode(Checkpoint()), newest)
            except InvalidRequest as fault:
                raise StorageFailed(
                    f"the run is at the snapshot, and a host could not write its checkpoint: {fault.detail}",
                    hint="come again with the same Idempotency-Key, or a power loss may take the run back",
                    retry_after=1.0,
                ) from fault

    # --- checkpoints ------------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Have all hosts take a checkpoint of each run that moved since its last one: of a few runs at once, for each
        holds the memory of a version, and each waits half a minute where a host is away. The first host that counts
        alone asks."""
        turns = asyncio.Semaphore(_CHECKPOINTS_AT_ONCE)

        async def take(name: str, shard: ShardRun) -> None:
            async with turns:
                try:
                    await self._take_checkpoint(shard)
                except EmaError as fault:
                    _log.warning("run %s: no checkpoint was taken: %s", name, fault)

        shards = list(self._shards.items()) if self._is_first else ()
        due = [each for each in shards if each[1].checkpoints.due and each[1].is_whole()]
        await asyncio.gather(*(take(name, shard) for name, shard in due))

    @property
    def _is_first(self) -> bool:
        """Whether this host is the first of those that count, which asks for what nobody else asks for."""
        absent = self._directory.reporting.record.seating.absent
        return self._membership.place == min(set(range(self._membership.of)) - absent, default=0)

    def _turn_of(self, shard: ShardRun) -> int | None:
        """How many of the hosts that count for a run come before this one; None where this one does not: it was left
        behind, and would ask for what it had then."""
        counting = [place for place in range(self._membership.of) if place not in shard.record.seating.absent]
        place = self._membership.place
        return counting.index(place) if place in counting else None

    async def _take_checkpoint(self, shard: ShardRun) -> None:
        """Have all hosts take one checkpoint, which settles the one before where all have that. Raises as _ask()."""
        newest, settled = shard.kept().newer, shard.record.settled
        change = encode(Checkpoint())
        try:
            await self._ask(shard.talk, secrets.token_hex(16), change, newest if newest > settled else 0)
        except InvalidRequest:
            if newest <= settled:
                raise
            await self._ask(shard.talk, secrets.token_hex(16), change)
        if written := shard.checkpoints.written:
            await asyncio.wait({asyncio.wrap_future(written)}, timeout=_WRITING_SECONDS)

    # ----------------------------------------------------------------------------------------------------------------

    async def _made(self, run: Run, change: str, key: str, answer: Callable[[], T | None], *, mends: bool = False) -> T:
        """What ``answer`` gives once a change is made here: None before. change, mends: as in Change. Raises as
        _ask()."""
        if (found := answer()) is not None:
            return found
        shard = self.shard(run)
        with shard.expecting(key, answer) as here:
            if await self._ask(shard.talk, key, change, mends=mends):
                found = await self._waiting.until(asyncio.wrap_future(here), "the change was made, and")
            else:
                found = answer()
        if found is None:
            raise Overloaded("the change was made, and others after it: look at the run", retry_after=1.0)
        return found

    async def _change_directory(self, change: str) -> bool:
        """Whether a change of the directory was made now, here too; False where it had been made. Raises as _ask()."""
        key = secrets.token_hex(16)
        with self._directory.expecting(key) as here:
            made = await self._ask(DIRECTORY, key, change)
            if made:
                await self._waiting.until(asyncio.wrap_future(here), "the change was made, and")
        return made

    async def _ask(self, talk: str, key: str, change: str, settles: int = 0, *, mends: bool = False) -> bool:
        """Whether a change was made now; False where it had been made. settles, mends: as in Change.

        Raises what a host refused the change for; Overloaded where nothing was decided in time; Stopping.
        """
        whole = Change(key, change, settles, mends)
        asked: asyncio.Future[Answer] = asyncio.ensure_future(self._asking.change(talk, whole))
        answer = await self._waiting.until(asked, "the change was", _CHANGE_SECONDS)
        if answer.committed or answer.reason == MADE_BEFORE:
            return answer.committed
        raise error_of(answer.reason)

    # --- what the twin copies ---------------------------------------------------------------------------------------

    def lend_runs(self, key: str | None) -> list[dict[str, Any]]:
        """The runs here, as a twin makes them. key: of the vote that the directory must hold, None for none. Raises
        Overloaded."""
        check_held(self._directory.reporting.record, key)
        return self._directory.lent()

    def lend_version(self, name: str, key: str) -> tuple[dict[str, Any], list[memoryview]]:
        """The version of a run, while its shard here holds a vote. key: of the vote. Raises RunNotFound, Overloaded."""
        return self.shard(self._registry.get(name)).lend(key)

    def lend_averages(self, name: str, key: str) -> str:
        """Which averages a run has, while its shard here holds a vote. key, raises: as for lend_version()."""
        return self.shard(self._registry.get(name)).lend_averages(key)

    def lending(self, name: str) -> ShardSnapshots:
        """The snapshots of a run. Raises RunNotFound, Overloaded."""
        return self.shard(self._registry.get(name)).snapshots

    def lending_ring(self, name: str) -> ShardRing:
        """The ring of a run. Raises RunNotFound, Overloaded; SnapshotNotFound where the run has none."""
        ring = self.shard(self._registry.get(name)).ring
        if ring is None:
            raise SnapshotNotFound(f"run {name!r} has no ring")
        return ring

    # --- runs come and go: called by the directory, on its threads --------------------------------------------------

    def _begin(self, name: str) -> None:
        run = self._registry.get(name)
        self._shards[name] = shard = self._shard_of(run)
        shard.reporting.start()

    def _end(self, name: str) -> None:
        if shard := self._shards.pop(name, None):
            shard.close(RunNotFound(f"run {name!r} was deleted"))

    def _shard_of(self, run: Run) -> ShardRun:
        member, name = self._membership, run.config.run
        whole = self._registry.whole(name)
        part = LayoutMap(Layout(whole.layout, whole.copied), member.shards).shards[member.shard].shadows
        arrival = self._arrival(part.start, part.stop)
        versions = self._registry.shard(name)
        snapshots, ring, summing = self._registry.snapshots(name), self._registry.ring(name), None
        if ring:
            run.changes.tell_always(lambda: self._rings.moved(ring))
            summing = Summing(run, self._registry.synthesiser(name), self._summing)
        return ShardRun(
            run,
            versions,
            snapshots,
            self._registry.source_of,
            self._registry.room_for_averages,
            arrival,
            member.coordinators,
            member.token,
            self._judging,
            self._saving,
            member.twin,
            ring,
            summing,
        )

    def _arrival(self, start: int = 0, stop: int = 0) -> Arrival:
        member = self._membership
        return Arrival(member.place, member.of, member.address, start, stop, member.twins)

    def _close(self) -> None:
        self._lease.close()
        fault = Stopping("the server was told to stop", retry_after=1.0)
        self._directory.reporting.close()
        for shard in list(self._shards.values()):
            shard.close(fault)
        for threads in (self._making, self._judging, self._saving, self._summing):
            threads.shutdown()


def _lease(seconds: float | None, store: Store, talk: Reporting[Any]) -> Lease:
    """What ends this server. talk: about the directory, which every host has."""

    def heard() -> float:
        return max(talk.heard, tether.heard())

    def replaced() -> str:
        return "a later server has the data dir" if store.taken_over() else talk.replaced

    return Lease(seconds, heard, replaced)
