"""A run's versions in memory files: kept as they are computed, with no copy and no write.

The arenas of the run *are* memory files (memory.FilePool), so a version outlives the process because of where it lies.
What makes it the run's is one row in the catalog, which names the files; the row is committed before anyone is told of
the version. The machine's end takes the files and leaves the newest checkpoint on disk (Versions), which is taken now
and then in the background.

Files may be written over once nothing refers to them: the run refers to the current state, a push to its base, and this
module to every state that a row names or, after a failed commit, may name.

Knows states, rows and names of files. Does not know how a file comes to be memory (storage), or when a checkpoint is
due.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack

from ema_client.errors import Overloaded, StorageFailed
from ema_client.protocol import RunConfig
from ema_service.averaging import Digest
from ema_service.memory import Arena, FilePool, Layout, Memory
from ema_service.persistence.restoring import Restored
from ema_service.persistence.rows import StoredVersion, dump
from ema_service.persistence.versions import Versions
from ema_service.shadows.state import Setup, State
from ema_service.storage import MEMORY, CheckpointRow, RunRow, Store
from ema_service.values import Array

__all__ = ["InPlace", "MemoryVersions"]

_log = logging.getLogger(__name__)

#: Steps of earlier updates that a row tells of, so that a trainer may still ask for them after a crash.
_TOLD_STEPS = 16
#: So many bytes are digested at a time when a version is verified: what was read is in the processor's cache.
_DIGESTED_AT_ONCE = 1 << 20
#: Memory files of each average, which updates take turns in: the current version's, and the next one's.
_FILES_EACH = 2
_MORE_MEMORY = "delete runs that nobody needs any more, or give the server more memory, and --memory-limit"
#: A write that failed may succeed after this many seconds.
_RETRY_SECONDS = 1.0


class InPlace:
    """Where a version in memory files is written to while it is computed: it lies there already."""

    def __init__(self, versions: MemoryVersions) -> None:
        self._versions = versions

    def write(self, average: str, data: memoryview, upto: int, start: int = 0) -> None:
        """Nothing to do; that someone follows the result gives its arena a digest."""

    def finish(self, state: State) -> None:
        """As MemoryVersions.write()."""
        self._versions.write(state)

    def commit(self, state: State) -> None:
        """As MemoryVersions.commit()."""
        self._versions.commit(state)


class MemoryVersions:
    """The versions of one run in memory files. Thread-safe: commit() and amend() are called under the run's lock.

    checkpoints: the versions on disk. durable_step: the latest step that the process' end leaves.

    More than twenty methods: what a version goes through, from the files that are taken for it to the row that
    makes it count, and the way back. More than a dozen attributes: what a version is made of (run, row, store,
    layout, memory, pool, nonce, checkpoints), which states rows name, what is told of them, and whether they were
    verified.
    """

    every = True

    def __init__(
        self,
        config: RunConfig,
        row: RunRow,
        store: Store,
        layout: Layout,
        memory: Memory,
        pool: FilePool,
        nonce: str,
        *,
        setup: Setup | None = None,
        checkpoints: Versions | None = None,
    ) -> None:
        """config, setup: as for Versions. memory: the run's, whose arenas are lent by ``pool``. nonce: of the folder
        that the files lie in. checkpoints: another kind of versions on disk than an ordinary run's."""
        self._run = config.run
        self._ringed = len(config.posthoc.sigma_rel) if config.posthoc else 0
        self._row = row
        self._store = store
        self._layout = layout
        self._memory = memory
        self._pool = pool
        self._nonce = nonce
        self.checkpoints = checkpoints or Versions(config, row, store, layout, memory, every=False, setup=setup)
        self._setup = setup or Setup.of(config)
        self.durable_step: int | None = None
        self._trouble: str | None = None
        self._newest: tuple[CheckpointRow, str] | None = None
        #: States that a row names, or may name: a row whose commit failed may be in the catalog's log all the same.
        self._held: list[State] = []
        self._steps: deque[int] = deque(maxlen=_TOLD_STEPS)
        self._unverified: list[tuple[StoredVersion, State]] = []
        self._verified = threading.Event()
        self._verified.set()

    # --- every version ----------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why the current state could not be kept, in memory files or in a checkpoint; None if all is well."""
        return self._trouble or self.checkpoints.trouble

    @property
    def checkpoint_step(self) -> int | None:
        """The latest step that the machine's end leaves."""
        return self.checkpoints.checkpoint_step

    @property
    def where(self) -> str:
        """Where versions are kept, for people to read."""
        return "memory files"

    def allocate(self) -> None:
        """Take the memory that the run will need, and the disk space of its checkpoints. Raises OSError, Overloaded."""
        self._reserve(self._needed)
        self.checkpoints.allocate()

    def _reserve(self, count: int) -> None:
        try:
            self._pool.reserve(count)
        except MemoryError as fault:
            text = f"there is no memory for run {self._run!r}: {fault}"
            raise Overloaded(text, hint=_MORE_MEMORY, retry_after=_RETRY_SECONDS) from fault

    @property
    def _needed(self) -> int:
        """Files that updates take turns in: of each average the current version's, and the next one's.

        And those of a version that is written to the ring.
        """
        return _FILES_EACH * self.checkpoints.count + self._ringed

    def take(self, averages: Collection[str]) -> InPlace:  # noqa: ARG002 - memory files are nobody's in particular
        """Where the next version is written to: nowhere else than where it is computed."""
        return InPlace(self)

    def write(self, state: State) -> None:
        """See that every arena lies in a memory file; waits until what the state was made from is verified.

        Raises StorageFailed where there is no room for a copy.
        """
        self._verified.wait()
        for arena in state.arenas:
            if self._pool.name_of(arena.host) is None:
                arena.twin = self._copied(arena)

    def commit(self, state: State) -> None:
        """Make the state what a restart brings back. Raises StorageFailed."""
        self._held.append(state)
        text = self._dump(state)
        try:
            row = self._store.put_checkpoint(self._row, MEMORY, text, synced=False, durable=False)
        except sqlite3.Error as fault:
            raise self._failed(f"version {state.version} could not be committed: {fault}") from fault
        self._held = [state]
        self._newest = row, text
        self.durable_step = state.version.step
        self._trouble = None
        self._note_step(state)

    def amend(self, state: State) -> None:
        """The newest version has another decay or counter; its weights are as they were. Raises StorageFailed."""
        if self._newest is None:
            self.write(state)
            self.commit(state)
            return
        row, _ = self._newest
        text = self._dump(state)
        try:
            self._store.amend_checkpoint(row, text, durable=False)
        except sqlite3.Error as fault:
            raise self._failed(f"the change could not be kept: {fault}") from fault
        self._held, self._newest = [state], (row, text)

    # --- now and then -----------------------------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:
        """Take a checkpoint on disk where the run moved since the last one. Raises StorageFailed.

        final: nothing will be applied after it; then the memory is given back.
        """
        self.checkpoints.save(state, final=final)
        if final:
            self._leave()
        else:
            self._pool.trim(self._needed)

    def settle(self, state: State) -> None:
        """Bring the state to the medium now. Raises StorageFailed."""
        self.checkpoints.save(state)

    # --- other averages ---------------------------------------------------------------------------------------------

    def steady(self) -> AbstractContextManager[None]:
        """As Versions.steady()."""
        return self.checkpoints.steady()

    def make_room(self, setup: Setup) -> None:
        """Take the memory that the averages of ``setup`` will need, and the disk space of their checkpoints, beside
        what is there.

        Raises OSError, Overloaded, and then took nothing.
        """
        with ExitStack() as undo:
            undo.callback(self._pool.trim, self._needed)
            self._reserve(_FILES_EACH * len(setup.members) + self._ringed)
            self.checkpoints.make_room(setup)
            undo.pop_all()

    def keep_setup(self, setup: Setup) -> None:
        """As Versions.keep_setup()."""
        self.checkpoints.keep_setup(setup)

    def change_averages(self, setup: Setup) -> None:
        """As Versions.change_averages(). The memory of an average that was removed is freed with its last reader."""
        self._setup = setup
        self.checkpoints.change_averages(setup)
        self._held = [state.only(setup.members) for state in self._held]

    def give_back(self) -> None:
        """Give back the memory and the disk space of averages that the run does not have any more."""
        self._pool.trim(self._needed)
        self.checkpoints.give_back()

    # --- the end ----------------------------------------------------------------------------------------------------

    def closing(self) -> AbstractContextManager[None]:
        """As Versions.closing()."""
        return self.checkpoints.closing()

    def free(self) -> None:
        """Give the memory back. What names the files goes first: a row never names files that are gone."""
        self._pool.close()

    def _leave(self) -> None:
        """The checkpoint has everything: take the row out, then give the memory back. Raises StorageFailed."""
        try:
            self._store.remove_checkpoint(self._row, MEMORY)
        except sqlite3.Error as fault:
            raise self._failed(f"its memory files are still there: {fault}") from fault
        self._held, self._newest = [], None
        self._pool.close()

    @property
    def elsewhere(self) -> bool:
        """Whether the run's version in memory lies in another folder than this one, which may be gone with its machine.

        Raises sqlite3.Error."""
        rows = (row for row in self.checkpoints.stored() if row.row.folder == MEMORY)
        return any(row.said and row.nonce != self._nonce for row in rows)

    # --- the way back -----------------------------------------------------------------------------------------------

    def restore(self) -> Restored:
        """What the run comes up with: the version in memory files, or else the newest checkpoint, in a new epoch.

        Files that are gone with their folder are what the machine's end takes; a file that is missing, or cut, in a
        folder that is there is damage. For a run that nobody uses yet. Raises sqlite3.Error.
        """
        row = self.checkpoints.memory_row() or self._same_as_checkpoint()
        fault = None
        if row and not row.said:
            fault = "the catalog's row of its memory files is damaged"
        elif row and row.nonce == self._nonce:
            try:
                return self._attached(row)
            except OSError as missing:
                fault = f"its memory files cannot be read: {missing}"
        found = self.checkpoints.restore(lost=self._gone(), fault=fault)
        self.durable_step = self.checkpoints.durable_step
        self._lend_others(self._beside(None))
        return found

    def _gone(self) -> StoredVersion | None:
        """A version that went with its folder, although none on disk is older: none is, of a run that decides alone."""
        return None

    def _same_as_checkpoint(self) -> StoredVersion | None:
        """The row of a version in memory files that was brought to the disk since, and is still in memory."""
        rows = self.checkpoints.stored()
        newest = max((row.age for row in rows if row.row.folder != MEMORY), default=None)
        return next((row for row in rows if row.row.folder == MEMORY and row.age == newest), None)

    def verify(self, take_up: Callable[[Restored], None]) -> None:
        """Compare the bytes of an attached version with their digests; where they differ, have the newest checkpoint
        taken up, with the fault. Until it is done no update is applied. Takes 0.1 s a GiB.
        """
        try:
            for row, state in self._unverified:
                damaged = [
                    average.name
                    for average, arena in zip(state.version.averages, state.arenas, strict=True)
                    if arena.digest and arena.digest != _digest_of(arena)
                ]
                if damaged:
                    fault = f"the bytes of {', '.join(damaged)} in memory are not those that were written"
                    take_up(self.checkpoints.restore(lost=row, fault=fault))
        finally:
            self._unverified.clear()
            self._verified.set()

    @property
    def unverified(self) -> bool:
        """Whether verify() has something to do."""
        return bool(self._unverified)

    def _attached(self, row: StoredVersion) -> Restored:
        """The version whose files are still there. Raises OSError."""
        state = self._in_memory(row, {})
        version = state.version
        self._held, self._newest = [state], (row.row, row.row.state)
        self.durable_step = version.step
        self._steps.extend(row.steps)
        self._note_step(state)
        self.checkpoints.go_on_beside()
        self._lend_others([(row, state), *self._beside(state)])
        return Restored(state=state, steps=row.steps, last_epoch=version.epoch)

    def _beside(self, state: State | None) -> list[tuple[StoredVersion, State]]:  # noqa: ARG002 - a shard has a vote
        """Versions in memory files that are to stay beside the run's current one, with their rows."""
        return []

    def _lend_others(self, attached: list[tuple[StoredVersion, State]]) -> None:
        """Have the files lent that none of these versions lies in, and the versions verified."""
        self._pool.adopt()
        self._pool.trim(self._needed)
        self._unverified += attached
        if self._unverified:
            self._verified.clear()

    def _in_memory(self, row: StoredVersion, arenas: dict[str, Arena]) -> State:
        """The version of a row. arenas: those that are attached already, by their files; more are added. Raises
        OSError."""
        version = row.version(self._setup)
        if not version.averages:
            raise OSError("they hold none of the averages that the run has by now")
        for average in version.averages:
            name, checksum = row.files[average.name], row.checksums[average.name]
            if name not in arenas:  # the averages of a first version share one
                arenas[name] = self._arena(name)
            if checksum:
                arenas[name].digest = bytes.fromhex(checksum)
        return State(version, tuple(arenas[row.files[average.name]] for average in version.averages))

    def _arena(self, name: str) -> Arena:
        host = self._pool.attach(name)
        if self._memory.on_host:
            return Arena(self._layout, host)
        arena = Arena(self._layout, self._memory.to_device(host[: self._layout.shadow_bytes]))
        arena.twin = host[: self._layout.shadow_bytes]
        return arena

    # ----------------------------------------------------------------------------------------------------------------

    def _copied(self, arena: Arena) -> Array:
        try:
            twin = self._pool.lend(self._layout.shadow_bytes)
        except (OSError, MemoryError) as fault:
            raise self._failed(f"no memory file for version: {fault}") from fault
        from ema_service.tensors import tensor_of

        tensor_of(twin).copy_(arena.tensor)
        return twin

    def _dump(self, state: State) -> str:
        names = {
            average.name: self._pool.name_of(arena.host)
            for average, arena in zip(state.version.averages, state.arenas, strict=True)
        }
        return dump(state, final=False, nonce=self._nonce, files=names, steps=list(self._steps))

    def _note_step(self, state: State) -> None:
        version = state.version
        if version.n and version.step is not None:
            self._steps.append(version.step)
        else:
            self._steps.clear()

    def _failed(self, fault: str) -> StorageFailed:
        self._trouble = fault
        _log.error("run %s: %s", self._run, fault)
        return StorageFailed(f"run {self._run!r}: {fault}", retry_after=_RETRY_SECONDS)


def _digest_of(arena: Arena) -> bytes:
    data, digest = arena.host.data[: arena.layout.shadow_bytes], Digest()
    for start in range(0, len(data), _DIGESTED_AT_ONCE):
        digest.update(data[start : start + _DIGESTED_AT_ONCE])
    return digest.digest()
