"""A shard's side of its talk with coordinators: its record is kept before anything is said that follows from it.

What a shard is to its run stands in RecordStore: six calls, of which four keep a record. Whoever has prepared a
proposal calls vote(), whoever cannot calls refuse(); all else comes from the coordinator.

Several coordinators may be named. The shard talks to all of them, and obeys the one of the largest term; the others
learn so from its reports, and end.

Knows the decision core, and which change of a record is which event. Does not know what a proposal does, or sockets
(link).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ema_client.errors import StorageFailed
from ema_service.cluster.decisions import Shard
from ema_service.cluster.link import Link
from ema_service.cluster.messages import (
    Answer,
    Arrival,
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
from ema_service.cluster.token import ClusterToken

__all__ = ["RecordStore", "Reporting"]

_log = logging.getLogger(__name__)

#: Seconds that a proposal waits behind one that nobody completes.
PATIENCE_SECONDS = 10.0


class RecordStore(Protocol):
    """What a shard's run does as the coordinator decides.

    Each of the first four returns once the record is durable, all of it or nothing, and is called for one record after
    another, from any thread. Raises StorageFailed where nothing was changed; then the shard stands where it stood
    before. Where that is not known the process has to end, and to begin with what is there.
    """

    def promise(self, record: Record) -> None:
        """Keep the record: another coordinator is obeyed from now on."""

    def vote(self, record: Record) -> None:
        """Keep the record with its vote, with the version that was prepared for it."""

    def commit(self, record: Record) -> None:
        """Keep the record, and make the version that was voted for the run's."""

    def abort(self, record: Record) -> None:
        """Keep the record, and drop the version that was voted for. Where the record has another vote, keep the version
        of that one: its proposal has waited."""

    def propose(self, proposal: Proposal) -> None:
        """Have a change judged and prepared, on another thread: then Reporting.vote() or refuse(). Where vote() raises
        StorageFailed the change comes again."""

    def answer(self, answer: Answer) -> None:
        """Tell whoever sent a proposal what became of it; whoever is gone will ask again. Where it was not committed,
        what was prepared for it is not needed any more."""


class Reporting:
    """One shard of one run, and its talk with the run's coordinators.

    Thread-safe; its calls may be made under no lock that the store takes in its own.
    """

    def __init__(
        self,
        run: str,
        arrival: Arrival,
        record: Record,
        store: RecordStore,
        coordinators: Sequence[str],
        token: ClusterToken,
        *,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """record: the last durable one. coordinators: their URLs. patience: seconds that a proposal waits behind one
        that nobody completes. Raises ValueError for a URL that is none of a coordinator."""
        self._place = arrival.shard
        self._arrival = arrival
        self._store = store
        self._patience = patience
        self._lock = threading.Lock()
        self._kept = record
        self._core = Shard(self._place, record)
        #: Changes that the store was told to prepare, and has not yet.
        self._preparing: set[Ticket] = set()
        #: What waits for the verdict on another proposal, and since when.
        self._waiting: tuple[Proposal | None, float] = (None, 0.0)
        self._links = [Link(url, run, lambda: self._arrival, token, self.hear) for url in coordinators]

    @property
    def record(self) -> Record:
        """The last durable record."""
        return self._kept

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

    def vote(self, vote: Vote) -> None:
        """Vote for a proposal whose version is prepared, on the revision that the ticket names. Again at each retry.

        What becomes of it is told by RecordStore.answer(), during this call or later. Raises StorageFailed where the
        vote could not be kept; then the proposal may be sent again.
        """
        self._act(lambda core: core.prepare(vote), vote.ticket)

    def refuse(self, ticket: Ticket, reason: str) -> None:
        """Vote against a proposal, which is then dropped on all shards."""
        self._act(lambda core: core.refuse(ticket, reason), ticket)

    def hear(self, message: Ask | Propose | Resolve) -> None:
        """Do as a coordinator says. What could not be kept is heard again, for it will be said again."""
        try:
            self._act(lambda core: core.receive(message))
            self._insist()
        except StorageFailed as fault:
            _log.warning("a coordinator's %s was not carried out: %s", type(message).__name__.lower(), fault)

    # ----------------------------------------------------------------------------------------------------------------

    def _act(
        self, act: Callable[[Shard], Sequence[Report | Refusal | Answer | Proposal]], prepared: Ticket | None = None
    ) -> None:
        """Have the core act; keep the record, and only then send what follows. Raises StorageFailed.

        prepared: what the store was told to prepare, if it is done with that.
        """
        waiting, kept = None, False
        try:
            with self._lock:
                if prepared:
                    self._preparing.discard(prepared)
                waiting = self._core.report().waiting
                outputs = act(self._core)
                self._keep()
                kept = True
                proposals = self._to_prepare(outputs)
                for output in outputs:
                    if isinstance(output, Report | Refusal):
                        for link in self._links:
                            link.say(output)
        finally:
            if waiting and not kept:  # in memory alone, in the core that is given up
                self._store.answer(Answer(waiting.ticket.key, committed=False))
        for output in outputs:
            if isinstance(output, Answer):
                self._store.answer(output)
        for proposal in proposals:
            self._store.propose(proposal)

    def _to_prepare(self, outputs: Sequence[Report | Refusal | Answer | Proposal]) -> list[Proposal]:
        """The proposals that the store is not preparing yet."""
        base = self._core.record.revision
        self._preparing = {ticket for ticket in self._preparing if ticket.base == base}
        found = [each for each in outputs if isinstance(each, Proposal) and each.ticket not in self._preparing]
        self._preparing.update(proposal.ticket for proposal in found)
        return found

    def _keep(self) -> None:
        """Make the core's record durable, or go on with a core from the last record that is."""
        record, before = self._core.record, self._kept
        if record is before:
            return
        try:
            self._keeper(before, record)(record)
            self._kept = record
        finally:
            if self._kept is before:
                self._core = Shard(self._place, before)

    def _keeper(self, before: Record, after: Record) -> Callable[[Record], None]:
        """What of the store keeps the record, by what changed in it."""
        if after.revision > before.revision:
            return self._store.commit
        if after.vote == before.vote:
            return self._store.promise
        return self._store.abort if before.vote else self._store.vote

    def _insist(self) -> None:
        """Say so once what waits has waited for long. Looked at whenever a coordinator says something, which is every
        second."""
        waiting, now = self._core.report().waiting, time.monotonic()
        if waiting != self._waiting[0]:
            self._waiting = (waiting, now)
        elif waiting and now - self._waiting[1] >= self._patience:
            self._act(lambda core: core.insist())
