"""The checkpoints of a shard: taken at one revision on all hosts, so that all can go back to one that all have.

    change on all hosts    each holds its state of that revision, and writes it to its disk in the background
    change after that      settles it: each host votes that it has it, and older ones go
    a machine goes down    its shard comes back lost; all go back to the newest checkpoint that all have, in a new epoch

Knows the checkpoints of one shard, and what a way back makes of its run. Does not know who votes for what (shard_run),
when a checkpoint is due, or how one is written.
"""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial

from ema_client.errors import EmaError, InvalidRequest, Overloaded
from ema_service.cluster.messages import Kept, Proposal, Record
from ema_service.persistence import ShardMemoryVersions, ShardVersions
from ema_service.runs import Run, State, Version, Write
from ema_service.runs.ledger import writer_in
from ema_service.runs.run import Place

__all__ = ["Checkpoints"]

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one shard. Thread-safe.

    lost: whether the machine took versions of the shard with it, and the shards have not gone back yet. writing:
    whether a checkpoint is being written. written: done once the latest one is; None before the first.
    """

    def __init__(self, run: Run, versions: ShardVersions | ShardMemoryVersions, saving: Executor) -> None:
        """versions: the run's. Where each of them lies on the disk there are no checkpoints. saving: writes them, one
        after the other."""
        self._run = run
        self._disk = versions.on_disk if isinstance(versions, ShardMemoryVersions) else None
        self._saving = saving
        self.lost = self._disk is not None and self._disk.lost
        self.writing = False
        self.written: Future[None] | None = None

    @property
    def kept(self) -> Kept:
        """Those that are on the disk."""
        there = self._disk.checkpoints if self._disk else ()
        return Kept(there[0], there[-1]) if there else Kept()

    @property
    def are_taken(self) -> bool:
        """Whether the run has checkpoints: else each of its versions is on the disk."""
        return self._disk is not None

    @property
    def due(self) -> bool:
        """Whether the run has moved since the newest checkpoint."""
        state = self._run.state
        return self._disk is not None and state is not None and not self._disk.has(state)

    def check(self, settles: int) -> None:
        """Whether another checkpoint may be taken, which settles that of a revision. Raises Overloaded while one is
        being written; InvalidRequest where that of the revision is not here, or the run has none."""
        if self._disk is None:
            raise InvalidRequest(f"run {self._run.config.run!r} has each version on the disk of this host")
        if self.writing:
            raise Overloaded("the checkpoint before is still being written", retry_after=1.0)
        if settles and settles not in self._disk.checkpoints:
            raise InvalidRequest(f"the checkpoint of revision {settles} is not on this host")

    def take(self, record: Record) -> None:
        """Write the run's state, which is that of the record's revision, in the background; nothing where the run has
        none. Under deciding()."""
        state = self._run.state
        self.writing = state is not None
        self.written = self._saving.submit(self._write, state, record)

    def read(self, back: int) -> State | None:
        """The state of a revision; None of revision 0, which all shards go back to that never had a checkpoint.

        Raises SnapshotDamaged, InvalidRequest, Overloaded.
        """
        if back == 0:
            return None
        if self._disk is None:
            raise InvalidRequest(f"run {self._run.config.run!r} has no checkpoints on this host")
        return self._disk.read_checkpoint(back)

    def going_back(self, proposal: Proposal, state: State | None) -> tuple[State | None, str]:
        """The state that a way back leads to, in its new epoch, and the outcome. state: as read() gave it, or of the
        snapshot that the proposal names."""
        ledger, version = self._run.ledger, state.version if state else None
        back: Version | None
        if version and proposal.to:
            back, outcome = ledger.gone_to(version, proposal.change or "", proposal.word)
        else:
            back, outcome = ledger.gone_back(version, proposal.change or "", proposal.word)
        return replace(state, version=back) if state and back else None, outcome

    def back_at(self, state: State | None, outcome: str, place: Place | None = None) -> Write:
        """The write that a way back is, of the state that was voted for; None where the run has no weights then. place:
        where the state was written; None where its bytes are kept already."""
        then = partial(self._arrived, writer_in(outcome))
        return self._run.moving_to(state, place, then) if state else self._run.moving_to_nothing(then)

    def follow(self, proposal: Proposal, record: Record) -> None:
        """Tell people where the shards went back to, and give up checkpoints that they went back over, once a proposal
        is committed. Under deciding()."""
        if proposal.back is not None and self._disk:
            if not proposal.to:  # of a rewind the verdict's own line tells
                self._saving.submit(self._tell, self._run.ledger.version)
            self._saving.submit(self._write, None, record)

    # ----------------------------------------------------------------------------------------------------------------

    def _arrived(self, writer: int) -> None:
        ledger = self._run.ledger
        if writer > ledger.writer:
            ledger.attach(writer)
        ledger.recover()
        self.lost = False

    def _tell(self, version: Version | None) -> None:
        """Tell people that the run went back."""
        there = f"step {version.step} as version {version}" if version else "its beginning, without weights"
        if self._disk:
            self._disk.remark(f"back at {there}; later updates, if any, are gone", version)

    def _write(self, state: State | None, record: Record) -> None:
        """Drop all checkpoints but the one that all shards have, and write another."""
        try:
            if self._disk:
                self._disk.keep_only(record.settled)
                if state:
                    self._disk.take_checkpoint(state, record.revision)
        except EmaError as fault:  # the run tells so; this host lacks the checkpoint, and another is taken
            _log.error("run %s: no checkpoint of revision %d: %s", self._run.config.run, record.revision, fault)
        finally:
            if state:
                self.writing = False
