"""How long a decision takes over loopback: from the moment at which all shards begin to vote until the last is told.

The coordinator is a process of its own; shards are threads here, and keep their records in memory. So this is the time
of the messages, of JSON and of deciding, without a disk. ``python -m tests.service.cluster.latency [SHARDS]`` prints
it, over plain HTTP and over TLS; at two shards the bound is 2 ms at the median and 5 ms at the 90th percentile.

Knows the talk's two ends. Does not know averaging.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import trustme

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

    def is_whole(self) -> bool:
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


def rows(shards: int) -> Iterator[str]:
    """A line for plain HTTP, and one for TLS."""
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("plain HTTP", []), ("TLS", _certificate(Path(folder)))):
            with _coordinator(Path(folder), flags) as url:
                yield _row(name, shards, measure(url, shards))


def _row(name: str, shards: int, seconds: list[float]) -> str:
    median, tenths = statistics.median(seconds), statistics.quantiles(seconds, n=10)
    return (
        f"{name}, load {os.getloadavg()[0]:.1f}, {shards} shards, {len(seconds)} decisions: "
        f"{1e3 * median:.2f} ms at the median, "
        f"{1e3 * tenths[-1]:.2f} ms at the 90th percentile, {1e3 * max(seconds):.2f} ms at most"
    )


@contextlib.contextmanager
def _coordinator(folder: Path, flags: Sequence[str]) -> Iterator[str]:
    """The URL of a coordinator's process, within the block."""
    (folder / "token").write_text(f"{TOKEN}\n")
    words = ["cluster", "coordinator", "--port", "0", "--cluster-token-file", str(folder / "token"), *flags]
    command = [sys.executable, "-u", "-m", "ema_service", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("the coordinator says no address")
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


def _certificate(folder: Path) -> list[str]:
    """The flags of a certificate that this process trusts."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    (folder / "key.pem").write_bytes(issued.private_key_pem.bytes())
    (folder / "authority.pem").write_bytes(authority.cert_pem.bytes())
    os.environ["SSL_CERT_FILE"] = str(folder / "authority.pem")
    return ["--ssl-certfile", str(folder / "cert.pem"), "--ssl-keyfile", str(folder / "key.pem")]


if __name__ == "__main__":
    for row in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 2):
        print(row, flush=True)  # noqa: T201  # what the script is for
