"""Two-phase commit of a run's proposals over its k shards: each becomes the next revision on all shards or on none.

    sender       -> shard         the slice of a proposal; the shard prepares the proposal beside its current version
    shard        -> coordinator   Report: the shard's record, which holds a vote by now
    coordinator  -> shards        Resolve: commit, once all k hold a vote of one ticket; else abort, or nothing yet
    shard        -> sender        Answer

**The k votes are the record of a commit.** A shard gives up a vote only on the coordinator's word, and the coordinator
keeps nothing: one that starts claims a larger term and asks all shards. A ticket on all k is committed; a shard that is
one revision behind holds the vote that the others have committed. So there is no log and nothing to replicate, and
while a shard is missing nothing is decided: without all k no version can be read anyway.

**A vote is aborted for three reasons**: a shard refuses the proposal; the shards disagree about its outcome, when it is
given up as one that was refused; a proposal that ranks higher waits. A trainer's newer step ranks higher than an older
one, whose trainer may be gone; a proposal that has waited too long ranks higher than one of any step; what a
coordinator brings to all shards ranks highest. An update gives way to such a change on a shard that has the change in
hand, and waits: its bytes are with its trainer, and another shard may refuse the change. Nothing is aborted because a
shard crashed: its neighbours keep what they prepared.

**Where a machine took with it what a shard had promised to keep**, the shard comes back *lost*: an older record, which
says so, and checkpoints. Then the coordinator has all shards go back to the newest checkpoint that all of them have, by
a proposal like any other, which follows the largest revision that any shard knows, and is for every shard the next one.

**Where no crash explains what a shard lacks**, for its bytes are damaged or its disk is an older copy, nothing is
decided before an operator's word. By that all shards go back in the same way: to the newest checkpoint that all have,
or to a snapshot that was named.

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
    Change,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Seating,
    Term,
    Ticket,
    Vote,
)
from ema_service.cluster.reasons import disagreement, nothing_common, nothing_damaged

__all__ = ["Coordinator", "Shard", "after_loss", "emptied"]

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


def emptied(edition: int) -> Record:
    """The record of a host that begins with an empty disk, and cannot know what one before it had promised. edition:
    larger than any that a host of this place ever gave; a clock's nanoseconds are."""
    return Record(edition=edition, lost=True)


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
        self._damaged = False

    def note_damage(self, damaged: bool) -> None:
        """Know whether the bytes of the record's revision can be read; while they cannot, the shard votes for a way
        back alone, or for its own return. To be said before each message, by who reads the bytes."""
        self._damaged = damaged

    def report(self) -> Report:
        """How the shard stands, for the coordinator that it obeys: at a start, and again while no verdict comes."""
        return Report(self._place, self.record, self._waiting.proposal if self._waiting else None, self._overdue)

    def receive(self, message: Ask | Propose | Resolve) -> list[Report | Answer | Proposal]:
        """What a coordinator's message leads to. Reports go back to whoever sent the message.

        An answer is for those who sent the proposal to this shard. A proposal is for the shard's holder, to be judged
        and prepared: then prepare(), or refuse().
        """
        if isinstance(message, Ask):
            self._promise(message)
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
        held = self.record.vote
        if held is None or (self._is_absent and held.ticket != vote.ticket):
            self._turn_to(vote)  # what a shard that counts for nothing had voted for before counts for nothing
        elif held.ticket != vote.ticket:
            return [*self._wait(vote), self.report()]
        return [self.report()]

    def let_go(self, returning: Proposal) -> list[Report]:
        """Have nothing any more, as a host whose disk is new: the shard is filled anew for its return, and what is here
        counts for nothing. A proposal that is none of its return, or an older one, changes nothing."""
        if self._is_absent and self._lacks(returning):
            self.record = self.record._replace(edition=self.record.edition + 1, vote=None, lost=True)
        return []

    def refuse(self, proposal: Proposal, reason: str) -> list[Refusal]:
        """Vote against a proposal that this shard has not voted for. Nothing is kept: whoever asks again is refused
        again. Nothing is said where the shard may have voted for the proposal before, or committed it, whatever it
        knows by now, for others would drop a vote that may be committed: of an earlier revision's proposal; after a
        loss, but for the way back; and, while the shard counts for nothing, but for its own return."""
        ticket, record = proposal.ticket, self.record
        held = record.vote is not None and record.vote.ticket == ticket
        over = ticket.base < record.revision or (record.lost and proposal.back is None)
        unsaid = proposal.seating is None if self._is_absent else over
        return [] if held or unsaid else [Refusal(self._place, record.term, ticket, reason)]

    def insist(self) -> list[Report]:
        """What waits has waited as long as a proposal should: whoever sent what the shard voted for may be gone."""
        self._overdue = self._waiting is not None
        return [self.report()]

    # ----------------------------------------------------------------------------------------------------------------

    def _promise(self, ask: Ask) -> None:
        """Obey the coordinator, and know of its seating, unless the shard knows of a later coordinator."""
        known = self.record.term, self.record.seating
        promised = ask.term, max(self.record.seating, ask.seating)
        if ask.term >= self.record.term and promised != known:
            self.record = self.record._replace(term=ask.term, seating=promised[1])

    @property
    def _is_absent(self) -> bool:
        """Whether the shard counts for nothing until it is filled."""
        return self._place in self.record.seating.absent

    def _follows(self, proposal: Proposal) -> bool:
        """Whether a proposal may lead on from the shard's revision."""
        if self._is_absent:
            return proposal.seating is not None and proposal.seating > self.record.seating
        if proposal.back is not None:
            return proposal.ticket.base >= self.record.revision
        return proposal.ticket.base == self.record.revision and not self.record.lost and not self._damaged

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
        """Do as the verdict on the shard's vote says. After an abort the shard votes for what has waited; an update
        that gave way to a change then waits in its turn, for the change may be refused elsewhere."""
        waiting = self._waiting
        if waiting and not verdict.committed and not verdict.reason and _makes_wait(waiting.proposal, vote.proposal):
            self._turn_to(waiting)
            self._waiting = vote
            return []
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
            lost = old.lost and way.back is None and way.seating is None
            seating = max(old.seating, way.seating or old.seating)
            self.record = self.record._replace(
                revision=revision, made=made, lost=lost, settled=settled, seating=seating
            )
        self._waiting, self._overdue = None, False


class Coordinator:
    """Decides for one run while it lives, and keeps nothing. Several at once do no harm: one of them is obeyed.

    term: claimed once all shards were asked for theirs. seating: the largest that any shard knows, or a larger one that
    they are to know. deposed: whether another coordinator has claimed a larger term; then this one says nothing any
    more, and ends. fault: why nothing can be decided, None if all is well: shards whose records no crash explains, for
    one has an older copy of its disk, say.

    More than twenty methods, more than a dozen attributes: what follows from a report, of all that a shard may say.
    """

    def __init__(self, name: str, shards: int, *, twins: bool = False) -> None:
        """name: drawn at random for each coordinator. shards: how many places the run has. twins: whether the later
        half of them are those of the twins of the earlier half, each with the same shard."""
        self.term = Term()
        self.seating = Seating()
        self.deposed = False
        self.fault: str | None = None
        self._name = name
        self._shards = shards
        self._twins = twins
        #: By shard: its newest report of this term, and what was said to that report.
        self._reports: dict[int, Report] = {}
        self._said: dict[int, Propose | Resolve] = {}
        #: Places that have not reported for as long as a host may be away.
        self._silent: set[int] = set()
        #: The number of the largest seating that this coordinator has spoken of.
        self._seatings = 0
        #: By place, of a host that is to return: what its return follows from, and the proposal.
        self._returning: dict[int, tuple[tuple[int, Seating], Proposal]] = {}
        #: ticket -> reason.
        self._refused: dict[Ticket, str] = {}
        #: By key, in the order in which changes are to take effect.
        self._changes: dict[str, Change] = {}

    def ask(self) -> list[Ask]:
        """What to ask all shards: at the start, and again now and then. A return that was refused is proposed again
        after that."""
        for shard, (_, proposal) in tuple(self._returning.items()):
            if proposal.ticket in self._refused:
                del self._returning[shard]  # it is proposed under another name
        return [] if self.deposed else [self._question(shard) for shard in range(self._shards)]

    def propose(self, key: str, change: str, settles: int = 0, *, mends: bool = False) -> list[Output]:
        """Bring a change to all shards. key: of the request, the same at each retry. settles, mends: as in Change."""
        self._changes.setdefault(key, Change(key, change, settles, mends))
        self._refused = {ticket: reason for ticket, reason in self._refused.items() if ticket.key != key}
        return self._decide()

    def receive(self, message: Report | Refusal) -> list[Output]:
        """What a shard's message leads to. An answer is for those who asked for the change of that key."""
        if self.deposed:
            return []
        self._silent.discard(message.shard)
        if not self.term.number:
            return self._hear(message) if isinstance(message, Report) else []
        self.deposed = message.term > self.term
        if message.term != self.term:
            return self._doubt(message) if isinstance(message, Report) else []
        return self._drop(message) if isinstance(message, Refusal) else self._take(message)

    def note_silence(self, shard: int) -> list[Output]:
        """A shard has not reported for as long as a host may be away: the others go on with its twin, if it has one."""
        if self.deposed or not self._twins:
            return []
        self._silent.add(shard)
        return self._decide() if self.term.number else self._claim()

    def revision(self, shard: int) -> int | None:
        """At which revision a shard was by its newest report; None where none of this term came."""
        report = self._reports.get(shard)
        return report.record.revision if report else None

    def twin(self, shard: int) -> int:
        """The place that has the same bytes."""
        return (shard + self._shards // 2) % self._shards

    # --- terms and seatings -----------------------------------------------------------------------------------------

    def _question(self, shard: int) -> Ask:
        return Ask(shard, self.term, self.seating)

    def _hear(self, report: Report) -> list[Output]:
        """Take in what a shard knew before this coordinator's term."""
        self._reports[report.shard] = report
        self.seating = max(self.seating, report.record.seating)
        return self._claim()

    def _claim(self) -> list[Output]:
        """Claim a term larger than any that a shard knows, once all that count have said theirs, or all but some whose
        twins have."""
        missing = self._members() - self._reports.keys()
        if missing and not self._can_leave(missing):
            return []
        self.term = Term(1 + max(each.term.number for each in self._reports.values()), self._name)
        self._reports = {}
        return [*self.ask()]

    def _members(self) -> frozenset[int]:
        """The places that count."""
        return frozenset(range(self._shards)) - self.seating.absent

    def _present(self) -> dict[int, Report]:
        """By place, the newest reports of those that count."""
        return {shard: self._reports[shard] for shard in sorted(self._members() & self._reports.keys())}

    def _can_leave(self, missing: Collection[int]) -> bool:
        """Whether the others may go on: fewer places than there are shards are missing, for long, and the twin of each
        is there."""
        if not missing or len(missing) >= self._shards // 2 or not self._silent.issuperset(missing):
            return False
        there = self._present().keys() - self._silent
        twins = [self.twin(each) for each in missing]
        return all(twin in there and _has_bytes(self._reports[twin]) for twin in twins)

    def _leave(self, missing: Collection[int]) -> list[Output]:
        """Have the others know that they go on without a place; with its twin, if that was left behind."""
        return self._seat(self.seating.absent.union(missing) - {self.twin(each) for each in missing})

    def _seat(self, absent: Collection[int]) -> list[Output]:
        """Have all know of the next seating."""
        self.seating = self._next_seating(absent)
        return [*self.ask()]

    def _next_seating(self, absent: Collection[int]) -> Seating:
        """A seating without these places, larger than any that this coordinator has spoken of."""
        self._seatings = 1 + max(self._seatings, self.seating.number)
        return Seating(self.term, self._seatings, " ".join(map(str, sorted(absent))))

    def _unfit(self, newest: Record, present: Mapping[int, Report]) -> set[int]:
        """A place whose host lost what it had, or has an older copy, and whose twin has more: all, or at least the
        checkpoint that all are to go back to. Empty where there is none.

        The twin may be one that was left behind, while its own twin's loss was not known yet.
        """
        if not self._twins:
            return set()
        settled = max(each.record.settled for each in present.values())

        def has(shard: int) -> int:
            report = self._reports.get(shard)
            if report is None or shard in self._silent:
                return -1
            return 2 if _has_all(report, newest, present.values()) else settled in (0, *report.kept)

        found = [shard for shard in present if has(shard) < min(has(self.twin(shard)), 2)]
        return set(found[:1])

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _doubt(self, report: Report) -> list[Output]:
        """Forget what a shard said that obeys an earlier term again, for its machine took its promise with it: the
        shard is asked anew. A report that was sent before the promise, and comes late, says nothing."""
        before = self._reports.get(report.shard)
        if self.deposed or before is None or before.record.edition >= report.record.edition:
            return []
        del self._reports[report.shard]
        self._said.pop(report.shard, None)
        return [self._question(report.shard)]

    def _take(self, report: Report) -> list[Output]:
        """Take a report in, unless it is an older one that comes late, and decide."""
        before, said = self._reports.get(report.shard), self._said.get(report.shard)
        if before and before.record.edition > report.record.edition:
            return []
        self._reports[report.shard] = report
        self.seating = max(self.seating, report.record.seating)
        if not report.returns:
            self._returning.pop(report.shard, None)  # it comes again, under another name than the one that was refused
        behind: list[Output] = [self._question(report.shard)] if report.record.seating < self.seating else []
        if before and before.record.edition == report.record.edition and isinstance(said, Resolve):
            # A verdict stands, whatever was learnt since: the shard may have obeyed by now.
            return [*behind, said]
        self._said.pop(report.shard, None)
        return [*behind, *self._decide()]

    def _drop(self, refusal: Refusal) -> list[Output]:
        """Remember what a shard refused, until the run moves on; but for what a shard judged that was left behind, by
        an older version. Such a shard's word counts of its own return alone."""
        is_return = any(refusal.ticket == proposal.ticket for _, proposal in self._returning.values())
        if refusal.shard not in self._members() and not is_return:
            return []
        return [*self._give_up(refusal.ticket, refusal.reason), *self._decide()]

    def _give_up(self, ticket: Ticket, reason: str) -> list[Answer]:
        """Propose a ticket no more; the answer to whoever asked for the change."""
        self._refused[ticket] = reason
        return [self._refuse(ticket.key, reason)] if ticket.key in self._changes else []

    def _decide(self) -> list[Output]:
        """What follows from the newest reports of all shards that count, as far as it was not said yet."""
        if self.deposed or not self.term.number:
            return []
        present = self._present()
        if missing := self._members() - present.keys():
            return self._leave(missing) if self._can_leave(missing) else []
        if gone := self._members() & self._silent:
            return self._leave(gone) if self._can_leave(gone) else []
        reports = list(present.values())
        if any(each.record.seating != self.seating for each in reports):
            return []
        newest = max(reports, key=lambda each: each.record.revision).record
        if unfit := self._unfit(newest, present):
            return self._leave(unfit)
        self.fault = _fault(newest, reports) or _damage(reports)
        lost, word = any(each.record.lost for each in reports), self._word()
        if self.fault and not lost and word is None:
            return []
        behind = [each for each in reports if each.record.revision < newest.revision]
        if led := [each.shard for each in behind if each.record.vote == newest.made]:
            return [*self._resolve(led, committed=True)]
        if lost or self.fault:
            return [*self._go_back(newest)] if word or self._may_go_back(present) else []
        return [*self._made(newest.made), *self._needless(), *self._count(newest.revision)]

    def _word(self) -> Change | None:
        """What an operator said first of those who want the shards to go on after damage; None where nobody did."""
        return next((change for change in self._changes.values() if change.mends), None)

    def _needless(self) -> list[Answer]:
        """The answer to who wants the shards to go on with what they have in common: they do."""
        needless = [key for key, each in self._changes.items() if each.mends and not each.change]
        return [self._refuse(key, nothing_damaged()) for key in needless]

    def _refuse(self, key: str, reason: str) -> Answer:
        """The answer to a change that is made on no shard."""
        del self._changes[key]
        return Answer(key, committed=False, reason=reason)

    def _made(self, vote: Vote | None) -> list[Answer]:
        """The answer to a change that every shard has committed, by the vote that led to their revision.

        Not before: whoever asked may turn to any shard next, and finds the change there.
        """
        key = (vote.proposal.word or vote.ticket.key) if vote else ""
        return [Answer(key, committed=True)] if self._changes.pop(key, None) else []

    def _count(self, revision: int) -> list[Output]:
        """Count the votes, all shards being at one revision."""
        refused = self._abort_refused(revision)
        votes = self._votes()
        proposal = self._agreed(votes)
        if proposal is None or self._is_held_up(proposal, revision):
            return [*refused, *self._weigh(votes, revision)]
        if proposal.seating:
            return [*refused, *self._count_return(votes, proposal, proposal.seating)]
        return self._close(votes)

    def _close(self, votes: Mapping[int, Vote]) -> list[Output]:
        """The verdict on a ticket that all have voted for. A proposal whose outcomes differ is given up: they would
        differ again. Where two proposals have the ticket, for what was known changed in between, one comes again."""
        shards: dict[Vote, list[int]] = {}
        for shard, vote in votes.items():
            shards.setdefault(vote, []).append(shard)
        proposal, *others = {vote.proposal for vote in shards}
        if len(shards) == 1 or others:
            return [*self._resolve(votes, committed=len(shards) == 1)]
        reason = disagreement(shards.values())
        return [*self._give_up(proposal.ticket, reason), *self._resolve(votes, reason=reason)]

    def _agreed(self, votes: Mapping[int, Vote]) -> Proposal | None:
        """The one proposal that all have voted for; None where there is none."""
        found = {vote.ticket: vote.proposal for vote in votes.values()}
        return next(iter(found.values())) if len(votes) == len(self._members()) and len(found) == 1 else None

    def _is_held_up(self, proposal: Proposal, revision: int) -> bool:
        """Whether a proposal that all have voted for waits for a change: a change that takes long to judge would
        otherwise follow a revision that is gone by then, each time. Not where a place is left out, whose host may have
        committed the proposal."""
        return proposal.change is None and not self.seating.absent and bool(self._next_change(revision))

    def _count_return(self, votes: Mapping[int, Vote], proposal: Proposal, seating: Seating) -> list[Output]:
        """A place counts again once its host, too, has voted for that, and so has what the others have.

        Where the host has gone silent another coordinator may have had it commit its return. So the others know of a
        later seating before they give up their votes, and it counts for nothing whatever it believes.
        """
        place = min(self.seating.absent - seating.absent, default=None)
        if seating <= self.seating or place is None:
            return [*self._resolve(votes)]
        vote = self._vote_of(place)
        if vote and vote.ticket == proposal.ticket:
            return self._close({**votes, place: vote})
        report = self._reports.get(place)
        if place in self._silent or report is None or not report.returns:
            return self._seat(self.seating.absent)
        return [*self._bring(proposal)]

    def _abort_refused(self, revision: int) -> list[Resolve]:
        """Abort what a shard refused wherever there is a vote for it. What followed an older revision is forgotten."""
        if not self._refused:
            return []
        refused = self._refused = {ticket: why for ticket, why in self._refused.items() if ticket.base == revision}
        votes = [(shard, vote.ticket) for shard, vote in self._votes().items() if vote.ticket in refused]
        return [each for shard, ticket in votes for each in self._resolve([shard], reason=refused[ticket])]

    def _weigh(self, votes: Mapping[int, Vote], revision: int) -> list[Propose | Resolve]:
        """Abort what ranks lower than another proposal, and bring a change to all. No ticket is on all shards, or a
        change is to come before."""
        reports = self._present().values()
        overdue = {each.waiting.ticket for each in reports if each.waiting and each.overdue}
        late: list[Propose | Resolve] = []
        late += self._resolve(shard for shard, vote in votes.items() if self._is_late(vote.proposal))
        rivals = [vote.proposal for vote in votes.values()]
        rivals += [each.waiting for each in reports if each.waiting]
        rivals = [rival for rival in rivals if not self._is_late(rival)]
        # One change after another: one that a shard has heard of is seen through first.
        if not any(rival.change is not None for rival in rivals):
            rivals += self._next_change(revision)
        if not rivals:
            return late
        best = max(rivals, key=lambda rival: _rank(rival, overdue))
        mark = _rank(best, overdue)
        lower = [shard for shard, vote in votes.items() if _rank(vote.proposal, overdue) < mark]
        if best.change is not None and not self.seating.absent:  # else no update may become complete before the change
            lower = [shard for shard in lower if not _lets_in(self._reports[shard])]
        return [*late, *self._resolve(lower), *self._bring(best)]

    def _is_late(self, proposal: Proposal) -> bool:
        """Whether a proposal is the return of a host, and a later seating came in its place."""
        return proposal.seating is not None and proposal.seating <= self.seating

    def _next_change(self, revision: int) -> list[Proposal]:
        """The change that is to take effect next, if there is one: what somebody asked for, or a host's return."""
        if self._changes:
            asked = next(iter(self._changes.values()))
            return [Proposal(Ticket(revision, None, asked.key), asked.change, settles=asked.settles)]
        returning = [shard for shard in sorted(self.seating.absent) if self._can_return(shard)]
        proposals = [self._return_of(shard, revision) for shard in returning]
        return [each for each in proposals if each.ticket not in self._refused][:1]

    def _can_return(self, shard: int) -> bool:
        report = self._reports.get(shard)
        return report is not None and report.returns and shard not in self._silent

    def _return_of(self, shard: int, revision: int) -> Proposal:
        """The proposal that a host counts again, the same as long as nothing else is so."""
        about = revision, self.seating
        if shard not in self._returning or self._returning[shard][0] != about:
            seating = self._next_seating(self.seating.absent - {shard})
            key = f"return-{shard}-{seating.number}-{seating.term.number}-{seating.term.name}"
            ticket = Ticket(revision, None, key)
            self._returning[shard] = about, Proposal(ticket, "", seating=seating)
        return self._returning[shard][1]

    def _bring(self, proposal: Proposal) -> list[Propose]:
        """Propose a change to the shards that have not voted, or for an update, which the change makes wait. The bytes
        of an update only its trainer can send."""
        if proposal.change is None or proposal.ticket in self._refused:
            return []
        free = [shard for shard, report in self._present().items() if _lets_in(report)]
        if proposal.seating:
            free += [shard for shard in self.seating.absent - proposal.seating.absent if self._awaits(shard, proposal)]
        proposals = [Propose(shard, self.term, proposal) for shard in free]
        return [each for each in proposals if self._says(each)]

    def _awaits(self, shard: int, proposal: Proposal) -> bool:
        """Whether a host that is to return has not voted for that."""
        report = self._reports.get(shard)
        return report is not None and (report.record.vote is None or report.record.vote.ticket != proposal.ticket)

    def _may_go_back(self, present: Mapping[int, Report]) -> bool:
        """Whether nobody who was left behind may have what its twin lost."""
        lost = [shard for shard, each in present.items() if each.record.lost]
        better = [shard for shard in lost if self._twins and not self._has_nothing(self.twin(shard))]
        if better:
            self.fault = f"shard {better[0]} lost its versions, and its twin was left behind"
        return not better

    def _has_nothing(self, shard: int) -> bool:
        """Whether a shard says that it lost what it had, as its twin did."""
        report = self._reports.get(shard)
        return report is not None and report.record.lost

    def _go_back(self, newest: Record) -> list[Output]:
        """Have all shards go back to one checkpoint. newest: the record of the largest revision that any knows."""
        refused = self._abort_refused(newest.revision)
        votes = self._votes()
        if self._agreed(votes):
            # The way back; or what a lost shard has voted for, on its medium, and others may have committed by now.
            return self._close(votes)
        way, word = self._way_back(newest), self._word()
        if way is None and word:
            why = self._why_not(word)
            return [*refused, self._refuse(word.key, why if word.change else nothing_common(why))]
        if way is None:
            self.fault = "a shard lost its newest versions, and there is no checkpoint that all can go back to"
            return [*refused]
        self.fault = None
        other = [shard for shard, vote in votes.items() if vote.ticket != way.ticket]
        return [*refused, *self._resolve(other), *self._bring(way)]

    def _way_back(self, newest: Record) -> Proposal | None:
        """The proposal that all shards go back by: to the newest checkpoint that all have, or the next older one where
        a shard could not read that; or to what an operator named. None where none is left."""
        reports, outcome, word = self._present().values(), newest.made.outcome if newest.made else "", self._word()
        settled = max(each.record.settled for each in reports)
        common = set.intersection(*({each.kept.older, each.kept.newer} for each in reports))
        kept = sorted({to for to in common if to > settled} | {settled}, reverse=True)
        # Another ticket than that of the change itself, which some may have voted for before.
        name, key = (f"{word.key}-back", word.key) if word else ("back", "")
        if word and word.change:
            # What all have stays: a loss of the machine before the next checkpoint asks for another word.
            way = Proposal(Ticket(newest.revision, None, name), outcome, kept[0], word=key, to=word.change)
            return None if way.ticket in self._refused else way
        for to in kept:
            way = Proposal(Ticket(newest.revision, None, f"{name}-{to}"), outcome, to, word=key)
            if way.ticket not in self._refused and (to or not word):
                return way
        return None

    def _why_not(self, word: Change) -> str:
        """Why a shard could not go back on an operator's word, empty where none was asked."""
        return next((why for ticket, why in self._refused.items() if ticket.key.startswith(f"{word.key}-back")), "")

    def _votes(self) -> dict[int, Vote]:
        """By shard, each vote that counts and was not aborted."""
        votes = {shard: self._vote_of(shard) for shard in self._present()}
        return {shard: vote for shard, vote in votes.items() if vote}

    def _vote_of(self, shard: int) -> Vote | None:
        """A shard's vote, unless it was aborted."""
        report, said = self._reports.get(shard), self._said.get(shard)
        aborted = isinstance(said, Resolve) and not said.committed
        return report.record.vote if report and not aborted else None

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


def _makes_wait(change: Proposal, update: Proposal) -> bool:
    """Whether a proposal is a change and another an update: of these two the update waits on a shard, and is not
    dropped; but for a way back, which is taken where a shard may not have the bytes that an update follows."""
    return change.change is not None and change.back is None and update.change is None


def _lets_in(report: Report) -> bool:
    """Whether a shard can be told of a change: it has not voted, or for an update, and no other change waits.

    Until then the update does not give way: its bytes are with its trainer, and the change may be refused.
    """
    vote, waiting = report.record.vote, report.waiting
    return vote is None or (vote.proposal.change is None and (waiting is None or waiting.change is None))


def _lacks_newest(record: Record, newest: Record) -> bool:
    """Whether a shard lacks the newest revision, and what led there."""
    if record.revision == newest.revision:
        return record.made != newest.made
    # The vote names the revision that it follows: the one before the newest.
    return record.vote is None or record.vote != newest.made


def _has_bytes(report: Report) -> bool:
    return not (report.record.lost or report.damaged)


def _has_all(report: Report, newest: Record, present: Iterable[Report]) -> bool:
    """Whether a shard has the newest revision and its bytes, or what led there; or, left behind by now, was the only
    one to be told that what the others hold votes for is committed."""
    record = report.record
    if record.revision > newest.revision:
        votes = [each.record.vote for each in present if not each.record.lost]
        return _has_bytes(report) and all(vote == record.made for vote in votes)
    has_voted = record.vote is not None and record.vote == newest.made
    return not (_lacks_newest(record, newest) or (record.lost and not has_voted) or report.damaged)


def _damage(reports: Collection[Report]) -> str | None:
    """What an operator has to decide on, of shards whose records are as they should be; None if all is well."""
    damaged = [report.shard for report in reports if report.damaged and not report.record.lost]
    if not damaged:
        return None
    return f"the versions of shard {damaged[0]} are damaged: an operator says what all shards go back to"


def _fault(newest: Record, reports: Collection[Report]) -> str | None:
    """What no crash explains, of shards that all obey one coordinator; None if all is well."""
    for report in reports:
        if _lacks_newest(report.record, newest):
            return (
                f"shard {report.shard} is at revision {report.record.revision} and lacks what led the others to "
                f"revision {newest.revision}: is its data dir an older copy?"
            )
    return None
