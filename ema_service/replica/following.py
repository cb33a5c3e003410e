"""Follows all runs of an original: one thread looks which there are, and one for each run listens and pulls.

    the list, each second  runs that are new, gone, or made anew in another's place
    events of a run        there is another version than the one that is held
    GET .../version        its facts, and all of its weights stay at the original for a second
    GET .../weights        every average at once, by ETag: of that version, or not at all
    Run.follow()           readers have it from now on; those who read the one before read on

Versions that come while one is pulled are skipped: the event that is read next may be old, and what is asked for then
is the newest. So a replica behind a slow link holds newer versions than it was told of first, and fewer of them.

Knows runs and their weights. Does not know HTTP (original), or who reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from ema_client.errors import EmaError, ProtocolError, RunNotFound
from ema_client.protocol import ReplicaInfo, RunEvent, RunInfo, RunVersion, ShardInfo
from ema_service.averaging import Digest
from ema_service.bodies import WeightsStream
from ema_service.memory import Arena
from ema_service.replica.original import Original
from ema_service.runs import Registry, Run, State, Version, replicated
from ema_service.shadows import Average, Setup

__all__ = ["Following", "Link"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at the list of runs, and before a run is tried again: the first pause, and the longest.
_LOOK_SECONDS = 1.0
_PAUSES = 0.1, 2.0
#: How often one version after another is asked for before the next event is awaited: a run that goes on at once.
_TRIES = 20
#: Seconds that threads are waited for at the end.
_END_SECONDS = 5.0


class Link(Protocol):
    """What tells others of a replica while it is there."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class Following:
    """The runs of one original, kept up in a registry. Threads, from start() to close(). Thread-safe."""

    def __init__(self, registry: Registry, original: Original, link: Link | None = None) -> None:
        """link: begins and ends with the following."""
        self._registry = registry
        self._original = original
        self._link = link
        self._copies: dict[str, _Copy] = {}
        self._stopped = threading.Event()
        #: Held while a run is made or goes: a copy that was ended makes none any more.
        self._making = threading.Lock()
        #: Why the list could not be read; empty where it could, None before the first look.
        self._fault: str | None = None
        self._filled = False
        self._thread = threading.Thread(target=self._look_always, name="ema-replica", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        if self._link:
            self._link.start()
        self._thread.start()

    async def close(self) -> None:
        """Follow no more; what is being pulled is left."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._stopped.set()
        if self._link:
            self._link.close()
        self._original.close()
        for thread in (self._thread, *(copy.thread for copy in list(self._copies.values()))):
            if thread.ident:
                thread.join(_END_SECONDS)

    @property
    def original_url(self) -> str:
        """Where writes go; empty while that is not known."""
        return self._original.url

    @property
    def filled(self) -> bool:
        """Whether every run that there was at the first look has been read, or cannot be."""
        self._filled = self._filled or (self._fault == "" and all(copy.tried for copy in list(self._copies.values())))
        return self._filled

    def info(self) -> ReplicaInfo:
        """How far behind the run is that is furthest behind."""
        copies = list(self._copies.values())
        faults = [copy.fault for copy in copies if copy.fault]
        behind = max((copy.behind for copy in copies), default=0.0)
        return ReplicaInfo(self.original_url, self.reached, behind, self._fault or next(iter(faults), None))

    @property
    def reached(self) -> bool:
        """Whether the original answered when it was asked last."""
        return self._fault == ""

    # ----------------------------------------------------------------------------------------------------------------

    def _look_always(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look(self._original.runs())
                self._told("")
                _ = self.filled  # once true, it stays so when the original is away
            except EmaError as fault:
                self._told(str(fault))
            self._stopped.wait(_LOOK_SECONDS)

    def _told(self, fault: str) -> None:
        if fault != (self._fault or "") and not self._stopped.is_set():
            if fault:
                _log.warning("the original cannot be read, and what is held of it is served: %s", fault)
            else:
                _log.info("the original %s answers again", self.original_url)
        self._fault = fault

    def _look(self, found: Sequence[RunInfo]) -> None:
        """Follow these runs, and no others."""
        listed = {info.run: info for info in found}
        for name, copy in list(self._copies.items()):
            info = listed.get(name)
            if info is None or info.created_at != copy.created_at:
                del self._copies[name]
                with self._making, contextlib.suppress(RunNotFound):
                    copy.end()
                    self._registry.delete(name)
        for name, info in listed.items():
            if name not in self._copies:
                copy = self._copies[name] = _Copy(info, self._original, self._made, self.info, self._stopped)
                copy.thread.start()
            self._copies[name].heard(info)

    def _made(self, copy: _Copy, setup: Setup, shard: ShardInfo | None) -> Run:
        """The run of a copy, that readers find from now on. Raises RunNotFound where the copy was ended."""
        with self._making:
            if copy.is_ended():
                raise RunNotFound(f"there is no run {setup.config.run!r} any more")
            return self._registry.follow(setup, copy.created_at, shard)


@dataclass(slots=True)
class _Behind:
    """Since when a newer version is known than the one that is held; None where none is."""

    since: float | None = None

    @property
    def seconds(self) -> float:
        since = self.since
        return 0.0 if since is None else time.monotonic() - since


class _Copy:
    """One run that is followed, by a thread of its own.

    tried: whether it was read once, or could not be. fault: why it could not be, the last time.
    """

    def __init__(
        self,
        info: RunInfo,
        original: Original,
        make: Callable[[_Copy, Setup, ShardInfo | None], Run],
        tell: Callable[[], ReplicaInfo],
        stopped: threading.Event,
    ) -> None:
        """make: makes the run, for readers to find. tell: of the replica as a whole. stopped: set once the replica
        ends."""
        self.created_at = info.created_at
        self.tried = False
        self.fault: str | None = None
        self._name = info.run
        self._original = original
        self._make = make
        self._tell = tell
        self._stopped = stopped
        self._ended = threading.Event()
        self._behind = _Behind()
        self._run: Run | None = None
        self.thread = threading.Thread(target=self._follow_always, name="ema-follow-run", daemon=True)

    @property
    def behind(self) -> float:
        """For how many seconds a version has been known that is not held."""
        return self._behind.seconds

    def is_ended(self) -> bool:
        """Whether the run is to be followed no more."""
        return self._ended.is_set() or self._stopped.is_set()

    def end(self) -> None:
        """Follow no more. The thread ends with its stream, or with what it pulls."""
        self._ended.set()

    def heard(self, info: RunInfo) -> None:
        """The list tells of the run: what no event tells of is taken over."""
        run = self._run
        if run is None or self.is_ended():
            return
        if self._is_newer(info.version):
            self._note_newer()
        else:
            self._behind.since = None
        if (run.ledger.writer, run.ledger.ended) != (info.writer, info.ended_at):
            run.follow(run.ledger.setup, run.state, writer=info.writer, ended_at=info.ended_at, fault=run.ledger.fault)

    def _follow_always(self) -> None:
        pause, longest = _PAUSES
        while not self.is_ended():
            try:
                for event in self._original.events(self._name, self._catch_up):
                    pause, _ = _PAUSES
                    if self.is_ended() or event.kind == "run_deleted":
                        break
                    if self._is_news(event):
                        self._catch_up()
            except EmaError as fault:
                self._failed(fault)
            self._stopped.wait(pause)
            pause = min(2 * pause, longest)

    def _failed(self, fault: EmaError) -> None:
        self.tried = True
        if not self.is_ended() and str(fault) != self.fault:
            _log.warning("run %s is not followed, and tried again: %s", self._name, fault)
        self.fault = str(fault)

    def _is_news(self, event: RunEvent) -> bool:
        """Whether what is held is older than what an event tells of."""
        if event.kind in ("snapshot_created", "snapshot_deleted"):
            return False
        return event.kind != "version" or self._is_newer(event.version)

    def _is_newer(self, version: str | None) -> bool:
        """Whether a version of the original is newer than the one that is held."""
        state = self._run.state if self._run else None
        if version is None:
            return state is not None
        return state is None or _age(version) > (state.version.epoch, state.version.n)

    def _note_newer(self) -> None:
        if self._behind.since is None:
            self._behind.since = time.monotonic()

    # --- a version ---------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Hold the newest version. Raises EmaError."""
        self._note_newer()
        for _ in range(_TRIES):
            if self.is_ended() or self._take(self._original.version(self._name, self.created_at)):
                break
        else:
            raise ProtocolError(f"run {self._name!r} went on before a version of it could be read")
        self.tried, self.fault, self._behind.since = True, None, None

    def _take(self, said: RunVersion) -> bool:
        """Hold the version that is told of; False where the original has it no more. Raises EmaError."""
        run = self._run or self._begun(said)
        setup, version = replicated.setup_of(said, run.ledger.setup.created), replicated.version_of(said)
        state = self._state(run, version) if version else None
        if (state is None) is not (version is None):
            return False
        if not self.is_ended():
            run.follow(setup, state, writer=said.writer, ended_at=said.ended_at, fault=said.fault)
        return True

    def _begun(self, said: RunVersion) -> Run:
        """The run, without weights yet."""
        setup = replicated.setup_of(said, self._original.config(self._name))
        run = self._run = self._make(self, setup, said.shard)
        run.replica = self._told
        return run

    def _told(self) -> ReplicaInfo:
        """How far behind this run is."""
        return replace(self._tell(), behind_seconds=self.behind, fault=self.fault)

    def _state(self, run: Run, version: Version) -> State | None:
        """The version with all of its weights; None where one of them is at the original no more."""
        kept = run.state
        same = kept is not None and _bytes_of(kept.version) == _bytes_of(version)
        held = [kept.at(average.member) if same and kept else None for average in version.averages]
        missing = [average for average, found in zip(version.averages, held, strict=True) if found is None]
        pulled = iter(self._pulled(run, version, missing))
        arenas = [found[1] if found else next(pulled) for found in held]
        found = tuple(arena for arena in arenas if arena is not None)
        return State(version, found) if len(found) == len(arenas) else None

    def _pulled(self, run: Run, version: Version, averages: Sequence[Average]) -> list[Arena | None]:
        """The weights of some averages, pulled at once: none stays for longer than a moment. Raises EmaError."""
        if len(averages) < 2:
            return [self._pull(run, version, average) for average in averages]
        with ThreadPoolExecutor(len(averages), "ema-replica-pull") as threads:
            return list(threads.map(lambda average: self._pull(run, version, average), averages))

    def _pull(self, run: Run, version: Version, average: Average) -> Arena | None:
        """The weights of one average; None where the original has them no more. Raises EmaError."""
        info = version.weights_info(run.config, average)
        stream = WeightsStream(run.layout.shadows, info, lineage=version.lineage)
        arena = run.memory.new_arena(run.layout)
        into = arena.host.data
        where = self._name, average.name, stream.etag, self.created_at
        digest = self._original.weights(*where, stream.head_bytes, into)
        if digest is None:
            return None
        arena.digest = _digest_of(into)
        if digest and digest != arena.digest:
            raise ProtocolError(f"run {self._name!r}: other weights came than the original sent: they are pulled again")
        return arena


def _bytes_of(version: Version) -> tuple[object, ...]:
    """What tells versions apart whose weights differ."""
    return version.lineage, version.epoch, version.n


def _digest_of(data: memoryview) -> bytes:
    digest = Digest()
    digest.update(data)
    return digest.digest()


def _age(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
