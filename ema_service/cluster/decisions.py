"""Two-phase commit of a run's proposals over its k shards: each becomes the next revision on all shards or on none.

    sender       -> shard         the slice of a proposal; the shard prepares the proposal beside its current version
    shard        -> coordinator   Report: the shard's record, which holds a vote by now
    coordinator  -> shards        Resolve: commit, once all k hold a vote of one ticket; else abort, or nothing yet
    shard        -> sender        Answer

**The k votes are the record of a commit.** A shard gives up a vote only on the coordinator's word, and the coordinator
keeps nothing: one that starts claims a larger term and asks all shards. A ticket on all k is committed; a shard that is
one revision behind holds the vote that the others have committed. So there is no log and nothing to replicate, and
while a shard is missing nothing is decided: without all k no version can be read anyway.

**A vote is aborted for three reasons**: a shard refuses the proposal; the shards disagree about its outcome; a
proposal that ranks higher waits. A trainer's newer step ranks higher than an older one, whose trainer may be gone; a
proposal that has waited too long ranks higher than one of any step; what a coordinator brings to all shards ranks
highest. Nothing is aborted because a shard crashed: its neighbours keep what they prepared.

**Where a machine took with it what a shard had promised to keep**, the shard comes back *lost*: an older record, which
says so, and checkpoints. Then the coordinator has all shards go back to the newest checkpoint that all of them have, by
a proposal like any other, which follows the largest revision that any shard knows, and is for every shard the next one.

**Nothing depends on the order of messages.** Each report carries a whole record with its edition, and each verdict
names the edition it is about; an older report is ignored by the coordinator, a verdict on another edition by the shard.
Sending anything again is always right, and enough to mend any loss: Shard.report() and Coordinator.ask(), now and then.

DESIGN.md in this folder has the argument. Both classes are pure: no I/O, no clock, no thread, no chance. Each method
returns what is to be sent. **The holder of a Shard makes ``record`` durable, where it is another than before, and only
then sends anything**; where the record cannot be written, or a process ends, the holder goes on with
``Shard(place, the last durable record)``. The holder of a Coordinator writes nothing.

Knows tickets, votes, terms. Does not know what a proposal does, how its bytes are prepared, or how messages travel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ema_service.cluster.messages import (
    Answer,
    Ask,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Term,
    Ticket,
    Vote,
)

__all__ = ["Coordinator", "Shard", "after_loss"]

#: What a coordinator has to say: to a shard, or to whoever asked for a change.
Output = Answer | Ask | Propose | Resolve

#: What a shard that lost records counts its editions on by, so that none comes again: more than a shard ever wrote
#: between two records that its machine did not take.
_EDITIONS_LOST = 1 << 32


def after_loss(record: Record, *, has_voted: bool = False) -> Record:
    """The record that a shard goes on with whose machine went down, and which may have lost later records than this
    one; to be durable beyond the machine before anything is said, as every record is while the shard is lost.

    has_voted: whether what the record votes for outlived the machine, as the record did before it was told. Then the
    vote stands, for others may have committed it.
    """
    if record.lost:
        return record
    vote = record.vote if has_voted else None
    return record._replace(edition=record.edition + _EDITIONS_LOST, vote=vote, lost=True)


class Shard:
    """One shard of one run: its vote, and what it does with the coordinator's verdict.

    record: durable before anything that a method returns is sent. A shard has one vote at most; a second proposal
    waits, in memory alone, for the verdict on the first.
    """

    def __init__(self, place: int, record: Record) -> None:
        """place: among the run's shards, from 0. record: the last durable one; ``Record()`` where there is none."""
        self.record = record
        self._place = place
        self._waiting: Vote | None = None
        self._overdue = False

    def report(self) -> Report:
        """How the shard stands, for the coordinator that it obeys: at a start, and again while no verdict comes."""
        return Report(self._place, self.record, self._waiting.proposal if self._waiting else None, self._overdue)

    def receive(self, message: Ask | Propose | Resolve) -> list[Report | Answer | Proposal]:
        """What a coordinator's message leads to. Reports go back to whoever sent the message.

        An answer is for those who sent the proposal to this shard. A proposal is for the shard's holder, to be judged
        and prepared: then prepare(), or refuse().
        """
        if isinstance(message, Ask):
            if message.term > self.record.term:
                self.record = self.record._replace(term=message.term)
        elif message.term == self.record.term:
            if isinstance(message, Propose):
                return [message.proposal] if self._lacks(message.proposal) else [self.report()]
            if message.edition == self.record.edition and self.record.vote:
                return [*self._resolve(self.record.vote, message), self.report()]
        # Also to a coordinator whose time is over, which learns so from the report's term.
        return [self.report()]

    def prepare(self, vote: Vote) -> list[Report | Answer]:
        """Vote for a proposal whose bytes are durable beside the current version; again at each retry.

        Where the shard has voted for another proposal, this one waits. A proposal that follows another revision is
        superseded, and of two that wait the one that ranks lower.
        """
        if not self._follows(vote.proposal):
            return [Answer(vote.ticket.key, committed=False)]
        if self.record.vote is None:
            self._turn_to(vote)
        elif self.record.vote.ticket != vote.ticket:
            return [*self._wait(vote), self.report()]
        return [self.report()]

    def refuse(self, ticket: Ticket, reason: str) -> list[Refusal]:
        """Vote against a proposal that this shard has not voted for. Nothing is kept: whoever asks again is refused
        again."""
        held = self.record.vote and self.record.vote.ticket == ticket
        return [] if held else [Refusal(self._place, self.record.term, ticket, reason)]

    def insist(self) -> list[Report]:
        """What waits has waited as long as a proposal should: whoever sent what the shard voted for may be gone."""
        self._overdue = self._waiting is not None
        return [self.report()]

    # ----------------------------------------------------------------------------------------------------------------

    def _follows(self, proposal: Proposal) -> bool:
        """Whether a proposal may lead on from the shard's revision."""
        if proposal.back is not None:
            return proposal.ticket.base >= self.record.revision
        return proposal.ticket.base == self.record.revision and not self.record.lost

    def _lacks(self, proposal: Proposal) -> bool:
        """Whether a proposal could be prepared here and has not been."""
        votes = (self.record.vote, self._waiting)
        return self._follows(proposal) and not any(vote and vote.ticket == proposal.ticket for vote in votes)

    def _wait(self, vote: Vote) -> list[Answer]:
        """Let a proposal wait for the verdict on another. Of one rank the one that came first stays."""
        before = self._waiting
        if before and before.ticket == vote.ticket:
            return []
        if before and _rank(before.proposal) >= _rank(vote.proposal):
            return [Answer(vote.ticket.key, committed=False)]
        self._waiting, self._overdue = vote, False
        return [Answer(before.ticket.key, committed=False)] if before else []

    def _resolve(self, vote: Vote, verdict: Resolve) -> list[Answer]:
        """Do as the verdict on the shard's vote says. After an abort the shard votes for what has waited."""
        waiting = self._waiting
        answers = [Answer(vote.ticket.key, verdict.committed, verdict.reason)]
        if verdict.committed:
            self._turn_to(None, made=vote)
            if waiting:
                answers.append(Answer(waiting.ticket.key, committed=False))
        else:
            self._turn_to(waiting)
        return answers

    def _turn_to(self, vote: Vote | None, *, made: Vote | None = None) -> None:
        """Replace the record: another vote and, where one was committed, the next revision."""
        old = self.record
        self.record = old._replace(edition=old.edition + 1, vote=vote)
        if made:
            way = made.proposal
            settled = way.settles or old.settled if way.back is None else way.back
            revision = made.ticket.base + 1
            lost = old.lost and way.back is None
            self.record = self.record._replace(revision=revision, made=made, lost=lost, settled=settled)
        self._waiting, self._overdue = None, False


class Coordinator:
    """Decides for one run while it lives, and keeps nothing. Several at once do no harm: one of them is obeyed.

    term: claimed once all shards were asked for theirs. deposed: whether another coordinator has claimed a larger one;
    then this one says nothing any more, and ends. fault: why nothing can be decided, None if all is well: shards whose
    records no crash explains, for one has an older copy of its disk, say.
    """

    def __init__(self, name: str, shards: int) -> None:
        """name: drawn at random for each coordinator. shards: how many the run has."""
        self.term = Term()
        self.deposed = False
        self.fault: str | None = None
        self._name = name
        self._shards = shards
        #: By shard: its newest report of this term, and what was said to that report.
        self._reports: dict[int, Report] = {}
        self._said: dict[int, Propose | Resolve] = {}
        #: ticket -> reason.
        self._refused: dict[Ticket, str] = {}
        #: key -> change and what it settles, in the order in which changes are to take effect.
        self._changes: dict[str, tuple[str, int]] = {}

    def ask(self) -> list[Ask]:
        """What to ask all shards: at the start, and again now and then."""
        return [] if self.deposed else [Ask(shard, self.term) for shard in range(self._shards)]

    def propose(self, key: str, change: str, settles: int = 0) -> list[Output]:
        """Bring a change to all shards. key: of the request, the same at each retry. settles: as in Proposal."""
        self._changes.setdefault(key, (change, settles))
        self._refused = {ticket: reason for ticket, reason in self._refused.items() if ticket.key != key}
        return self._decide()

    def receive(self, message: Report | Refusal) -> list[Output]:
        """What a shard's message leads to. An answer is for those who asked for the change of that key."""
        if self.deposed:
            return []
        if not self.term.number:
            return self._claim(message) if isinstance(message, Report) else []
        self.deposed = message.term > self.term
        if message.term != self.term:
            return []
        return self._drop(message) if isinstance(message, Refusal) else self._take(message)

    def revision(self, shard: int) -> int | None:
        """At which revision a shard was by its newest report; None where none of this term came."""
        report = self._reports.get(shard)
        return report.record.revision if report else None

    # ----------------------------------------------------------------------------------------------------------------

    def _claim(self, report: Report) -> list[Output]:
        """Claim a term larger than any that a shard knows, once all have said theirs."""
        self._reports[report.shard] = report
        if len(self._reports) < self._shards:
            return []
        self.term = Term(1 + max(each.term.number for each in self._reports.values()), self._name)
        self._reports = {}
        return [*self.ask()]

    def _take(self, report: Report) -> list[Output]:
        """Take a report in, unless it is an older one that comes late, and decide."""
        before, said = self._reports.get(report.shard), self._said.get(report.shard)
        if before and before.record.edition > report.record.edition:
            return []
        self._reports[report.shard] = report
        if before and before.record.edition == report.record.edition and isinstance(said, Resolve):
            return [said]  # a verdict stands, whatever was learnt since: the shard may have obeyed by now
        self._said.pop(report.shard, None)
        return self._decide()

    def _drop(self, refusal: Refusal) -> list[Output]:
        """Remember what a shard refused, until the run moves on."""
        key = refusal.ticket.key
        self._refused[refusal.ticket] = refusal.reason
        asked = self._changes.pop(key, None) is not None
        return [*([Answer(key, committed=False, reason=refusal.reason)] if asked else []), *self._decide()]

    def _decide(self) -> list[Output]:
        """What follows from the newest reports of all shards, as far as it was not said yet."""
        reports = list(self._reports.values())
        if len(reports) < self._shards or self.deposed:
            return []
        newest = max(reports, key=lambda each: each.record.revision).record
        self.fault = _fault(newest, reports)
        lost = any(each.record.lost for each in reports)
        if self.fault and not lost:
            return []
        behind = [each for each in reports if each.record.revision < newest.revision]
        if led := [each.shard for each in behind if each.record.vote == newest.made]:
            return [*self._resolve(led, committed=True)]
        if lost:
            return [*self._go_back(newest)]
        return [*self._made(newest.made), *self._count(newest.revision)]

    def _made(self, vote: Vote | None) -> list[Answer]:
        """The answer to a change that every shard has committed, by the vote that led to their revision.

        Not before: whoever asked may turn to any shard next, and finds the change there.
        """
        if vote is None or self._changes.pop(vote.ticket.key, None) is None:
            return []
        return [Answer(vote.ticket.key, committed=True)]

    def _count(self, revision: int) -> list[Propose | Resolve]:
        """Count the votes, all shards being at one revision."""
        refused = self._abort_refused(revision)
        votes = self._votes()
        if len(votes) < self._shards or len({vote.ticket for vote in votes.values()}) > 1:
            return [*refused, *self._weigh(votes, revision)]
        return [*self._resolve(votes, committed=len(set(votes.values())) == 1)]

    def _abort_refused(self, revision: int) -> list[Resolve]:
        """Abort what a shard refused wherever there is a vote for it. What followed an older revision is forgotten."""
        if not self._refused:
            return []
        refused = self._refused = {ticket: why for ticket, why in self._refused.items() if ticket.base == revision}
        votes = [(shard, vote.ticket) for shard, vote in self._votes().items() if vote.ticket in refused]
        return [each for shard, ticket in votes for each in self._resolve([shard], reason=refused[ticket])]

    def _weigh(self, votes: Mapping[int, Vote], revision: int) -> list[Propose | Resolve]:
        """Abort what ranks lower than another proposal, and bring a change to all. No ticket is on all shards."""
        reports = self._reports.values()
        overdue = {each.waiting.ticket for each in reports if each.waiting and each.overdue}
        rivals = [vote.proposal for vote in votes.values()]
        rivals += [each.waiting for each in reports if each.waiting]
        # One change after another: one that a shard has heard of is seen through first.
        if self._changes and not any(rival.change is not None for rival in rivals):
            key, (change, settles) = next(iter(self._changes.items()))
            rivals.append(Proposal(Ticket(revision, None, key), change, settles=settles))
        if not rivals:
            return []
        best = max(rivals, key=lambda rival: _rank(rival, overdue))
        mark = _rank(best, overdue)
        lower = [shard for shard, vote in votes.items() if _rank(vote.proposal, overdue) < mark]
        return [*self._resolve(lower), *self._bring(best)]

    def _bring(self, proposal: Proposal) -> list[Propose]:
        """Propose a change to the shards that are free. The bytes of an update only its trainer can send."""
        if proposal.change is None:
            return []
        free = [shard for shard, report in self._reports.items() if report.record.vote is None]
        proposals = [Propose(shard, self.term, proposal) for shard in free]
        return [each for each in proposals if self._says(each)]

    def _go_back(self, newest: Record) -> list[Propose | Resolve]:
        """Have all shards go back to one checkpoint. newest: the record of the largest revision that any knows."""
        refused = self._abort_refused(newest.revision)
        votes = self._votes()
        if len(votes) == self._shards and len({vote.ticket for vote in votes.values()}) == 1:
            # The way back; or what a lost shard has voted for, on its medium, and others may have committed by now.
            return [*self._resolve(votes, committed=len(set(votes.values())) == 1)]
        way = self._way_back(newest)
        if way is None:
            self.fault = "a shard lost its newest versions, and no checkpoint can be read on all shards"
            return [*refused]
        self.fault = None
        other = [shard for shard, vote in votes.items() if vote.ticket != way.ticket]
        return [*refused, *self._resolve(other), *self._bring(way)]

    def _way_back(self, newest: Record) -> Proposal | None:
        """The proposal that all shards go back by: to the newest checkpoint that all have, or the next older one where
        a shard could not read that. None where none is left."""
        reports, outcome = self._reports.values(), newest.made.outcome if newest.made else ""
        settled = max(each.record.settled for each in reports)
        common = set.intersection(*({each.kept.older, each.kept.newer} for each in reports))
        for to in sorted({to for to in common if to > settled} | {settled}, reverse=True):
            way = Proposal(Ticket(newest.revision, None, f"back-{to}"), outcome, to)
            if way.ticket not in self._refused:
                return way
        return None

    def _votes(self) -> dict[int, Vote]:
        """By shard, each vote that was not aborted."""
        aborted = {shard for shard, said in self._said.items() if isinstance(said, Resolve) and not said.committed}
        records = {shard: report.record for shard, report in self._reports.items() if shard not in aborted}
        return {shard: record.vote for shard, record in records.items() if record.vote}

    def _resolve(self, shards: Iterable[int], *, committed: bool = False, reason: str = "") -> list[Resolve]:
        """Pass the verdict on the votes of these shards."""
        editions = [(shard, self._reports[shard].record.edition) for shard in shards]
        verdicts = [Resolve(shard, self.term, edition, committed, reason) for shard, edition in editions]
        return [each for each in verdicts if self._says(each)]

    def _says(self, message: Propose | Resolve) -> bool:
        """Whether a message is to be sent: nothing was said to that report, or a change was proposed and now a verdict
        passed."""
        said = self._said.get(message.shard)
        if said == message or isinstance(said, Resolve):
            return False
        self._said[message.shard] = message
        return True


def _rank(proposal: Proposal, overdue: Collection[Ticket] = ()) -> tuple[bool, bool, bool, int, str]:
    """By which one proposal gives way to another that follows the same revision.

    Of two that rank the same neither gives way before one of them is overdue. Of two changes, or two that are overdue,
    some order is needed that all can see: their keys'.
    """
    ticket, change, late = proposal.ticket, proposal.change is not None, proposal.ticket in overdue
    step = -1 if ticket.step is None else ticket.step
    return (proposal.back is not None, change, late, step, ticket.key if change or late else "")


def _fault(newest: Record, reports: Collection[Report]) -> str | None:
    """What no crash explains, of shards that all obey one coordinator; None if all is well."""
    for report in reports:
        record = report.record
        if record.revision == newest.revision:
            well = record.made == newest.made
        else:
            # The vote names the revision that it follows: the one before the newest.
            well = record.vote is not None and record.vote == newest.made
        if not well:
            return (
                f"shard {report.shard} is at revision {record.revision} and lacks what led the others to revision "
                f"{newest.revision}: is its data dir an older copy?"
            )
    return None
