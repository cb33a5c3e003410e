"""A shard of a run on this server: judges and prepares what comes, votes, and does as the verdict says.

    sender       -> push()        the update's version is finished, judged, written; the vote is durable; a future
    coordinator  -> receive()     the verdict is durable; the version is put in place; the future has its answer

The holder of a decisions.Shard (see there): a record is durable before anything is sent that follows from it, and where
it cannot be written the shard goes on as if it had been killed before. Between vote and verdict neither a lock is held
nor a thread: what waits is a Write, its slot and its senders' futures.

Knows one run, its versions and its Shard. Does not know HTTP, which coordinator there is, or how messages travel.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ema_client.errors import EmaError, InvalidRequest, StepConflict, StorageFailed, Superseded
from ema_client.protocol import RunInfo, UpdateResult
from ema_service.cluster.decisions import Shard
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.messages import (
    Adjustment,
    Answer,
    Ask,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Ticket,
    Vote,
)
from ema_service.cluster.reasons import error_of, reason_of
from ema_service.persistence import ShardMemoryVersions, ShardVersions
from ema_service.persistence.versions import SlotPlace
from ema_service.runs import Parameters, Run, Update, Write
from ema_service.runs.ledger import writer_in

__all__ = ["ShardRun"]

T = TypeVar("T")

#: What is to be done once the run's lock is free: sending, and answering.
_Act = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Sender(Generic[T]):
    """Whoever sent a proposal and waits. answer: gives the answer to one that was committed, under the run's lock."""

    future: Future[T]
    answer: Callable[[], T]


@dataclass(frozen=True, slots=True)
class _Held:
    """A write that the shard has voted for, or that waits. outcome: as in Vote."""

    write: Write
    outcome: str


class ShardRun:
    """One shard of a run. Thread-safe; methods that vote may block for a row, as those of Run do, and not longer.

    While the run is degraded the shard says nothing: without it nothing is decided.
    """

    def __init__(
        self,
        run: Run,
        versions: ShardVersions | ShardMemoryVersions,
        send: Callable[[Report | Refusal], None],
    ) -> None:
        """run, versions: as Registry.get() and shard() have them, for which there is no other ShardRun. send: called
        with what is for the coordinator, on any thread, without a lock; what it loses is said again."""
        self._run = run
        self._versions = versions
        self._send = send
        #: The record that is on disk.
        self._durable = decode(versions.record, Record) if versions.record else Record()
        self._shard = Shard(versions.place, self._durable)
        self._held: dict[Ticket, _Held] = {}
        #: By the key of the proposal.
        self._senders: dict[str, list[_Sender[Any]]] = {}
        with run.deciding():
            self._take_up()

    @property
    def record(self) -> Record:
        """What the shard has promised, voted for and committed, on disk."""
        return self._durable

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

    # --- from and to the coordinator --------------------------------------------------------------------------------

    def receive(self, message: Ask | Propose | Resolve) -> None:
        """Do as a coordinator says. Where a record cannot be written the run tells so, and nothing is done."""
        if self._run.ledger.fault:
            return
        with self._run.deciding():
            outputs: list[Report | Refusal | Answer] = []
            for output in self._shard.receive(message):
                outputs += self._prepare_change(output) if isinstance(output, Proposal) else [output]
            acts = self._carry_out(outputs)
        _do(acts)

    def report(self) -> None:
        """Say how the shard stands: at a start, and now and then while no verdict comes."""
        if not self._run.ledger.fault:
            with self._run.deciding():  # not while a record is being written that may fail
                report = self._shard.report()
            self._send(report)

    def insist(self) -> None:
        """What waits here has waited as long as a proposal should."""
        if not self._run.ledger.fault:
            with self._run.deciding():
                reports = self._shard.insist()
            for report in reports:
                self._send(report)

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
            ticket = ticket._replace(base=self._durable.revision)
            held = self._hold(ticket, write)
            self._senders.setdefault(ticket.key, []).append(_Sender(future, partial(answer, True)))
            acts = self._carry_out(self._shard.prepare(Vote(Proposal(ticket), held.outcome)))
        _do(acts)
        return future

    def _hold(self, ticket: Ticket, write: Write, writer: int | None = None) -> _Held:
        """Hold a write until the verdict; of one that comes again the first. Raises StepConflict for other bytes."""
        version = write.state.version if write.state else None
        held = self._held.setdefault(ticket, _Held(write, self._run.ledger.outcome(version, writer)))
        first = held.write.state
        if version and first and first.version.digest != version.digest:
            raise StepConflict(f"step {ticket.step} of run {self._run.config.run!r} came before with other bytes")
        return held

    def _prepare_change(self, proposal: Proposal) -> list[Report | Refusal | Answer]:
        """Vote for a change that a coordinator brings, or refuse it."""
        ticket = proposal.ticket
        try:
            held = self._changed(ticket, decode(proposal.change or "", Adjustment))
        except EmaError as fault:
            return [*self._shard.refuse(ticket, reason_of(fault))]
        except MalformedMessage as fault:
            return [*self._shard.refuse(ticket, reason_of(InvalidRequest(f"no change: {fault}")))]
        if held is None:
            return [*self._shard.refuse(ticket, "applied before")]
        return [*self._shard.prepare(Vote(proposal, held.outcome))]

    def _changed(self, ticket: Ticket, change: Adjustment) -> _Held | None:
        """What a change makes of the run; None where it was made before. Raises InvalidRequest, and as Run.amend()."""
        run, writer = self._run, None
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
        return self._hold(ticket, write, writer) if write else None

    def _attaching(self, writer: int, key: str) -> Write:
        return Write(_nothing, partial(self._run.ledger.attach, writer, key))

    @contextlib.contextmanager
    def _refusing(self, step: int | None, key: str) -> Iterator[None]:
        """Within the block a fault that will not pass is also a vote against the proposal."""
        try:
            yield
        except EmaError as fault:
            if not fault.retryable and not self._run.ledger.fault:
                with self._run.deciding():
                    refusals = self._shard.refuse(Ticket(self._durable.revision, step, key), reason_of(fault))
                for refusal in refusals:
                    self._send(refusal)
            raise

    # --- what follows -----------------------------------------------------------------------------------------------

    def _carry_out(self, outputs: Iterable[Report | Refusal | Answer]) -> list[_Act]:
        """Make the record durable and what was committed the run's. Returns what may be said then. Under the lock."""
        try:
            self._persist()
        except StorageFailed as fault:
            self._shard = Shard(self._versions.place, self._durable)
            return [act for key in list(self._senders) for act in self._fail(key, fault)]
        finally:
            self._let_go()
        acts: list[_Act] = []
        for output in outputs:
            acts += self._answer(output) if isinstance(output, Answer) else [partial(self._send, output)]
        return acts

    def _persist(self) -> None:
        """Keep the record where it changed, with the version that it speaks of; then do as it says. Raises
        StorageFailed, and then nothing was done."""
        before, after, versions = self._durable, self._shard.record, self._versions
        if after == before:
            return
        text = encode(after)
        held = self._held[after.vote.ticket] if after.vote else None
        if after.revision > before.revision:
            versions.confirm(text)
        elif after.vote == before.vote:
            versions.promise(text)
        elif held and held.write.state:
            place = held.write.place
            versions.vote(place.slot if isinstance(place, SlotPlace) else None, held.write.state, text)
        else:
            versions.discard(text)
        self._durable = after
        if after.made and after.revision > before.revision:
            self._held[after.made.ticket].write.put()

    def _let_go(self) -> None:
        """Drop every write that is neither voted for nor waiting, with its memory and its slot."""
        report = self._shard.report()
        live = [each.ticket for each in (report.record.vote, report.waiting) if each]
        self._held = {ticket: held for ticket, held in self._held.items() if ticket in live}

    def _answer(self, answer: Answer) -> list[_Act]:
        """Tell those who sent a proposal what became of it."""
        if answer.committed:
            senders = self._senders.pop(answer.key, [])
            return [partial(each.future.set_result, each.answer()) for each in senders]
        superseded = Superseded(
            f"another write to run {self._run.config.run!r} came in place of this one", retry_after=0.0
        )
        return self._fail(answer.key, error_of(answer.reason) if answer.reason else superseded)

    def _fail(self, key: str, fault: EmaError) -> list[_Act]:
        return [partial(each.future.set_exception, fault) for each in self._senders.pop(key, [])]

    # --- a start ----------------------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Go on with what the record says that the run's versions do not: the latest trainer, and a vote."""
        record, ledger = self._durable, self._run.ledger
        if record.made and (writer := writer_in(record.made.outcome)) > ledger.writer:
            ledger.attach(writer)
        if record.vote:
            ticket, voted = record.vote.ticket, self._versions.voted
            if voted:
                write = self._run.moving_to(voted, None)
            else:
                write = self._attaching(writer_in(record.vote.outcome), ticket.key)
            self._held[ticket] = _Held(write, record.vote.outcome)


def _lineage_of(key: str) -> str:
    """The lineage of a run whose initial weights come under this key: the same on all shards, and no other run's."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _do(acts: Iterable[_Act]) -> None:
    for act in acts:
        act()


def _nothing() -> None:
    """Keeps what the record keeps: a trainer's number stands in the outcome of each vote."""
