"""Group hosts: pushes and pulls of a run on several hosts, each of which has a link of 200 MB/s (1600 Mbit/s), beside
one server that has such a link; of two shards that have two hosts each, past the gateway and by it; and pushes to two
hosts over flows of 100 MB/s, one to each host and as many as the client finds to pay, and to two hosts that read the
memory of the client, which no link paces.

Linux paces single sockets (SO_MAX_PACING_RATE), over loopback too; a client of one lane has one connection to each
host, and so its rate to it. Knows how a cluster is started. Does not know how a round is timed or shown.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lanes import PROCESSES, paced
from scale import Scale

from ema_client import EmaClient
from ema_service.bench.children import Child, Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["measure"]

NBYTES = 128 << 20
RATE = "200"
ONE = {"push": "push, one server", "pull": "pull, one server"}
TWINS, BY_GATEWAY = "twins of 2 shards", "twins, by the gateway"
SHARED = "push, 2 hosts, shared memory"
#: Of k times what one server reaches.
PUSHED, PULLED = 0.95, 0.9
#: Of what two hosts reach that are sent their slices.
READ = 2.5
COUNTS = 2, 3
#: Of flows of FLOW MB/s to two hosts: one to each, and as many as are found, which bring WIDER times as much.
FLOW = "100"
LANES = "push, 2 hosts, a flow of 100 MB/s each", "push, 2 hosts, lanes found"
WIDER = 2.0
#: Bodies that go to and fro before any is counted: hosts are found with the first ones.
FINDING = 2


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes = min(NBYTES, scale.wire_bytes)
    operations: dict[str, Operation] = {}
    needs: dict[str, tuple[Need, ...]] = dict.fromkeys(ONE.values(), ())
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-")))
        on_step("starting a server and two clusters")
        one = stack.enter_context(Service(RATE, data_dir=folder / "one", program="paced", path=PROCESSES))
        urls: dict[int | str, str] = {1: one.url}
        urls |= {count: stack.enter_context(_cluster(folder / str(count), count)) for count in COUNTS}
        urls |= dict.fromkeys((TWINS, BY_GATEWAY), stack.enter_context(_cluster(folder / "twins", 4, "--twins")))
        stack.enter_context(paced(RATE))
        for of, url in urls.items():
            client, traffic = stack.enter_context(EmaClient(url, lanes=1)), Traffic(f"hosts-{len(operations)}", nbytes)
            if of == BY_GATEWAY:
                _keep_to_gateway(client)
            traffic.create(client)
            for _ in range(FINDING):
                traffic.push(client)
                traffic.pull_into(client)
            traffic.check(client)
            for way, what, share in (("push", traffic.push, PUSHED), ("pull", traffic.pull_into, PULLED)):
                name = ONE[way] if of == 1 else f"{way}, {f'{of} hosts' if isinstance(of, int) else of}"
                operations[name] = timed(partial(what, client))
                if of not in (1, BY_GATEWAY):
                    needs[name] = (Need(share * (of if isinstance(of, int) else 2), ONE[way]),)
            if of == COUNTS[0]:
                operations[SHARED] = timed(partial(traffic.push, client, client.shared_state(traffic.state)))
                needs[SHARED] = (Need(READ, f"push, {of} hosts"),)
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    facts = ["each host, and the one server, sends and is sent 200 MB/s; a client's weights go past the gateway"]
    seconds |= _lanes(nbytes, scale, on_step, facts)
    needs[LANES[1]] = (Need(WIDER, LANES[0]),)
    rows = tuple(rate_row(name, nbytes, seconds, needs.get(name, ())) for name in seconds)
    return Group("hosts", f"hosts: {show_size(nbytes)} of float32, TCP", rows, tuple(facts))


def _lanes(
    nbytes: int, scale: Scale, on_step: Callable[[str], object], facts: list[str]
) -> dict[str, tuple[float, ...]]:
    """Two hosts that take whatever comes, of a trainer whose flows are paced. facts: is told what the client found."""
    on_step("finding the lanes to two hosts")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-")))
        url = stack.enter_context(_cluster(folder / "lanes", 2, rate="0"))
        stack.enter_context(paced(FLOW))
        one, free = (stack.enter_context(EmaClient(url, lanes=lanes)) for lanes in (1, None))
        traffic = Traffic("hosts-lanes", nbytes)
        traffic.create(one)
        for _ in range(FINDING):
            traffic.push(free)
        traffic.push(one)
        ours = {name: timed(partial(traffic.push, each)) for name, each in zip(LANES, (one, free), strict=True)}
        found = interleave(ours, scale.rounds, on_step=on_step)
        traffic.check(free)
        if hosted := free._hosts.of(traffic.run):
            facts += [f"{LANES[1]}, host {host.shard.place}: {host.transport.link}" for host in hosted.hosts]
    return found


@contextlib.contextmanager
def _cluster(folder: Path, count: int, *more: str, rate: str = RATE) -> Iterator[str]:
    """A coordinator, hosts, and a gateway, within the block; the gateway's URL. more: flags of hosts. rate: of a host's
    connections; 0: not paced."""
    folder.mkdir()
    token = folder / "token"
    token.write_text(f"{secrets.token_hex(16)}\n")
    token.chmod(0o600)
    secret = ["--cluster-token-file", str(token)]
    with contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(Child("ema_service", ["cluster", "coordinator", "--port", "0", *secret]))
        known = ["--coordinator", coordinator.said, *secret]
        for place in range(count):
            flags = ["--shard", f"{place}/{count}", *more, *known, rate]
            host = Service(*flags, data_dir=folder / f"host-{place}", program="paced", path=PROCESSES)
            stack.enter_context(host)
        gateway = stack.enter_context(Child("ema_service", ["cluster", "gateway", "--port", "0", *known]))
        yield gateway.said


def _keep_to_gateway(client: EmaClient) -> None:
    """Have a client that goes past the gateway send and read all by it."""
    client._pushes._hosts.of = lambda _: None  # type: ignore[method-assign]
    client._pulls = client._pulls._pulls  # type: ignore[assignment]
