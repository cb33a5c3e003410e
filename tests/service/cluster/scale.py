"""What a run on 8, 64 and 256 hosts would cost, worked out: bytes, messages, the time of a commit, failures.

Messages and the coordinator's time are counted with the decision core itself; bytes and failures are arithmetic on the
assumptions below. ``python -m tests.service.cluster.scale`` prints the table of ema_service/cluster/DESIGN.md.

Knows the protocol's messages and what hosts are assumed to do. Does not know any real network or host.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from ema_service.cluster import Coordinator, Proposal, Record, Report, Resolve, Shard, Ticket, Vote

__all__ = ["Commit", "commit"]

#: A model of 70 billion parameters in float32, three averages, and an update in bfloat16.
_PARAMETERS, _AVERAGES, _SHADOW_BYTES, _UPDATE_BYTES = 70e9, 3, 4, 2
#: Each host's link, bytes a second (100 Gbit/s, of which nine tenths are reached).
_LINK = 100e9 / 8 * 0.9
#: Bytes of a host's shadows read and written by its averaging, in a second.
_AVERAGING = 12e9
#: A round trip between two hosts, and what one small HTTP request costs the coordinator's core, in seconds.
_ROUND_TRIP, _REQUEST = 0.2e-3, 0.15e-3
#: Failures of a host in a day: 419 in 54 days among 2048 hosts of eight GPUs, as the report of Llama 3 tells.
_FAILURES = 419 / 54 / 2048
#: Seconds until a host that fails is replaced: by a spare that mounts its disk, and by somebody who is called.
_SPARE, _CALLED = 20.0, 1800.0


class Commit(NamedTuple):
    """One update of a sharded run. messages: between coordinator and shards. seconds: of the coordinator's core."""

    messages: int
    seconds: float


def commit(shards: int) -> Commit:
    """Commit one update on so many shards with the decision core, all messages arriving."""
    coordinator = Coordinator("c", shards)
    hosts = [Shard(place, Record()) for place in range(shards)]
    for _ in range(2):
        for ask in coordinator.ask():
            for report in hosts[ask.shard].receive(ask):
                coordinator.receive(report)  # type: ignore[arg-type]  # a shard answers a question with a report
    vote = Vote(Proposal(Ticket(0, 1, "u")), "1.1")
    waiting = [each for host in hosts for each in host.prepare(vote)]
    messages, seconds = 0, 0.0
    while waiting:
        report = waiting.pop(0)
        if not isinstance(report, Report):
            continue
        began = time.process_time()
        verdicts = coordinator.receive(report)
        seconds += time.process_time() - began
        messages += 1 + len(verdicts)
        for verdict in verdicts:
            if isinstance(verdict, Resolve):
                waiting += hosts[verdict.shard].receive(verdict)  # type: ignore[arg-type]  # no change is proposed
    return Commit(messages, seconds)


def table() -> str:
    """The table, in Markdown."""
    names = ("hosts", "memory a host, GB", "received a host, GB", "receiving, s", "averaging, s", "messages")
    names += ("commit, ms", "of which deciding, ms", "failures a day", "stall a day with spares, s", "without, s")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for shards in (8, 64, 256):
        shadow, update = _PARAMETERS * _SHADOW_BYTES / shards, _PARAMETERS * _UPDATE_BYTES / shards
        messages, deciding = min((commit(shards) for _ in range(3)), key=lambda each: each.seconds)
        latency = _ROUND_TRIP + 2 * shards * _REQUEST + deciding / 2
        failures = shards * _FAILURES
        cells = (
            f"{shards} | {2 * _AVERAGES * shadow / 1e9:.0f} | {update / 1e9:.1f} | {update / _LINK:.2f} | "
            f"{_AVERAGES * shadow / _AVERAGING:.2f} | {messages} | {latency * 1e3:.1f} | {deciding / 2 * 1e3:.1f} | "
            f"{failures:.2f} | {failures * _SPARE:.1f} | {failures * _CALLED:.0f}"
        )
        rows.append(f"| {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())  # noqa: T201  # what the script is for
