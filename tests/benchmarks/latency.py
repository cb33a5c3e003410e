"""Groups latency and sizes: what asking costs, and how time grows with the bytes.

Knows a small push, an empty PUT of the same kind of server, and the sizes. Does not know how a round is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from scale import Scale
from wire import PROCESSES

from ema_client import EmaClient
from ema_client.http.body import Body
from ema_client.http.transport import Transport
from ema_service.bench.ceiling import RAW_TCP, RAW_UNIX, Ceiling
from ema_service.bench.children import Child, Service
from ema_service.bench.fit import Fit
from ema_service.bench.rounds import Operation, interleave, repeated, timed
from ema_service.bench.rows import Group, Need, Row
from ema_service.bench.sizes import SMALL_SIZES, Link, Sizes, ceiling_rows, show_size
from ema_service.bench.traffic import Traffic

__all__ = ["measure", "measure_sizes"]

EMPTY, BARE = "empty PUT, the same server", "empty PUT, bare FastAPI"


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """One small push, there and back, beside a PUT that does nothing; the same client code sends all."""
    push = f"push of {show_size(scale.small_bytes)}, TCP"
    push_unix = f"push of {show_size(scale.small_bytes)}, Unix"
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service(program="with_empty_put", path=PROCESSES))
        servers = {EMPTY: service.url, BARE: stack.enter_context(Child("empty", path=PROCESSES)).said}
        tcp = stack.enter_context(EmaClient(service.url))
        unix = stack.enter_context(EmaClient(service.uds))
        traffic = Traffic("latency", scale.small_bytes)
        traffic.create(tcp)
        operations = {
            **{
                name: _nothing(stack.enter_context(contextlib.closing(Transport(url)))) for name, url in servers.items()
            },
            push: timed(lambda: traffic.push(tcp)),
            push_unix: timed(lambda: traffic.push(unix)),
        }
        many = {name: repeated(operation, scale.small_repeats) for name, operation in operations.items()}
        seconds = interleave(many, scale.rounds, on_step=on_step)
    needs = {
        BARE: (Need(against=EMPTY),),
        push: (Need(2.2, EMPTY, most=True), Need(against=BARE)),
        push_unix: (Need(against=EMPTY),),
    }
    rows = tuple(Row(name, "ms", tuple(1000 * s for s in seconds[name]), needs.get(name, ())) for name in operations)
    facts = (f"each figure is the median of {scale.small_repeats} in a row; both servers: uvicorn, asyncio, httptools",)
    return Group("latency", "latency: one round trip", rows, facts)


def _nothing(transport: Transport) -> Operation:
    body = Body(0, lambda: ())
    return timed(lambda: transport.upload("/empty", body))


def measure_sizes(scale: Scale, on_step: Callable[[str], object]) -> tuple[Group, dict[str, Fit]]:
    """Push and pull at 100 KB, 10 MB and the size of the wire group, and the lines through them."""
    sizes = sorted({*(size for size in SMALL_SIZES if size < scale.wire_bytes), scale.wire_bytes})
    with contextlib.ExitStack() as stack:
        ceiling = stack.enter_context(Ceiling(scale.wire_bytes))
        service = stack.enter_context(Service())
        links = [
            Link("TCP", stack.enter_context(EmaClient(service.url)), RAW_TCP),
            Link("Unix", stack.enter_context(EmaClient(service.uds)), RAW_UNIX),
        ]
        runs = Sizes("sizes", sizes, links)
        runs.create()
        seconds = interleave({**ceiling.operations(), **runs.operations()}, scale.rounds, on_step=on_step)
    rows = (*ceiling_rows(scale.wire_bytes, seconds), *runs.rows(seconds))
    return Group("sizes", "sizes: 100 KB is the median of 20 in a row each round, 10 MB of 5", rows), runs.fits(seconds)
