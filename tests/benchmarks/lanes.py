"""Group lanes: large bodies over several connections, on links that give each connection a share, and on loopback.

Linux paces single sockets (SO_MAX_PACING_RATE), over loopback too: one flow then has 100 MB/s, as a cloud gives one
flow 5 Gbit/s. How many lanes there are is found by the client; raw flows of the same pace stand beside each figure.

Knows which links there are and what is demanded. Does not know how a round is timed or shown.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from processes.paced import SO_MAX_PACING_RATE, dealt
from scale import Scale
from tls import certificate

from ema_client import EmaClient
from ema_client.tensors.body import encode
from ema_service.bench.children import BenchFailed, Child, Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, Row, rate_row
from ema_service.bench.sink import LENGTH_BYTES, warm_buffer
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["PROCESSES", "measure", "paced"]

PROCESSES = Path(__file__).parent / "processes"
NBYTES = 256 << 20
#: Bodies of each kind in which the number of lanes is found, before any is counted.
FINDING = 2
#: The same on loopback, where one lane of a pull is tried once memory is warm, three times.
FINDING_LOOPBACK = 20
SENT_AT_ONCE = 1 << 20

EVEN, UNEVEN = ("100",) * 8, ("100", "100", "60", "20")
RAW_ONE = "one raw flow of 100 MB/s"
RAW_UNEVEN = f"raw flows of {' + '.join(UNEVEN)} MB/s"
RAW_FREE = "one raw flow, not paced"
AVERAGED = "one raw flow, averaged on arrival"
#: Ranks that send a part each, and the lanes of each at the most: the service has eight for an update.
RANKS, RANK_LANES = 2, 4
_PARTS = f"push in parts, {RANKS} ranks, one flow of 100 MB/s each", f"push in parts, {RANKS} ranks, lanes found"
#: Rows in the order of the table, and what is demanded of them.
NEEDS: dict[str, tuple[Need, ...]] = {
    RAW_ONE: (),
    "push, flows of 100 MB/s": (Need(0.9 * len(EVEN), RAW_ONE),),
    "pull, flows of 100 MB/s": (Need(0.9 * len(EVEN), RAW_ONE),),
    _PARTS[0]: (),
    _PARTS[1]: (Need(0.8 * RANK_LANES, _PARTS[0]),),
    RAW_UNEVEN: (),
    "push, uneven flows": (Need(0.8, RAW_UNEVEN),),
    "pull, uneven flows": (Need(0.8, RAW_UNEVEN),),
    RAW_FREE: (),
    AVERAGED: (Need(against=RAW_FREE),),
    "push, one lane": (Need(0.9, RAW_FREE), Need(0.95, AVERAGED)),
    "push, lanes found": (Need(0.97, "push, one lane"),),
    "pull, one lane": (),
    "pull, two lanes": (),
    "pull, lanes found": (Need(0.95, RAW_FREE), Need(0.97, "pull, one lane"), Need(0.97, "pull, two lanes")),
    "push over TLS, one lane": (),
    "push over TLS, lanes found": (Need(0.97, "push over TLS, one lane"),),
    "pull over TLS, one lane": (),
    "pull over TLS, two lanes": (),
    "pull over TLS, lanes found": (Need(0.97, "pull over TLS, one lane"), Need(0.97, "pull over TLS, two lanes")),
}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes, seconds, facts = min(NBYTES, scale.wire_bytes), dict[str, tuple[float, ...]](), list[str]()
    with contextlib.ExitStack() as stack:
        flows = stack.enter_context(Child("flows", [str(nbytes)], path=PROCESSES))
        links = {
            "flows of 100 MB/s": (EVEN, {RAW_ONE: _raw(stack, flows.said, EVEN[:1], _raw_size(nbytes))}),
            "uneven flows": (UNEVEN, {RAW_UNEVEN: _raw(stack, flows.said, UNEVEN, nbytes)}),
        }
        for name, (rates, raw) in links.items():
            seconds |= _link(name, rates, raw, nbytes, scale, on_step, facts)
        seconds |= _parts(nbytes, scale, on_step, facts)
        averaging = stack.enter_context(Child("flows", [str(nbytes), "average"], path=PROCESSES))
        raw = {
            RAW_FREE: _raw(stack, flows.said, ("0",), nbytes),
            AVERAGED: _raw(stack, averaging.said, ("0",), nbytes),
        }
        seconds |= _loopback("", raw, nbytes, scale, on_step, facts)
        seconds |= _loopback(" over TLS", {}, nbytes, scale, on_step, facts, stack.enter_context(certificate()))
    rows = [_row(name, nbytes, seconds, needs) for name, needs in NEEDS.items()]
    facts.append("a raw flow: sendall of 1 MiB at a time from memory of the body's size; uneven flows end together")
    return Group("lanes", f"lanes: {show_size(nbytes)} of float32, TCP", tuple(rows), tuple(facts))


def _raw_size(nbytes: int) -> int:
    """Bytes of the single raw flow: a quarter takes long enough."""
    return nbytes // 4


def _row(name: str, nbytes: int, seconds: dict[str, tuple[float, ...]], needs: Sequence[Need]) -> Row:
    return rate_row(name, _raw_size(nbytes) if name == RAW_ONE else nbytes, seconds, needs)


def _link(
    name: str,
    rates: Sequence[str],
    raw: dict[str, Operation],
    nbytes: int,
    scale: Scale,
    on_step: Callable[[str], object],
    facts: list[str],
) -> dict[str, tuple[float, ...]]:
    """A client that finds out about a link of paced flows. facts: is told what the client found."""
    on_step(f"finding the lanes of {name}")
    joined = ",".join(rates)
    # Four flows are four connections: on a fifth the pace would begin anew.
    lanes = len(rates) if len(set(rates)) > 1 else None
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service(joined, program="paced", path=PROCESSES))
        stack.enter_context(paced(joined))
        client = stack.enter_context(EmaClient(service.url, lanes=lanes))
        traffic = Traffic("lanes", nbytes)
        traffic.create(client)
        for _ in range(FINDING):
            traffic.push(client)
            traffic.pull_into(client)
        traffic.check(client)
        ours = {f"push, {name}": partial(traffic.push, client), f"pull, {name}": partial(traffic.pull_into, client)}
        found = interleave({**raw, **{n: timed(each) for n, each in ours.items()}}, scale.rounds, on_step=on_step)
        facts.append(f"{name}: {client.link}")
    return found


def _parts(
    nbytes: int, scale: Scale, on_step: Callable[[str], object], facts: list[str]
) -> dict[str, tuple[float, ...]]:
    """Ranks of a sharded trainer, over flows that are paced alike: with one lane each, and with the lanes they find."""
    on_step("finding the lanes of ranks")
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service())
        stack.enter_context(paced(EVEN[0]))
        traffic = Traffic("parts", nbytes)
        ranks = stack.enter_context(contextlib.closing(_Ranks(service.url, traffic)))
        for _ in range(FINDING):
            ranks.push(None)
        ours = {name: partial(ranks.push, lanes) for name, lanes in zip(_PARTS, (1, None), strict=True)}
        found = interleave({name: timed(each) for name, each in ours.items()}, scale.rounds, on_step=on_step)
        facts += [f"{_PARTS[1]}, rank {number}: {each.link}" for number, each in enumerate(ranks.clients)]
        traffic.check(ranks.clients[0])
    return found


class _Ranks:
    """Ranks that each send half of a run's tensors, all at once. clients: one of each rank.

    What is found of lanes is remembered by a service's URL: here each rank has one of its own.
    """

    def __init__(self, url: str, traffic: Traffic) -> None:
        self._run, self._step = traffic.run, 0
        self.clients = [EmaClient(url.replace("127.0.0.1", host)) for host in ("127.0.0.1", "localhost")]
        traffic.create(self.clients[0])
        names = list(traffic.state)
        halves = [names[: len(names) // RANKS], names[len(names) // RANKS :]]
        self._bodies = [encode({name: traffic.state[name] for name in half}, {}) for half in halves]
        self._threads = ThreadPoolExecutor(RANKS)

    def push(self, lanes: int | None) -> None:
        """Push an update by all ranks, with so many lanes each, or with those that they find."""
        self._step += 1
        for client in self.clients:
            client.lanes = lanes
        list(self._threads.map(self._send, range(RANKS)))

    def _send(self, rank: int) -> None:
        client, body = self.clients[rank], self._bodies[rank]
        client.push_part_once(self._run, body, step=self._step, part=rank, of=RANKS, group="ranks")

    def close(self) -> None:
        self._threads.shutdown()
        for client in self.clients:
            client.close()


def _loopback(
    how: str,
    raw: dict[str, Operation],
    nbytes: int,
    scale: Scale,
    on_step: Callable[[str], object],
    facts: list[str],
    flags: Sequence[str] = (),
) -> dict[str, tuple[float, ...]]:
    """Links that nothing paces. how: said of them in the rows' names. flags: of the server."""
    on_step(f"finding the lanes of loopback{how}")
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service(*flags))
        clients = [stack.enter_context(EmaClient(service.url, lanes=lanes)) for lanes in (1, 2, None)]
        one, two, free = clients
        traffic = Traffic("lanes", nbytes)
        traffic.create(one)
        for _ in range(FINDING_LOOPBACK):
            traffic.push(free)
            traffic.pull_into(free)
        ours = {
            f"push{how}, one lane": partial(traffic.push, one),
            f"push{how}, lanes found": partial(traffic.push, free),
            f"pull{how}, one lane": partial(traffic.pull_into, one),
            f"pull{how}, two lanes": partial(traffic.pull_into, two),
            f"pull{how}, lanes found": partial(traffic.pull_into, free),
        }
        found = interleave({**raw, **{n: timed(each) for n, each in ours.items()}}, scale.rounds, on_step=on_step)
        traffic.check(free)
        facts.append(f"not paced{how}: {free.link}")
    return found


@contextlib.contextmanager
def paced(rates: str) -> Iterator[None]:
    """Within the block, what this process sends over its connections is paced, one connection after the other."""
    connect, rate = socket.create_connection, dealt(rates)

    def create(*given: Any, **named: Any) -> socket.socket:
        connection = connect(*given, **named)
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, next(rate))
        return connection

    socket.create_connection = create
    try:
        yield
    finally:
        socket.create_connection = connect


def _raw(stack: contextlib.ExitStack, address: str, rates: Sequence[str], nbytes: int) -> Operation:
    """All flows at once, each with as much of ``nbytes`` as its rate allows, from memory of so many bytes: as the raw
    loops of the wire, and as a trainer, whose parameters lie in no cache."""
    host, _, port = address.rpartition(":")
    buffer, whole = warm_buffer(nbytes), sum(map(float, rates)) or 1.0
    threads = stack.enter_context(ThreadPoolExecutor(len(rates)))
    shares: list[tuple[socket.socket, int]] = []
    for rate, pace in zip(rates, dealt(",".join(rates)), strict=False):
        connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=120))
        if pace:
            connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pace)
        shares.append((connection, int(nbytes * float(rate) / whole) if pace else nbytes))

    def send(share: tuple[socket.socket, int]) -> None:
        connection, size = share
        connection.sendall(size.to_bytes(LENGTH_BYTES, "little"))
        for start in range(0, size, SENT_AT_ONCE):
            connection.sendall(buffer[start : min(start + SENT_AT_ONCE, size)])
        if connection.recv(1) != b"\1":
            raise BenchFailed("the receiving end of a raw flow has gone")

    return timed(lambda: list(threads.map(send, shares)))
