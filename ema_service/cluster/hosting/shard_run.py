"""A shard of a run on this server: judges and prepares what comes, votes, and does as the verdict says.

    sender       -> push()        the update's version is finished, judged, written; the vote is durable; a future
    coordinator  -> commit()      the verdict is durable; the version is put in place; the future has its answer

The RecordStore of a Reporting (see there), which decides when a record is kept, and says what follows from it. Between
vote and verdict neither a lock is held nor a thread: what waits is a Write, its slot and its senders' futures.

Knows one run and its versions. Does not know what follows from a message, HTTP, or which coordinator there is.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast
from weakref import WeakValueDictionary

from ema_client.errors import (
    EmaError,
    InternalError,
    InvalidRequest,
    Overloaded,
    SegmentUnusable,
    StepConflict,
    StorageFailed,
    Superseded,
)
from ema_client.protocol import RunInfo, UpdateResult
from ema_service.cluster.decisions import after_loss
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.hosting.borrowing import Twin
from ema_service.cluster.hosting.checkpoints import Checkpoints
from ema_service.cluster.hosting.reporting import Reporting
from ema_service.cluster.hosting.shard_averages import RoomFor, ShardAverages
from ema_service.cluster.hosting.shard_snapshots import ShardSnapshots, SourceOf
from ema_service.cluster.messages import (
    Adjustment,
    Answer,
    Arrival,
    AverageAdded,
    AverageRemoved,
    Checkpoint,
    Kept,
    Proposal,
    Record,
    Rewind,
    RingKept,
    SnapshotBegun,
    SnapshotGone,
    SnapshotTaken,
    Ticket,
    Vote,
    talk_of,
)
from ema_service.cluster.reasons import MADE_BEFORE, error_of, lacking, reason_of
from ema_service.cluster.token import ClusterToken
from ema_service.persistence import (
    ShardMemoryVersions,
    ShardRing,
    ShardVersions,
    Snapshots,
    Told,
    told_accepted,
    told_decay,
    told_reset,
    told_rewind,
    told_writer,
)
from ema_service.persistence.rows import dump, dump_setup
from ema_service.persistence.versions import SlotPlace
from ema_service.runs import Parameters, Run, Setup, State, Update, Write
from ema_service.runs.ledger import writer_in
from ema_service.runs.summing import Summing
from ema_service.storage import RowChange

__all__ = ["ShardRun", "check_held"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two tries to fill a shard from its twin: all hosts hold their votes meanwhile.
_FILL_PAUSE = 2.0
#: Seconds after a start within which a damaged shard is left behind for its twin; else the twin has no more than it.
_LEFT_BEHIND_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class _Sender(Generic[T]):
    """Whoever sent a proposal and waits. answer: gives the answer to one that was committed, under the run's lock."""

    future: Future[T]
    answer: Callable[[], T]

    def answering(self) -> Callable[[], None]:
        """What gives the sender of a committed proposal the answer, once the run's lock is free."""
        try:
            return partial(self.future.set_result, self.answer())
        except EmaError as fault:  # the run was found damaged meanwhile
            return partial(self.future.set_exception, fault)


#: Changes that leave the version as it is, and what a run has beside it.
_Beside = Checkpoint | RingKept | SnapshotBegun | SnapshotTaken | SnapshotGone
#: Changes after which a run has other averages.
_Averages = AverageAdded | AverageRemoved
_Any = Adjustment | Rewind | _Averages | _Beside


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Held:
    """A write that the shard has voted for, or that waits. outcome: as in Vote. change: which it is, of those that
    leave the version as it is. rows: what else changes on the disk with the verdict. filled: whether the write is what
    the twin has, in place of whatever is here."""

    write: Write
    outcome: str
    change: _Beside | None = None
    rows: RowChange | None = None
    filled: bool = False


@dataclass(frozen=True, slots=True)
class _Cast:
    """A vote for what a sender sent. absent: the places that did not count then. judge: judges what was sent again, as
    it is."""

    ticket: Ticket
    absent: frozenset[int]
    judge: Callable[[], Write | None]


class _Lacking(Exception):
    """A ring is to have snapshots that are not here. versions: theirs."""

    def __init__(self, versions: Sequence[str]) -> None:
        super().__init__(*versions)
        self.versions = versions


class ShardRun:
    """One shard of a run. More than twenty methods: what senders, the coordinator's decisions and a restart ask.
    More than a dozen attributes: what these share, and who waits for what.

    Thread-safe; methods that vote may block for a row, as those of Run do, and not longer.

    reporting: the talk with coordinators, begun by ``reporting.start()``, whose name is ``talk``. While the run is
    degraded nothing is decided before an operator has said what all shards go back to; unless they do by themselves,
    for its machine went down, or the shard is filled from its twin. checkpoints, snapshots, ring: the shard's; no ring
    where the run was made without.
    """

    def __init__(
        self,
        run: Run,
        versions: ShardVersions | ShardMemoryVersions,
        snapshots: Snapshots,
        source_of: SourceOf,
        room_for: RoomFor,
        arrival: Arrival,
        coordinators: Sequence[str],
        token: ClusterToken,
        changes: Executor,
        saving: Executor,
        twin: Twin | None = None,
        ring: ShardRing | None = None,
        summing: Summing | None = None,
    ) -> None:
        """run, versions, snapshots, ring: as Registry.get(), shard(), snapshots() and ring() have them, for which there
        is no other ShardRun. source_of, room_for: Registry.source_of(), room_for_averages(). arrival, coordinators,
        token: as for Reporting. changes: judges what coordinators bring, and works until the talk is closed; saving:
        does the same where files are read or written. twin: the other host of the shard, None where there is none.
        summing: works averages out of the ring.

        Raises MalformedMessage for a damaged record, StorageFailed, and as Reporting().
        """
        self._run = run
        self._place = arrival.shard
        self._twin = twin
        self._began = time.monotonic()
        #: When the shard may be filled from its twin again, by time.monotonic().
        self._fills_from = float("-inf")
        #: The copying of snapshots before that; None before it has begun.
        self._copying: Future[None] | None = None
        self._versions = versions
        self._changes, self._saving = changes, saving
        self.checkpoints = Checkpoints(run, versions, saving)
        self.snapshots = ShardSnapshots(run, snapshots, saving, source_of, summing)
        self.ring = ring
        run.ledger.expect_mending(self._is_mending)
        self._averages = ShardAverages(run, versions, saving, room_for)
        record = decode(versions.record, Record) if versions.record else Record()
        #: Of the record on disk; changed under the run's lock.
        self._revision = record.revision
        #: What waits for a verdict or is on its way to a vote: whoever brings it and the talk keep it alive.
        self._held: WeakValueDictionary[Ticket, _Held] = WeakValueDictionary()
        #: By the key of the proposal: who waits, and what answers those whose proposal is committed.
        self._senders: dict[str, list[_Sender[Any]]] = {}
        #: By the key of what such a sender sent: the vote for it.
        self._cast: dict[str, _Cast] = {}
        #: By the key of a change: who waits until it is made here; and its lock, which the event loop takes.
        self._expecting = threading.Lock()
        self._expected: dict[str, list[_Sender[Any]]] = {}
        self._answers: dict[str, list[Callable[[], None]]] = {}
        with run.deciding():
            if self.checkpoints.lost and not record.lost:
                record = after_loss(record, has_voted=record.vote is not None and _outlives(record.vote))
                versions.promise(encode(record))
            taken_up = self._take_up(record)
        self._held.update(taken_up)
        shard = run.shard
        self.talk = talk_of(run.config.run, shard.birth if shard else 0)
        self.reporting = Reporting(self.talk, arrival, record, self, coordinators, token, prepared=taken_up)

    @property
    def record(self) -> Record:
        """What the shard has promised, voted for and committed, on disk."""
        return self.reporting.record

    def is_of(self, run: Run) -> bool:
        """Whether the shard is of this very run, and not of one that had its name before."""
        return self._run is run

    # --- from senders -----------------------------------------------------------------------------------------------

    def push(self, update: Update, key: str) -> Future[UpdateResult]:
        """Vote for an update whose parameters have all arrived. key: drawn by its trainer, the same on all shards and
        at each retry.

        Raises as Run.commit(), before there is a vote. The future raises Superseded where another proposal took the
        update's place; what another shard refused the update for; StorageFailed.
        """
        step = update.plan.step
        with self._refusing(step, key):
            finished = self._run.finish(update)
            return self._vote(
                Ticket(0, step, key),
                lambda: self._run.prepare(finished),
                lambda applied: self._run.result(step, applied=applied),
            )

    def initialise(
        self, parameters: Parameters, key: str, *, num_updates: int | None = None, step: int | None = None
    ) -> Future[RunInfo]:
        """Vote for initial weights, as push(). Others as for Run.initialise(), and raises as that."""
        with self._refusing(None, key):
            first = self._run.finish_first(parameters, _lineage_of(key), num_updates=num_updates, step=step)
            return self._vote(Ticket(0, None, key), lambda: self._run.prepare_first(first), lambda _: self._run.info())

    def initialise_anew(
        self, parameters: Parameters, key: str, replaces: str, writer: int | None = None
    ) -> Future[RunInfo]:
        """Vote for initial weights in place of those that the run has, as push(). Others as for Run.initialise_anew(),
        and raises as that.

        The same weights again count, unless they come under the same key: those of another shard may be others.
        """
        with self._refusing(None, key):
            anew = self._run.finish_anew(parameters, _lineage_of(key), writer, key)
            prepare = partial(self._run.prepare_anew, anew, replaces, writer)
            return self._vote(Ticket(0, None, key), prepare, lambda _: self._run.info())

    def refuse(self, step: int | None, key: str, fault: EmaError) -> None:
        """Vote against a push whose slice here will never be right, so that no host waits for the slice. step: None of
        initial weights. Not for shared memory that cannot be read, or was withdrawn: the slice is right, and comes
        otherwise."""
        if isinstance(fault, SegmentUnusable):
            return
        self.reporting.refuse(Proposal(Ticket(self.record.revision, step, key)), reason_of(fault))

    # --- changes, which come by a coordinator -----------------------------------------------------------------------

    @contextlib.contextmanager
    def expecting(self, key: str, answer: Callable[[], T]) -> Iterator[Future[T]]:
        """Within the block, a future that has its result once the change of this key is made here.

        answer: gives the result then, under the run's lock.
        """
        sender: _Sender[T] = _Sender(Future(), answer)
        sender.future.set_running_or_notify_cancel()
        with self._expecting:
            self._expected.setdefault(key, []).append(sender)
        try:
            yield sender.future
        finally:
            with self._expecting:
                waiting = self._expected.get(key, [])
                if sender in waiting:
                    waiting.remove(sender)
                if not waiting:
                    self._expected.pop(key, None)

    def close(self, fault: EmaError) -> None:
        """End the talk, and tell all who wait why."""
        self.reporting.close()
        self._run.ledger.expect_mending(lambda: False)  # else run and shard hold each other's memory
        with self._run.deciding():
            keys = list(self._senders)
        for key in keys:
            self._fail(key, fault)
        self.snapshots.close()
        self._averages.close()

    # --- as the coordinator decides: RecordStore --------------------------------------------------------------------

    def is_whole(self) -> bool:
        """Whether the run is not degraded, or all shards go back by themselves."""
        return not self._run.ledger.fault or self.checkpoints.lost

    def _is_mending(self) -> bool:
        """Whether a degraded run waits for nobody's word: all shards go back, or this one is filled from its twin."""
        is_new = time.monotonic() < self._began + _LEFT_BEHIND_SECONDS
        return self.checkpoints.lost or (self._twin is not None and is_new)

    def kept(self) -> Kept:
        """Of which revisions there are checkpoints."""
        return self.checkpoints.kept

    def returns(self) -> bool:
        """Whether the shard can be filled from its twin, where it was left behind. Has snapshots copied before, while
        updates go on; of those a return has to copy the latest alone."""
        if self._twin is None or time.monotonic() < self._fills_from:
            return False
        if self._copying is None:
            self._copying = self._saving.submit(self._copy_snapshots, self._twin)
        if self._copying.done() and (fault := self._copying.exception()):
            _log.warning("run %s: snapshots could not be copied: %s", self._run.config.run, fault)
            self._fills_from, self._copying = time.monotonic() + _FILL_PAUSE, None
        return self._copying is not None and self._copying.done()

    def promise(self, record: Record) -> None:
        """Keep a record of the same versions. Raises StorageFailed, as vote(), commit() and abort()."""
        with self._run.deciding():
            self._versions.promise(encode(record))

    def vote(self, record: Record, prepared: _Held | None) -> None:
        """Keep a record with its vote and the version that it is for, in place of an earlier vote."""
        with self._run.deciding():
            if prepared and prepared.write.state:
                place = prepared.write.place
                slot = place.slot if isinstance(place, SlotPlace) else None
                base = record.vote.ticket.base if record.vote else self._revision
                self._versions.vote(slot, prepared.write.state, encode(record), base + 1)
            else:
                rows = prepared.rows if prepared else None
                self._versions.discard(encode(record), durable=rows is not None and rows.lasts)

    def abort(self, record: Record, prepared: _Held | None) -> None:
        """Keep a record without the vote, or with that for what has waited."""
        self.vote(record, prepared)

    def commit(self, record: Record, prepared: _Held) -> None:
        """Keep a record of the next revision, and make the write that was voted for the run's."""
        with self._run.deciding():
            emptied = record.made is not None and record.made.proposal.back == 0
            emptied = emptied or (prepared.filled and prepared.write.state is None)
            self._versions.confirm(encode(record), record.revision if emptied else 0, prepared.rows)
            self._revision = record.revision
            prepared.write.put()
            if isinstance(prepared.change, Checkpoint):
                self.checkpoints.take(record)
            elif isinstance(prepared.change, RingKept):
                self._ring_of(prepared.change).settle(prepared.change.versions.split())
            elif prepared.change:
                self.snapshots.follow(prepared.change)
            if prepared.filled:
                self._copying = None
                self._saving.submit(self._tell_filled)
                self._saving.submit(self._averages.forget)
            if record.made:
                self.checkpoints.follow(record.made.proposal, record)
                key, word = record.made.ticket.key, record.made.proposal.word
                self._averages.settle(key, made=True)
                if prepared.rows and prepared.rows.averages:
                    self._averages.give_back()
                # Now: the next verdict makes another version the run's.
                with self._expecting:
                    expected = self._expected.pop(word or key, [])
                waiting = [*self._senders.pop(key, []), *expected]
                self._cast.pop(key, None)
                self._answers[key] = [sender.answering() for sender in waiting]

    def propose(self, proposal: Proposal) -> None:
        """Have a change judged, and vote for or against it."""
        reads = proposal.back is not None or self._is_own_return(proposal) or self._reads(proposal)
        executor = self._saving if reads else self._changes
        executor.submit(self._judge, proposal).add_done_callback(partial(self._judged, proposal))

    def answer(self, answer: Answer) -> None:
        """Tell those who sent a proposal what became of it."""
        with self._run.deciding():
            acts = self._answers.pop(answer.key, [])
        for act in acts:
            act()
        if not answer.committed:
            self._averages.settle(answer.key, made=False)
            if not answer.reason and self._votes_again(answer.key):
                return
            superseded = f"another write to run {self._run.config.run!r} came in place of this one"
            fault = error_of(answer.reason) if answer.reason else Superseded(superseded, retry_after=0.0)
            self._fail(answer.key, fault)

    # --- a vote -----------------------------------------------------------------------------------------------------

    def _vote(self, ticket: Ticket, prepare: Callable[[], Write | None], answer: Callable[[bool], T]) -> Future[T]:
        """Judge a write and vote for it. ticket: its base is the run's revision by then. answer: whether the write was
        applied now -> the answer."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # who gives up waiting does not take the vote back
        with self._run.deciding():
            write = prepare()
            if write is None:
                future.set_result(answer(False))
                return future
            ticket = ticket._replace(base=self._revision)
            held = self._hold(ticket, write)
            self._senders.setdefault(ticket.key, []).append(_Sender(future, partial(answer, True)))
            self._cast.setdefault(ticket.key, _Cast(ticket, self.record.seating.absent, prepare))
        self._cast_vote(ticket, held)
        return future

    def _cast_vote(self, ticket: Ticket, held: _Held) -> None:
        """Vote for what a sender sent, and tell the sender where the vote cannot be kept."""
        try:
            self.reporting.vote(Vote(Proposal(ticket), held.outcome), held)
        except StorageFailed as fault:
            self._fail(ticket.key, fault)

    def _votes_again(self, key: str) -> bool:
        """Vote once more for what a sender sent, with the bytes that are here, where another write came before it and
        left the version as it is; or tell the sender what it is refused for now.

        False where nothing came before it, or where a host counts again that was sent nothing: then its sender sends it
        to all.
        """
        with self._run.deciding():
            cast = self._cast.pop(key, None)
            if cast is None or cast.ticket.base == self._revision or cast.absent - self.record.seating.absent:
                return False
            try:
                write = cast.judge()
            except EmaError as fault:
                refused: EmaError | None = fault
            else:
                if write is None:
                    return False
                refused, ticket = None, cast.ticket._replace(base=self._revision)
                held = self._hold(ticket, write)
                self._cast[key] = replace(cast, ticket=ticket)
        if refused:
            self._fail(key, refused)
        else:
            self._cast_vote(ticket, held)
        return True

    def _fail(self, key: str, fault: EmaError) -> None:
        """Tell those who sent a proposal why it was not committed."""
        with self._run.deciding():
            senders = self._senders.pop(key, [])
            self._cast.pop(key, None)
        for sender in senders:
            sender.future.set_exception(fault)

    def _held_beside(self, change: _Beside, outcome: str) -> _Held:
        """What a change holds that leaves the version as it is. Raises as ShardSnapshots.rows()."""
        if isinstance(change, RingKept):
            rows: RowChange | None = self._ring_of(change).rows(change.versions.split())
        else:
            rows = None if isinstance(change, Checkpoint) else self.snapshots.rows(change)
        return _Held(Write(_nothing, _nothing), outcome, change, rows)

    def _ring_of(self, change: RingKept) -> ShardRing:
        """The ring that a change is about. Raises InvalidRequest where the run has none."""
        if self.ring is None:
            raise InvalidRequest(f"run {self._run.config.run!r} has no ring, for {change.versions!r} or anything else")
        return self.ring

    def _check_ring(self, change: RingKept) -> None:
        """Whether a ring may have the snapshots of a change. Raises _Lacking, Overloaded; InvalidRequest where the run
        went back meanwhile, and as _ring_of()."""
        ring, version = self._ring_of(change), self._run.ledger.writable()
        if version.epoch != change.epoch:
            raise InvalidRequest(f"the ring was of epoch {change.epoch}, and the run is at version {version}")
        if lacked := ring.lacking(change.versions.split()):
            raise _Lacking(lacked)

    def _hold(
        self, ticket: Ticket, write: Write, writer: int | None = None, change: Adjustment | Rewind | None = None
    ) -> _Held:
        """Hold a write until the verdict; of one that comes again the first. change: that the write is, if any. Raises
        StepConflict for other bytes."""
        version = write.state.version if write.state else None
        outcome = self._run.ledger.outcome(version, writer)
        held = self._held.setdefault(ticket, _Held(write, outcome, rows=self._rows(write, outcome, change)))
        first = held.write.state
        if version and first and first.version.digest != version.digest:
            raise StepConflict(f"step {ticket.step} of run {self._run.config.run!r} came before with other bytes")
        return held

    def _rows(self, write: Write, outcome: str, change: Adjustment | Rewind | None) -> RowChange | None:
        """What else changes on the disk with the verdict on a change: a line of the run's timeline. None of a write
        that is no change."""
        if change is None:
            return None
        version = write.state.version if write.state else self._run.ledger.version
        return RowChange(line=self._told(change, outcome).line(version))

    def _told(self, change: Adjustment | Rewind, outcome: str) -> Told:
        """What the timeline says of a change."""
        if isinstance(change, Rewind):
            return told_rewind(change.snapshot, change.version, change.step, change.source)
        if change.kind == "decay" and change.decay is not None:
            return told_decay(change.average or self._run.config.averages[0].name, change.decay)
        return told_writer(writer_in(outcome)) if change.kind == "writer" else told_reset()

    def _judge(self, proposal: Proposal) -> None:
        """Vote for a change that a coordinator brings, or refuse it; one for an older revision comes again."""
        ticket = proposal.ticket
        try:
            if proposal.back is not None:
                held = self._way_back(proposal, proposal.back)
            elif self._is_own_return(proposal):
                held = self._filled(proposal)
            elif self._reads(proposal):
                if ticket.base != self._revision:
                    return
                held = self._read_for(ticket, cast("Rewind | _Averages", _change_in(proposal.change or "")))
            else:
                with self._run.deciding():
                    if ticket.base != self._revision:
                        return
                    held = self._others_return(proposal) or self._changed(proposal, _change_in(proposal.change or ""))
        except _Lacking as lacked:
            self.reporting.refuse(proposal, lacking(lacked.versions))
        except EmaError as fault:
            self.reporting.refuse(proposal, reason_of(fault))
        except MalformedMessage as fault:
            self.reporting.refuse(proposal, reason_of(InvalidRequest(f"no change: {fault}")))
        else:
            self._vote_for(proposal, held)

    def _judged(self, proposal: Proposal, done: Future[None]) -> None:
        """Refuse a change that this program fails at: whoever asked for it would wait for ever."""
        fault = None if done.cancelled() else done.exception()
        if fault:
            _log.error("run %s: a change could not be judged", self._run.config.run, exc_info=fault)
            defect = InternalError(f"a host failed at the change: {type(fault).__name__}")
            self.reporting.refuse(proposal, reason_of(defect))

    def _vote_for(self, proposal: Proposal, held: _Held | None) -> None:
        """Vote for a change. held: None where it was made before."""
        if held is None:
            self.reporting.refuse(proposal, MADE_BEFORE)
            return
        with contextlib.suppress(StorageFailed):  # the run tells so, and the change comes again
            self.reporting.vote(Vote(proposal, held.outcome), held)

    @staticmethod
    def _reads(proposal: Proposal) -> bool:
        """Whether a change reads files, or takes their room, before it can be voted for."""
        try:
            return isinstance(_change_in(proposal.change or ""), Rewind | _Averages)
        except MalformedMessage:
            return False  # to be refused

    def _read_for(self, ticket: Ticket, change: Rewind | _Averages) -> _Held | None:
        """What a change holds that touches files; None where it was made before. Raises as _rewound() and
        ShardAverages.prepare()."""
        if isinstance(change, Rewind):
            return self._rewound(ticket, change)
        setup = self._averages.prepare(change, ticket.key)
        with self._run.deciding():
            outcome = self._run.ledger.outcome()
            return None if setup is None else self._held.setdefault(ticket, self._held_averages(change, setup, outcome))

    def _held_averages(self, change: _Averages, setup: Setup, outcome: str) -> _Held:
        rows = self._averages.rows(change, setup)
        return _Held(self._run.moving_to_averages(setup), outcome, rows=rows)

    def _rewound(self, ticket: Ticket, change: Rewind) -> _Held | None:
        """What a rewind holds; None where it was made before. Raises as ShardSnapshots.read() and
        Run.prepare_rewound()."""
        version = self._run.ledger.version
        if version and version.made_by(ticket.key):
            return None
        rewound = self.snapshots.read(change, _lineage_of(ticket.key), ticket.key)
        with self._run.deciding():
            return self._hold(ticket, self._run.prepare_rewound(rewound), change=change)

    def _way_back(self, proposal: Proposal, back: int) -> _Held | None:
        """What a way back holds, of one that comes again the first; None where an operator's word was obeyed before.

        Raises as Checkpoints.read(), ShardSnapshots.state() and Run.write().
        """
        version = self._run.ledger.version
        if proposal.word and version and version.made_by(proposal.word):
            return None
        state, outcome = self.checkpoints.going_back(proposal, self._back_at(proposal, back))
        place = self._run.write(state) if state and proposal.to else None
        with self._run.deciding():
            held = _Held(self.checkpoints.back_at(state, outcome, place), outcome, rows=self._rows_of_word(proposal))
            return self._held.setdefault(proposal.ticket, held)

    def _back_at(self, proposal: Proposal, back: int) -> State | None:
        """What a way back leads to, as it was kept: the checkpoint of a revision, or a snapshot."""
        change = _change_in(proposal.to) if proposal.to else None
        if change is None:
            return self.checkpoints.read(back)
        if not isinstance(change, Rewind):
            raise InvalidRequest("shards go back to a snapshot, or to a checkpoint")
        return self.snapshots.state(change, _lineage_of(proposal.word))

    def _rows_of_word(self, proposal: Proposal) -> RowChange | None:
        """What else changes on the disk with a way back that an operator asked for: a line of the run's timeline."""
        if not proposal.word:
            return None
        change = _change_in(proposal.to) if proposal.to else None
        told = self._told(change, "") if isinstance(change, Rewind) else told_accepted()
        return RowChange(line=told.line(self._run.ledger.version))

    def _others_return(self, proposal: Proposal) -> _Held | None:
        """What the return of another host holds; None for any other proposal."""
        if proposal.seating is None:
            return None
        held = _Held(Write(_nothing, _nothing), self._run.ledger.outcome())
        return self._held.setdefault(proposal.ticket, held)

    def _is_own_return(self, proposal: Proposal) -> bool:
        """Whether a proposal has this very host count again."""
        seating = proposal.seating
        return seating is not None and self._place in self.record.seating.absent - seating.absent

    def _filled(self, proposal: Proposal) -> _Held:
        """What the twin has, to be put in place of what is here. Raises Overloaded, StorageFailed."""
        if self._twin is None:
            raise InvalidRequest("this host has no twin")
        key = proposal.ticket.key
        try:
            self._copy_snapshots(self._twin)
            self._averages.adopt(self._twin.averages(self._run, key), partial(self._begin_with, proposal))
            copied = self._twin.copy(self._run, key)
        finally:  # also of a copy that was made: the others may not agree on what it makes of the run
            self._fills_from = time.monotonic() + _FILL_PAUSE
        place = self._run.write(copied.state) if copied.state else None
        with self._run.deciding():
            write = self.checkpoints.back_at(copied.state, copied.outcome, place)
            return self._held.setdefault(proposal.ticket, _Held(write, copied.outcome, filled=True))

    def _begin_with(self, proposal: Proposal, setup: Setup) -> None:
        """Have nothing but these averages, for the return of this host: what it has here belongs to others. Raises
        StorageFailed."""

        def keep(record: Record) -> None:
            with self._run.deciding():
                self._versions.empty(encode(record), setup)
                self._run.moving_to_nothing(_nothing).put()
                self._run.moving_to_averages(setup).put()

        self.reporting.let_go(proposal, keep)

    def _copy_snapshots(self, twin: Twin) -> None:
        """Have the snapshots that the twin has, the ring's too, and no others. Raises Overloaded, StorageFailed."""
        self.snapshots.copy(twin)
        if self.ring:
            run = self._run.config.run
            self.ring.copy(twin.ring(run), partial(twin.ring_file, run))

    def _tell_filled(self) -> None:
        """Tell people that the shard is on both its hosts again."""
        on_disk = self._versions.on_disk if isinstance(self._versions, ShardMemoryVersions) else self._versions
        on_disk.remark("filled from its twin: the shard lies on two hosts again", self._run.ledger.version)

    def lend_averages(self, key: str) -> str:
        """Which averages the run is to have, for a twin that is to have them. key: as for lend(). Raises Overloaded."""
        with self._run.deciding():
            check_held(self.record, key)
            return dump_setup(self._run.ledger.setup)

    def lend(self, key: str) -> tuple[dict[str, Any], list[memoryview]]:
        """The run's version, for a twin that is to have it: facts, and the bytes of each average. key: of the vote that
        this shard holds, so that the run stays as it is. Raises Overloaded."""
        with self._run.deciding():
            vote, state = check_held(self.record, key), self._run.state
        head = {"outcome": vote.outcome if vote else "", "state": dump(state, final=False) if state else None}
        memory = self._run.memory
        return head, [memoryview(memory.to_host(arena.data).data) for arena in (state.arenas if state else ())]

    def _changed(self, proposal: Proposal, change: _Any) -> _Held | None:
        """What a change makes of the run; None where it was made before. Raises InvalidRequest, as Run.amend(), as
        Checkpoints.check(), as ShardSnapshots.check(), and as _check_ring()."""
        run, writer, ticket = self._run, None, proposal.ticket
        if isinstance(change, Rewind | _Averages):
            raise InvalidRequest("a change that touches files is judged where files are read")
        if not isinstance(change, Adjustment):
            if isinstance(change, Checkpoint):
                self.checkpoints.check(proposal.settles)
            elif isinstance(change, RingKept):
                self._check_ring(change)
            else:
                self.snapshots.check(change)
            return self._held.setdefault(ticket, self._held_beside(change, run.ledger.outcome()))
        if change.kind == "writer":
            writer = run.ledger.next_writer(ticket.key)
            write = self._attaching(writer, ticket.key) if writer > run.ledger.writer else None
        elif change.kind == "decay" and change.decay is not None:
            decay, average = change.decay, change.average
            write = run.prepare_amended(lambda after, version: after.with_decay(version, decay, average), ticket.key)
        elif change.kind == "reset":
            write = run.prepare_amended(lambda after, version: after.with_counter_reset(version), ticket.key)
        else:
            raise InvalidRequest(f"{change.kind!r} is no change that shards can make together")
        return self._hold(ticket, write, writer, change) if write else None

    def _attaching(self, writer: int, key: str) -> Write:
        return Write(_nothing, partial(self._run.ledger.attach, writer, key))

    @contextlib.contextmanager
    def _refusing(self, step: int | None, key: str) -> Iterator[None]:
        """Within the block a fault that will not pass is also a vote against the proposal."""
        try:
            yield
        except EmaError as fault:
            if not fault.retryable:
                self.refuse(step, key, fault)
            raise

    # --- a start ----------------------------------------------------------------------------------------------------

    def _take_up(self, record: Record) -> dict[Ticket, _Held]:
        """Go on with what the record says that the run's versions do not: the latest trainer, and a vote, which is
        returned."""
        ledger = self._run.ledger
        if record.made and (writer := writer_in(record.made.outcome)) > ledger.writer:
            ledger.attach(writer, _attached_by(record.made))
        if record.vote is None:
            return {}
        proposal, outcome, voted = record.vote.proposal, record.vote.outcome, self._versions.voted
        if proposal.back is not None:
            held = self._taken_up_way(record, proposal, outcome, voted)
        elif proposal.seating is not None:
            own = self._place in record.seating.absent
            write = self.checkpoints.back_at(voted, outcome) if own else Write(_nothing, _nothing)
            held = _Held(write, outcome, filled=own)
        else:
            held = self._taken_up(proposal, outcome, voted)
        return {proposal.ticket: held}

    def _taken_up_way(self, record: Record, proposal: Proposal, outcome: str, voted: State | None) -> _Held:
        """What a vote for a way back holds. voted: None where all are to begin anew, or what was voted for went with
        the machine, or is damaged: then the verdict is obeyed, and the run stays degraded."""
        anew = not proposal.back and not proposal.to
        if voted is None and not anew and self.checkpoints.lost:
            voted = self._voted_again(record, proposal)
        write = self.checkpoints.back_at(voted, outcome) if voted or anew else Write(_nothing, _nothing)
        return _Held(write, outcome, rows=self._rows_of_word(proposal))

    def _voted_again(self, record: Record, proposal: Proposal) -> State | None:
        """What the record's vote for a way back leads to, read once more, and kept as voted for; None where that cannot
        be."""
        try:
            state, _ = self.checkpoints.going_back(proposal, self._back_at(proposal, proposal.back or 0))
            if state:
                self._versions.vote(None, state, encode(record), proposal.ticket.base + 1)
        except EmaError as fault:
            _log.error("run %s: what this host has voted for is gone: %s", self._run.config.run, fault)
            return None
        return state

    def _taken_up(self, proposal: Proposal, outcome: str, voted: State | None) -> _Held:
        """What a vote for an update or a change holds. voted: the version that was voted for, if any."""
        change = _change_in(proposal.change) if proposal.change else None
        if isinstance(change, _Averages):
            return self._held_averages(change, self._averages.again(change, proposal.ticket.key), outcome)
        if change is not None and not isinstance(change, Adjustment | Rewind):
            return self._held_beside(change, outcome)
        attaching = self._attaching(writer_in(outcome), proposal.ticket.key)
        write = self._run.moving_to(voted, None) if voted else attaching
        return _Held(write, outcome, rows=self._rows(write, outcome, change))


def check_held(record: Record, key: str | None) -> Vote | None:
    """The vote that a record holds, which has this key; None for no key. Raises Overloaded where it holds another."""
    if key is None:
        return None
    if record.vote is None or record.vote.ticket.key != key:
        raise Overloaded("this host has not voted for the return of its twin", retry_after=1.0)
    return record.vote


def _lineage_of(key: str) -> str:
    """The lineage of a run whose initial weights come under this key: the same on all shards, and no other run's."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _attached_by(made: Vote) -> str | None:
    """The key of the trainer's call that made a revision; None where another write did."""
    text = made.proposal.change
    if not text or made.proposal.back is not None:
        return None
    change = _change_in(text)
    return made.ticket.key if isinstance(change, Adjustment) and change.kind == "writer" else None


def _change_in(text: str) -> _Any:
    """Raises MalformedMessage."""
    kinds = (Adjustment, AverageAdded, AverageRemoved, Checkpoint, Rewind, RingKept)
    return cast("_Any", decode(text, *kinds, SnapshotBegun, SnapshotTaken, SnapshotGone))


def _outlives(vote: Vote) -> bool:
    """Whether what was voted for is on the medium, as the vote is."""
    text = vote.proposal.change
    if not text or vote.proposal.back is not None:
        return False
    return isinstance(_change_in(text), RingKept | SnapshotTaken | SnapshotGone | _Averages)


def _nothing() -> None:
    """Keeps what the record keeps: a trainer's number stands in the outcome of each vote."""
