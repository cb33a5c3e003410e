"""The decision core with two hosts for each shard, against an oracle: schedules of faults in which disks are lost as a
whole, mutants that they must catch, and examples.

A schedule that fails names its seed; ``play_twins(seed)`` plays it again.

Knows what a host may lose. Does not know files, servers or time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from ema_service.cluster import (
    Ask,
    Coordinator,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Seating,
    Shard,
    Term,
    Ticket,
    Vote,
    emptied,
)
from ema_service.cluster.decisions import Output
from tests.service.cluster.mutants import Mutant
from tests.service.cluster.twin_world import TwinHost, play_twins
from tests.service.cluster.world import Design
from tests.service.cluster.world_hosts import Broken, Stuck, Torn

PART, PARTS, SOAKED = 750, 4, 15_000


def play_all(first: int, count: int, design: Design) -> Counter[str]:
    """Play so many schedules. Returns how often what happened."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            seen += play_twins(seed, design).seen
        except Broken as broken:
            broken.add_note(f"schedule {seed}: play_twins({seed}) of twin_world.py plays it again")
            raise
    return seen


@pytest.mark.parametrize("part", range(PARTS))
def test_schedules(part: int) -> None:
    """Nothing that was acknowledged is lost with the disk of any host whose twin is in step; and once the faults stop
    every host is filled, and counts."""
    seen = play_all(part * PART, PART, Design(host=TwinHost))

    assert seen["committed"] > PART // 4
    assert seen["filled"] > PART // 2
    assert seen["lost disks"] > PART // 5
    assert seen["emptied"] > PART // 5
    assert seen["filled after damage"] > PART // 20


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_many_schedules(part: int) -> None:
    """The same for many more."""
    play_all(PART * PARTS + part * SOAKED, SOAKED, Design(host=TwinHost))


# --- mutants ---------------------------------------------------------------------------------------------------------


class CommitsWithoutTheTwin(Coordinator):
    """A vote counts for both hosts of a shard."""

    def _agreed(self, votes: Mapping[int, Vote]) -> Proposal | None:
        found = {vote.ticket: vote.proposal for vote in votes.values()}
        shards = {shard % (self._shards // 2) for shard in votes}
        return next(iter(found.values())) if len(shards) == self._shards // 2 and len(found) == 1 else None


class TakesBackWhoIsBehind(Coordinator):
    """A host that lacks what the others have, or lost it, is waited for."""

    def _unfit(self, _: Record, __: Mapping[int, Report]) -> set[int]:
        return set()


class WaitsForTheDamaged(Coordinator):
    """A host whose bytes are damaged is waited for, until an operator says something."""

    def _unfit(self, newest: Record, present: Mapping[int, Report]) -> set[int]:
        return {shard for shard in super()._unfit(newest, present) if not present[shard].damaged}


class LeavesTheLast(Coordinator):
    """The others go on without a host whose twin is left behind already."""

    def _can_leave(self, missing: Any) -> bool:
        return len(missing) == 1 < len(self._members()) and self._silent.issuperset(missing)

    def _leave(self, missing: Any) -> list[Output]:
        return self._seat(self.seating.absent.union(missing))

    def _unfit(self, newest: Record, present: Mapping[int, Report]) -> set[int]:
        return {shard for shard in super()._unfit(newest, present) if self.twin(shard) in present}


class LeavesAsManyAsThereAreShards(Coordinator):
    """The others go on without one host of each shard, as those may without them."""

    def _can_leave(self, missing: Any) -> bool:
        there = self._present().keys() - self._silent
        twins = {self.twin(each) for each in missing}
        return (
            self._silent.issuperset(missing)
            and there >= twins
            and not any(self._reports[twin].record.lost for twin in twins)
        )


class ReturnsWithoutATurn(Coordinator):
    """A host counts again once the others have voted for that, whatever it has."""

    def _count_return(self, votes: Mapping[int, Vote], _: Proposal, seating: Seating) -> list[Output]:
        return [*self._resolve(votes, committed=seating > self.seating)]


class KnowsTheSeatingInMemory(TwinHost):
    """Who counts is written with a host's next vote, and not before the host says that it knows."""

    def persist(self) -> None:
        if self.shard and self.shard.record.edition > self.disk.edition:
            super().persist()


class HoldsUpWhatTheAbsentMayHave(Coordinator):
    """A change comes before a ticket that all others hold, and a host that was left out may have committed."""

    def _is_held_up(self, proposal: Proposal, revision: int) -> bool:
        return proposal.change is None and bool(self._next_change(revision))


class StartsAsNew(TwinHost):
    """A host whose disk is empty begins as one that never had any."""

    def emptied(self) -> Record:
        return Record()


class RefusesAfterALoss(Shard):
    """A host votes against what it may have voted for before it lost that."""

    def refuse(self, proposal: Proposal, reason: str) -> list[Refusal]:
        record, self.record = self.record, self.record._replace(lost=False)
        said = super().refuse(proposal, reason)
        self.record = record
        return said


class CountsEditionsAnew(TwinHost):
    """A host whose disk is empty gives editions that were given before."""

    def emptied(self) -> Record:
        return emptied(1)


MUTANTS = (
    Mutant(Design(coordinator=CommitsWithoutTheTwin, host=TwinHost), Torn, 100),
    Mutant(Design(coordinator=TakesBackWhoIsBehind, host=TwinHost), Stuck, 100),
    Mutant(Design(coordinator=WaitsForTheDamaged, host=TwinHost), Stuck, 100),
    Mutant(Design(coordinator=LeavesTheLast, host=TwinHost), Broken, 500),
    Mutant(Design(coordinator=LeavesAsManyAsThereAreShards, host=TwinHost), Torn, 100, first=550),
    Mutant(Design(coordinator=ReturnsWithoutATurn, host=TwinHost), Torn, 100),
    Mutant(Design(host=KnowsTheSeatingInMemory), Broken, 200, first=1000),
    Mutant(Design(coordinator=HoldsUpWhatTheAbsentMayHave, host=TwinHost), Torn, 50, first=3260),
    Mutant(Design(shard=RefusesAfterALoss, host=TwinHost), Torn, 10, first=62_565),
    Mutant(Design(host=StartsAsNew), Broken, 300),
    Mutant(Design(host=CountsEditionsAnew), Broken, 300),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_caught(mutant: Mutant) -> None:
    """Each rule that is left out breaks the promise that it is there for, within the stated number of schedules."""
    with pytest.raises(mutant.breaks):
        play_all(mutant.first, mutant.within, mutant.design)


# --- examples, two shards with two hosts each ------------------------------------------------------------------------

UPDATE = Proposal(Ticket(0, 5, "u"))


def begun(*records: Record) -> tuple[Coordinator, list[Shard]]:
    """A coordinator that has claimed a term and heard all hosts."""
    coordinator = Coordinator("c", len(records), twins=True)
    shards = [Shard(place, record) for place, record in enumerate(records)]
    for _ in range(3):  # the question, the claim, and a seating
        for ask in coordinator.ask():
            for report in shards[ask.shard].receive(ask):
                assert isinstance(report, Report)
                coordinator.receive(report)
    return coordinator, shards


def test_the_others_go_on_without_a_silent_host() -> None:
    """Once each of them knows it, and not before."""
    coordinator, shards = begun(*[Record()] * 4)
    for shard in (0, 1, 3):
        for report in shards[shard].prepare(Vote(UPDATE, "o")):
            assert coordinator.receive(report) == []  # type: ignore[arg-type]

    asked = [ask for ask in coordinator.note_silence(2) if isinstance(ask, Ask) and ask.shard != 2]
    reports = [report for ask in asked for report in shards[ask.shard].receive(ask)]
    verdicts = [coordinator.receive(report) for report in reports if isinstance(report, Report)]

    assert [[type(each) for each in said] for said in verdicts] == [[], [], [Resolve] * 3]
    assert coordinator.seating.absent == {2}


def test_what_an_absent_host_may_have_is_committed_before_its_return() -> None:
    """A ticket that all others hold, though a change is next: the host that is left out may have had the verdict."""
    absent = Seating(Term(1, "b"), 1, "2")
    update = Vote(UPDATE, "o")
    held, ahead = (
        Record(Term(1, "b"), e, r, m, v, seating=absent) for e, r, m, v in ((1, 0, None, update), (2, 1, update, None))
    )
    coordinator, shards = begun(held, held, ahead, held)

    assert coordinator._reports[2].returns is False
    said = coordinator.receive(shards[2].report()._replace(returns=True))

    assert said == []
    assert [coordinator._said[place].committed for place in (0, 1, 3)] == [True] * 3  # type: ignore[union-attr]


def test_a_return_is_given_up_with_a_later_seating() -> None:
    """The host may have been told that it counts again, by a coordinator that is gone; so its word counts for nothing
    before the others give up their votes."""
    absent = Seating(Term(1, "b"), 1, "2")
    back = Proposal(Ticket(0, None, "return"), "", seating=Seating(Term(1, "b"), 2, ""))
    voted = Record(Term(1, "b"), 1, 0, None, Vote(back, "o"), seating=absent)

    coordinator, shards = begun(voted, voted, Record(Term(1, "b"), 0, 0, None, None, seating=absent), voted)

    assert coordinator.seating > Seating(Term(1, "b"), 2, "")
    assert coordinator.seating.absent == {2}
    assert all(shards[place].record.seating == coordinator.seating for place in (0, 1, 3))


@pytest.mark.parametrize(("of", "missing", "goes_on"), [(3, (0, 4), True), (2, (0, 3), False), (3, (0, 3), False)])
def test_hosts_of_one_machine_are_missing(of: int, missing: tuple[int, ...], goes_on: bool) -> None:
    """A coordinator that never heard them goes on if they are fewer than there are shards, and no two are of one."""
    coordinator = Coordinator("c", 2 * of, twins=True)
    shards = {place: Shard(place, Record()) for place in range(2 * of) if place not in missing}

    def ask() -> None:
        for asked in coordinator.ask():
            if asked.shard in shards:
                for report in shards[asked.shard].receive(asked):
                    coordinator.receive(report)  # type: ignore[arg-type]

    ask()
    for place in missing:
        coordinator.note_silence(place)
    for _ in range(3):  # the question, the claim, and a seating
        ask()

    assert coordinator.seating.absent == (set(missing) if goes_on else set())
    assert {each.record.seating for each in shards.values()} == {coordinator.seating}


def test_a_damaged_host_is_filled_from_its_twin() -> None:
    """No operator is asked: its twin has all that it cannot read."""
    coordinator, shards = begun(*[Record()] * 4)

    said = coordinator.receive(shards[2].report()._replace(damaged=True))

    assert {ask.seating.absent for ask in said if isinstance(ask, Ask)} == {frozenset({2})}
    assert coordinator.fault is None


def test_nobody_goes_on_without_a_host_whose_twin_is_damaged() -> None:
    """The host is waited for, to fill its twin: an operator's word would give up what it has."""
    coordinator, shards = Coordinator("c", 4, twins=True), [Shard(place, Record()) for place in range(4)]

    def hear(place: int, message: Ask) -> list[Output]:
        (report,) = shards[place].receive(message)
        assert isinstance(report, Report)
        return coordinator.receive(report._replace(damaged=place == 2))

    for place in (1, 2, 3):
        hear(place, Ask(place, coordinator.term))
    assert coordinator.note_silence(0) == []
    assert coordinator.propose("w", "rewind to s", mends=True) == []


def test_nobody_goes_on_without_both_hosts_of_a_shard() -> None:
    """A host is waited for whose twin was left behind."""
    coordinator, shards = begun(*[Record()] * 4)
    for ask in coordinator.note_silence(2):
        for report in shards[ask.shard].receive(ask):  # type: ignore[union-attr,arg-type]
            coordinator.receive(report)  # type: ignore[arg-type]

    assert coordinator.note_silence(0) == []
    assert coordinator.seating.absent == {2}


def test_an_empty_disk_is_left_behind() -> None:
    """Also where nobody was silent: its host came back before that was noticed."""
    made = Record(Term(1, "c"), 2, 1, Vote(UPDATE, "o"), None)

    coordinator, shards = begun(made, made, emptied(7), made)

    assert coordinator.seating.absent == {2}
    assert 2 in shards[0].record.seating.absent
    assert coordinator.fault is None


LEFT_BEHIND = Record(Term(1, "b"), 1, 0, None, None, seating=Seating(Term(1, "b"), 1, "2"))


def test_a_host_that_was_left_behind_counts_again_where_its_twin_has_less() -> None:
    """A host was left behind while nobody knew that its twin had lost its disk. It has all that was committed since,
    and counts at once, in place of its twin."""
    coordinator, shards = begun(emptied(7), *[LEFT_BEHIND] * 3)

    assert coordinator.seating.absent == {0}
    assert coordinator.fault is None
    said = [
        verdict
        for shard in (1, 2, 3)
        for report in shards[shard].prepare(Vote(UPDATE, "o"))
        for verdict in coordinator.receive(report)  # type: ignore[arg-type]
    ]
    assert [each.committed for each in said if isinstance(each, Resolve)] == [True] * 3


def test_a_host_that_was_left_behind_stays_so_where_it_lacks_an_update() -> None:
    """Nothing is decided where its twin has lost that, and why is told."""
    made = LEFT_BEHIND._replace(edition=2, revision=1, made=Vote(UPDATE, "o"))

    coordinator, _ = begun(emptied(7), made, LEFT_BEHIND, made)

    assert coordinator.seating.absent == {2}
    assert coordinator.fault == "shard 0 lost its versions, and its twin was left behind"


def test_all_empty_disks_begin_together() -> None:
    """A new cluster's hosts have lost nothing, and cannot know that."""
    coordinator, _ = begun(*[emptied(7)] * 4)

    assert coordinator.seating.absent == frozenset()
    assert coordinator.fault is None


def test_a_host_that_was_left_behind_refuses_nothing() -> None:
    """It judges by an older version: what the others voted for takes effect. Its own return it can refuse."""
    behind = Seating(Term(1, "b"), 1, "2")
    record = Record(Term(1, "b"), 1, 0, None, None, seating=behind)
    coordinator, shards = begun(record, record, record, record)
    for shard in (0, 1):
        for report in shards[shard].prepare(Vote(UPDATE, "o")):
            coordinator.receive(report)  # type: ignore[arg-type]

    assert shards[2].refuse(UPDATE, "an older step") == []
    refusal = Refusal(2, coordinator.term, UPDATE.ticket, "an older step")  # before it knew that it was left behind
    assert coordinator.receive(refusal) == []
    (report,) = shards[3].prepare(Vote(UPDATE, "o"))
    said = coordinator.receive(report)  # type: ignore[arg-type]

    assert [each.committed for each in said if isinstance(each, Resolve)] == [True] * 3


def test_a_host_that_lost_what_it_had_refuses_nothing() -> None:
    """It may have voted for that, and another have committed it who was left behind since. Its own return, and the way
    back, it can refuse."""
    behind = Seating(Term(1, "b"), 1, "2")
    lost, absent = emptied(7), emptied(7)._replace(seating=behind)
    back, own = UPDATE._replace(back=0), UPDATE._replace(change="", seating=behind._replace(number=2, without=""))

    assert [bool(Shard(2, lost).refuse(each, "why")) for each in (UPDATE, back)] == [False, True]
    assert [bool(Shard(2, absent).refuse(each, "why")) for each in (UPDATE, own)] == [False, True]


def test_two_hosts_return_one_after_the_other() -> None:
    """Each return is proposed once, and not under another name whenever the other host says that it can return."""
    record = Record(Term(1, "b"), 1, 0, None, None, seating=Seating(Term(1, "b"), 1, "0 4"))
    coordinator, shards = begun(*[record] * 6)

    def proposed(shard: int) -> list[Seating | None]:
        said = coordinator.receive(shards[shard].report()._replace(returns=True))
        return [each.proposal.seating for each in said if isinstance(each, Propose)]

    (first,) = set(proposed(0))
    assert first
    assert first.absent == {4}
    assert proposed(4) == []
    assert set(proposed(0)) <= {first}


def test_a_return_that_was_refused_is_proposed_again() -> None:
    """Also where another host refused it, and the one that returns has nothing to add: with the next questions, under
    another name, or it would wait for ever."""
    behind = Seating(Term(1, "b"), 1, "2")
    record = Record(Term(1, "b"), 1, 0, None, None, seating=behind)
    coordinator, shards = begun(record, record, record, record)

    def proposed() -> set[Ticket]:
        said = coordinator.receive(shards[2].report()._replace(returns=True))
        return {each.proposal.ticket for each in said if isinstance(each, Propose)}

    (first,) = proposed()
    coordinator.receive(Refusal(0, coordinator.term, first, "a defect"))
    assert proposed() == set()
    coordinator.ask()
    (second,) = proposed()
    assert second != first
