"""Group history: what it costs to measure how far shadow and parameters are apart, and to tell how runs go.

Knows the averaging of a push piece by piece, two servers, and a run of a year. Does not know how squares are summed.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from scale import Scale

from ema_client import EmaClient
from ema_client.protocol import AverageConfig, TensorSpec
from ema_service.api.answers import json_bytes
from ema_service.averaging import NO_DIGEST, BlockDigest, Squares, digesting
from ema_service.bench.children import Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, Row, rate_row
from ema_service.bench.traffic import Traffic
from ema_service.memory import Layout
from ema_service.metrics import Metrics, Pulse
from ema_service.runs.measurements import Measured, Measurements
from ema_service.shadows import Average, Member, Version
from ema_service.sizes import show_size

__all__ = ["measure"]

PLAIN = "averaging a push, nothing measured"
MEASURED = "the same, measured"
IN_TURN = "the same, measured as the server does: one of five"
PUSH, PUSH_PLAIN = "push, Unix socket", "push, Unix socket, --no-measurements"
ANSWER, NOTE = "history of a year, 500 points, packed", "noting one update"
RUNS = 1000
METRICS = f"metrics of {RUNS:,} runs"
#: As a push is averaged: pieces that are still in a cache, of blocks whose digests begin anew.
PIECE, TENSORS = (1 << 20) // 4, 256
#: Pushes one behind the other, of which some are measured; and groups of tensors of the run of a year.
IN_A_ROW, GROUPS = 10, 24


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    averaging, noted = _averaging(scale.flat_bytes), scale.history_updates
    with contextlib.ExitStack() as stack:
        operations = {
            PLAIN: lambda: averaging(measured=False),
            MEASURED: lambda: averaging(measured=True),
            IN_TURN: lambda: sum(averaging(measured=each == 0) for each in range(5)) / 5,
            PUSH_PLAIN: _pushes(stack, scale.wire_bytes, "--no-measurements"),
            PUSH: _pushes(stack, scale.wire_bytes),
        }
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    on_step(f"noting {noted} updates")
    begun, measurements = perf_counter(), _of_a_year(noted)
    note = (perf_counter() - begun) / noted
    told = {ANSWER: timed(lambda: _answer(measurements)), METRICS: timed(_metrics_of_many(measurements))}
    answers = interleave(told, scale.rounds, on_step=on_step)
    rows = (
        rate_row(PLAIN, scale.flat_bytes, seconds),
        rate_row(MEASURED, scale.flat_bytes, seconds, [Need(against=PLAIN)]),
        rate_row(IN_TURN, scale.flat_bytes, seconds, [Need(0.9, PLAIN)]),
        rate_row(PUSH_PLAIN, scale.wire_bytes, seconds),
        rate_row(PUSH, scale.wire_bytes, seconds, [Need(0.97, PUSH_PLAIN)]),
        Row(NOTE, "µs", (1e6 * note,) * scale.rounds),
        Row(ANSWER, "ms", tuple(1000 * each for each in answers[ANSWER]), (Need(50, most=True),)),
        Row(METRICS, "ms", tuple(1000 * each for each in answers[METRICS]), (Need(100, most=True),)),
    )
    facts = (
        f"averaging: {show_size(scale.flat_bytes)} of float32 in {TENSORS} tensors, digests of the parameters too, on "
        f"one thread; a push is the mean of {IN_A_ROW}, one behind the other; {noted} updates make the year",
    )
    return Group("history", "history: what measuring costs", rows, facts)


def _averaging(nbytes: int) -> Callable[..., float]:
    """Seconds to average a push, piece by piece as it arrives; receiving is not counted."""
    elements = nbytes // 4
    shadow, sent, buffer = (torch.empty(elements).uniform_(0.5, 1.5) for _ in range(3))
    ends = np.linspace(elements // TENSORS, elements, TENSORS).astype(np.int64)

    def averaging(*, measured: bool) -> float:
        squares = Squares(ends) if measured else None
        loop = digesting(buffer, shadow, buffer, 1e-4, squares=squares)
        params, seconds = BlockDigest(compiled=True), 0.0
        for start in range(0, elements, PIECE):
            stop = min(start + PIECE, elements)
            buffer[start:stop].copy_(sent[start:stop])
            begun = perf_counter()
            loop(start, stop, params.accumulators, NO_DIGEST)
            seconds += perf_counter() - begun
        return seconds

    return averaging


def _pushes(stack: contextlib.ExitStack, nbytes: int, *flags: str) -> Operation:
    """Pushes one behind the other to a server of their own; the mean of their seconds."""
    service = stack.enter_context(Service(*flags))
    client = stack.enter_context(EmaClient(service.uds))
    traffic = Traffic("history", nbytes)
    traffic.create(client)

    def operation() -> float:
        begun = perf_counter()
        for _ in range(IN_A_ROW):
            traffic.push(client)
        return (perf_counter() - begun) / IN_A_ROW

    return operation


def _of_a_year(updates: int) -> Measurements:
    """The measurements of a run that had so many updates in a year."""
    layout = Layout([TensorSpec(f"block.{n}.weight", (4, 4), "F32") for n in range(GROUPS)])
    measurements, sums = Measurements("year", layout), np.random.default_rng(0).uniform(1, 2, (GROUPS, 3))
    average = Average(Member(AverageConfig()), 0.9999, 0.9999, 0)
    first = Version("lineage", 1, 0, 0, 0, b"", (average,), 1.7e9)
    for number in range(1, updates + 1):
        at = first.updated_at + number * 3.15e7 / updates
        version = replace(first, n=number, step=number, num_updates=number, updated_at=at)
        measurements.note(Measured(version, sums, layout.param_bytes, 0, 0.1, 0.01, 0.001))
    return measurements


def _answer(measurements: Measurements) -> bytes:
    """The body of the answer, as the route makes it."""
    told = measurements.history("ema", since=0.0, points=500)
    return gzip.compress(json_bytes(told), 1, mtime=0)


def _metrics_of_many(measurements: Measurements) -> Callable[[], bytes]:
    """What makes the body of ``GET /metrics`` on a server of many runs, each measured."""
    runs = [
        Pulse(f"run-{n}", "ready", 1.7e9 + n, n, n, n, 1 << 30, distance=lambda: measurements.distance)
        for n in range(RUNS)
    ]
    return partial(Metrics().render, runs)
