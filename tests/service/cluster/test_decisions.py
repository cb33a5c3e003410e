"""The decision core against an oracle: 20,000 random schedules of faults, mutants that they must catch, and examples.

A schedule that fails names its seed; ``play(seed)`` plays it again.

Knows what a proposal may lead to. Does not know files, servers or time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from unittest.mock import ANY

import pytest

from ema_service.cluster import (
    Answer,
    Ask,
    Coordinator,
    Kept,
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
from tests.service.cluster.mutants import MUTANTS, Mutant
from tests.service.cluster.scale import commit
from tests.service.cluster.world import Design, play
from tests.service.cluster.world_hosts import Broken

#: Schedules of one test. Eight tests, so that a failure is told while the others are still played.
PART = 2500
PARTS = 8
SOAKED = 25_000


def play_all(first: int, count: int, design: Design) -> Counter[str]:
    """Play so many schedules. Returns how often what happened."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            seen += play(seed, design).seen
        except Broken as broken:
            broken.add_note(f"schedule {seed}: play({seed}) of tests/service/cluster/world.py plays it again")
            raise
    return seen


# --- random schedules ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played() -> Iterator[list[Future[Counter[str]]]]:
    """By part, what happened, once its schedules are played: a process on each core plays them."""
    cores = min(os.cpu_count() or 1, PARTS)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as processes:
        yield [processes.submit(play_all, part * PART, PART, Design()) for part in range(PARTS)]
        processes.shutdown(cancel_futures=True)


@pytest.mark.parametrize("part", range(PARTS))
def test_schedules(part: int, played: list[Future[Counter[str]]]) -> None:
    """No update is on some shards only, none that was acknowledged is lost, no version is torn, and once the faults
    stop everything is resolved; and schedules are such that all of that could have failed."""
    seen = played[part].result()

    assert seen["committed"] > PART // 4
    assert seen["aborted"] > PART // 4
    assert seen["refused"] > PART // 10
    assert seen["deposed"] > PART // 50
    assert seen["went back on a word"] > PART // 20


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_many_schedules(part: int) -> None:
    """The same for ten times as many."""
    play_all(PART * PARTS + part * SOAKED, SOAKED, Design())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_caught(mutant: Mutant) -> None:
    """Each rule that is left out breaks the promise that it is there for, within the stated number of schedules."""
    with pytest.raises(mutant.breaks):
        play_all(mutant.first, mutant.within, mutant.design)


def test_schedule_is_played_again() -> None:
    """One seed is one schedule."""
    first, second = play(11), play(11)

    assert (first.chosen, first.seen, first.names) == (second.chosen, second.seen, second.names)


# --- examples, two shards each ---------------------------------------------------------------------------------------

TERM = Term(1, "c")
UPDATE = Proposal(Ticket(0, 5, "u"))
NEWER = Proposal(Ticket(0, 6, "v"))
AGAIN = Proposal(Ticket(0, 5, "w"))


def vote(proposal: Proposal) -> Vote:
    return Vote(proposal, f"after {proposal.ticket.key}")


def begun(*records: Record) -> tuple[Coordinator, list[Shard]]:
    """A coordinator that has claimed a term and heard all shards."""
    coordinator = Coordinator("c", 2)
    shards = [Shard(place, record) for place, record in enumerate(records or (Record(), Record()))]
    for _ in range(2):  # the question, and the claim
        for ask in coordinator.ask():
            for report in shards[ask.shard].receive(ask):
                assert isinstance(report, Report)
                coordinator.receive(report)
    return coordinator, shards


def carry(coordinator: Coordinator, shards: list[Shard], messages: list[object]) -> list[Answer]:
    """Deliver messages, and what follows from them, until none is left. Changes are prepared at once."""
    answers, waiting = [], list(messages)
    while waiting:
        message = waiting.pop(0)
        if isinstance(message, Answer):
            answers.append(message)
        elif isinstance(message, Report | Refusal):
            waiting += coordinator.receive(message)
        elif isinstance(message, Ask | Propose | Resolve):
            waiting += shards[message.shard].receive(message)
            # A proposal comes alone, as answer to the message that asks for it.
            for each in [each for each in waiting if isinstance(each, Proposal)]:
                waiting.remove(each)
                waiting += shards[message.shard].prepare(vote(each))
    return answers


def test_all_votes_commit() -> None:
    """The last vote commits: two reports, two verdicts, two answers."""
    coordinator, shards = begun()

    assert carry(coordinator, shards, shards[0].prepare(vote(UPDATE))) == []
    assert carry(coordinator, shards, shards[1].prepare(vote(UPDATE))) == [Answer("u", committed=True)] * 2
    assert [shard.record.revision for shard in shards] == [1, 1]


@pytest.mark.parametrize("shards", [8, 64, 256])
def test_messages_of_a_commit(shards: int) -> None:
    """An update costs three messages a shard, however many there are: the vote, the verdict, and that it was obeyed."""
    assert commit(shards).messages == 3 * shards


def test_newer_step_takes_over() -> None:
    """An update that its trainer left half sent gives way to the next step, and its sender is told."""
    coordinator, shards = begun()
    carry(coordinator, shards, shards[0].prepare(vote(UPDATE)))

    answers = carry(coordinator, shards, shards[1].prepare(vote(NEWER)))

    assert answers == [Answer("u", committed=False)]
    assert carry(coordinator, shards, shards[0].prepare(vote(NEWER))) == [Answer("v", committed=True)] * 2


def test_same_step_of_another_trainer_waits_its_time() -> None:
    """Slices of two pushes of one step are never one update; the second push takes over once it has waited for long."""
    coordinator, shards = begun()
    carry(coordinator, shards, shards[0].prepare(vote(UPDATE)))
    carry(coordinator, shards, shards[1].prepare(vote(AGAIN)))

    assert carry(coordinator, shards, shards[0].prepare(vote(AGAIN))) == []
    answers = carry(coordinator, shards, [*shards[0].insist()])

    assert answers == [Answer("u", committed=False), *[Answer("w", committed=True)] * 2]


def test_successor_commits_what_is_half_committed() -> None:
    """A coordinator that ends between two verdicts leaves a shard behind; the next commits there too."""
    behind = Record(TERM, 1, 0, None, vote(UPDATE))
    ahead = Record(TERM, 2, 1, vote(UPDATE), None)

    coordinator, shards = begun(behind, ahead)
    answers = carry(coordinator, shards, [*coordinator.ask()])

    assert answers == [Answer("u", committed=True)]
    assert [shard.record.revision for shard in shards] == [1, 1]


def test_successor_sees_a_change_through() -> None:
    """A change that one shard has heard of is brought to all, also where nobody asks for it any more."""
    change = Proposal(Ticket(0, None, "k"), "decay 0.5")
    coordinator, shards = begun(Record(TERM, 1, 0, None, vote(change)), Record())

    carry(coordinator, shards, [*coordinator.ask()])

    assert [shard.record.made for shard in shards] == [vote(change)] * 2


def test_change_is_refused_with_its_reason() -> None:
    """One shard's refusal drops a change on all, and whoever asked is told why."""
    coordinator, shards = begun()
    change = Proposal(Ticket(0, None, "k"), "rewind to s")
    assert coordinator.propose("k", "rewind to s") == [Propose(place, coordinator.term, change) for place in (0, 1)]
    carry(coordinator, shards, shards[0].prepare(vote(change)))

    answers = carry(coordinator, shards, [*shards[1].refuse(change, "damaged")])

    assert Answer("k", committed=False, reason="damaged") in answers
    assert [shard.record.vote for shard in shards] == [None, None]


def test_nobody_refuses_what_it_has_committed() -> None:
    """A proposal that comes once more, and late, is of a revision that is over."""
    change = Proposal(Ticket(0, None, "k"), "snapshot s")
    shard = Shard(0, Record(TERM, 2, 1, vote(change), None))

    assert shard.refuse(change, "made before") == []
    again = Ticket(1, None, "k")
    assert shard.refuse(change._replace(ticket=again), "made before") == [Refusal(0, TERM, again, "made before")]


def test_update_waits_for_a_change_and_not_before() -> None:
    """An update keeps its vote until the shard has the change in hand; then the update waits, and its sender is told
    that the change came first."""
    coordinator, shards = begun()
    change = Proposal(Ticket(0, None, "k"), "snapshot s")
    carry(coordinator, shards, shards[0].prepare(vote(UPDATE)))

    assert coordinator.propose("k", "snapshot s") == [Propose(place, coordinator.term, change) for place in (0, 1)]
    assert shards[0].record.vote == vote(UPDATE)
    assert carry(coordinator, shards, shards[0].prepare(vote(change))) == []
    assert (shards[0].record.vote, shards[0].report().waiting) == (vote(change), UPDATE)

    answers = carry(coordinator, shards, shards[1].prepare(vote(change)))
    assert sorted(answers) == [Answer("k", True), Answer("k", True), Answer("k", True), Answer("u", False)]


def test_update_is_voted_for_again_where_a_change_is_refused() -> None:
    """What gave way to a change that comes to nothing has its vote back, and its sender heard nothing."""
    coordinator, shards = begun()
    change = Proposal(Ticket(0, None, "k"), "snapshot s")
    carry(coordinator, shards, shards[0].prepare(vote(UPDATE)))
    coordinator.propose("k", "snapshot s")
    carry(coordinator, shards, shards[0].prepare(vote(change)))

    answers = carry(coordinator, shards, [*shards[1].refuse(change, "full")])

    assert {answer.key for answer in answers} == {"k"}
    assert shards[0].record.vote == vote(UPDATE)
    assert carry(coordinator, shards, shards[1].prepare(vote(UPDATE))) == [Answer("u", committed=True)] * 2


def test_update_on_all_shards_lets_a_change_pass() -> None:
    """A change that a shard judges for long is for the revision that it was proposed for: no update goes before."""
    coordinator, shards = begun()
    change = Proposal(Ticket(0, None, "k"), "rewind to s")
    coordinator.propose("k", "rewind to s")

    answers = carry(coordinator, shards, [*shards[0].prepare(vote(UPDATE)), *shards[1].prepare(vote(UPDATE))])

    assert Answer("k", committed=True) in answers
    assert [shard.record.made for shard in shards] == [vote(change)] * 2


def differ(coordinator: Coordinator, shards: list[Shard], proposal: Proposal) -> list[Answer]:
    """Have each shard vote for another outcome of a proposal."""
    reports = [each for place, shard in enumerate(shards) for each in shard.prepare(Vote(proposal, f"by {place}"))]
    return carry(coordinator, shards, [*reports])


def test_change_that_shards_disagree_about_is_proposed_once() -> None:
    """Outcomes that differ would differ again: whoever asked is told so, and may ask again."""
    coordinator, shards = begun()
    change = Proposal(Ticket(0, None, "k"), "decay 0.5")
    coordinator.propose("k", "decay 0.5")

    answers = differ(coordinator, shards, change)

    assert [each.committed for each in answers] == [False] * 3
    assert all("shards 0 against 1" in each.reason for each in answers)
    assert [shard.record.vote for shard in shards] == [None, None]
    assert coordinator.propose("k", "decay 0.5") == [Propose(place, coordinator.term, change) for place in (0, 1)]


def test_update_that_shards_disagree_about_is_refused() -> None:
    """Its sender would send the update for ever: it is told that the update is not to be sent again."""
    coordinator, shards = begun()

    answers = differ(coordinator, shards, UPDATE)
    again = carry(coordinator, shards, [*shards[0].prepare(vote(UPDATE))])

    assert {(each.key, each.committed) for each in [*answers, *again]} == {("u", False)}
    assert all("shards 0 against 1" in each.reason for each in [*answers, *again])
    assert carry(coordinator, shards, [*shards[0].prepare(vote(NEWER)), *shards[1].prepare(vote(NEWER))])[-1].committed


def test_way_back_that_shards_disagree_about_is_not_taken() -> None:
    """Nobody goes anywhere, and the fault is told."""
    lost = after_loss(Record(TERM, 4, 0, None, None))
    coordinator, shards = begun(lost, lost._replace(edition=lost.edition + 1))
    way = Proposal(Ticket(0, None, "back-0"), "", 0)

    assert differ(coordinator, shards, way) == [Answer("back-0", committed=False, reason=ANY)] * 2
    assert coordinator.fault == "a shard lost its newest versions, and there is no checkpoint that all can go back to"


def test_lost_shard_votes_for_the_way_back_alone() -> None:
    """An update would be gone back over as soon as all are there; its sender is told to send it again."""
    shard = Shard(0, after_loss(Record(TERM, 4, 0, None, None)))

    assert shard.prepare(vote(UPDATE)) == [Answer("u", committed=False)]
    assert shard.record.vote is None
    way = Proposal(Ticket(3, None, "back-2"), "", 2)
    shard.prepare(vote(way))
    assert shard.record.vote == vote(way)


def test_older_copy_of_a_disk_is_a_fault() -> None:
    """What no crash explains is told, and nothing is decided."""
    coordinator, _ = begun(Record(TERM, 4, 2, vote(NEWER), None), Record())

    assert coordinator.fault == (
        "shard 1 is at revision 0 and lacks what led the others to revision 2: is its data dir an older copy?"
    )
    assert coordinator.propose("k", "decay 0.5") == []


def test_a_promise_that_a_machine_took_with_it_is_asked_for_again() -> None:
    """At once, and what the shard said before counts for nothing; a report from before the promise does no harm."""
    coordinator, _ = begun(AT_TWO, AT_TWO)

    assert coordinator.receive(Shard(1, Record()).report()) == []
    assert coordinator.revision(1) == 2
    assert coordinator.receive(Shard(1, after_loss(Record())).report()) == [Ask(1, coordinator.term)]
    assert coordinator.revision(1) is None


def hurt(*records: Record) -> tuple[Coordinator, list[Shard]]:
    """As begun(), where the bytes of the last shard are damaged."""
    coordinator, shards = begun(*records)
    shards[-1].note_damage(True)
    coordinator.receive(shards[-1].report()._replace(damaged=True))
    return coordinator, shards


AT_TWO = Record(TERM, 4, 2, vote(NEWER), None)


def test_damage_waits_for_a_word() -> None:
    """Nothing is decided while a shard cannot read what it has, nor does it vote; and that is told."""
    coordinator, shards = hurt(AT_TWO, AT_TWO)

    assert coordinator.fault == "the versions of shard 1 are damaged: an operator says what all shards go back to"
    assert coordinator.propose("k", "decay 0.5") == []
    following = Proposal(Ticket(2, 7, "x"))
    assert shards[1].prepare(vote(following)) == [Answer("x", committed=False)]
    shards[1].note_damage(False)
    assert shards[1].prepare(vote(following)) == [shards[1].report()]


@pytest.mark.parametrize("older", [False, True], ids=["damaged", "older copy"])
def test_all_go_back_on_a_word(older: bool) -> None:
    """To the snapshot that it names: for each shard that is its next revision, also for an older copy of a disk."""
    coordinator, shards = begun(AT_TWO, Record(TERM, 1, 1, vote(UPDATE), None)) if older else hurt(AT_TWO, AT_TWO)
    way = Proposal(Ticket(2, None, "w-back"), "after v", 0, word="w", to="rewind to s")

    assert coordinator.propose("w", "rewind to s", mends=True) == [Propose(p, coordinator.term, way) for p in (0, 1)]
    answers = carry(coordinator, shards, [each for shard in shards for each in shard.prepare(vote(way))])

    assert answers == [*[Answer("w-back", committed=True)] * 2, Answer("w", committed=True)]
    assert [shard.record.made for shard in shards] == [vote(way)] * 2
    assert [shard.record.revision for shard in shards] == [3, 3]


def test_a_word_goes_back_to_the_newest_that_all_have() -> None:
    """A checkpoint that one shard cannot read gives way to the one before; where none is left the word is refused, with
    what that shard said."""
    coordinator, shards = begun(*[AT_TWO._replace(settled=1)] * 2)
    for shard in shards:
        shard.note_damage(True)
        coordinator.receive(shard.report()._replace(damaged=True, kept=Kept(1, 2)))

    first = coordinator.propose("w", "", mends=True)
    second = [
        each
        for refusal in shards[0].refuse(Proposal(Ticket(2, None, "w-back-2"), back=2), "torn")
        for each in coordinator.receive(refusal)
    ]
    third = [
        each
        for refusal in shards[0].refuse(Proposal(Ticket(2, None, "w-back-1"), back=1), "torn")
        for each in coordinator.receive(refusal)
    ]

    assert [each.proposal.back for each in first if isinstance(each, Propose)] == [2, 2]
    assert [each.proposal.back for each in second if isinstance(each, Propose)] == [1, 1]
    (answer,) = third
    assert isinstance(answer, Answer)
    assert not answer.committed
    assert "there is no version that all hosts can read: torn" in answer.reason


def test_a_word_without_need() -> None:
    """Where no shard is damaged all have everything in common, and a rewind is a change like any other."""
    coordinator, _ = begun()

    (answer,) = coordinator.propose("w", "", mends=True)
    assert isinstance(answer, Answer)
    assert "not degraded" in answer.reason
    said = coordinator.propose("v", "rewind to s", mends=True)
    assert {each.proposal for each in said if isinstance(each, Propose)} == {
        Proposal(Ticket(0, None, "v"), "rewind to s")
    }


def test_old_coordinator_learns_that_its_time_is_over() -> None:
    """A shard that obeys another coordinator says so, and does nothing."""
    coordinator, shards = begun()
    carry(coordinator, shards, [Ask(0, Term(9, "d"))])
    before = shards[0].record

    carry(coordinator, shards, [*coordinator.ask()])

    assert coordinator.deposed
    assert coordinator.propose("k", "decay 0.5") == coordinator.ask() == []
    assert shards[0].record == before
