"""What all hosts of a run are sent at once, while one of them moves, is left behind by its twin, or comes back.

Knows maps and errors. Does not know bodies, or processes (those of a cluster: test_twins_direct.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from ema_client.errors import ConnectionLost, EmaError, LayoutMismatch, NonFinite, Overloaded, ServiceUnreachable
from ema_client.hosts import sending
from ema_client.hosts.finding import GivenUp, Host, HostedRun, Hosts
from ema_client.hosts.sending import Target, send_to_all
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Reply, Transport
from ema_client.protocol import HostedShard
from tests.waiting import wait_until


class Cluster:
    """Maps of two shards, and who was sent what. A host's name is one letter."""

    #: No host gives up before the others have begun.
    patient = RetryPolicy(attempts=10_000, base=0.001, cap=0.001)

    def __init__(self) -> None:
        self._transports: dict[str, Transport] = {}
        #: The map that is told when it is asked for again.
        self.map = ""
        #: By host, to how many hosts of its shard its bodies went.
        self.sent: dict[str, list[int]] = {}

    def run(self, told: str, *, twins: bool = True) -> HostedRun:
        """A map: "AC B" is a shard on A and C, and one on B."""
        hosts = []
        for place, (first, *others) in enumerate(told.split()):
            to = [self.to(name) for name in (first, *others)]
            hosts.append(Host(HostedShard(place, 1, to[0].url, (), ()), to[0], twin=to[1] if others else None))
        return HostedRun("r", tuple(hosts), twins)

    def to(self, name: str) -> Transport:
        return self._transports.setdefault(name, Transport(f"http://{name}"))

    def again(self, _: HostedRun) -> HostedRun | None:
        return self.run(self.map) if self.map else None

    def send(self, told: str, answer: Callable[[str, Target], Reply], *, twins: bool = True) -> set[str]:
        """Send by a map. answer: called with a host's name. Returns the hosts whose answers count."""

        def sent(target: Target) -> Reply:
            name = target.transport.url.removeprefix("http://")
            self.sent.setdefault(name, []).append(target.copies)
            return answer(name, target)

        replies = send_to_all(cast(Hosts, self), self.run(told, twins=twins), sent)
        return {reply.url for reply in replies}

    def close(self) -> None:
        for each in self._transports.values():
            each.close()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(sending, "_LOOK_SECONDS", 0.01)
    made = Cluster()
    yield made
    made.close()


def taken(name: str) -> Reply:
    return Reply(name, {})


def test_both_hosts_of_each_shard_are_sent_all(cluster: Cluster) -> None:
    """And are told to how many hosts of the shard it goes: one where the other does not count."""
    assert cluster.send("AC B", lambda name, _: taken(name)) == {"A", "B", "C"}
    assert cluster.sent == {"A": [2], "C": [2], "B": [1]}


@pytest.mark.parametrize("fault", [ServiceUnreachable("gone"), NonFinite("of other weights"), Overloaded("starting")])
def test_what_a_host_says_that_does_not_count_is_nobodys_error(cluster: Cluster, fault: EmaError) -> None:
    """Where the newest map does not have the host: silence, a final word, and "later" are alike."""
    cluster.map = "C B"

    def answer(name: str, _: Target) -> Reply:
        if name == "A":
            raise fault
        return taken(name)

    assert cluster.send("AC B", answer) == {"B", "C"}
    assert cluster.sent["A"] == [2]


def test_a_final_word_of_a_host_that_counts_is_the_pushs_error(cluster: Cluster) -> None:
    """Also where the map was asked for anew."""
    cluster.map = "AC B"

    def answer(name: str, _: Target) -> Reply:
        if name == "A":
            raise NonFinite("NaN")
        return taken(name)

    with pytest.raises(NonFinite):
        cluster.send("AC B", answer)
    assert cluster.sent["A"] == [2]


def test_a_host_that_says_nothing_is_left_once_the_others_go_on(cluster: Cluster) -> None:
    """Its sending ends although neither an answer nor an error comes."""

    def answer(name: str, target: Target) -> Reply:
        if name == "A":
            wait_until(lambda: len(cluster.sent) == 3)
            cluster.map = "C B"
            wait_until(target.look)  # returns nothing, until it raises
        return taken(name)

    assert cluster.send("AC B", answer) == {"B", "C"}


@pytest.mark.parametrize("twins", [True, False])
def test_who_waits_is_let_go_once_all_is_given_up(cluster: Cluster, twins: bool) -> None:
    """A host that has its slice answers when all have theirs: half a minute after another's refusal, if at all."""

    def answer(name: str, target: Target) -> Reply:
        if name == "A":
            wait_until(lambda: len(cluster.sent) == 2)
            raise LayoutMismatch("another run")
        wait_until(target.look)  # returns nothing, until it raises
        return taken(name)

    with pytest.raises(LayoutMismatch, match="another run"):
        cluster.send("A B", answer, twins=twins)


def test_a_host_that_comes_back_is_sent_it_as_well(cluster: Cluster) -> None:
    """Its twin refuses what goes to one of the two; then both are sent it, and wait for each other."""
    both, numbers = threading.Barrier(2), dict[str, int]()

    def answer(name: str, target: Target) -> Reply:
        if name == "C" and target.copies == 1:
            cluster.map = "AC B"
            raise Overloaded("the twin of this host has come back")
        numbers[name] = target.number
        if name in "AC":
            both.wait(30)
        return taken(name)

    assert cluster.send("C B", answer) == {"A", "B", "C"}
    assert cluster.sent == {"C": [1, 2], "B": [1], "A": [2]}
    assert numbers["A"] > 0, "a host that comes late may have lost what it was sent before"


def test_a_host_that_is_elsewhere_is_sent_it_there(cluster: Cluster) -> None:
    """Alone, and not as one that came late and one that was left; what another program says in its old place does not
    count."""
    for fault in (ConnectionLost("broke off"), NonFinite("another program")):
        cluster.sent.clear()
        cluster.map = "DC B"

        def answer(name: str, _: Target, fault: EmaError = fault) -> Reply:
            if name == "A":
                raise fault
            return taken(name)

        assert cluster.send("AC B", answer) == {"D", "B", "C"}
        assert cluster.sent == {"A": [2], "C": [2], "B": [1], "D": [2]}


def test_a_host_that_has_answered_is_done_wherever_it_is(cluster: Cluster) -> None:
    """Its bytes do not go again to where it was started anew meanwhile."""

    def answer(name: str, target: Target) -> Reply:
        if name == "A" and not target.number:
            wait_until(lambda: "B" in cluster.sent)
            cluster.map = "AC E"
            raise ConnectionLost("broke off")
        return taken(name)

    assert cluster.send("AC B", answer) == {"A", "B", "C"}
    assert cluster.sent == {"A": [2, 2], "C": [2], "B": [1]}


def test_whose_host_moves_while_it_is_sent_to_is_told(cluster: Cluster) -> None:
    """A machine that is gone ends no connection."""
    cluster.map = "DC B"

    def answer(name: str, target: Target) -> Reply:
        if name == "A":
            wait_until(target.look)
        return taken(name)

    assert cluster.send("AC B", answer) == {"D", "B", "C"}


def test_hosts_without_twins_are_asked_after_at_broken_connections_alone(cluster: Cluster) -> None:
    """A map of many tensors is no small answer."""
    cluster.map, tries = "A B", list[str]()

    def answer(name: str, target: Target) -> Reply:
        tries.append(name)
        if name == "A" and not target.number:
            raise Overloaded("later")
        return taken(name)

    asked = list[HostedRun]()
    cluster.again = asked.append  # type: ignore[assignment,method-assign]
    assert cluster.send("A B", answer, twins=False) == {"A", "B"}
    assert asked == []
    assert sorted(tries) == ["A", "A", "B"]


def test_what_ended_the_sending_is_told_and_not_that_others_gave_up(cluster: Cluster) -> None:
    """Of whatever kind it is: what one host said, for which all begin anew, say."""

    class Lacks(GivenUp):
        """What one host lacks."""

    def answer(name: str, _: Target) -> Reply:
        if name == "A":
            raise Overloaded("later")
        wait_until(lambda: len(cluster.sent.get("A", ())) > 1)
        raise Lacks

    with pytest.raises(Lacks):
        cluster.send("A B", answer)


def test_nobody_is_begun_with_once_all_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with a host that the map has since; and the error is told once nothing is sent any more."""
    begun, given_up, ended = threading.Event(), threading.Event(), list[str]()
    give_up = sending._Sending._give_up

    def watched(of: sending._Sending) -> None:
        give_up(of)
        given_up.set()

    monkeypatch.setattr(sending._Sending, "_give_up", watched)

    def answer(name: str, _: Target) -> Reply:
        if name == "A":
            assert begun.wait(30)
            raise NonFinite("NaN")
        begun.set()
        assert given_up.wait(30)
        cluster.map = "A BC"
        ended.append(name)
        raise Overloaded("the others are waited for")

    with pytest.raises(NonFinite):
        cluster.send("A B", answer)
    assert ended == ["B"]
    assert cluster.sent == {"A": [1], "B": [1]}
    assert not issubclass(GivenUp, EmaError)
