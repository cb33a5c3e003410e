"""A shard's talk: which record is kept when, what is said after, and what becomes of a record that cannot be kept.

Links are replaced by lists of what was said. Knows the calls of a record store. Does not know sockets.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from ema_client.errors import StorageFailed
from ema_service.cluster import (
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
    Term,
    Ticket,
    Vote,
)
from ema_service.cluster.hosting import reporting
from ema_service.cluster.hosting.link import Link
from ema_service.cluster.hosting.reporting import Reporting
from ema_service.cluster.token import ClusterToken

TERM = Term(1, "c")
TOKEN = ClusterToken("a-token-of-the-tests")
UPDATE, NEWER = (Vote(Proposal(Ticket(0, step, key)), f"1.{step}") for step, key in ((5, "u"), (6, "v")))
CHANGE = Proposal(Ticket(0, None, "k"), "decay 0.5")


class Spoken:
    """In place of a link: what was said, each time with the record that was durable then."""

    def __init__(self, *_: object) -> None:
        self.said: list[object] = []
        self.durable: list[Record] = []
        self.store: Store | None = None

    def say(self, message: object) -> None:
        self.said.append(message)
        if self.store:
            self.durable.append(self.store.durable)


class Store:
    """A run that keeps its record in memory. fails: what the next write raises. prepared: what came with each record.
    whole: whether the version can be read."""

    def __init__(self) -> None:
        self.durable = Record(TERM)
        self.events: list[Any] = []
        self.fails: Exception | None = None
        self.prepared: list[str | None] = []
        self.whole = True

    def promise(self, record: Record) -> None:
        self.keep("promise", record)

    def is_whole(self) -> bool:
        return self.whole

    def returns(self) -> bool:
        """It has no twin."""
        return False

    def kept(self) -> Kept:
        return Kept()

    def vote(self, record: Record, prepared: str) -> None:
        self.keep("vote", record, prepared)

    def commit(self, record: Record, prepared: str) -> None:
        self.keep("commit", record, prepared)

    def abort(self, record: Record, prepared: str | None) -> None:
        self.keep("abort", record, prepared)

    def keep(self, event: str, record: Record, prepared: str | None = None) -> None:
        if self.fails:
            raise self.fails
        self.durable = record
        self.events.append(event)
        self.prepared.append(prepared)

    def propose(self, proposal: Proposal) -> None:
        self.events.append(proposal)

    def answer(self, answer: Answer) -> None:
        self.events.append(answer)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def talk(store: Store, monkeypatch: pytest.MonkeyPatch) -> Reporting[str]:
    monkeypatch.setattr(reporting, "Link", Spoken)
    made = Reporting("r", Arrival(0, 2, "a"), store.durable, store, ["http://c"], TOKEN, patience=0.0)
    spoken(made).store = store
    return made


def spoken(talk: Reporting[str]) -> Spoken:
    (link,) = talk._links
    assert isinstance(link, Spoken)
    return link


def verdict(talk: Reporting[str], *, committed: bool) -> Resolve:
    return Resolve(0, talk.record.term, talk.record.edition, committed)


def test_each_change_of_the_record_is_its_event(store: Store, talk: Reporting[str]) -> None:
    """A promise, a vote, an abort, a commit: each is kept as what it is, and what follows is told after."""
    talk.hear(Ask(0, Term(2, "d")))
    talk.vote(UPDATE, "bytes of u")
    talk.hear(verdict(talk, committed=False))
    talk.vote(NEWER, "bytes of v")
    talk.hear(verdict(talk, committed=True))

    assert store.events == [
        *("promise", "vote", "abort", Answer("u", committed=False), "vote", "commit", Answer("v", committed=True))
    ]
    assert store.durable == talk.record == Record(Term(2, "d"), 4, 1, NEWER, None)


def test_what_waited_is_kept_with_the_abort(store: Store, talk: Reporting[str]) -> None:
    """Where a proposal has waited the abort's record has its vote, and nothing is written while it waits."""
    talk.vote(UPDATE, "bytes of u")
    talk.vote(NEWER, "bytes of v")
    assert store.events == ["vote"]

    talk.hear(verdict(talk, committed=False))

    assert store.events == ["vote", "abort", Answer("u", committed=False)]
    assert store.durable.vote == NEWER


def test_what_was_prepared_comes_with_its_record(store: Store, talk: Reporting[str]) -> None:
    """A record comes with what was prepared first for its vote; what is neither voted for nor waits is let go."""
    talk.vote(UPDATE, "bytes of u")
    for prepared in ("bytes of v", "bytes of v again"):
        talk.vote(NEWER, prepared)
    talk.hear(verdict(talk, committed=False))
    talk.hear(verdict(talk, committed=True))

    assert store.prepared == ["bytes of u", "bytes of v", "bytes of v"]
    assert talk._prepared == {}
    talk.vote(UPDATE, "bytes of u")
    assert talk._prepared == {}, "of a revision that is over"


def test_vote_of_an_earlier_life(store: Store) -> None:
    """What was prepared for the vote of the last durable record is committed after a restart."""
    record = Record(TERM, 1, 0, None, UPDATE)
    talk = Reporting("r", Arrival(0, 2, "a"), record, store, [], TOKEN, prepared={UPDATE.ticket: "bytes of u"})
    talk.hear(verdict(talk, committed=True))

    assert (store.events, store.prepared) == (["commit", Answer("u", committed=True)], ["bytes of u"])


def test_damaged_run_votes_for_no_update(store: Store, talk: Reporting[str]) -> None:
    """A shard whose version cannot be read says so in each report, and votes for a way back alone."""
    store.whole = False
    talk.hear(Ask(0, Term(2, "d")))
    talk.vote(UPDATE, "bytes of u")

    assert [each.damaged for each in spoken(talk).said] == [True]
    assert store.events == ["promise", Answer("u", committed=False)]
    way = Vote(Proposal(Ticket(4, None, "w"), "o", 0, word="w", to="a rewind"), "o")
    talk.vote(way, "bytes of a snapshot")
    assert (store.events[-1], store.durable.vote) == ("vote", way)


def test_nothing_is_said_before_its_record_is_kept(talk: Reporting[str]) -> None:
    """Each report is of the record that was durable when it was said."""
    talk.hear(Ask(0, Term(2, "d")))
    talk.vote(UPDATE, "bytes of u")
    talk.hear(verdict(talk, committed=True))

    reports = [each for each in spoken(talk).said if isinstance(each, Report)]
    assert [each.record for each in reports] == spoken(talk).durable
    assert len(reports) == 3


@pytest.mark.parametrize("fault", [StorageFailed("no room"), ValueError("a defect")])
def test_vote_that_is_not_kept_is_none(store: Store, talk: Reporting[str], fault: Exception) -> None:
    """The sender gets the error, whatever it is; nothing is said, and the shard stands where it stood."""
    store.fails = fault
    with pytest.raises(type(fault), match=re.escape(str(fault))):
        talk.vote(UPDATE, "bytes of u")
    assert spoken(talk).said == []
    store.fails = None

    talk.hear(Ask(0, TERM))
    assert spoken(talk).said == [Report(0, Record(TERM))]
    talk.vote(UPDATE, "bytes of u")
    assert store.durable.vote == UPDATE


def test_verdict_that_is_not_kept_comes_again(store: Store, talk: Reporting[str]) -> None:
    """The vote stays, its sender waits on; a proposal that waited in memory is lost, and its sender is told."""
    talk.vote(UPDATE, "bytes of u")
    talk.vote(NEWER, "bytes of v")
    store.fails = StorageFailed("no room")
    before = len(spoken(talk).said)
    talk.hear(verdict(talk, committed=True))
    assert store.events == ["vote", Answer("v", committed=False)]
    assert len(spoken(talk).said) == before
    store.fails = None

    talk.hear(verdict(talk, committed=True))

    assert store.events[2:] == ["commit", Answer("u", committed=True)]


def test_change_is_handed_over_once(store: Store, talk: Reporting[str]) -> None:
    """A coordinator that proposes again while the change is prepared does not have it prepared twice; once it was
    refused, or could not be kept, it is."""
    for _ in range(2):
        talk.hear(Propose(0, TERM, CHANGE))
    assert store.events == [CHANGE]
    talk.refuse(CHANGE, "no such snapshot")
    assert spoken(talk).said == [Refusal(0, TERM, CHANGE.ticket, "no such snapshot")]
    talk.hear(Propose(0, TERM, CHANGE))
    assert store.events == [CHANGE, CHANGE]
    store.fails = StorageFailed("no room")
    with pytest.raises(StorageFailed):
        talk.vote(Vote(CHANGE, "1.1"), "a decay")
    talk.hear(Propose(0, TERM, CHANGE))
    assert store.events == [CHANGE, CHANGE, CHANGE]


def test_what_waits_for_long_is_overdue(talk: Reporting[str]) -> None:
    """The coordinator is told that a proposal has waited, once it has waited longer than a proposal should."""
    talk.vote(UPDATE, "bytes of u")
    talk.vote(NEWER, "bytes of v")
    for _ in range(2):
        talk.hear(Ask(0, TERM))

    reports = [each for each in spoken(talk).said if isinstance(each, Report)]
    assert [report.overdue for report in reports] == [False, False, False, False, True]


def test_move_is_told(talk: Reporting[str]) -> None:
    """A shard that has another stretch by now says so."""
    talk.move(Arrival(0, 2, "a", 0, 64))

    assert spoken(talk).said == [Arrival(0, 2, "a", 0, 64)]


@pytest.mark.parametrize("url", ["ftp://c", "c:8471", "http://", "http://u:p@c", "http://c?x=1", "http://c/v1"])
def test_url_of_no_coordinator(store: Store, url: str) -> None:
    """What cannot be a coordinator's URL is an error before anything begins."""
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        Reporting("r", Arrival(0, 2, "a"), Record(), store, [url], TOKEN)


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 15, "a token with spaces in it", "line\r\nInjected: header-x", "ä" * 20]
)
def test_token_that_cannot_be_one(token: str) -> None:
    """A token that somebody may guess, or that no header carries, is refused, and not quoted."""
    with pytest.raises(ValueError, match="the cluster token: expected at least 16") as fault:
        ClusterToken(token)
    assert not token or token not in str(fault.value)


def test_token_fits_itself_alone() -> None:
    """Only the very token fits, and it does not show where it is printed."""
    token = b"Bearer a-token-of-the-tests"
    assert TOKEN.fits(token)
    assert not any(map(TOKEN.fits, (b"", b"Bearer ", token[:-1], token + b"x", token.title(), token[7:])))
    assert "a-token" not in f"{TOKEN!r} {TOKEN}"


def test_closed_link_ends() -> None:
    """A link that never found its coordinator is closed at once."""
    link = Link("http://127.0.0.1:9", "r", lambda: Arrival(0, 2, "a"), TOKEN, lambda _: None)
    link.start()
    link.say(Report(0, Record()))
    link.close()

    assert not any(thread.is_alive() for thread in link._threads)
