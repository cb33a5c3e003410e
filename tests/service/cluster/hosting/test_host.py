"""One host of a cluster, without sockets: the order in which its talks begin, and what its token's file may lack.

Knows that the directory's talk adds and ends runs on a thread of its own. Does not know coordinators (test_servers).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ema_client.errors import Overloaded, StorageFailed
from ema_client.protocol import HEADER_COPIES
from ema_service.cluster import Record, Seating, SnapshotBegun, SnapshotGone, SnapshotTaken, Term, decode
from ema_service.cluster.hosting import host as hosting
from ema_service.cluster.hosting.host import _CHECKPOINTS_AT_ONCE, Host, Membership
from ema_service.cluster.token import ClusterToken, read_cluster_token


def test_the_directory_begins_last() -> None:
    """From its first word on runs are added and ended: nobody may be going through them any more."""
    host, begun = Host.__new__(Host), list[str]()

    def talk(name: str) -> SimpleNamespace:
        return SimpleNamespace(reporting=SimpleNamespace(start=lambda: begun.append(name)))

    host.__dict__.update(
        _shards={"a": talk("a"), "b": talk("b")},
        _directory=talk("directory"),
        _lease=SimpleNamespace(start=list),
        _rings=SimpleNamespace(start=list),
    )
    host.start()
    assert begun == ["a", "b", "directory"]


def test_a_token_that_cannot_be_read(tmp_path: Path) -> None:
    """Which file, why, and what to do, in words and not as a number of the system's."""
    for path in (tmp_path / "nobody", tmp_path):
        with pytest.raises(OSError, match=r"--cluster-token-file .*openssl rand") as told:
            read_cluster_token(path)
        assert str(path) in str(told.value)
        assert "Errno" not in str(told.value)


def test_checkpoints_are_asked_for_at_once() -> None:
    """While a host is away each of them waits for half a minute: many runs take no many half minutes, and a run that
    fails keeps no other from its checkpoint; and of a few alone the memory is held."""
    host, begun, at_once = Host.__new__(Host), list[int](), list[int]()
    asked = asyncio.Event()

    def shard(moved: bool) -> SimpleNamespace:
        return SimpleNamespace(checkpoints=SimpleNamespace(due=moved), is_whole=lambda: True)

    async def take(_: object) -> None:
        begun.append(1)
        at_once.append(len(begun) - sum(ended))
        if len(begun) == _CHECKPOINTS_AT_ONCE:
            asked.set()
        await asked.wait()
        ended.append(1)
        raise Overloaded("a host is away")

    ended = list[int]()
    shards = {f"r{number}": shard(moved=number < 9) for number in range(12)}
    record = SimpleNamespace(seating=SimpleNamespace(absent=frozenset[int]()))
    directory = SimpleNamespace(reporting=SimpleNamespace(record=record))
    member = SimpleNamespace(place=0, of=1)
    host.__dict__.update(_shards=shards, _membership=member, _directory=directory, _take_checkpoint=take)
    asyncio.run(asyncio.wait_for(host.checkpoint(), 10))
    assert len(begun) == len(ended) == 9
    assert max(at_once) == _CHECKPOINTS_AT_ONCE


def test_a_slice_for_one_of_two_hosts_is_sent_again() -> None:
    """Where both count: the other one would never vote. Its sender takes a moment to hear that a twin is back."""
    host = Host.__new__(Host)
    token = ClusterToken("t" * 32)
    host.__dict__.update(_membership=Membership(0, 4, "http://h", ("http://c:1",), token, twins=True))

    def check(copies: str | None, without: str) -> None:
        shard = SimpleNamespace(record=Record(seating=Seating(Term(1, "c"), 1, without)))
        host.check_copies(shard, {} if copies is None else {HEADER_COPIES: copies})  # type: ignore[arg-type]

    with pytest.raises(Overloaded, match="has come back"):
        check("1", without="")
    with pytest.raises(Overloaded, match="has come back"):
        check("1", without="3")  # of the other shard
    check("1", without="2")
    check("2", without="")
    with pytest.raises(Overloaded, match="has come back"):
        check(None, without="")  # who says nothing sends to one


def test_what_a_host_says_that_was_left_behind() -> None:
    """Nothing of the run, before a coordinator has told that the host counts; of a run that is not here, whether the
    host knows which runs there are. A host without a twin always counts, and a damaged run says so itself, unless it is
    filled by then."""
    host = Host.__new__(Host)

    def check(
        name: str | None, *, run: bool, directory: bool, whole: bool = True, twins: bool = True, absent: bool = False
    ) -> None:
        shard = SimpleNamespace(reporting=SimpleNamespace(counts=run, absent=absent), is_whole=lambda: whole)
        host.__dict__.update(
            _membership=Membership(0, 4, "http://h", ("http://c:1",), ClusterToken("x" * 16), twins=twins),
            _shards={"r": shard},
            _directory=SimpleNamespace(reporting=SimpleNamespace(counts=directory, absent=absent)),
        )
        host.check_counts(name)

    for name, run, directory in (("r", False, True), ("other", True, False), (None, True, False)):
        with pytest.raises(Overloaded, match="left behind"):
            check(name, run=run, directory=directory)
        check(name, run=run, directory=directory, twins=False)
        check(name, run=not run, directory=not directory)
    check("r", run=False, directory=True, whole=False)
    with pytest.raises(Overloaded, match="left behind"):
        check("r", run=False, directory=True, whole=False, absent=True)


def test_a_host_is_ready_once_its_twin_can_be_taken_down() -> None:
    """Before that it has not heard that it counts, lacks a run's latest version, or has a damaged one. The reason names
    no run, for strangers hear it; a host without a twin is ready as soon as it hears a coordinator."""
    host = Host.__new__(Host)

    def check(*, directory: bool = True, heard: bool = True, twins: bool = True, **run: bool) -> None:
        facts = {"linked": True, "counts": True, "is_whole": True} | run
        talk = SimpleNamespace(linked=facts["linked"], counts=facts["counts"])
        shards = {"secret": SimpleNamespace(reporting=talk, is_whole=lambda: facts["is_whole"])}
        host.__dict__.update(
            _membership=Membership(0, 4, "http://h", ("http://c:1",), ClusterToken("x" * 16), twins=twins),
            _shards=shards,
            _directory=SimpleNamespace(reporting=SimpleNamespace(counts=directory, linked=heard)),
        )
        host.check_ready()

    check()
    with pytest.raises(Overloaded, match="hears no coordinator"):
        check(heard=False, twins=False)
    with pytest.raises(Overloaded, match="left behind"):
        check(directory=False)
    check(directory=False, counts=False, twins=False)
    for fact in ("linked", "counts", "is_whole"):
        with pytest.raises(Overloaded, match="1 of 1 runs") as told:
            check(**{fact: False})
        assert "secret" not in str(told.value)


def test_what_a_host_could_not_write_goes_once_the_others_have_written() -> None:
    """A host that is still writing refuses to give a snapshot up: it is asked again, or the files would stay there."""
    host, asked = Host.__new__(Host), list[str]()
    begun = SnapshotBegun("s", 5.0, "k")
    refusals = {"taken": [StorageFailed("no room")], "gone": [Overloaded("still being written")]}

    async def ask(_: str, __: str, change: str, ___: int = 0) -> bool:
        asked.append(type(decode(change, SnapshotBegun, SnapshotTaken, SnapshotGone)).__name__)
        if faults := refusals.get(asked[-1].removeprefix("Snapshot").lower()):
            raise faults.pop()
        return True

    async def taken() -> SnapshotTaken:
        return SnapshotTaken("s", 5.0)

    host.__dict__.update(_ask=ask)
    with pytest.raises(StorageFailed):
        asyncio.run(host._take(SimpleNamespace(talk="r@1"), begun, taken))  # type: ignore[arg-type]
    assert asked == ["SnapshotBegun", "SnapshotTaken", "SnapshotGone", "SnapshotGone"]


def test_an_average_is_worked_out_of_the_version_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the present one too, before anything is begun; and of none where the call has its snapshot already."""
    host, asked, of = Host.__new__(Host), list[SnapshotTaken](), list[str]()
    taken = dict[str, str]()

    async def take(shard: object, begun: SnapshotBegun, make: Callable[[], Awaitable[SnapshotTaken]]) -> None:
        assert (shard, begun.name, begun.held) == (made, "s", True)
        assert of == ["now"]
        asked.append(await make())
        taken["s"] = begun.key

    async def recipe(state: str) -> SimpleNamespace:
        of.append(state)
        return SimpleNamespace(info=state)

    made = SimpleNamespace(snapshots=SimpleNamespace(held=lambda *_: "held"))
    snapshots = SimpleNamespace(
        taken_by=lambda name, key: name if taken.get(name) == key else None,
        kept_before=lambda *_: None,
        find=lambda name: name,
    )
    run = SimpleNamespace(ready_state=lambda: "now", layout=SimpleNamespace(shadows=()))
    registry = SimpleNamespace(get=lambda _: run, snapshots=lambda _: snapshots)
    host.__dict__.update(_registry=registry, _take=take, shard=lambda _: made)
    monkeypatch.setattr(hosting, "text_of", lambda recipes: f"of {recipes[0].info}")
    answers = [asyncio.run(host.keep_average("r", "s", recipe, "k")) for _ in range(2)]  # type: ignore[arg-type]
    assert answers == [("s", True), ("s", False)]
    assert of == ["now", "held"]
    assert [each.recipe for each in asked] == ["of held"]
