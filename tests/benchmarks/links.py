"""Group links: pushes and pulls of a run on one server, on two and on three hosts, each behind a link of 1600 Mbit/s
(200 MB/s), on machines that are network namespaces; the trainer's own link is as fast as the kernel makes it.

Beside each stands what raw flows over the same links take, one to each host at once. Needs root and iproute2. Knows how
a cluster is started on machines. Does not know how a round is timed or shown.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lanes import PROCESSES, SENT_AT_ONCE
from namespaces import Network, why_no_network
from scale import Scale

from ema_client import EmaClient
from ema_service.bench.children import BenchFailed, Child, Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, Row, rate_row
from ema_service.bench.sink import LENGTH_BYTES
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic, make_state

__all__ = ["measure"]

NBYTES = 256 << 20
MEGABITS = 1600
COUNTS = 1, 2, 3
#: Of k times what one host reaches.
PUSHED, PULLED = 0.95, 0.9
CORE, TRAINER = "core", "trainer"
#: Bodies that go to and fro before any is counted: hosts are found with the first ones.
FINDING = 2


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes = min(NBYTES, scale.wire_bytes)
    title = f"links: {show_size(nbytes)} of float32, machines behind {MEGABITS} Mbit/s each"
    if why := why_no_network():
        rows = tuple(Row(name, "GB/s", note=f"skipped: {why}") for name in _names())
        return Group("links", title, rows)
    operations: dict[str, Operation] = {}
    with contextlib.ExitStack() as stack:
        places = [_machine(place) for place in range(max(COUNTS))]
        network = stack.enter_context(Network({CORE: None, TRAINER: None, **dict.fromkeys(places, MEGABITS)}))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-")))
        stack.enter_context(network.at(TRAINER))
        sinks = [stack.enter_context(_sink(network, machine, nbytes)) for machine in places]
        state = make_state(nbytes)
        for count in COUNTS:
            on_step(f"starting a cluster of {count}")
            url = stack.enter_context(_cluster(network, folder / str(count), count))
            client, traffic = stack.enter_context(EmaClient(url, lanes=1)), Traffic("links", nbytes, state)
            traffic.create(client)
            for _ in range(FINDING):
                traffic.push(client)
                traffic.pull_into(client)
            traffic.check(client)
            operations[_raw(count)] = timed(partial(_flow, sinks[:count], nbytes))
            operations[_row("push", count)] = timed(partial(traffic.push, client))
            operations[_row("pull", count)] = timed(partial(traffic.pull_into, client))
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    needs = {
        _row(way, count): (Need(share * count, _row(way, 1)),)
        for count in COUNTS[1:]
        for way, share in (("push", PUSHED), ("pull", PULLED))
    }
    rows = tuple(rate_row(name, nbytes, seconds, needs.get(name, ())) for name in _names())
    facts = (
        "a link is a pair of veth, with tbf at both ends; a raw flow sends from one warm buffer, one to each host",
    )
    return Group("links", title, rows, facts)


def _names() -> list[str]:
    return [name for count in COUNTS for name in (_raw(count), _row("push", count), _row("pull", count))]


def _row(way: str, count: int) -> str:
    return f"{way}, {count} linked host{'s' if count > 1 else ''}"


def _raw(count: int) -> str:
    return f"raw flow{'s' if count > 1 else ''} to {count} machine{'s' if count > 1 else ''}"


def _machine(place: int) -> str:
    return f"host-{place}"


@contextlib.contextmanager
def _sink(network: Network, machine: str, nbytes: int) -> Iterator[socket.socket]:
    """A connection to what takes raw flows on a machine, within the block."""
    with network.at(machine):
        child = Child("flows", [str(nbytes), network.address(machine)], path=PROCESSES)
        child.__enter__()
    try:
        host, _, port = child.said.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            yield connection
    finally:
        child.__exit__()


def _flow(sinks: list[socket.socket], nbytes: int) -> None:
    """Send each sink its share, all at once."""
    share, buffer = nbytes // len(sinks), memoryview(bytearray(SENT_AT_ONCE))

    def send(connection: socket.socket) -> None:
        connection.sendall(share.to_bytes(LENGTH_BYTES, "little"))
        for start in range(0, share, SENT_AT_ONCE):
            connection.sendall(buffer[: min(SENT_AT_ONCE, share - start)])
        if connection.recv(1) != b"\1":
            raise BenchFailed("the receiving end of a raw flow has gone")

    with ThreadPoolExecutor(len(sinks)) as threads:
        list(threads.map(send, sinks))


@contextlib.contextmanager
def _cluster(network: Network, folder: Path, count: int) -> Iterator[str]:
    """Coordinator and gateway on one machine and hosts on theirs, within the block; the gateway's URL. One host is a
    server that decides alone: our client passes by a gateway only where hosts are several."""
    folder.mkdir()
    token = folder / "token"
    token.write_text(f"{secrets.token_hex(16)}\n")
    token.chmod(0o600)
    secret = ["--cluster-token-file", str(token)]
    here = ["--host", network.address(CORE), "--port", "0"]
    with contextlib.ExitStack() as stack:

        def start(machine: str, child: Child) -> str:
            with network.at(machine):
                stack.enter_context(child)
            return child.said

        def serve(place: int, *flags: str) -> str:
            reached = ("--host", network.address(_machine(place)), "--insecure-no-auth")
            return start(_machine(place), Service(*flags, *reached, data_dir=folder / f"host-{place}"))

        if count == 1:
            yield serve(0)
            return
        coordinator = start(CORE, Child("ema_service", ["cluster", "coordinator", *here, *secret]))
        known = ["--coordinator", coordinator, *secret]
        for place in range(count):
            serve(place, "--shard", f"{place}/{count}", *known)
        yield start(CORE, Child("ema_service", ["cluster", "gateway", *here, "--insecure-no-auth", *known]))
