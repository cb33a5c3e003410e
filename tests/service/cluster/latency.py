"""How long a decision takes over loopback: from the moment at which all shards begin to vote until the last is told.

The coordinator is a process of its own; shards are threads here, and keep their records in memory. So this is the time
of the messages, of JSON and of deciding, without a disk. ``python -m tests.service.cluster.latency [SHARDS]`` prints
it; at two shards the bound is 2 ms at the median and 5 ms at the 90th percentile.

Knows the talk's two ends. Does not know averaging.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from queue import SimpleQueue

from ema_service.cluster import Answer, Arrival, ClusterToken, Kept, Proposal, Record, Ticket, Vote
from ema_service.cluster.hosting import Reporting
from tests.service.cluster.processes.coordinating import TOKEN

__all__ = ["Memory"]

_DECISIONS, _WARM_UP = 1000, 100
_SECONDS = 10.0


class Memory:
    """A run that keeps nothing but what it was told. answers: of decisions, in their order."""

    def __init__(self) -> None:
        self.answers: SimpleQueue[Answer] = SimpleQueue()

    def takes_part(self) -> bool:
        return True

    def returns(self) -> bool:
        """It has no twin."""
        return False

    def kept(self) -> Kept:
        return Kept()

    def promise(self, record: Record) -> None:
        """Keep the record: Reporting has it in memory."""

    def keep(self, record: Record, prepared: None) -> None:
        """Keep the record: Reporting has it in memory."""

    vote = commit = abort = keep

    def propose(self, proposal: Proposal) -> None:
        raise NotImplementedError("no change is asked for")

    def answer(self, answer: Answer) -> None:
        self.answers.put(answer)


def measure(url: str, shards: int) -> list[float]:
    """Seconds of each decision."""
    stores = [Memory() for _ in range(shards)]
    token = ClusterToken(TOKEN)
    talks = [
        Reporting("r", Arrival(place, shards, ""), Record(), store, [url], token) for place, store in enumerate(stores)
    ]
    for talk in talks:
        talk.start()
    found = []
    for revision in range(_WARM_UP + _DECISIONS):
        vote = Vote(Proposal(Ticket(revision, revision + 1, f"key-{revision}")), "1.1")
        began = time.perf_counter()
        for talk in talks:
            talk.vote(vote, None)
        if not all(store.answers.get(timeout=_SECONDS).committed for store in stores):
            raise RuntimeError("an update was not committed")
        found.append(time.perf_counter() - began)
    for talk in talks:
        talk.close()
    return found[_WARM_UP:]


def main(shards: int) -> str:
    command = [sys.executable, "-m", "tests.service.cluster.processes.coordinating", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as coordinator:
        try:
            if coordinator.stdout is None:
                raise RuntimeError("the coordinator says no port")
            port = coordinator.stdout.readline().split()[1]
            seconds = measure(f"http://127.0.0.1:{port}", shards)
        finally:
            coordinator.kill()
    median, tenths = statistics.median(seconds), statistics.quantiles(seconds, n=10)
    return (
        f"{shards} shards, {len(seconds)} decisions: {1e3 * median:.2f} ms at the median, {1e3 * tenths[-1]:.2f} ms at "
        f"the 90th percentile, {1e3 * max(seconds):.2f} ms at most"
    )


if __name__ == "__main__":
    print(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2))  # noqa: T201  # what the script is for
