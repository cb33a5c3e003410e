"""Two shards and their coordinators as processes on real ports, killed at each message and each record.

After each kill the killed one is started again, everything has to be resolved, and the shards' files show what became
of it: the same on all, nothing twice, and nothing that was acknowledged missing.

Knows where processes end themselves. Does not know how the core decides (test_decisions).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.forked import Forked
from tests.service.cluster.hosts import Hosts
from tests.service.cluster.processes.coordinating import TOKEN
from tests.waiting import wait_until

_SECONDS = 30.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    started = Hosts(tmp_path)
    yield started
    started.end()


def begin(hosts: Hosts) -> Forked:
    """A coordinator and all shards, after an update."""
    coordinator = hosts.coordinate()
    for place in range(hosts.shards):
        hosts.hold(place)
    hosts.push_all(1, "first")
    return coordinator


def end(process: Forked) -> None:
    process.kill()
    process.wait(_SECONDS)


def killed(process: Forked) -> bool:
    """Whether the process ended itself, in some seconds."""
    wait_until(lambda: process.poll() is not None, "a process to be killed", _SECONDS)
    return process.poll() == -signal.SIGKILL


# --- nobody is killed ------------------------------------------------------------------------------------------------


def test_updates_and_changes_are_made_on_all(hosts: Hosts) -> None:
    """Updates and a change follow each other on both shards; what one of them refuses is made on none."""
    begin(hosts)

    assert hosts.change("k", "decay 0.5") == {"key": "k", "committed": True, "reason": ""}
    hosts.push_all(2, "second")
    assert hosts.change("bad", "decay 7") == {"key": "bad", "committed": False, "reason": "not finite"}
    good, bad = hosts.push(0, 3, "badly"), hosts.push(1, 3, "badly")
    assert {push.answer()["reason"] for push in (good, bad)} == {"not finite"}

    assert hosts.agreed() == ["first", "k", "second"]


def test_slices_of_two_trainers_are_never_one_update(hosts: Hosts) -> None:
    """Slices of one step with two keys are not put together; the later one takes over once it has waited for long."""
    begin(hosts)
    gone = hosts.push(0, 2, "gone")
    wait_until(lambda: hosts.disk(0).record.vote, "a vote")
    hosts.push_all(2, "here")
    gone.give_up()

    assert hosts.agreed() == ["first", "here"]


def test_newer_step_takes_over(hosts: Hosts) -> None:
    """An update of which a slice never came gives way to the next step at once."""
    begin(hosts)
    gone = hosts.push(0, 2, "gone")
    wait_until(lambda: hosts.disk(0).record.vote, "a vote")
    hosts.push_all(3, "here")

    assert hosts.agreed() == ["first", "here"]
    assert gone.answer() == {"committed": False, "reason": "stale"}


def test_map_tells_who_holds_what(hosts: Hosts) -> None:
    """The coordinator says where the shards are, which stretch each has, and which of them listens."""
    begin(hosts)
    seat = {"address": "http://host-0", "start": 0, "stop": 100, "listens": True, "place": 0}
    other = {"address": "http://host-1", "start": 100, "stop": 200, "listens": True, "place": 1}

    def told() -> list[dict[str, object]]:
        """The shards, but for what grows."""
        found = hosts.ask("GET", "/v1/runs/r/shards").json()
        assert (found["run"], found["term"], found["fault"]) == ("r", 1, None)
        assert all(shard.pop("since") > 0 for shard in found["shards"])
        assert all(shard.pop("revision") >= 1 for shard in found["shards"])
        return list(found["shards"])

    assert told() == [seat, other]
    end(hosts.of_shard[1])
    gone = {**other, "listens": False}
    wait_until(lambda: told() == [seat, gone], "a shard to be missed")


# --- the coordinator is killed ---------------------------------------------------------------------------------------

#: A coordinator that starts and makes one update hears and says so much: two questions twice, two votes, two verdicts.
HEARD = [f"hear {count}" for count in range(1, 7)]
DECIDED = [f"decide {count}" for count in range(1, 5)]
SAID = [f"say {count}" for count in range(1, 7)]


@pytest.mark.parametrize("point", [*HEARD, *DECIDED, *SAID])
def test_coordinator_killed_at_each_message(hosts: Hosts, point: str) -> None:
    """Wherever a coordinator ends, the next one sees the update through."""
    end(begin(hosts))
    coordinator = hosts.coordinate(hosts.ports[0], point)
    pushes = [hosts.push(place, 2, "second") for place in range(2)]
    assert killed(coordinator)

    hosts.coordinate(hosts.ports[0])

    assert [push.answer()["committed"] for push in pushes] == [True, True]
    hosts.push_all(3, "third")
    assert hosts.agreed() == ["first", "second", "third"]


@pytest.mark.parametrize("point", [*HEARD, "say 5", "say 6"])
def test_coordinator_killed_at_an_abort(hosts: Hosts, point: str) -> None:
    """Where an update is aborted for a newer one, the next coordinator sees the newer one through."""
    end(begin(hosts))
    gone = hosts.push(0, 2, "gone")
    wait_until(lambda: hosts.disk(0).record.vote, "a vote")
    coordinator = hosts.coordinate(hosts.ports[0], point)
    pushes = [hosts.push(place, 3, "third") for place in range(2)]
    assert killed(coordinator)

    hosts.coordinate(hosts.ports[0])

    assert [push.answer()["committed"] for push in pushes] == [True, True]
    assert not gone.answer()["committed"]
    assert hosts.agreed() == ["first", "third"]


@pytest.mark.parametrize("point", ["say 5", "say 6", "hear 5", "hear 6"])
def test_coordinator_killed_at_a_change(hosts: Hosts, point: str) -> None:
    """A change that one shard has heard of is seen through, and one of which none has heard is asked for again."""
    end(begin(hosts))
    coordinator = hosts.coordinate(hosts.ports[0], point)
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(hosts.change("k", "decay 0.5")), daemon=True)
    asking.start()
    assert killed(coordinator)

    hosts.coordinate(hosts.ports[0])

    asking.join(_SECONDS)
    # Made, or made before: by the coordinator that ended.
    assert answers
    assert hosts.agreed() == ["first", "k"]


# --- a shard is killed -----------------------------------------------------------------------------------------------

EVENTS = ("promise", "vote", "commit")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "point", [*(f"{when} {event} 1" for event in EVENTS for when in ("before", "after")), "answer 1", "hear 2"]
)
def test_shard_killed_at_each_point(hosts: Hosts, place: int, point: str) -> None:
    """Wherever a shard ends, the update is made on both once the shard is back."""
    end(begin(hosts))
    end(hosts.of_shard[place])
    shard = hosts.hold(place, point)
    hosts.coordinate(hosts.ports[0])
    pushes = [hosts.push(each, 2, "second") for each in range(2)]
    assert killed(shard)

    hosts.hold(place)

    assert [push.answer()["committed"] for push in pushes] == [True, True]
    hosts.push_all(3, "third")
    assert hosts.agreed() == ["first", "second", "third"]


@pytest.mark.parametrize("point", ["before abort 1", "after abort 1", "answer 1"])
def test_shard_killed_at_an_abort(hosts: Hosts, point: str) -> None:
    """A shard that ends while it gives up a vote gives it up once it is back, or has."""
    begin(hosts)
    end(hosts.of_shard[0])
    shard = hosts.hold(0, point)
    gone = hosts.push(0, 2, "gone")
    wait_until(lambda: hosts.disk(0).record.vote, "a vote")
    other = hosts.push(1, 3, "third")
    assert killed(shard)

    hosts.hold(0)

    hosts.push_all(3, "third")
    assert other.answer()["committed"]
    assert not gone.answer()["committed"]
    assert hosts.agreed() == ["first", "third"]


def test_shard_killed_before_it_votes_for_a_change(hosts: Hosts) -> None:
    """A change is proposed again to a shard that had prepared it in memory."""
    begin(hosts)
    end(hosts.of_shard[1])
    shard = hosts.hold(1, "prepared 1")
    asking = threading.Thread(target=lambda: hosts.change("k", "decay 0.5"), daemon=True)
    asking.start()
    assert killed(shard)

    hosts.hold(1)

    asking.join(_SECONDS)
    assert hosts.agreed() == ["first", "k"]


def test_vote_that_is_not_kept_is_none(hosts: Hosts) -> None:
    """A disk without room holds up an update and a change, whose senders send again, or whose coordinator does."""
    begin(hosts)
    full = hosts.folder / "0.full"
    full.touch()
    pushes = [hosts.push(place, 2, "second") for place in range(2)]
    wait_until(lambda: hosts.disk(1).record.vote, "the other's vote")
    assert hosts.disk(0).record.vote is None
    full.unlink()
    assert [push.answer()["committed"] for push in pushes] == [True, True]

    full.touch()
    asking = threading.Thread(target=lambda: hosts.change("k", "decay 0.5"), daemon=True)
    asking.start()
    wait_until(lambda: hosts.disk(1).record.vote, "the other's vote")
    assert hosts.disk(0).record.vote is None
    full.unlink()
    asking.join(_SECONDS)

    assert hosts.agreed() == ["first", "second", "k"]


def test_verdict_that_is_not_kept_comes_again(hosts: Hosts) -> None:
    """A disk without room at the verdict keeps the vote, and commits once there is room."""
    begin(hosts)
    full = hosts.folder / "0.full"
    mine = hosts.push(0, 2, "second")
    wait_until(lambda: hosts.disk(0).record.vote, "a vote")
    full.touch()
    assert hosts.push(1, 2, "second").answer()["committed"]
    assert not mine.answered()
    assert hosts.disk(0).record.vote
    full.unlink()

    assert mine.answer()["committed"]
    assert hosts.agreed() == ["first", "second"]
    assert "TimeoutError" not in hosts.log(), "the shard was asked again, and did not have to come again"


# --- anything, at any time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.soak)])
def test_random_kills(hosts: Hosts, seconds: float) -> None:
    """Coordinator and shards are killed at any time, trainers leave with one slice sent, changes are asked for: every
    update that a trainer went on sending is made once, on both shards, and no other one is made at all."""
    random, step, kept, changes = Random(7), 1, ["first"], list[threading.Thread]()
    coordinator, until = begin(hosts), time.monotonic() + seconds
    while time.monotonic() < until:
        step += 2
        if random.random() < 0.3:
            hosts.push(random.randrange(2), step - 1, f"orphan{step}").give_up()
        if random.random() < 0.2:
            changes.append(threading.Thread(target=hosts.change, args=(f"k{step}", "decay 0.5"), daemon=True))
            changes[-1].start()
        pushes = [hosts.push(place, step, f"u{step}") for place in range(2)]
        time.sleep(random.random() * 0.01)
        for victim in random.choice([(), ("coordinator",), (0,), (1,), (0, 1), ("coordinator", 0, 1)]):
            if isinstance(victim, int):
                end(hosts.of_shard[victim])
                hosts.hold(victim)
            else:
                end(coordinator)
                coordinator = hosts.coordinate(hosts.ports[0])
        assert [push.answer() for push in pushes] == [{"committed": True, "reason": ""}] * 2
        kept.append(f"u{step}")
    for change in changes:
        change.join(_SECONDS)

    made = hosts.agreed()
    assert [key for key in made if not key.startswith("k")] == kept
    assert len(made) == len(kept) + len(changes)
    assert len(kept) > 5


# --- two coordinators ------------------------------------------------------------------------------------------------


def test_two_coordinators_at_once(hosts: Hosts) -> None:
    """Two that start together both talk to all shards; one is obeyed, the other ends for good, and nothing is lost."""
    both = [hosts.coordinate(), hosts.coordinate()]
    for place in range(2):
        hosts.hold(place)
    for step in range(1, 40):
        hosts.push_all(step, f"u{step}")
    wait_until(lambda: any(each.poll() is not None for each in both), "one of them to end")

    assert sorted(each.poll() is None for each in both) == [False, True]
    assert {each.poll() for each in both} <= {0, None}
    assert "another coordinator has taken over" in hosts.log()
    assert hosts.agreed() == [f"u{step}" for step in range(1, 40)]


def test_later_coordinator_takes_over(hosts: Hosts) -> None:
    """One that starts while another works takes over in the middle of updates, and the other ends."""
    old = hosts.coordinate()
    spare = hosts.coordinate()
    end(spare)
    for place in range(2):
        hosts.hold(place)
    hosts.push_all(1, "u1")
    hosts.coordinate(hosts.ports[1])
    for step in range(2, 40):
        hosts.push_all(step, f"u{step}")
    wait_until(lambda: old.poll() is not None, "the old one to end", _SECONDS)

    assert old.poll() == 0
    assert hosts.agreed() == [f"u{step}" for step in range(1, 40)]


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")],
    ],
)
def test_nobody_is_answered_without_the_token(hosts: Hosts, headers: dict[str, str]) -> None:
    """A coordinator tells and does nothing without the cluster's token, but for saying that it lives."""
    hosts.coordinate()
    for method, path in (
        ("GET", "/v1/runs/r/shards"),
        ("POST", "/v1/runs/r/changes"),
        ("POST", "/v1/runs/r/shards/0/link"),
        ("POST", "/v1/runs/r/shards/0/reports"),
        ("GET", "/docs"),
    ):
        answer = hosts.ask(method, path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.text
    assert hosts.ask("GET", "/healthz", headers=headers).json() == {"status": "ok"}


def test_token_is_in_no_log(hosts: Hosts) -> None:
    """Processes that come, go and fail never print the token."""
    end(begin(hosts))
    hosts.coordinate(hosts.ports[0])
    hosts.push_all(2, "second")
    end(hosts.of_shard[0])

    assert hosts.log()
    assert TOKEN not in hosts.log()
