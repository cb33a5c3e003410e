"""The counters and gauges of a server, for Prometheus.

One registry for each server, so that two servers in one process do not share numbers.

Knows names, help texts and numbers. Does not know who counts or when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

T = TypeVar("T")

#: Buckets of commit times: an update of 100 KB takes about a millisecond, one of 10 GB about ten seconds.
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics:
    """The counters of one server; ``render()`` is the body of ``GET /metrics``."""

    def __init__(self) -> None:
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
        self.received = Counter("ema_received_bytes", "Bytes of tensors received in pushes.", registry=self.registry)
        self.sent = Counter("ema_sent_bytes", "Bytes of weights sent to readers.", registry=self.registry)
        self.watchers = Gauge("ema_watchers", "Streams of events that are open.", registry=self.registry)
        self.events = Counter("ema_events", "Events sent to watchers, by kind.", ["kind"], registry=self.registry)
        self.slow_readers = Counter(
            "ema_slow_readers", "Readers cut off because they took too little.", registry=self.registry
        )
        self.commit_seconds = Histogram(
            "ema_commit_seconds",
            "Time from the last byte of an update to its being applied.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def timed(self, commit: Callable[[], T]) -> Callable[[], T]:
        """``commit``, with its time counted in ema_commit_seconds."""

        def work() -> T:
            with self.commit_seconds.time():
                return commit()

        return work

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error of this code."""
        self.errors.labels(code).inc()

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge; ``value`` is called whenever someone asks for the metrics."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
