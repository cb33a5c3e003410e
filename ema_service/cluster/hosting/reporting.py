"""A shard's side of its talk with coordinators: its record is kept before anything is said that follows from it.

What a shard is to its run stands in RecordStore: seven calls, of which four keep a record. Whoever has prepared a
proposal calls vote(), whoever cannot calls refuse(); all else comes from the coordinator. What was prepared is held
here for as long as the shard votes for its proposal or has the proposal wait, and not longer.

Several coordinators may be named. The shard talks to all of them, and obeys the one of the largest term; the others
learn so from its reports, and end.

Knows the decision core, and which change of a record is which event. Does not know what a proposal does, or sockets
(link).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from ema_client.errors import StorageFailed
from ema_service.cluster.decisions import Shard
from ema_service.cluster.hosting.link import Link
from ema_service.cluster.messages import (
    Answer,
    Arrival,
    Ask,
    Kept,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Ticket,
    Vote,
)
from ema_service.cluster.token import ClusterToken
from ema_service.runs.verdicts import PATIENCE_SECONDS

__all__ = ["RecordStore", "Reporting"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class RecordStore(Protocol[T_contra]):
    """What a shard's run does as the coordinator decides.

    Each of the four that keep a record returns once the record is durable, all of it or nothing, and is called for one
    record after another, from any thread. Raises StorageFailed where nothing was changed; then the shard stands where
    it stood before. Where that is not known the process has to end, and to begin with what is there.

    prepared: what Reporting.vote() was called with for the proposal.
    """

    def is_whole(self) -> bool:
        """Whether the run's version can be read. While it cannot nothing is decided, unless an operator says how to go
        on, or the shard is filled from its twin."""

    def kept(self) -> Kept:
        """Of which revisions there are checkpoints."""

    def returns(self) -> bool:
        """Whether the shard can be filled from its twin, where it was left behind."""

    def promise(self, record: Record) -> None:
        """Keep the record: another coordinator is obeyed from now on, or another seating is known."""

    def vote(self, record: Record, prepared: T_contra) -> None:
        """Keep the record with its vote, with the version that was prepared for it."""

    def commit(self, record: Record, prepared: T_contra) -> None:
        """Keep the record, and make the version that was voted for the run's."""

    def abort(self, record: Record, prepared: T_contra | None) -> None:
        """Keep the record, and drop the version that was voted for. Where the record has another vote, keep the version
        of that one, which is the prepared one: its proposal has waited."""

    def propose(self, proposal: Proposal) -> None:
        """Have a change judged and prepared, on another thread: then Reporting.vote() or refuse(). Where vote() raises
        StorageFailed the change comes again."""

    def answer(self, answer: Answer) -> None:
        """Tell whoever sent a proposal what became of it; whoever is gone will ask again."""


class Reporting(Generic[T]):
    """One shard of one run, and its talk with the run's coordinators.

    Thread-safe; its calls may be made under no lock that the store takes in its own. More than twenty methods:
    what those who vote, the coordinators and whoever asks how the talk stands call, and the keeping of the record.
    """

    def __init__(
        self,
        run: str,
        arrival: Arrival,
        record: Record,
        store: RecordStore[T],
        coordinators: Sequence[str],
        token: ClusterToken,
        *,
        prepared: Mapping[Ticket, T] | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """run: the talk's name. record: the last durable one. coordinators: their URLs. prepared: by its ticket, what
        the record's vote is for, where there is one. patience: seconds that a proposal waits behind one that nobody
        completes. Raises ValueError for a URL that is none of a coordinator."""
        self._place = arrival.shard
        self._arrival = arrival
        self._store = store
        self._patience = patience
        self._lock = threading.Lock()
        self._kept = record
        self._core = Shard(self._place, record)
        #: What was prepared for the vote, and for what waits.
        self._prepared = dict(prepared or {})
        #: Changes that the store was told to prepare, and has not yet.
        self._preparing: set[Ticket] = set()
        #: What waits for the verdict on another proposal, and since when.
        self._waiting: tuple[Proposal | None, float] = (None, 0.0)
        self._links = [Link(url, run, lambda: self._arrival, token, self.hear) for url in coordinators]
        self._asked = False

    @property
    def record(self) -> Record:
        """The last durable record."""
        return self._kept

    @property
    def linked(self) -> bool:
        """Whether any coordinator is heard."""
        return any(link.linked for link in self._links)

    @property
    def counts(self) -> bool:
        """Whether the shard counts, and lost nothing, as a coordinator has told since the talk began: before, others
        may have gone on without it."""
        return self._asked and not self._kept.lost and not self.absent

    @property
    def absent(self) -> bool:
        """Whether the others go on without the shard, for all that it knows."""
        return self._place in self._kept.seating.absent

    @property
    def heard(self) -> float:
        """When the latest word of any coordinator came, by time.monotonic(); minus infinity before the first."""
        return max((link.heard for link in self._links), default=float("-inf"))

    @property
    def replaced(self) -> str:
        """By whom, as a coordinator says, this process was replaced as its host; empty by nobody."""
        return next((link.replaced for link in self._links if link.replaced), "")

    def start(self) -> None:
        """Begin to look for coordinators."""
        for link in self._links:
            link.start()

    def close(self) -> None:
        """Talk to nobody any more. What has no verdict keeps its vote."""
        for link in self._links:
            link.close()

    def move(self, arrival: Arrival) -> None:
        """Tell where the shard is by now, or which stretch it has."""
        self._arrival = arrival
        for link in self._links:
            link.say(arrival)

    def vote(self, vote: Vote, prepared: T) -> None:
        """Vote for a proposal whose version is prepared, on the revision that the ticket names. Again at each retry,
        when what was prepared first stays.

        What becomes of it is told by RecordStore.answer(), during this call or later. Raises StorageFailed where the
        vote could not be kept; then the proposal may be sent again.
        """

        def prepare(core: Shard) -> Sequence[Report | Answer]:
            self._prepared.setdefault(vote.ticket, prepared)
            return core.prepare(vote)

        self._act(prepare, vote.ticket)

    def let_go(self, returning: Proposal, keep: Callable[[Record], None]) -> None:
        """Have the shard begin with nothing, for its return. keep: keeps the record of that, and gives up what is here;
        raises StorageFailed where nothing was changed. Not called for what is no return of this shard any more."""
        self._act(lambda core: core.let_go(returning), keep=keep)

    def refuse(self, proposal: Proposal, reason: str) -> None:
        """Vote against a proposal, which is then dropped on all shards."""
        self._act(lambda core: core.refuse(proposal, reason), proposal.ticket)

    def postpone(self, ticket: Ticket) -> None:
        """Neither vote for a proposal nor refuse it: it cannot be judged now, and comes again."""
        with self._lock:
            self._preparing.discard(ticket)

    def hear(self, message: Ask | Propose | Resolve) -> None:
        """Do as a coordinator says. What could not be kept is heard again, for it will be said again."""
        try:
            self._act(lambda core: core.receive(message))
            self._asked = self._asked or isinstance(message, Ask)
            if self._has_waited_long():
                self.insist()
        except StorageFailed as fault:
            _log.warning("a coordinator's %s was not carried out: %s", type(message).__name__.lower(), fault)

    def insist(self) -> None:
        """Say that what waits has waited as long as a proposal should: whoever sent the shard's vote may be gone."""
        self._act(lambda core: core.insist())

    def _act(
        self,
        act: Callable[[Shard], Sequence[Report | Refusal | Answer | Proposal]],
        prepared: Ticket | None = None,
        keep: Callable[[Record], None] | None = None,
    ) -> None:
        """Have the core act; keep the record, and only then send what follows. Raises StorageFailed.

        prepared: what the store was told to prepare, if it is done with that. keep: keeps a record that is none of the
        store's events.
        """
        waiting, kept = None, False
        try:
            with self._lock:
                if prepared:
                    self._preparing.discard(prepared)
                waiting = self._core.report().waiting
                self._core.note_damage(not self._store.is_whole())
                outputs = act(self._core)
                self._keep(keep)
                kept = True
                proposals = self._to_prepare(outputs)
                for output in outputs:
                    if isinstance(output, Report):
                        self._say(self._dressed(output))
                    elif isinstance(output, Refusal):
                        self._say(output)
        finally:
            if waiting and not kept:  # in memory alone, in the core that is given up
                self._store.answer(Answer(waiting.ticket.key, committed=False))
        for output in outputs:
            if isinstance(output, Answer):
                self._store.answer(output)
        for proposal in proposals:
            self._store.propose(proposal)

    def _dressed(self, report: Report) -> Report:
        """A report with what the store says in it."""
        store = self._store
        return report._replace(kept=store.kept(), returns=self._returns(), damaged=not store.is_whole())

    def _returns(self) -> bool:
        """Whether the shard was left behind, and can be filled."""
        return self._place in self._core.record.seating.absent and self._store.returns()

    def _say(self, output: Report | Refusal) -> None:
        for link in self._links:
            link.say(output)

    def _to_prepare(self, outputs: Sequence[Report | Refusal | Answer | Proposal]) -> list[Proposal]:
        """The proposals that the store is not preparing yet."""
        base = self._core.record.revision
        self._preparing = {ticket for ticket in self._preparing if ticket.base >= base}
        found = [each for each in outputs if isinstance(each, Proposal) and each.ticket not in self._preparing]
        self._preparing.update(proposal.ticket for proposal in found)
        return found

    def _keep(self, keep: Callable[[Record], None] | None) -> None:
        """Make the core's record durable, or go on with a core from the last record that is. Then hold nothing that was
        prepared for a proposal which is neither voted for nor waits."""
        record, before = self._core.record, self._kept
        try:
            if record is not before:
                (keep or partial(self._store_record, before))(record)
                self._kept = record
        finally:
            if self._kept is not record:
                self._core = Shard(self._place, before)
            report = self._core.report()
            live = [each.ticket for each in (report.record.vote, report.waiting) if each]
            self._prepared = {ticket: each for ticket, each in self._prepared.items() if ticket in live}

    def _store_record(self, before: Record, after: Record) -> None:
        """Have the store keep a record, as the event that it is by what changed in it."""
        if after.made and after.made != before.made:
            self._store.commit(after, self._prepared[after.made.ticket])
        elif after.vote == before.vote:
            self._store.promise(after)
        elif before.vote:
            self._store.abort(after, self._prepared[after.vote.ticket] if after.vote else None)
        elif after.vote:
            self._store.vote(after, self._prepared[after.vote.ticket])

    def _has_waited_long(self) -> bool:
        """Whether what waits has waited for long. Looked at whenever a coordinator says something, which is every
        second."""
        waiting, now = self._core.report().waiting, time.monotonic()
        if waiting != self._waiting[0]:
            self._waiting = (waiting, now)
            return False
        return waiting is not None and now - self._waiting[1] >= self._patience
