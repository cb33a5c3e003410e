"""Group connections: one gigabyte pushed over one connection, and split over several as parts of one update.

The parts are whole tensors, dealt out evenly, each sent by a thread of the trainer's process. Also the whole as one
part: what the way of parts costs by itself. And the last of four parts alone, the others being there: with tensors in a
row, as the ranks of a pipeline have them, what lies in whole blocks was averaged as it came; of every fourth tensor all
is averaged in the end.

Knows how a push is split. Does not know how a round is timed or shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter

from scale import Scale

from ema_client import EmaClient
from ema_service.bench.ceiling import RAW_TCP, Ceiling
from ema_service.bench.children import BenchFailed, Service
from ema_service.bench.rounds import interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["measure"]

WHOLE = "push, whole"
#: As many connections at once.
CONNECTIONS = (1, 2, 4)
RANKS = 4
EVERY_FOURTH, IN_A_ROW = f"last of {RANKS} parts, every fourth tensor", f"last of {RANKS} parts, tensors in a row"


def _every_fourth(names: list[str], part: int) -> list[str]:
    return names[part::RANKS]


def _in_a_row(names: list[str], part: int) -> list[str]:
    return names[len(names) * part // RANKS : len(names) * (part + 1) // RANKS]


LAST = {EVERY_FOURTH: _every_fourth, IN_A_ROW: _in_a_row}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes = scale.wire_bytes
    with contextlib.ExitStack() as stack:
        on_step("starting two processes")
        ceiling = stack.enter_context(Ceiling(nbytes))
        client = stack.enter_context(EmaClient(stack.enter_context(Service()).url))
        traffic = _Parts("connections", nbytes)
        traffic.create(client)
        names = {count: f"push in {count} part{'s' if count > 1 else ''}, as many connections" for count in CONNECTIONS}
        operations = {WHOLE: timed(partial(traffic.push, client))}
        for name, dealt in LAST.items():
            operations[name] = partial(traffic.last_part, client, dealt)
        for count, name in names.items():
            threads = stack.enter_context(ThreadPoolExecutor(count))
            operations[name] = timed(partial(traffic.push_parts, client, threads, count))
        traffic.push_parts(client, threads, CONNECTIONS[-1])
        traffic.check(client)
        raw = {RAW_TCP: ceiling.operations()[RAW_TCP]}
        seconds = interleave({**raw, **operations}, scale.rounds, on_step=on_step)
    needs = {name: (Need(against=WHOLE), Need(against=names[1])) for name in names.values()}
    needs[IN_A_ROW] = (Need(against=EVERY_FOURTH),)
    sizes = dict.fromkeys(LAST, nbytes // RANKS)
    rows = [rate_row(name, sizes.get(name, nbytes), seconds, needs.get(name, ())) for name in (RAW_TCP, *operations)]
    title = f"connections: {show_size(nbytes)} of float32 in {len(traffic.state)} tensors, TCP"
    return Group("connections", title, tuple(rows), ("one process sends, one thread for each connection",))


class _Parts(Traffic):
    """A run whose updates may be split."""

    def push_parts(self, client: EmaClient, threads: ThreadPoolExecutor, count: int) -> None:
        """One update in ``count`` parts, all sent at once."""
        self._step += 1
        step, names = self._step, list(self.state)

        def send(part: int) -> bool:
            state = {name: self.state[name] for name in names[part::count]}
            return client.push_part(self.run, state, slices={}, step=step, part=part, of=count)

        if list(threads.map(send, range(count))).count(True) != 1:
            raise BenchFailed(f"{count} parts did not make one update")

    def last_part(self, client: EmaClient, dealt: Callable[[list[str], int], list[str]]) -> float:
        """The seconds that the last part of an update takes, once the others are there."""
        self._step += 1
        for part in range(RANKS):
            state = {name: self.state[name] for name in dealt(list(self.state), part)}
            start = perf_counter()
            last = client.push_part(self.run, state, slices={}, step=self._step, part=part, of=RANKS)
            seconds = perf_counter() - start
        if not last:
            raise BenchFailed(f"{RANKS} parts did not make one update")
        return seconds
