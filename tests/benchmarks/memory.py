"""Groups memory and readers: how much memory server and client take at most, and what many readers cost.

Knows whose peak is taken when, and what is demanded. Does not know how a server accounts for its memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from scale import Scale
from watching import watched
from wire import PROCESSES

from ema_client import EmaClient
from ema_service.bench.ceiling import RAW_TCP, Ceiling
from ema_service.bench.children import Child, Service
from ema_service.bench.machine import resident_bytes
from ema_service.bench.rounds import interleave, timed
from ema_service.bench.rows import Group, Need, Row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["measure", "measure_readers"]

MEGA = 1e6
SHADOW, STAGING, FROZEN = "ema_shadow_bytes", "ema_staging_bytes", "ema_frozen_bytes"
#: The server beyond the weights: the interpreter, torch, FastAPI.
SERVER_SLACK = 400e6
CLIENT_SLACK = 64e6
#: Of a process that grows by nothing: 10 KB kept of each of 450 pushes would be more.
NOISE = 4e6
PUSHES = 5
UNKNOWN = "this system does not tell a process's memory"
_PEAKS = re.compile(r"peaks (\d+ \d+)")


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Peaks as the system counts them (VmHWM), in processes that do nothing else."""
    with Service() as service, EmaClient(service.url) as client:
        rows, fact = _server_peak(scale, service, client, on_step)
        rows += _growth(scale, service, client, on_step)
        rows += _client_peak(scale, service, on_step)
    return Group("memory", "memory: MB are 10^6 bytes", tuple(rows), (fact,))


def _server_peak(
    scale: Scale, service: Service, client: EmaClient, on_step: Callable[[str], object]
) -> tuple[list[Row], str]:
    at_rest = service.peak_bytes()
    traffic = Traffic("peak", scale.wire_bytes)
    with watched(service.url, (SHADOW, STAGING, FROZEN)) as highest:
        traffic.create(client)
        for number in range(PUSHES):
            on_step(f"server's peak: push {number + 1} of {PUSHES}")
            traffic.push(client)
            traffic.pull_into(client)
    client.delete_run(traffic.run)
    bound = sum(highest.values()) + SERVER_SLACK
    what = f"server's peak, push and pull of {show_size(traffic.nbytes)}"
    gauges = " + ".join(f"{highest[gauge] / MEGA:,.0f}" for gauge in (SHADOW, STAGING, FROZEN))
    return (
        [_megabytes("server at rest", at_rest), _megabytes(what, service.peak_bytes(), bound)],
        f"{what}: at most shadows + staging + frozen, as its gauges reached, + 400 MB: {gauges} + 400",
    )


def _growth(scale: Scale, service: Service, client: EmaClient, on_step: Callable[[str], object]) -> list[Row]:
    """No push may leave anything behind: in the end the server is as large as after warming up, but for one push."""
    traffic = Traffic("growth", scale.growth_bytes)
    traffic.create(client)
    sizes = {0: resident_bytes(service.pid)}
    for number in range(1, scale.growth_pushes + 1):
        on_step(f"server's growth: push {number} of {scale.growth_pushes}")
        traffic.push(client)
        sizes[number] = resident_bytes(service.pid)
    early, late = sizes[scale.growth_warm], sizes[scale.growth_pushes]
    grown = late - early if late is not None and early is not None else None
    what = f"server's growth, pushes {scale.growth_warm}..{scale.growth_pushes} of {show_size(traffic.nbytes)}"
    return [_megabytes(what, grown, traffic.nbytes + NOISE)]


def _client_peak(scale: Scale, service: Service, on_step: Callable[[str], object]) -> list[Row]:
    size = scale.wire_bytes
    trained = _grown(service, scale, "train", on_step)
    pushed = _grown(service, scale, "push", on_step)
    return [
        _megabytes(
            f"client's peak beyond the model of {show_size(size)}, steps longer than sending",
            trained,
            size + CLIENT_SLACK,
        ),
        # This one does nothing but push, so one update waits while another is on its way: two copies.
        _megabytes("the same, nothing but updates", pushed, 2 * size + CLIENT_SLACK),
    ]


def _grown(service: Service, scale: Scale, way: str, on_step: Callable[[str], object]) -> float | None:
    on_step(f"client's peak: {way}")
    arguments = [service.url, str(scale.wire_bytes), str(PUSHES), way]
    with Child("trainer", arguments, path=PROCESSES, says=_PEAKS) as trainer:
        before, after = (int(number) for number in trainer.said.split())
    return after - before if before else None


def measure_readers(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Many pull one version at once, each a thread with a connection and tensors of its own."""
    with contextlib.ExitStack() as stack:
        ceiling = stack.enter_context(Ceiling(scale.reader_bytes))
        service = stack.enter_context(Service())
        clients = [stack.enter_context(EmaClient(service.url)) for _ in range(scale.readers)]
        pool = stack.enter_context(ThreadPoolExecutor(scale.readers))
        traffic = Traffic("readers", scale.reader_bytes)
        traffic.create(clients[0])
        for _ in range(PUSHES):
            traffic.push(clients[0])
        outs = [{name: torch.zeros_like(t) for name, t in traffic.state.items()} for _ in clients]
        all_pull = timed(lambda: list(pool.map(lambda c, out: c.pull("readers", out=out), clients, outs)))
        before = service.peak_bytes()
        operations = {RAW_TCP: ceiling.operations()[RAW_TCP], "all": all_pull}
        with watched(service.url, [FROZEN]) as highest:
            seconds = interleave(operations, scale.rounds, on_step=on_step)
        grown = service.peak_bytes()
    return _readers_group(scale, seconds, highest[FROZEN], grown - before if grown and before else None)


def _readers_group(scale: Scale, seconds: dict[str, tuple[float, ...]], frozen: float, grown: int | None) -> Group:
    size = scale.reader_bytes
    together = tuple(scale.readers * size / s / 1e9 for s in seconds["all"])
    rows = (
        Row(RAW_TCP, "GB/s", tuple(size / s / 1e9 for s in seconds[RAW_TCP])),
        Row("all readers together", "GB/s", together, (Need(against=RAW_TCP),)),
        Row("frozen copies at most", "copies", (frozen / size,), (Need(1, most=True),)),
        _megabytes("growth of the server's peak", grown, size + CLIENT_SLACK),
    )
    title = f"readers: {scale.readers} pull one version of {show_size(size)} at once"
    return Group("readers", title, rows, ("threads of one process, each with a connection and tensors of its own",))


def _megabytes(name: str, nbytes: float | None, most: float | None = None) -> Row:
    if nbytes is None:
        return Row(name, "MB", note=UNKNOWN)
    needs = () if most is None else (Need(most / MEGA, most=True),)
    return Row(name, "MB", (nbytes / MEGA,), needs)
