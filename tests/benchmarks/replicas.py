"""Group replicas: one version pulled by 1, 4 and 8 evaluators at once, from one server and from one with 1, 2 and 4
replicas, each behind a link of 100 MB/s of its own; and what a trainer's push takes meanwhile, over the same link's
other direction.

The link is the limit, not the cores. Knows who reads where. Does not know how a round is timed or shown.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lanes import PROCESSES, paced
from scale import Scale

from ema_client import EmaClient
from ema_service.bench.children import BenchFailed, Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["measure"]

NBYTES = 32 << 20
RATE = "100"
RUN = "replicas"
READERS = 1, 4, 8
REPLICAS = 0, 1, 2, 4
#: Of what the links allow: the server with most evaluators has to send to all of them.
SHARE = 0.8
#: Of one server's rate, what 4 replicas bring to most evaluators: two of eight are at the busiest server.
MOST_SHARE = 3.5
QUIET, READ, RELIEVED = "push, nobody reads", "push, 8 read at one server", "push, 8 read at 4 replicas"
#: Of the rate of a push that nobody reads beside.
PUSHED = 0.95
PATIENCE = 60.0


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes = min(NBYTES, scale.wire_bytes)
    with contextlib.ExitStack() as stack:
        on_step(f"starting a server and {max(REPLICAS)} replicas")
        stack.enter_context(paced(RATE))
        start = partial(_start, stack)
        urls = [first := start(), *(start("--replica-of", first) for _ in range(max(REPLICAS)))]
        trainer, traffic = stack.enter_context(EmaClient(first, lanes=1)), Traffic(RUN, nbytes)
        traffic.create(trainer)
        traffic.push(trainer)
        readers = [[stack.enter_context(EmaClient(url, lanes=1)) for _ in range(max(READERS))] for url in urls]
        _meet(readers)
        threads = stack.enter_context(ThreadPoolExecutor(max(READERS)))
        operations: dict[str, Operation] = {}
        needs: dict[str, tuple[Need, ...]] = {}
        for count in READERS:
            for replicas in REPLICAS:
                who = [readers[number % (1 + replicas)][number] for number in range(count)]
                operations[_name(count, replicas)] = timed(partial(_pull_all, threads, who))
                wanted = (Need(_demanded(count, replicas), _name(count, 0)),) if replicas and count > 1 else ()
                needs[_name(count, replicas)] = wanted
        most = max(REPLICAS)
        beside = {QUIET: [], READ: readers[0], RELIEVED: [readers[1 + i % most][i] for i in range(max(READERS))]}
        for name, who in beside.items():
            operations[name] = partial(_push_beside, threads, who, partial(traffic.push, trainer))
            needs[name] = (Need(PUSHED, QUIET),) if who else ()
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    rows = [
        rate_row(name, nbytes * (1 if name in beside else int(name.split()[1])), seconds, needs[name])
        for name in operations
    ]
    facts = (
        "each server sends 100 MB/s in all, to whoever asks, and the trainer 100 MB/s to the server",
        "evaluators are dealt out to the server and its replicas",
        "a pull's rate is that of all evaluators together; replicas bring each push over the server's link as well",
    )
    return Group("replicas", f"replicas: {show_size(nbytes)} of float32, TCP", tuple(rows), facts)


def _start(stack: contextlib.ExitStack, *flags: str) -> str:
    """The URL of a server, or a replica, behind a link of its own."""
    url: str = stack.enter_context(Service(*flags, RATE, program="linked", path=PROCESSES)).url
    return url


def _name(readers: int, replicas: int) -> str:
    where = f"with {replicas} replica{'s' if replicas > 1 else ''}" if replicas else "one server"
    return f"pull, {readers} evaluator{'s' if readers > 1 else ''}, {where}"


def _demanded(readers: int, replicas: int) -> float:
    """The rate with so many replicas, as a multiple of one server's."""
    if (readers, replicas) == (max(READERS), max(REPLICAS)):
        return MOST_SHARE
    return SHARE * readers / -(-readers // (1 + replicas))


def _meet(readers: Sequence[Sequence[EmaClient]]) -> None:
    """Wait until all servers have the version that the first one has. Raises BenchFailed."""
    until = time.monotonic() + PATIENCE
    while len({_version(each[0]) for each in readers}) > 1:
        if time.monotonic() > until:
            raise BenchFailed("a replica did not follow")
        time.sleep(0.05)


def _version(client: EmaClient) -> str | None:
    return next((run.version for run in client.runs() if run.run == RUN), None)


def _pull_all(threads: ThreadPoolExecutor, readers: Sequence[EmaClient]) -> None:
    list(threads.map(lambda client: client.pull(RUN), readers))


def _push_beside(threads: ThreadPoolExecutor, readers: Sequence[EmaClient], push: Callable[[], object]) -> float:
    """Seconds of a push while readers pull, one pull after another."""
    with _reading(threads, readers):
        began = time.perf_counter()
        push()
        return time.perf_counter() - began


@contextlib.contextmanager
def _reading(threads: ThreadPoolExecutor, readers: Sequence[EmaClient]) -> Iterator[None]:
    """Within the block each reader pulls again and again."""
    ended = threading.Event()

    def read(client: EmaClient) -> None:
        while not ended.is_set():
            client.pull(RUN)

    doing = [threads.submit(read, client) for client in readers]
    time.sleep(0.2 if readers else 0.0)
    try:
        yield
    finally:
        ended.set()
        for each in doing:
            each.result()
