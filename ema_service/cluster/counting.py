"""What the cluster's own programs count, for Prometheus: a gateway its requests and hosts, a coordinator its decisions.

No metric names a run or an address: neither program knows who may learn of them.

Knows names, help texts and numbers, and when a ticket was voted for first. Does not know who asks, or what is decided.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from ema_service.cluster.messages import Arrival, Refusal, Report, Resolve, Ticket, Vote

__all__ = ["CoordinatorMetrics", "GatewayMetrics", "TalkCount"]

#: Buckets of a decision: two milliseconds where all votes are there, until a host is back where one is not.
_DECIDING = (0.001, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Buckets of a request: as a server's.
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
#: Tickets of a talk that are yet to be decided: with more, the oldest are those of trainers that are gone.
_MOST_OPEN = 64


class GatewayMetrics:
    """The counters of one gateway. registry: has them all.

    More than a dozen attributes: one for each thing that is counted as it happens.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ema_gateway_requests",
            "Requests answered, by route and status.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "ema_gateway_request_seconds",
            "Time from a request's head to the end of its answer, by route; those who wait for a run left out.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.received = Counter("ema_gateway_received_bytes", "Bytes of bodies received.", registry=registry)
        self.sent = Counter("ema_gateway_sent_bytes", "Bytes of answers sent.", registry=registry)
        self.hosts = Gauge("ema_gateway_hosts", "Hosts of the cluster.", registry=registry)
        self.away = Gauge("ema_gateway_host_away", "1 where a host did not answer last.", ["host"], registry=registry)
        self.failures = Counter(
            "ema_gateway_host_failures", "Requests that a host did not answer.", ["host"], registry=registry
        )
        self.unmapped = Counter(
            "ema_gateway_map_failures", "Times that no coordinator told where the hosts are.", registry=registry
        )
        self.apart = Counter(
            "ema_gateway_apart", "Times that hosts were asked again: they were at two versions.", registry=registry
        )
        self.disagreed = Counter(
            "ema_gateway_disagreements", "Requests given up: hosts stayed at two versions.", registry=registry
        )
        self.waiting = Gauge("ema_gateway_waiting", "Requests that wait for something to happen.", registry=registry)
        self.events = Counter("ema_gateway_events", "Events sent to watchers, by kind.", ["kind"], registry=registry)
        ProcessCollector(registry=registry)


class CoordinatorMetrics:
    """The counters of one coordinator."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.reports = Counter("ema_coordinator_reports", "Reports of shards.", registry=registry)
        self.votes = Counter("ema_coordinator_votes", "Votes of shards.", ["kind"], registry=registry)
        self.refusals = Counter("ema_coordinator_refusals", "Proposals that a shard refused.", registry=registry)
        self.commits = Counter("ema_coordinator_commits", "Proposals committed.", ["kind"], registry=registry)
        self.aborts = Counter("ema_coordinator_aborts", "Proposals aborted.", ["kind"], registry=registry)
        self.seconds = Histogram(
            "ema_coordinator_decision_seconds",
            "Time from the first vote for a proposal to its verdict.",
            ["kind"],
            buckets=_DECIDING,
            registry=registry,
        )
        ProcessCollector(registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge; ``value`` is called whenever someone asks for the metrics."""
        Gauge(name, text, registry=self.registry).set_function(value)


class TalkCount:
    """Counts what is heard and said in one coordinator's talk about one run."""

    def __init__(self, metrics: CoordinatorMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        #: By shard, the edition of its latest vote, and the vote.
        self._voted: dict[int, tuple[int, Vote]] = {}
        #: ticket -> when the first vote for it came.
        self._open: dict[Ticket, float] = {}

    def heard(self, message: Arrival | Refusal | Report) -> None:
        """Count what a shard says."""
        if isinstance(message, Refusal):
            self._metrics.refusals.inc()
        if not isinstance(message, Report):
            return
        self._metrics.reports.inc()
        vote, edition = message.record.vote, message.record.edition
        if vote and self._voted.get(message.shard) != (edition, vote):
            self._voted[message.shard] = edition, vote
            self._metrics.votes.labels(_kind(vote)).inc()
            self._open.setdefault(vote.ticket, self._clock())
            while len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]

    def said(self, verdict: Resolve) -> None:
        """Count a verdict, once for all shards."""
        edition, vote = self._voted.get(verdict.shard, (None, None))
        if vote is None or edition != verdict.edition:
            return
        began = self._open.pop(vote.ticket, None)
        if began is not None:
            counter = self._metrics.commits if verdict.committed else self._metrics.aborts
            counter.labels(_kind(vote)).inc()
            self._metrics.seconds.labels(_kind(vote)).observe(self._clock() - began)


def _kind(vote: Vote) -> str:
    return "update" if vote.proposal.change is None else "change"
