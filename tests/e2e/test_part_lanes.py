"""Ranks of sharded trainers with several lanes each: what LitEma makes of the whole model, whatever breaks on the way.

Knows a real service, ranks as senders in this process, and transports that note, break or refuse uploads. Does not know
how a model is sharded (test_sharded.py), or how stretches are put together (tests/service/runs/test_part_stretches.py).
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.errors import ConnectionLost, DigestMismatch, EmaError, Overloaded, Superseded
from ema_client.forks import Lock
from ema_client.hosts.parts import PartName, is_staged
from ema_client.http.body import Body
from ema_client.http.connection import Timeouts
from ema_client.http.pace import Pace
from ema_client.http.transport import Reply, Transport
from ema_client.pushing import Pushes
from ema_client.tensors.body import encode
from ema_client.training.publisher import Publisher
from ema_client.training.rounds import SendPolicy
from ema_client.training.updates import Update
from ema_client.wire import Box, boxes_of_range
from tests.relays import Breaking
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, ServerProcess

PATIENCE = 90.0
#: Of 60 MiB in two dtypes: no tensor and no rank's share of one ends where a block or a stretch does.
SHAPES = {
    "a": ((6, 500, 1003), torch.float32),
    "b": ((1502, 3001), torch.float32),
    "c": ((3002, 5003), torch.bfloat16),
    "d": ((7,), torch.float32),
}
#: What a rank has of each tensor.
Share = Mapping[str, tuple[Box, ...]]


def state_of(step: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=dice).to(dtype) for name, (shape, dtype) in SHAPES.items()}


def chunk(size: int, rank: int, of: int) -> tuple[int, int]:
    return size * rank // of, size * (rank + 1) // of


def fsdp2(rank: int, of: int) -> Share:
    """Rows of each tensor, as fully_shard gives them."""
    return {n: ((chunk(s[0], rank, of), *((0, e) for e in s[1:])),) for n, (s, _) in SHAPES.items()}


def tensor_parallel(rank: int, of: int) -> Share:
    """Columns of one tensor, rows of another; what all ranks have is the first one's."""
    share: dict[str, tuple[Box, ...]] = {
        "b": (((0, 1502), chunk(3001, rank, of)),),
        "c": ((chunk(3002, rank, of), (0, 5003)),),
    }
    return share if rank else {**share, "a": (((0, 6), (0, 500), (0, 1003)),), "d": (((0, 7),),)}


def zero3(rank: int, of: int) -> Share:
    """A range of each flattened tensor."""
    flat = {n: boxes_of_range(*chunk(torch.Size(s).numel(), rank, of), s) for n, (s, _) in SHAPES.items()}
    return {name: boxes for name, boxes in flat.items() if boxes}


def mesh(rank: int, of: int) -> Share:
    """Rows over one dimension of the mesh, columns over the other."""
    share: dict[str, tuple[Box, ...]] = {}
    for name, (shape, _) in SHAPES.items():
        if len(shape) > 1:
            *rest, last = shape[1:]
            share[name] = ((chunk(shape[0], rank // 2, of // 2), *((0, e) for e in rest), chunk(last, rank % 2, 2)),)
    return share if rank else {**share, "d": (((0, 7),),)}


def body_of(step: int, share: Share) -> Body:
    whole = state_of(step)
    tensors, slices = {}, {}
    for name, boxes in share.items():
        found = [whole[name][tuple(slice(*bounds) for bounds in box)] for box in boxes]
        tensors[name] = found[0].clone() if len(found) == 1 else torch.cat([each.reshape(-1) for each in found])
        slices[name] = boxes
    return encode(tensors, slices)


class Watched(Transport):
    """A transport that notes what the service has taken, and lets a test meddle with each stretch before and after."""

    def __init__(self, url: str, lanes: int | None, **more: Any) -> None:
        super().__init__(url, lanes=lanes, **more)
        self.sent: list[str] = []
        self.before: Callable[[str], None] = lambda _path: None
        self.after: Callable[[str], None] = lambda _path: None

    def upload_once(self, path: str, body: Body, **more: Any) -> Reply:
        self.before(path)
        reply = super().upload_once(path, body, **more)
        self.sent.append(path)
        self.after(path)
        return reply


class Rank:
    """One rank's sender, as RemoteEma has it, of any size of parts."""

    def __init__(self, url: str, run: str, number: int, of: int, share: Share, lanes: int | None, **more: Any) -> None:
        self.number, self.share, self.run = number, share, run
        self.transport = Watched(url, lanes, **more)
        self._query = {"of": of, "group": "one start"}
        self._pushes = Pushes(self.transport, stretched_above=1 << 20)
        self._client = EmaClient(url)
        # More tries than there are troubles: after a round's the service counts as away, and updates are skipped.
        policy = SendPolicy(RetryPolicy(attempts=20, base=0.01, cap=0.2))
        self.publisher = Publisher(self.send, policy, name=f"rank {number}", fate=self.fate)

    def send(self, step: int | None, body: Body, *, once: bool = True) -> bool:
        name = PartName(step, self.number, "one start")
        return not is_staged(self._pushes.push_part(self.run, name, body, self._query, {}, once=once))

    def push_patiently(self, step: int) -> bool:
        """As EmaClient.push_part(): whether the update is applied."""
        return self.send(step, body_of(step, self.share), once=False)

    def fate(self, step: int | None) -> bool | None:
        status = self._client.update_status(self.run, step or 0)
        return True if status.state == "applied" else False if self.number in status.parts else None

    def push(self, step: int) -> None:
        assert self.publisher.room(wait=True)
        self.publisher.submit(Update(step, body_of(step, self.share), lambda: None, lambda: None))

    def close(self) -> None:
        self.publisher.close()
        self._client.close()
        self.transport.close()


Ranks = Callable[..., "list[Rank]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """One for all tests; those that end it start it again."""
    folder = tmp_path_factory.mktemp("lanes")
    running = server_class(folder, ("--body-timeout", "20"), folder / "data").start()
    yield running
    running.kill()


@pytest.fixture
def ranks(server: ServerProcess, run_name: str) -> Iterator[Ranks]:
    """Make a run, and its ranks."""
    with contextlib.ExitStack() as made:

        def make(
            cut: Callable[[int, int], Share] = fsdp2, of: int = 2, lanes: int | None = 4, **config: Any
        ) -> list[Rank]:
            with EmaClient(server.uds) as client:
                client.create_run(run_name, state_of(0), **config)
            new = [Rank(server.uds, run_name, number, of, cut(number, of), lanes) for number in range(of)]
            for rank in new:
                made.callback(rank.close)
            return new

        yield make


def train(ranks: list[Rank], steps: Iterator[int] | range) -> None:
    for step in steps:
        for rank in ranks:
            rank.push(step)
    for rank in ranks:
        rank.publisher.flush(PATIENCE)


def assert_is_litema(server: ServerProcess, run: str, litema: type[LitEmaOracle], steps: int) -> None:
    """The run is bit for bit what LitEma in one process makes of the whole model, each step once."""
    oracle = litema(state_of(0))
    for step in range(1, steps + 1):
        oracle.update(state_of(step))
    with EmaClient(server.uds) as client:
        pulled = client.pull(run)
    assert [name for name, tensor in oracle.shadow.items() if not torch.equal(tensor, pulled[name])] == []
    assert (pulled.info.step, pulled.info.num_updates, pulled.info.version) == (steps, steps, f"1.{steps}")


@pytest.mark.parametrize("lanes", [*(pytest.param(lanes, marks=pytest.mark.soak) for lanes in (1, 2)), 4])
@pytest.mark.parametrize(
    ("cut", "of"), [(fsdp2, 2), (tensor_parallel, 2), (zero3, 3), (mesh, 4)], ids=["fsdp2", "tp", "zero3", "mesh"]
)
def test_bit_for_bit(
    cut: Callable[[int, int], Share],
    of: int,
    lanes: int,
    ranks: Ranks,
    server: ServerProcess,
    run_name: str,
    litema: type[LitEmaOracle],
) -> None:
    """Parts in stretches make what LitEma makes; each stretch is taken once."""
    made = ranks(cut, of, lanes)
    train(made, range(1, 4))

    assert_is_litema(server, run_name, litema, 3)
    for rank in made:
        assert {"/stretches/" in path for path in rank.transport.sent} == {lanes > 1}
        assert len(rank.transport.sent) == len(set(rank.transport.sent))


@pytest.mark.parametrize(
    ("at", "lost"),
    [
        ("first", "request"),
        ("last", "answer"),
        *(
            pytest.param(at, lost, marks=pytest.mark.soak)
            for at, lost in (("first", "answer"), ("second", "request"), ("second", "answer"), ("last", "request"))
        ),
    ],
)
def test_a_lane_that_breaks_off(
    at: str, lost: str, ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """Before or after its stretch was taken, whichever it is: each step once."""
    made = ranks()
    broken: set[str] = set()

    def break_once(path: str) -> None:
        start, stop = path.rpartition("/")[2].split("-")
        hit = {"first": start == "0", "second": start == str(8 << 20), "last": int(stop) % (8 << 20) != 0}[at]
        if hit and path not in broken:
            broken.add(path)
            raise ConnectionLost("gone")

    for rank in made:
        setattr(rank.transport, "before" if lost == "request" else "after", break_once)
    train(made, range(1, 3))

    assert len(broken) == 4
    assert_is_litema(server, run_name, litema, 2)


FAULTS = [Overloaded("no more", retry_after=0.01), DigestMismatch("a bit")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code)
def test_lanes_that_are_refused(
    fault: EmaError, ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """A stretch that is refused alone is carried by the lanes that are left."""
    made = ranks()

    def refuse(_: str) -> None:
        if threading.current_thread().name.startswith("ema lane"):
            raise fault

    made[0].transport.before = refuse
    train(made, range(1, 3))

    assert_is_litema(server, run_name, litema, 2)


def test_more_lanes_than_the_server_takes(
    ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """Of all ranks together the server receives as many stretches as of any update at once; each rank gets on."""
    made = ranks(mesh, 4, 8)
    train(made, range(1, 3))

    assert_is_litema(server, run_name, litema, 2)


@pytest.mark.parametrize("durability", ["process", pytest.param("disk", marks=pytest.mark.soak)])
@pytest.mark.parametrize("after", [0.02, *(pytest.param(each, marks=pytest.mark.soak) for each in (0.005, 0.05, 0.1))])
def test_server_is_killed(
    after: float, durability: Any, ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """While stretches arrive and are averaged, and while the step is applied: each step is applied once."""
    made = ranks(durability=durability)
    for step in (1, 2):
        for rank in made:
            rank.push(step)
        time.sleep(after)
        server.kill()
        server.start()
    for rank in made:
        rank.publisher.flush(PATIENCE)

    assert_is_litema(server, run_name, litema, 2)


def test_server_is_killed_between_ranks(
    ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """A part of stretches that the server has lost is sent again before a later one."""
    first, second = ranks()
    for step in (1, 2):
        first.push(step)
    wait_until(lambda: [first.fate(step) for step in (1, 2)] == [False, False])
    server.kill()
    server.start()
    for step in (1, 2):
        second.push(step)
    for rank in (first, second):
        rank.publisher.flush(PATIENCE)

    assert_is_litema(server, run_name, litema, 2)


def once(act: Callable[[], object], path_has: str = "") -> Callable[[str], bool]:
    """Does something at the first path that has ``path_has``, while other lanes wait; says whether it did."""
    lock, done = threading.Lock(), list[str]()

    def at(path: str) -> bool:
        with lock:
            if done or path_has not in path:
                return False
            done.append(path)
            act()
            return True

    return at


def test_server_is_started_anew_between_stretches(
    ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """A server that has lost the stretches of before takes the others: whoever sends finds out, and sends all again."""
    first, second = ranks(lanes=2)
    # By the third stretch one of two lanes has been answered.
    restart = once(lambda: (server.kill(), server.start()), f"/stretches/{16 << 20}-")
    first.transport.before = lambda path: restart(path) and None
    assert first.push_patiently(1) is False
    assert first.fate(1) is False, "the part is there"
    assert len(first.transport.sent) > len(set(first.transport.sent)), "a stretch was lost, and came again"
    assert second.push_patiently(1)

    assert_is_litema(server, run_name, litema, 1)


def test_earlier_parts_first(ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]) -> None:
    """A server started anew before the first stretch of a part is given the rank's earlier part, which it lost, before
    any of this one."""
    first, second = ranks()
    first.push(1)
    wait_until(lambda: first.fate(1) is False)
    restart = once(lambda: (server.kill(), server.start(), first.transport.sent.clear()), "/updates/2/")

    def break_once(path: str) -> None:
        if restart(path):
            raise ConnectionLost("gone")

    first.transport.before = break_once
    first.push(2)
    wait_until(lambda: [first.fate(step) for step in (1, 2)] == [False, False])
    steps = ["/updates/2/" in path for path in first.transport.sent]
    assert steps == sorted(steps), "all of step 1 comes before any of step 2"
    for step in (1, 2):
        second.push(step)
    for rank in (first, second):
        rank.publisher.flush(PATIENCE)

    assert_is_litema(server, run_name, litema, 2)


@pytest.mark.parametrize("lanes", [(1, 4), (4, 1)], ids=["one body", "stretches"])
def test_a_part_goes_as_it_first_went(
    lanes: tuple[int, int], ranks: Ranks, server: ServerProcess, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """Also where another number of lanes pays by the next try: the service has some of it."""
    made = ranks(lanes=lanes[0])

    def change() -> None:
        made[0].transport.lanes = lanes[1]

    changed = once(change, "/updates/1/")

    def lose(path: str) -> None:
        if changed(path):
            raise Superseded("the answer was lost, and all of the try", retry_after=0.0)

    made[0].transport.after = lose
    train(made, range(1, 3))

    for step, number in ((1, lanes[0]), (2, lanes[1])):
        of_step = [path for path in made[0].transport.sent if f"/updates/{step}/" in path]
        assert {"/stretches/" in path for path in of_step} == {number > 1}
    assert_is_litema(server, run_name, litema, 2)


def test_ranks_share_the_lanes(server: ServerProcess, run_name: str) -> None:
    """No rank tries more lanes than are its share of those that the service takes."""
    with contextlib.closing(Watched(server.url, None)) as transport, EmaClient(server.uds) as client:
        client.create_run(run_name, state_of(0))
        asked: list[int] = []
        transport.bound = lambda _, most: asked.append(most)  # type: ignore[method-assign]
        pushes = Pushes(transport, stretched_above=1 << 20)
        for of in (3, 8, 100):
            name, query = PartName(1, 0, str(of)), {"of": of, "group": str(of)}
            pushes.push_part(run_name, name, body_of(1, fsdp2(0, 2)), query, {}, once=True)
        pushes.push(run_name, 1, encode(state_of(1)), {}, once=True)

    assert asked == [2, 1, 1, 8]


def test_a_part_without_data_goes_as_one(server: ServerProcess, run_name: str) -> None:
    """Whatever its size: what a rank has of one host's rows may be nothing."""
    with contextlib.closing(Watched(server.url, 4)) as transport, EmaClient(server.uds) as client:
        client.create_run(run_name, state_of(0))
        pushes = Pushes(transport, stretched_above=0)
        for number, share in enumerate(({}, fsdp2(0, 1))):
            body, query = body_of(1, share), {"of": 2, "group": "one start"}
            pushes.push_part(run_name, PartName(1, number, "one start"), body, query, {}, once=True)
        assert client.run(run_name).step == 1

    empty, *stretches = transport.sent
    assert empty.endswith("/parts/0")
    assert stretches
    assert all("/stretches/" in path for path in stretches)


class Measuring(Pace):
    """Of one lane; notes what it is told."""

    def __init__(self) -> None:
        super().__init__(None, 1, Lock())
        self.seen, self.over = 0, 0

    def moved(self, count: int) -> None:
        self.seen += count

    def ends(self, *, alike: bool = False) -> None:  # noqa: ARG002 - one lane is like itself
        self.over += 1


def test_one_connection_is_measured(ranks: Ranks) -> None:
    """A part that goes over one lane tells whether two may pay, as a whole update does."""
    rank, pace = ranks(lanes=None)[0], Measuring()
    rank.transport.pace = lambda _: pace  # type: ignore[method-assign]
    body = body_of(1, rank.share)
    assert rank.send(1, body) is False
    assert pace.seen >= body.length
    assert pace.over == 1


def test_run_that_changes_meanwhile(ranks: Ranks, server: ServerProcess, run_name: str) -> None:
    """Ranks send again, by themselves, what was averaged before the run changed."""
    first, second = ranks()
    first.push(1)
    wait_until(lambda: first.fate(1) is False)
    with EmaClient(server.uds) as client:
        client.set_decay(run_name, 0.25)
        second.push(1)
        for rank in (first, second):
            rank.publisher.flush(PATIENCE)
        client.create_run(f"{run_name}-whole", state_of(0), decay=0.25)
        client.push(f"{run_name}-whole", state_of(1), step=1)
        found, expected = client.pull(run_name), client.pull(f"{run_name}-whole")

    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert found.info.num_updates == 1


# --- lives over a network that breaks -------------------------------------------------------------------------------

SOON, LATER = [1], range(2, 101)


@pytest.fixture
def way(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Breaking]:
    with contextlib.closing(Breaking(server.url, random.Random(request.param), troubles=10)) as made:
        yield made


@pytest.mark.parametrize("way", [*SOON, *(pytest.param(seed, marks=pytest.mark.soak) for seed in LATER)], indirect=True)
def test_a_life(
    way: Breaking, server: ServerProcess, run_name: str, litema: type[LitEmaOracle], request: pytest.FixtureRequest
) -> None:
    """Ranks of a random cut, with random numbers of lanes, over connections that are cut or fall silent: LitEma's
    shadow, each step once."""
    dice = random.Random(request.node.callspec.params["way"])
    cut, of = dice.choice([(fsdp2, 2), (tensor_parallel, 2), (zero3, 3), (mesh, 4)])
    with EmaClient(server.uds) as client:
        client.create_run(run_name, state_of(0), durability=dice.choice(["process", "disk", "memory"]))
    timeouts = Timeouts(transfer=1.0, kept=1.0)
    with contextlib.ExitStack() as undo:
        made = []
        for number in range(of):
            lanes = dice.choice([1, 2, 4])
            made.append(Rank(way.url, run_name, number, of, cut(number, of), lanes, timeouts=timeouts))
            undo.callback(made[-1].close)
        train(made, range(1, 4))

    assert_is_litema(server, run_name, litema, 3)
