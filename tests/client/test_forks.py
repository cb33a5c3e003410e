"""Clients in forked processes, on the real service: no child uses, holds open or ends what belongs to its parent.

Knows os.fork, the calls of EmaClient and RemoteEma, and Linux' list of a process' sockets. Does not know what the calls
do with their connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma, RetryPolicy
from ema_client.errors import UsageError
from ema_client.forks import Home, Lock, tell_in_child, this_process
from ema_client.reading.slices import Wanted
from tests.client.trainers import same, values

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

#: A fork that hangs is ended by SIGALRM after so many seconds.
PATIENCE = 20
SHAPES = {"w": (300,), "v": (50, 300)}


class Fork:
    """A forked process in which ``work`` is done; result() is what it returned."""

    def __init__(self, work: Callable[[], object]) -> None:
        out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_the_child(work, into)
        os.close(into)
        self._out = out

    def _be_the_child(self, work: Callable[[], object], into: int) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        # As a DataLoader's worker does: OpenMP's threads are not in the fork, and are waited for there.
        torch.set_num_threads(1)
        try:
            answer: object = ("returned", work())
        except BaseException:  # noqa: BLE001 - told to the parent, which the child must not become
            answer = ("raised", traceback.format_exc())
        os.write(into, pickle.dumps(answer))
        os._exit(0)

    def result(self) -> Any:
        with os.fdopen(self._out, "rb") as pipe:
            raw = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert raw, f"the fork ended with status {status}"
        kind, value = pickle.loads(raw)  # noqa: S301 - of our own making
        assert kind == "returned", value
        return value


def state(number: float) -> dict[str, Tensor]:
    return {name: torch.full(shape, float(number)) for name, shape in SHAPES.items()}


def numbers_in(tensors: Any) -> set[float]:
    return {float(number) for tensor in tensors.values() for number in tensor.unique()}


@pytest.fixture
def runs(client: EmaClient, run_name: str) -> list[str]:
    """Four runs, of which each tensor holds the run's position in this list."""
    names = [f"{run_name}-{number}" for number in range(4)]
    for number, name in enumerate(names):
        client.create_run(name, state(number), decay=0.0, use_num_updates=False)
    return names


# --- a client ---------------------------------------------------------------------------------------------------------


def pull(client: EmaClient, run: str) -> object:
    weights = client.pull(run)
    return weights.info.run, numbers_in(weights)


def pull_into(client: EmaClient, run: str) -> object:
    out = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return client.pull(run, out=out).info.run, numbers_in(out)


def pull_slices(client: EmaClient, run: str) -> object:
    target = torch.zeros(3)
    info = client.pull_slices(run, {"w": Wanted(SHAPES["w"], (((7, 10),),), target)})
    return info.run, set(target.tolist())


def copy_to(client: EmaClient, run: str) -> object:
    module = nn.ParameterDict({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    return client.copy_to(run, module).run, numbers_in({name: tensor.detach() for name, tensor in module.items()})


def show(client: EmaClient, run: str) -> object:
    return client.run(run).run, None


def push(client: EmaClient, run: str) -> object:
    return client.push(run, client.pull(run)).applied, numbers_in(client.pull(run))


def take_snapshot(client: EmaClient, run: str) -> object:
    return client.snapshot(run, f"of-{os.getpid()}-{time.monotonic_ns()}").run, None


def watch(client: EmaClient, run: str) -> object:
    with contextlib.closing(client.watch(run)) as events:  # type: ignore[type-var]  # an iterator that is a generator
        return next(events).run, None


CALLS = [pull, pull_into, pull_slices, copy_to, show, push, take_snapshot, watch]


@pytest.fixture(params=["tcp", "unix", "tls"])
def opened(request: pytest.FixtureRequest, server: Any) -> Iterator[EmaClient]:
    """A client, which a test is to give connections."""
    if request.param == "tls":
        server = request.getfixturevalue("secure_server")
    with EmaClient(server.uds if request.param == "unix" else server.url) as made:
        yield made


@pytest.fixture(scope="module")
def secure_server(tmp_path_factory: pytest.TempPathFactory, server_class: Any, certificate: Any) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("secure")
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = str(certificate.authority)
    running = server_class(folder, certificate.flags, folder / "data").start()
    yield running
    running.stop()
    os.environ.pop("SSL_CERT_FILE")
    if before:
        os.environ["SSL_CERT_FILE"] = before


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_each_process_gets_its_own_answers(client: EmaClient, runs: list[str], call: Callable[..., Any]) -> None:
    """Parent and children, forked with open connections, ask for different runs at once: each answer is the asker's."""
    for run in runs:
        pull(client, run)
        show(client, run)

    def often(run: str) -> list[Any]:
        return [call(client, run) for _ in range(8)]

    expected = {run: {repr(answer) for answer in often(run)[:1]} for run in runs}
    forks = [Fork(lambda run=run: often(run)) for run in runs[1:]]  # type: ignore[misc]
    mine = often(runs[0])
    theirs = [fork.result() for fork in forks]

    for run, answers in zip(runs, [mine, *theirs], strict=True):
        assert {repr(answer) for answer in answers} == expected[run]


def sockets() -> set[str]:
    """The sockets that this process has open, by the kernel's numbers."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()))
    return {name for name in found if name.startswith("socket:")}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_fork_holds_no_connection_open(opened: EmaClient, run_name: str) -> None:
    """A connection that a child held would not end with the parent: the service would wait for a trainer that died.

    Connections of both kinds, and of a watch: none is open in the child, all are whole in the parent.
    """
    before = sockets()
    opened.create_run(run_name, state(1))
    with contextlib.closing(opened.watch(run_name)) as events:  # type: ignore[type-var]
        next(events)
        pull(opened, run_name)
        ours = sockets() - before
        assert len(ours) >= 3
        assert Fork(lambda: sockets() & ours).result() == set()
        Fork(lambda: opened.close()).result()

        assert sockets() >= ours
        assert pull(opened, run_name) == (run_name, {1.0})
        opened.push(run_name, state(1), step=1)
        assert next(events).step == 1
    assert not sockets() - before - ours


def test_a_fork_while_every_lock_is_held(client: EmaClient, runs: list[str]) -> None:
    """A thread of the parent that holds a lock is not in the child to let go of it: the child waits for nobody."""
    pull(client, runs[0])
    show(client, runs[0])
    held, release = threading.Event(), threading.Event()
    locks = [found for found in gc.get_objects() if type(found) is Lock]

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            release.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE)
    fork = Fork(lambda: [call(client, runs[1]) for call in CALLS])
    release.set()
    holder.join()

    assert len(locks) >= 4
    assert len(fork.result()) == len(CALLS)


def test_a_fork_while_another_thread_asks(client: EmaClient, runs: list[str]) -> None:
    """Children are forked at any moment of the parent's requests, and both sides' answers are right."""
    stop, mine = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            mine.append((pull(client, runs[0]), show(client, runs[0])))

    asking = threading.Thread(target=ask)
    asking.start()
    theirs = [Fork(lambda: (pull(client, runs[1]), show(client, runs[1]))).result() for _ in range(12)]
    stop.set()
    asking.join()

    assert {repr(answer) for answer in theirs} == {repr(((runs[1], {1.0}), (runs[1], None)))}
    assert {repr(answer) for answer in mine} == {repr(((runs[0], {0.0}), (runs[0], None)))}


def test_a_fork_of_a_fork(client: EmaClient, runs: list[str]) -> None:
    """Each generation asks by itself."""
    pull(client, runs[0])

    def child() -> object:
        first = pull(client, runs[1])
        return first, Fork(lambda: pull(client, runs[0])).result(), pull(client, runs[1])

    assert Fork(child).result() == ((runs[1], {1.0}), (runs[0], {0.0}), (runs[1], {1.0}))


def test_a_closed_client_is_closed_in_a_fork(server: Any, run_name: str) -> None:
    """What the parent closed is no client for the child either."""
    client = EmaClient(server.url)
    client.close()
    for call in (show, pull):
        with pytest.raises(AssertionError, match="this client is closed"):
            Fork(lambda call=call: call(client, run_name)).result()  # type: ignore[misc]


def test_a_watch_belongs_to_its_process(client: EmaClient, runs: list[str]) -> None:
    """The thread that reads the events is the parent's: the child is told so at once, and disturbs nothing by it."""
    events = client.watch(runs[0])
    next(events)

    def child() -> str:
        with pytest.raises(UsageError) as raised:
            next(events)
        return str(raised.value)

    dropped = Fork(lambda: events.close())  # type: ignore[attr-defined]
    assert "this is a fork of it" in Fork(child).result()
    dropped.result()
    client.push(runs[0], state(5), step=9)

    assert next(events).step == 9


# --- a trainer --------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError, match="is a fork of it") as raised:
        call()
    return type(raised.value).__name__


#: Every public name of a RemoteEma, and what a fork does with it: "refused", or what comes of it.
IN_A_FORK: dict[str, Callable[[RemoteEma, nn.Module], object]] = {
    "update": lambda ema, model: refused(lambda: ema.update(model)),
    "__call__": lambda ema, model: refused(lambda: ema(model)),
    "flush": lambda ema, _: refused(lambda: ema.flush(timeout=1)),
    "decay": lambda ema, _: refused(lambda: ema.decay),
    "num_updates": lambda ema, _: refused(lambda: ema.num_updates),
    "reset_num_updates": lambda ema, _: refused(ema.reset_num_updates),
    "copy_to": lambda ema, model: refused(lambda: ema.copy_to(model)),
    "scope": lambda ema, model: refused(lambda: ema.scope(model).__enter__()),
    "state_dict": lambda ema, _: refused(ema.state_dict),
    "load_state_dict": lambda ema, _: refused(
        lambda: ema.load_state_dict({"run": ema.run, "version": "1.0", "step": 0, "snapshot": None})
    ),
    "close": lambda ema, _: refused(ema.close),
    "store": lambda ema, model: (ema.store(model.parameters()), ema.restore(model.parameters())),
    "restore": lambda ema, model: (ema.store(model.parameters()), ema.restore(model.parameters())),
    "parameters": lambda ema, _: list(ema.parameters()),
    "buffers": lambda ema, _: list(ema.buffers()),
    "run": lambda ema, _: ema.run,
    "pending": lambda ema, _: ema.pending,
    "stats": lambda ema, _: str(ema.stats),
    "step": lambda ema, _: ema.step,
    "away": lambda ema, _: ema.away,
}


def test_every_call_of_a_trainer(make_ema: Callable[..., RemoteEma]) -> None:
    """In a fork each call ends at once, is refused where it would need the parent's thread, and changes nothing."""
    model = nn.Linear(300, 300)
    ema = make_ema(model, 0.5, False, borrow=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    public = {name for name in dir(RemoteEma) if not name.startswith("_")} | {"__call__"}
    assert public == set(IN_A_FORK)
    forks = []
    for call in IN_A_FORK.values():
        optimizer.step()
        ema(model)
        forks.append(Fork(lambda call=call: call(ema, model) and None))  # type: ignore[misc]
    for fork in forks:
        fork.result()
    ema.flush()

    assert ema.stats.sent == len(IN_A_FORK)
    assert same(values(model), before)


def test_an_optimizer_in_a_fork_waits_for_nobody(make_ema: Callable[..., RemoteEma]) -> None:
    """A step waits until borrowed parameters are sent, but not in a fork, whose parameters are not those being sent."""
    model = nn.Linear(2000, 2000)
    ema = make_ema(model, borrow=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    for _ in range(5):
        ema(model)
        fork = Fork(lambda: optimizer.step())
        optimizer.step()
        fork.result()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="needs Linux")
def test_a_fork_that_drops_a_trainer_keeps_its_own_memory(server: Any, run_name: str) -> None:
    """The buffers of updates are not in the fork: freeing a buffer there must not unmap what the fork has instead."""
    model = nn.Linear(2000, 2000)
    trainers = [RemoteEma(model, run=run_name, client=EmaClient(server.url, retry=RetryPolicy(attempts=1)))]
    trainers[0](model)
    trainers[0].flush()

    def child() -> int:
        mine = [mmap.mmap(-1, 17 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON) for _ in range(20)]
        trainers.clear()
        gc.collect()
        for each in mine:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(each)), 1, len(each))
        return sum(each[-1] for each in mine)

    assert Fork(child).result() == 20
    trainers[0].close()


@pytest.mark.one_server("memory that is shared over one socket")
def test_shared_memory_is_the_parents_to_offer(server: Any, run_name: str) -> None:
    """A fork that pushes a parent's shared_state() sends it, though the parent is handing the same memory over."""
    with EmaClient(server.uds) as client:
        big = {"w": torch.full((600_000,), 1.0)}
        client.create_run(run_name, big, decay=0.0, use_num_updates=False)
        shared = client.shared_state(big)
        client.push(run_name, shared, step=1)
        assert client.link == "shared memory"
        with shared.body.shared.offered():  # type: ignore[union-attr]
            assert Fork(lambda: client.push(run_name, shared, step=2).applied).result()
        client.push(run_name, shared, step=3)
        assert client.link == "shared memory"


# --- the mechanism ----------------------------------------------------------------------------------------------------


def test_home() -> None:
    """An object's home is the process that made it, and none that comes of it."""
    home = Home()
    home.check("it", hint="")

    def child() -> tuple[bool, str, bool]:
        with pytest.raises(UsageError) as raised:
            home.check("the thing", hint="make another")
        return home.is_here, str(raised.value), Home().is_here

    here, told, own = Fork(child).result()
    assert (here, own) == (False, True)
    assert told == f"the thing belongs to process {os.getpid()} and this is a fork of it (make another)"


def test_what_is_dropped_is_not_told() -> None:
    """Telling the children keeps nothing alive."""
    told: list[str] = []

    class Thing:
        def after_fork(self) -> None:
            told.append("told")

    thing, dropped = Thing(), Thing()
    tell_in_child(thing)
    tell_in_child(dropped)
    del dropped

    assert Fork(lambda: told).result() == ["told"]
    assert told == []


def test_each_process_has_a_name() -> None:
    """A process keeps its name, and a fork has another: a copied RemoteEma knows its own process by that."""
    fork = Fork(this_process)
    assert fork.result() != this_process() == this_process()
