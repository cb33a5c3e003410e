"""Mutants of the decision core and of what holds it: each leaves out one rule, and breaks a promise.

Knows which rule each leaves out. Does not know in which schedules that shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ema_service.cluster import (
    Answer,
    Coordinator,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Shard,
    Term,
    Ticket,
    Vote,
    after_loss,
)
from ema_service.cluster.decisions import Output
from tests.service.cluster.world import Design, Seat
from tests.service.cluster.world_hosts import Broken, Host, Stuck, Torn

__all__ = ["MUTANTS", "Mutant"]


# --- shards ----------------------------------------------------------------------------------------------------------


class DropsOnItsOwnWord(Shard):
    """A vote gives way to a later proposal without the coordinator's word."""

    def prepare(self, vote: Vote) -> list[Report | Answer]:
        held = self.record.vote
        if held and held.ticket != vote.ticket and vote.ticket.base == self.record.revision:
            self._turn_to(None)
        return super().prepare(vote)


class DropsWhenItStarts(Shard):
    """A restart begins with the current version, and without what was prepared."""

    def __init__(self, place: int, record: Record) -> None:
        super().__init__(place, record._replace(vote=None))


class HearsOldCoordinators(Shard):
    """A verdict counts, whichever coordinator passed it."""

    def receive(self, message: Any) -> list[Any]:
        if isinstance(message, Resolve):
            message = message._replace(term=self.record.term)
        return super().receive(message)


class TakesAnyVerdict(Shard):
    """A verdict counts for whatever the shard has voted for by now."""

    def receive(self, message: Any) -> list[Any]:
        if isinstance(message, Resolve):
            message = message._replace(edition=self.record.edition)
        return super().receive(message)


class PreparesOnAnyBase(Shard):
    """A proposal that follows another revision is prepared all the same."""

    def prepare(self, vote: Vote) -> list[Report | Answer]:
        if self.record.vote is None:
            self._turn_to(vote)
            return [self.report()]
        return super().prepare(vote)


class AnswersBeforeTheVerdict(Shard):
    """A sender is told that its update is applied as soon as this shard has voted for it."""

    def prepare(self, vote: Vote) -> list[Report | Answer]:
        return [*super().prepare(vote), Answer(vote.ticket.key, committed=True)]


class KeepsItsEdition(Shard):
    """Two votes of one shard have one edition."""

    def _turn_to(self, vote: Vote | None, *, made: Vote | None = None) -> None:
        super()._turn_to(vote, made=made)
        self.record = self.record._replace(edition=self.record.revision)


# --- coordinators ----------------------------------------------------------------------------------------------------


class CommitsWithoutTheLast(Coordinator):
    """All but one of the votes are enough."""

    def _count(self, revision: int) -> list[Propose | Resolve]:
        votes = self._votes()
        if len(votes) == self._shards - 1 and len(set(votes.values())) == 1:
            return [*self._resolve(votes, committed=True)]
        return super()._count(revision)


class DecidesByTheMajority(Coordinator):
    """A coordinator that starts does not wait for the last shard's report."""

    def _decide(self) -> list[Output]:
        shards, self._shards = self._shards, max(len(self._reports), self._shards - 1)
        try:
            return super()._decide()
        finally:
            self._shards = shards


class ForgetsItsVerdicts(Coordinator):
    """What was said to a shard is forgotten with the shard's next report."""

    def _take(self, report: Report) -> list[Output]:
        self._said.pop(report.shard, None)
        return super()._take(report)


class TakesLateReports(Coordinator):
    """A report that comes late replaces a newer one."""

    def _take(self, report: Report) -> list[Output]:
        self._reports.pop(report.shard, None)
        return super()._take(report)


class DecidesOnEarlierAnswers(Coordinator):
    """What shards answered before they promised to obey this coordinator counts."""

    def _hear(self, report: Report) -> list[Output]:
        reports = {**self._reports, report.shard: report}
        outputs = super()._hear(report)
        self._reports = reports
        return outputs


class ClaimsWithoutAsking(Coordinator):
    """Every coordinator takes the first term, as if there had been none before."""

    def __init__(self, _: str, shards: int) -> None:
        super().__init__("coordinator", shards)
        self.term = Term(1, self._name)


class CountsSteps(Coordinator):
    """Votes for one step count together, whichever trainer sent the slices."""

    def _take(self, report: Report) -> list[Output]:
        vote = report.record.vote
        if vote and vote.ticket.step is not None:
            ticket = vote.ticket._replace(key="any")
            record = report.record._replace(vote=Vote(vote.proposal._replace(ticket=ticket), "any"))
            report = report._replace(record=record)
        return super()._take(report)


class IgnoresOutcomes(Coordinator):
    """Shards that disagree about the outcome of a proposal commit it."""

    def _count(self, revision: int) -> list[Propose | Resolve]:
        votes = self._votes()
        if len(votes) == self._shards and len({vote.ticket for vote in votes.values()}) == 1:
            return [*self._resolve(votes, committed=True)]
        return super()._count(revision)


class TriesAgainWhatDiffers(Coordinator):
    """A change that shards disagree about is proposed to them again."""

    def _close(self, votes: Mapping[int, Vote]) -> list[Output]:
        return [*self._resolve(votes, committed=len(set(votes.values())) == 1)]


class AbortsWhatIsHalfDone(Coordinator):
    """A coordinator that finds a shard behind the others has it drop its vote and start over."""

    def _resolve(self, shards: Iterable[int], *, committed: bool = False, reason: str = "") -> list[Resolve]:
        behind = len({each.record.revision for each in self._reports.values()}) > 1
        return super()._resolve(shards, committed=committed and not behind, reason=reason)


class WaitsForTheDead(Coordinator):
    """Nothing gives way to anything: a trainer that died with half of its slices sent holds up all that follow."""

    def _weigh(self, _: Mapping[int, Vote], revision: int) -> list[Propose | Resolve]:
        return super()._weigh({}, revision)


class HasNoPatience(Coordinator):
    """A proposal gives way to a newer step alone, so a trainer that went back to an older step waits for ever."""

    def _take(self, report: Report) -> list[Output]:
        return super()._take(report._replace(overdue=False))


class SaysItOnce(Coordinator):
    """A verdict that was lost is not said again."""

    def _take(self, report: Report) -> list[Output]:
        before = self._said.get(report.shard)
        return [each for each in super()._take(report) if each != before or not isinstance(each, Resolve)]


class IgnoresRefusals(Coordinator):
    """A shard that will never vote for a proposal is waited for."""

    def _drop(self, _: Refusal) -> list[Output]:
        return []


class LosesChanges(Coordinator):
    """A change that a coordinator before has begun is left to whoever asks for the next."""

    def _bring(self, proposal: Proposal) -> list[Propose]:
        return super()._bring(proposal) if proposal.ticket.key in self._changes else []


class GoesOnWithoutTheLost(Coordinator):
    """A shard that lost what it had voted for counts as any other."""

    def _take(self, report: Report) -> list[Output]:
        return super()._take(report._replace(record=report.record._replace(lost=False)))


class LeavesBehindWhoVoted(Coordinator):
    """Where a shard is lost, all others go back, also one that only lacks the verdict on what the others are at."""

    def _decide(self) -> list[Output]:
        reports = [each.record for each in self._reports.values()]
        if len(reports) == self._shards and any(record.lost for record in reports) and not self.deposed:
            return [*self._go_back(max(reports, key=lambda record: record.revision))]
        return super()._decide()


class GoesOnDamaged(Shard):
    """A shard votes whose bytes are damaged."""

    def note_damage(self, damaged: bool) -> None:
        pass


class NeedsNoWord(Coordinator):
    """Where a shard is damaged, or its disk an older copy, all go back before an operator has said so."""

    def _decide(self) -> list[Output]:
        outputs = super()._decide()
        newest = max((each.record for each in self._reports.values()), key=lambda each: each.revision, default=Record())
        return [*outputs, *self._go_back(newest)] if self.fault and not outputs else outputs


class GoesBackOnAnyWord(Coordinator):
    """An operator's word counts also where no shard has less than the others."""

    def _needless(self) -> list[Answer]:
        if self._word():
            self._go_back(max((each.record for each in self._reports.values()), key=lambda each: each.revision))
        return []


class HearsNoWord(Coordinator):
    """Whatever an operator says, nothing is decided while a shard is damaged."""

    def _word(self) -> None:
        return None


class BeginsAnewOnAWord(Coordinator):
    """Where the shards have nothing in common they begin anew, on the word of who wanted them to go on."""

    def _way_back(self, newest: Record) -> Proposal | None:
        way, word = super()._way_back(newest), self._word()
        if way or word is None or word.change:
            return way
        settled = max(each.record.settled for each in self._present().values())
        return None if settled else Proposal(Ticket(newest.revision, None, word.key), "", 0, word=word.key)


class UnsettlesOnAWord(Coordinator):
    """Shards that go back to a snapshot have no checkpoint from then on that all have."""

    def _way_back(self, newest: Record) -> Proposal | None:
        way = super()._way_back(newest)
        return way._replace(back=0) if way and way.to else way


# --- their holders ---------------------------------------------------------------------------------------------------


class SendsFirst(Host):
    """The vote is on its way before it is durable."""

    def carry_out(self, outputs: Iterable[Any], source: Seat | None = None) -> None:
        outputs = list(outputs)
        self.send([each for each in outputs if isinstance(each, Report)], source)
        super().carry_out([each for each in outputs if not isinstance(each, Report)], source)


class ForgetsItsVote(Host):
    """The bytes outlive the process, and which ticket they are for does not."""

    def recovered(self) -> Record:
        return self.disk._replace(vote=None)


class PromisesInMemory(Host):
    """Which coordinator a shard obeys is written with its next vote, and not before the shard says so."""

    def persist(self) -> None:
        if self.shard and self.shard.record.edition > self.disk.edition:
            super().persist()


class KeepsTheNewestCheckpoint(Host):
    """A checkpoint makes room for the next before all shards are known to have the next."""

    def finish(self) -> None:
        super().finish()
        self.keep_only(max(self.checkpoints, default=0))


class SettlesWhatItLacks(Host):
    """A shard votes that all have a checkpoint which it does not have."""

    def lacks_checkpoint(self, _: Proposal) -> bool:
        return False


class DropsWhatLasts(Host):
    """A vote that outlived the machine is dropped, although others may have committed what it is for."""

    def after_loss(self, record: Record) -> Record:
        return after_loss(record)


class CountsEditionsAnew(Host):
    """After a loss of power editions are given that were given before."""

    def after_loss(self, record: Record) -> Record:
        return record._replace(vote=None, lost=True)


class TrustsItsDisk(Host):
    """A shard goes on with the record that the machine's end left, as if nothing had been lost."""

    def after_loss(self, record: Record) -> Record:
        return record


class ForgetsThatItIsLost(Host):
    """What a lost shard has voted for may be lost as well."""

    def sync(self) -> None:
        if not self.disk.lost:
            super().sync()


class VotesAgainOnAnyVersion(Host):
    """What another proposal came before is voted for once more, whatever that made of the version."""

    def may_follow(self, version: str) -> bool:  # noqa: ARG002 - that is the fault
        return True


#: Where what is no mutant is written.
_AS_THEY_ARE = ("ema_service.cluster.decisions", "tests.service.cluster.world", "tests.service.cluster.twin_world")


class Mutant(NamedTuple):
    """What is built with one rule left out, which promise that breaks, and within how many schedules it shows.

    first: the schedule that these begin with, of a fault that shows once in thousands.
    """

    design: Design
    breaks: type[Broken]
    within: int
    first: int = 0

    @property
    def name(self) -> str:
        """Of the class that differs."""
        return next(part.__name__ for part in self.design if part.__module__ not in _AS_THEY_ARE)


MUTANTS = (
    Mutant(Design(shard=DropsOnItsOwnWord), Torn, 200),
    Mutant(Design(shard=DropsWhenItStarts), Torn, 200),
    Mutant(Design(shard=TakesAnyVerdict), Torn, 200),
    Mutant(Design(shard=AnswersBeforeTheVerdict), Torn, 10),
    Mutant(Design(shard=HearsOldCoordinators), Torn, 1000),
    Mutant(Design(shard=PreparesOnAnyBase), Torn, 200),
    Mutant(Design(shard=KeepsItsEdition), Stuck, 50),
    Mutant(Design(coordinator=CommitsWithoutTheLast), Torn, 50),
    Mutant(Design(coordinator=DecidesByTheMajority), Torn, 50),
    Mutant(Design(coordinator=CountsSteps), Broken, 200),
    Mutant(Design(coordinator=IgnoresOutcomes), Torn, 500),
    Mutant(Design(coordinator=TriesAgainWhatDiffers), Stuck, 200),
    Mutant(Design(coordinator=AbortsWhatIsHalfDone), Broken, 500),
    Mutant(Design(coordinator=DecidesOnEarlierAnswers), Torn, 1000),
    Mutant(Design(coordinator=ForgetsItsVerdicts), Torn, 2000),
    Mutant(Design(coordinator=TakesLateReports), Torn, 2500),
    Mutant(Design(coordinator=ClaimsWithoutAsking), Broken, 200),
    Mutant(Design(coordinator=WaitsForTheDead), Stuck, 50),
    Mutant(Design(coordinator=HasNoPatience), Stuck, 200),
    Mutant(Design(coordinator=SaysItOnce), Stuck, 200),
    Mutant(Design(coordinator=IgnoresRefusals), Stuck, 1000),
    Mutant(Design(coordinator=LosesChanges), Stuck, 500),
    Mutant(Design(coordinator=GoesOnWithoutTheLost), Broken, 500),
    Mutant(Design(coordinator=LeavesBehindWhoVoted), Torn, 2500),
    Mutant(Design(shard=GoesOnDamaged), Torn, 500),
    Mutant(Design(coordinator=NeedsNoWord), Torn, 500),
    Mutant(Design(coordinator=GoesBackOnAnyWord), Broken, 500),
    Mutant(Design(coordinator=HearsNoWord), Stuck, 500),
    Mutant(Design(coordinator=BeginsAnewOnAWord), Torn, 500),
    Mutant(Design(coordinator=UnsettlesOnAWord), Torn, 2500),
    Mutant(Design(host=KeepsTheNewestCheckpoint), Broken, 2500),
    Mutant(Design(host=SettlesWhatItLacks), Broken, 2500),
    Mutant(Design(host=CountsEditionsAnew), Broken, 2500),
    Mutant(Design(host=DropsWhatLasts), Torn, 2500),
    Mutant(Design(host=TrustsItsDisk), Broken, 500),
    Mutant(Design(host=ForgetsThatItIsLost), Broken, 2500),
    Mutant(Design(host=SendsFirst), Broken, 500),
    Mutant(Design(host=ForgetsItsVote), Torn, 200),
    Mutant(Design(host=PromisesInMemory), Torn, 200, first=7700),
    Mutant(Design(host=VotesAgainOnAnyVersion), Torn, 200),
)
