"""A coordinator's talk with the shards of a run, without sockets.

Knows queues and what goes through them. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from ema_client.errors import Conflict, InvalidRequest, Overloaded, RunNotFound, Stopping
from ema_service.cluster import Answer, Arrival, Ask, Change, Record, Report, Resolve, Seating, Shard, Term, Vote
from ema_service.cluster.conversation import Conversation, Conversations, Listening, Seat
from ema_service.cluster.messages import DIRECTORY, Proposal, Propose, Ticket

T = TypeVar("T")

UPDATE = Vote(Proposal(Ticket(0, 1, "u")), "1.1")


def arrival(place: int, shards: int = 2) -> Arrival:
    return Arrival(place, shards, f"http://host-{place}", 10 * place, 10 * place + 10)


def run(test: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine on a loop of its own."""

    async def whole() -> T:
        return await asyncio.wait_for(test(), 20)

    return asyncio.run(whole())


def read(listening: Listening) -> list[object]:
    """What a shard was told since it read the last time."""
    return [listening.get_nowait() for _ in range(listening.qsize())]


def begun() -> tuple[Conversation, Listening, Listening]:
    """A talk in which both shards listen and have promised."""
    talk = Conversation("r", "c", 2)
    one, two = talk.arrive(arrival(0)), talk.arrive(arrival(1))
    for term in (Term(), Term(1, "c")):
        for place in range(2):
            talk.hear(Report(place, Record(term)))
    read(one), read(two)
    return talk, one, two


def twins() -> tuple[Conversation, dict[int, Listening], dict[int, Shard]]:
    """A talk of two shards with two hosts each, all of which listen and have promised."""
    talk = Conversation("r", "c", 4, twins=True)
    cores = {place: Shard(place, Record()) for place in range(4)}
    listening = {place: talk.arrive(arrival(place, 4)._replace(twins=True)) for place in range(4)}
    for _ in range(3):
        answer(talk, listening, cores)
    return talk, listening, cores


def answer(talk: Conversation, listening: dict[int, Listening], cores: dict[int, Shard]) -> None:
    """Have those that listen answer what they were told."""
    for place, queue in listening.items():
        for message in read(queue):
            assert isinstance(message, Ask | Propose | Resolve)
            for report in cores[place].receive(message):
                assert isinstance(report, Report)
                talk.hear(report)


@pytest.mark.parametrize(("connected", "questions"), [(False, 6), (True, 11)])
def test_a_host_that_says_nothing_is_left_behind(connected: bool, questions: int) -> None:
    """After so many questions, one a second: sooner where its connection is gone. Not while it answers."""

    async def test() -> None:
        talk, listening, cores = twins()
        quiet = listening.pop(2)
        if not connected:
            talk.leave(2, quiet)
        for _ in range(questions - 1):
            talk.ask_again()
            answer(talk, listening, cores)
        assert talk.core.seating.absent == frozenset()
        talk.ask_again()
        answer(talk, listening, cores)
        assert talk.core.seating.absent == {2}
        assert [2 in core.record.seating.absent for core in cores.values()] == [True, True, False, True]

    run(test)


@pytest.mark.parametrize("apart", [0, 1, 2])
def test_nobody_is_left_behind_where_both_are_gone(apart: int) -> None:
    """Of the talk of a deleted run all go, one a few questions before its twin; so do hosts whose power ends. Those
    that come back count, and the one whose twin does not come is gone on without."""

    async def test() -> None:
        talk, listening, cores = twins()
        for place in (0, 1):
            talk.leave(place, listening.pop(place))
        for _ in range(apart):
            talk.ask_again()
            answer(talk, listening, cores)
        for place in (2, 3):
            talk.leave(place, listening.pop(place))
        for _ in range(60):
            talk.ask_again()
        assert talk.core.seating.absent == frozenset()
        for place in (0, 1, 3):
            listening[place] = talk.arrive(arrival(place, 4)._replace(twins=True))
        for _ in range(3):
            answer(talk, listening, cores)
            talk.ask_again()
        assert talk.core.seating.absent == {2}

    run(test)


def test_a_run_that_is_made_while_a_host_is_away() -> None:
    """Nobody waits for the host to come to the run's talk."""

    async def test() -> None:
        talks = Conversations(lambda: "c")
        for name in (DIRECTORY, "r@2"):
            seated = Record(Term(1, "b"), seating=Seating(Term(1, "b"), 1, "2" if name == DIRECTORY else ""))
            for place in (0, 1, 3):
                talk, _ = talks.arrive(name, arrival(place, 4)._replace(twins=True))
                talk.hear(Report(place, seated))
        assert talks.absent() == {DIRECTORY: [2]}
        talks.ask_again()
        assert talks.find("r@2").core.term.number == 2

    run(test)


def test_who_is_left_out_of_a_deleted_run_is_not_told_of_the_next_of_its_name() -> None:
    """Its talk is there for some seconds more, and the next run's begins with everybody."""

    async def test() -> None:
        talks = Conversations(lambda: "c")
        for name in ("r@9", "r@10", "s@9"):
            seated = Record(Term(1, "b"), seating=Seating(Term(1, "b"), 1, "2" if name.endswith("@9") else ""))
            for place in (0, 1, 3):
                talk, _ = talks.arrive(name, arrival(place, 4)._replace(twins=True))
                talk.hear(Report(place, seated))
        assert talks.absent() == {"s@9": [2]}

    run(test)


def test_first_question_comes_at_once() -> None:
    """A shard that begins to listen is asked, and once all have said their term, asked to promise one."""

    async def test() -> None:
        talk = Conversation("r", "c", 2)
        one, two = talk.arrive(arrival(0)), talk.arrive(arrival(1))
        assert (read(one), read(two)) == ([Ask(0, Term())], [Ask(1, Term())])
        talk.hear(Report(0, Record(Term(4, "d"))))
        talk.hear(Report(1, Record()))
        assert (read(one), read(two)) == ([Ask(0, Term(5, "c"))], [Ask(1, Term(5, "c"))])

    run(test)


def test_verdict_goes_to_all_that_listen() -> None:
    """The last vote is followed by a verdict for each shard; one that is away hears it when it reports again."""

    async def test() -> None:
        talk, one, two = begun()
        voted = Record(Term(1, "c"), 1, 0, None, UPDATE)
        talk.leave(0, one)
        talk.hear(Report(0, voted))
        talk.hear(Report(1, voted))
        assert (read(one), read(two)) == ([], [Resolve(1, Term(1, "c"), 1, committed=True)])
        back = talk.arrive(arrival(0))
        talk.hear(Report(0, voted))
        assert read(back) == [Ask(0, Term(1, "c")), Resolve(0, Term(1, "c"), 1, committed=True)]

    run(test)


def test_claim_that_a_shard_missed_is_said_again() -> None:
    """A shard that was not listening when the term was claimed is asked as soon as it reports the old one."""

    async def test() -> None:
        talk = Conversation("r", "c", 2)
        one, two = talk.arrive(arrival(0)), talk.arrive(arrival(1))
        talk.hear(Report(0, Record()))
        talk.leave(1, two)
        talk.hear(Report(1, Record()))
        two = talk.arrive(arrival(1))
        read(one), read(two)
        talk.hear(Report(1, Record()))
        assert (read(one), read(two)) == ([], [Ask(1, Term(1, "c"))])

    run(test)


def test_newer_process_of_a_shard_is_talked_to() -> None:
    """A shard that was started again takes the place of the process before, whose end does not matter any more."""

    async def test() -> None:
        talk, old, _ = begun()
        new = talk.arrive(arrival(0))
        assert read(old) == [None]
        talk.leave(0, old)
        read(new)
        talk.ask_again()
        assert read(new) == [Ask(0, Term(1, "c"))]

    run(test)


def test_shard_that_reads_nothing_is_held_for_gone() -> None:
    """What a shard does not read takes a bounded memory: then its listening ends."""

    async def test() -> None:
        talk, one, _ = begun()
        for _ in range(1000):
            talk.ask_again()
        assert one.qsize() <= 64
        assert read(one)[-1] is None
        assert not talk.seats()[0].listens

    run(test)


def test_seats() -> None:
    """Each shard has its seat, also one that never came."""

    async def test() -> None:
        talk = Conversation("r", "c", 2)
        talk.arrive(arrival(1))
        talk.hear(arrival(1)._replace(stop=99))
        assert talk.seats() == [
            Seat(0, None, 0, 0, listens=False),
            Seat(1, "http://host-1", 10, 99, listens=True),
        ]

    run(test)


def test_change_is_answered_once_it_is_made() -> None:
    """Who asks for a change waits for the shards; two who ask with one key wait for the same."""

    async def test() -> None:
        talk, one, two = begun()
        asked = [asyncio.create_task(talk.change(Change("k", "decay 0.5"), 5)) for _ in range(2)]
        await asyncio.sleep(0)
        (proposed,) = read(one)
        assert isinstance(proposed, Propose)
        assert [each.proposal for each in read(two) if isinstance(each, Propose)] == [proposed.proposal]
        vote = Vote(proposed.proposal, "1.1")
        for place in range(2):
            talk.hear(Report(place, Record(Term(1, "c"), 1, 0, None, vote)))
        for place in range(2):
            talk.hear(Report(place, Record(Term(1, "c"), 2, 1, vote, None)))
        assert await asyncio.gather(*asked) == [Answer("k", committed=True)] * 2

    run(test)


def test_change_waits_no_longer_than_it_may() -> None:
    """Without all shards nothing is decided, and the error names those that are missing."""

    async def test() -> None:
        talk, one, _ = begun()
        talk.leave(0, one)
        with pytest.raises(Overloaded, match=r"not decided in 0\.01 seconds: without shard 0"):
            await talk.change(Change("k", "decay 0.5"), 0.01)

    run(test)


def test_end_tells_all_that_wait() -> None:
    """A coordinator that ends lets nobody listen, and nobody wait."""

    async def test() -> None:
        talks = Conversations(lambda: "c")
        talk, one = talks.arrive("r", arrival(0))
        waiting = asyncio.create_task(talk.change(Change("k", "decay 0.5"), 5))
        await asyncio.sleep(0)
        talks.end()
        assert read(one)[-1] is None
        with pytest.raises(Stopping):
            await waiting
        with pytest.raises(Stopping):
            talks.arrive("r", arrival(0))

    run(test)


def test_larger_term_deposes() -> None:
    """One report of a larger term, about any run, and the coordinator is to end."""

    async def test() -> None:
        talks = Conversations(lambda: "c")
        for place in range(2):
            talks.arrive("r", arrival(place))
        talks.arrive("other", arrival(0, 1))
        for place in range(2):
            talks.find("r").hear(Report(place, Record()))
        assert not talks.deposed
        talks.find("r").hear(Report(0, Record(Term(2, "d"))))
        assert talks.deposed

    run(test)


def test_who_does_not_fit_is_refused() -> None:
    """A shard that believes in another number of shards, or has no place among them, changes nothing."""

    async def test() -> None:
        talks = Conversations(lambda: "c")
        with pytest.raises(InvalidRequest, match="shard 2 of 2: places are counted from 0"):
            talks.arrive("r", arrival(2))
        with pytest.raises(RunNotFound):
            talks.find("r")
        talk, _ = talks.arrive("r", arrival(0))
        for message in (arrival(1, 3), arrival(0, 1)):
            with pytest.raises(Conflict, match=f"shard {message.shard} says that run 'r' has {message.shards} shards"):
                talks.arrive("r", message)
            with pytest.raises(Conflict, match="others say 2"):
                talk.hear(message)
        with pytest.raises(InvalidRequest, match="has shards 0 to 1"):
            talk.hear(Report(2, Record()))
        assert [seat.address for seat in talk.seats()] == ["http://host-0", None]

    run(test)


def test_change_is_answered_when_every_shard_has_it() -> None:
    """Whoever asked for a change may turn to any shard next: the answer waits for the last one's commit."""

    async def test() -> None:
        talk, one, two = begun()
        asked = asyncio.create_task(talk.change(Change("k", "c"), 20.0))
        await asyncio.sleep(0)
        vote, term = Vote(Proposal(Ticket(0, None, "k"), "c"), ""), Term(1, "c")
        for place in range(2):
            talk.hear(Report(place, Record(term, 1, 0, None, vote)))
        assert [message for message in read(one) + read(two) if isinstance(message, Resolve) and message.committed]
        talk.hear(Report(0, Record(term, 2, 1, vote)))
        await asyncio.sleep(0.05)
        assert not asked.done()
        talk.hear(Report(1, Record(term, 2, 1, vote)))
        assert (await asked).committed

    run(test)


def test_talk_that_nobody_hears_is_forgotten() -> None:
    """A coordinator forgets a talk that nobody listened to for a minute, and begins anew, as another, when a shard
    comes; one that anybody listens to it keeps."""

    async def test() -> None:
        names = iter("abc")
        talks = Conversations(lambda: next(names))
        gone, left = talks.arrive("r@1", arrival(0))
        kept, _ = talks.arrive("s@2", arrival(0))
        gone.leave(0, left)
        for _ in range(60):
            talks.ask_again()
            assert talks.find("r@1") is gone
        talks.ask_again()
        with pytest.raises(RunNotFound):
            talks.find("r@1")
        assert talks.find("s@2") is kept
        assert talks.arrive("r@1", arrival(0))[0] is not gone

    run(test)
