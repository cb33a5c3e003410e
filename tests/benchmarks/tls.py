"""Group tls: pushes and pulls over TLS beside those without, and which threads of the server pay for it.

Knows how a certificate for one run is made, and a process' threads as Linux counts them. Does not know how a round is
timed or shown.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from scale import Scale

from ema_client import EmaClient
from ema_service.bench.children import BenchFailed, Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import GIGA, Group, Need, Row, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["certificate", "measure"]

PUSH, PULL, TWO = "push, TLS", "pull into tensors, TLS", "two pushes at once, TLS"
#: The same without TLS.
PLAIN = {PUSH: "push, without TLS", PULL: "pull into tensors, without TLS"}
#: Of the server's CPU time of pushes over TLS, at most so much is the event loop's. Of a pull's that has what a reader
#: leaves who takes nothing for a moment, which depends on the reader.
LOOP_SHARE = 0.25


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, also where there is no ``openssl`` to make a certificate; and what the client raises."""
    nbytes = scale.wire_bytes
    with contextlib.ExitStack() as stack:
        on_step("starting two servers")
        flags = stack.enter_context(certificate())
        plain, secure = stack.enter_context(Service()), stack.enter_context(Service(*flags))
        threads = _Threads(secure.pid)
        whole, halves = Traffic("whole", nbytes), [Traffic(f"half-{k}", nbytes // 2) for k in range(2)]
        clients = [stack.enter_context(EmaClient(service.url)) for service in (plain, secure, secure)]
        for client in clients[:2]:
            whole.create(client)
            whole.push(client)
            whole.check(client)
        for half in halves:
            half.create(clients[1])
        pool = stack.enter_context(ThreadPoolExecutor(2))
        operations: dict[str, Operation] = {
            PLAIN[PUSH]: timed(partial(whole.push, clients[0])),
            PUSH: threads.counted(PUSH, timed(partial(whole.push, clients[1]))),
            TWO: threads.counted(TWO, timed(lambda: list(pool.map(Traffic.push, halves, clients[1:])))),
            PLAIN[PULL]: timed(partial(whole.pull_into, clients[0])),
            PULL: threads.counted(PULL, timed(partial(whole.pull_into, clients[1]))),
        }
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    needs = {name: (Need(against=without),) for name, without in PLAIN.items()} | {TWO: (Need(against=PUSH),)}
    rows = [rate_row(name, nbytes, seconds, needs.get(name, ())) for name in operations]
    for name in (PUSH, TWO, PULL):
        rows += threads.rows(name, nbytes, scale.rounds)
    title = f"tls: {show_size(nbytes)} of float32 in {len(whole.state)} tensors, TCP"
    return Group("tls", title, tuple(rows), ("the sender encrypts in one process, the server decrypts in another",))


@contextlib.contextmanager
def certificate() -> Iterator[tuple[str, ...]]:
    """The flags of a server with a certificate that clients within the block trust."""
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        cert, key = Path(folder) / "cert.pem", Path(folder) / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        try:
            subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as fault:
            raise BenchFailed(f"no certificate can be made: {fault}") from None
        former = os.environ.get("SSL_CERT_FILE")
        os.environ["SSL_CERT_FILE"] = str(cert)
        try:
            yield "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)
        finally:
            del os.environ["SSL_CERT_FILE"]
            if former is not None:
                os.environ["SSL_CERT_FILE"] = former


class _Threads:
    """The CPU time of a server's threads; its event loop is its first thread."""

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._loop = pid
        self._spent: dict[str, list[tuple[float, float]]] = {}

    def counted(self, name: str, operation: Operation) -> Operation:
        """The operation, whose CPU time is noted under ``name``."""
        spent = self._spent.setdefault(name, [])

        def counting() -> float:
            before = self._now()
            seconds = operation()
            total, loop = self._now()
            spent.append((total - before[0], loop - before[1]))
            return seconds

        return counting

    def rows(self, name: str, nbytes: int, rounds: int) -> list[Row]:
        """CPU time for each GB, and the event loop's share, of the counted rounds."""
        spent = self._spent[name][-rounds:]
        each = tuple(total / nbytes * GIGA for total, _ in spent)
        share = tuple(loop / max(total, 1e-9) for total, loop in spent)
        needs = () if name == PULL else (Need(LOOP_SHARE, most=True),)
        return [
            Row(f"server's CPU time, {name}", "s/GB", each),
            Row(f"of that the event loop's, {name}", "", share, needs),
        ]

    def _now(self) -> tuple[float, float]:
        """CPU seconds of all threads there are, and of the event loop."""
        spent = {}
        for task in self._tasks.iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
                spent[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        return sum(spent.values()), spent[self._loop]
