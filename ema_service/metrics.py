"""The counters and gauges of a server, for Prometheus.

One registry for each server, so that two servers in one process do not share numbers.

Knows names, help texts and numbers. Does not know who counts or when.
"""

from __future__ import annotations

import heapq
import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["MOST_RUNS", "Metrics", "Pulse"]

T = TypeVar("T")
Span = Callable[[str], AbstractContextManager[None]]

#: Buckets of the phases of pushes and pulls: an update of 100 KB is committed within a millisecond, one of 10 GB takes
#: ten seconds to come.
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
#: Runs with series of their own: so many runs are trained at once at most, and Prometheus keeps
#: each series that it ever saw. 500 runs are 3,500 lines; of 1,000 runs the answer takes 60 ms of a core.
MOST_RUNS = 500


@dataclass(frozen=True, slots=True)
class Pulse:
    """What metrics tell of one run, as RunInfo has it.

    shadow_bytes: RunInfo.bytes. ended: whether RunInfo.ended_at is told. distance: gives that of the newest
    measurement, None where there is none; asked of runs that get series of their own, for it takes 20 microseconds.
    """

    run: str
    status: str
    updated_at: float
    step: int | None
    num_updates: int
    durable_step: int | None
    shadow_bytes: int
    ended: bool = False
    distance: Callable[[], float | None] = lambda: None


class _Runs(Collector):
    """The metrics of runs, made anew for each time that somebody asks."""

    def __init__(self, runs: Sequence[Pulse], told: Sequence[Pulse]) -> None:
        """told: the runs that get series of their own."""
        self._runs = runs
        self._told = told

    def collect(self) -> Iterable[GaugeMetricFamily]:
        runs = self._runs
        degraded = sum(run.status == "degraded" for run in runs)
        yield GaugeMetricFamily("ema_runs", "Runs held.", len(runs))
        yield GaugeMetricFamily("ema_degraded_runs", "Runs that are not as they should be.", degraded)
        yield GaugeMetricFamily("ema_shadow_bytes", "Bytes of shadows.", sum(run.shadow_bytes for run in runs))
        yield GaugeMetricFamily(
            "ema_runs_left_out", "Runs without series of their own: others moved later.", len(runs) - len(self._told)
        )
        yield self._by_run("ema_run_updated_timestamp_seconds", "When the run last moved.", lambda run: run.updated_at)
        yield self._by_run(
            "ema_run_ended", "1 where the trainer said that its training is over.", lambda run: run.ended
        )
        yield self._by_run("ema_run_step", "The trainer's step of the latest update.", lambda run: run.step)
        yield self._by_run("ema_run_num_updates", "LitEma's counter of the run.", lambda run: run.num_updates)
        yield self._by_run(
            "ema_run_durable_lag_steps", "Steps that a crash would cost: step less durable_step.", _durable_lag
        )
        yield self._by_run(
            "ema_run_distance", "|shadow - parameters| / |parameters|, as last measured.", lambda run: run.distance()
        )
        yield self._status()

    def _by_run(self, name: str, text: str, value: Callable[[Pulse], float | None]) -> GaugeMetricFamily:
        """One gauge of each run that has the value."""
        family = GaugeMetricFamily(name, text, labels=["run"])
        for run in self._told:
            if (number := value(run)) is not None:
                family.add_metric([run.run], number)
        return family

    def _status(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily("ema_run_status", "1 for the status that the run has.", labels=["run", "status"])
        for run in self._told:
            family.add_metric([run.run, run.status], 1)
        return family


class _Phase:
    """Counts the time of a block, and has it traced. A class, for it takes a tenth of what a generator would."""

    __slots__ = ("_begun", "_seconds", "_span")

    def __init__(self, seconds: Histogram, span: AbstractContextManager[None] | None) -> None:
        self._seconds = seconds
        self._span = span

    def __enter__(self) -> None:
        self._begun = perf_counter()
        if self._span:
            self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, where: TracebackType | None
    ) -> None:
        self._seconds.observe(perf_counter() - self._begun)
        if self._span:
            self._span.__exit__(kind, fault, where)


class Metrics:
    """The counters of one server; ``render()`` is the body of ``GET /metrics``.

    More than a dozen attributes: one for each thing that is counted as it happens.
    """

    def __init__(self, span: Span | None = None) -> None:
        """span: entered for the time of each phase, with its name, where somebody traces."""
        self._span = span
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self.registry = CollectorRegistry()
        self.updates = Counter(
            "ema_updates",
            "Updates by result: applied, repeated, or expired for want of parts.",
            ["result"],
            registry=self.registry,
        )
        self.errors = Counter(
            "ema_errors", "Requests answered with an error, by code.", ["code"], registry=self.registry
        )
        self.pushes = Counter(
            "ema_pushes",
            "Pushes received whole, by link: Unix socket, TCP on this host, TCP, or shared memory.",
            ["link"],
            registry=self.registry,
        )
        self.stretches = Counter(
            "ema_stretches",
            "Stretches of updates by result: staged, applied, repeated, refused, or broken off.",
            ["result"],
            registry=self.registry,
        )
        self.received = Counter("ema_received_bytes", "Bytes of tensors received in pushes.", registry=self.registry)
        self.sent = Counter("ema_sent_bytes", "Bytes of weights sent to readers.", registry=self.registry)
        self.watchers = Gauge("ema_watchers", "Streams of events that are open.", registry=self.registry)
        self.events = Counter("ema_events", "Events sent to watchers, by kind.", ["kind"], registry=self.registry)
        self.slow_readers = Counter(
            "ema_slow_readers", "Readers cut off because they took too little.", registry=self.registry
        )
        self.push_seconds = Histogram(
            "ema_push_seconds",
            "Time of pushes by phase: waiting for room, receiving, committing (from the last byte to the answer).",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pull_seconds = Histogram(
            "ema_pull_seconds",
            "Time of reads of weights by phase: waiting for room, sending.",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._push = {phase: self.push_seconds.labels(phase) for phase in ("wait", "receive", "commit")}
        self._pull = {phase: self.pull_seconds.labels(phase) for phase in ("wait", "send")}
        self.requests = Counter(
            "ema_requests",
            "Requests answered, by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "ema_request_seconds",
            "Time from a request's head to the end of its answer, by route; streams of events left out.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def build(self, facts: Mapping[str, str]) -> None:
        """Tell what the server is made of: ema_build_info, whose labels are ``facts``."""
        Info("ema_build", "What the server is made of.", registry=self.registry).info(dict(facts))

    def push(self, phase: Literal["wait", "receive", "commit"]) -> AbstractContextManager[None]:
        """Count the time of the block in ema_push_seconds."""
        return _Phase(self._push[phase], self._span(f"push {phase}") if self._span else None)

    def pull(self, phase: Literal["wait", "send"]) -> AbstractContextManager[None]:
        """Count the time of the block in ema_pull_seconds."""
        return _Phase(self._pull[phase], self._span(f"pull {phase}") if self._span else None)

    def answered(self, method: str, route: str, status: int, seconds: float | None) -> None:
        """Count a request that was answered. seconds: None where they say nothing, as of a stream of events."""
        key = method, route, status
        found = self._answered.get(key)
        if found is None:
            counter = self.requests.labels(method, route, str(status))
            found = self._answered[key] = counter, self.request_seconds.labels(method, route)
        found[0].inc()
        if seconds is not None:
            found[1].observe(seconds)

    def timed(self, commit: Callable[[], T]) -> Callable[[], T]:
        """``commit``, with its time counted in ema_push_seconds."""

        def work() -> T:
            with self.push("commit"):
                return commit()

        return work

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error of this code."""
        self.errors.labels(code).inc()

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge; ``value`` is called whenever someone asks for the metrics.

        A value that cannot be had (OSError, sqlite3.Error: a disk that is gone) is told as NaN: the others matter most
        then.
        """

        def told() -> float:
            try:
                return value()
            except (OSError, sqlite3.Error):
                return math.nan

        Gauge(name, text, registry=self.registry).set_function(told)

    def render(self, runs: Sequence[Pulse], may_tell: Callable[[str], bool] = lambda run: True) -> bytes:  # noqa: ARG005
        """All metrics in the text format of Prometheus.

        may_tell: whether the name of a run is for whoever asks; the others are counted only.
        """
        told = heapq.nlargest(MOST_RUNS, (run for run in runs if may_tell(run.run)), key=_importance)
        of_runs = CollectorRegistry(auto_describe=False)
        of_runs.register(_Runs(runs, told))
        return generate_latest(self.registry) + generate_latest(of_runs)


def _importance(run: Pulse) -> tuple[bool, float]:
    """Degraded runs come first, which may never move again; then those that moved last."""
    return run.status == "degraded", run.updated_at


def _durable_lag(run: Pulse) -> int | None:
    """None where nothing was pushed with a step yet."""
    if run.step is None:
        return None
    return run.step - (run.durable_step or 0)
