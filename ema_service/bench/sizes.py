"""Push and pull at several sizes over several links, and the line through the sizes.

Knows the operations of a size, how often a small one is repeated, and the names of rows. Does not know where the
service came from or how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ema_client import EmaClient
from ema_service.bench.ceiling import RAW_TCP, RAW_UNIX
from ema_service.bench.fit import Fit, fit_line
from ema_service.bench.rounds import Operation, repeated, timed
from ema_service.bench.rows import GIGA, Need, Row
from ema_service.bench.traffic import Traffic
from ema_service.sizes import show_size

__all__ = ["SMALL_SIZES", "Link", "Seconds", "Sizes", "ceiling_rows"]

Seconds = Mapping[str, Sequence[float]]

SMALL_SIZES = (100_000, 10_000_000)
#: (bytes, times): an operation of at most so many bytes is repeated so often in a round, and the median counts.
_REPEATS = ((1_000_000, 20), (100_000_000, 5))


@dataclass(frozen=True, slots=True)
class Link:
    """A way to the service. ceiling: the name of the raw loop to compare with; empty where there is none."""

    name: str
    client: EmaClient
    ceiling: str = ""


class Sizes:
    """A run for each size on one service. ``create()`` makes the runs."""

    def __init__(self, prefix: str, sizes: Sequence[int], links: Sequence[Link]) -> None:
        self.links = links
        self._traffic = {size: Traffic(f"{prefix}-{size}", size) for size in sizes}

    @property
    def runs(self) -> list[str]:
        return [traffic.run for traffic in self._traffic.values()]

    def create(self) -> None:
        """Make the runs. Raises BenchFailed where a link brings back other bytes than were pushed."""
        for traffic in self._traffic.values():
            traffic.create(self.links[0].client)
            for link in self.links:
                traffic.push(link.client)
                traffic.check(link.client)

    def operations(self) -> dict[str, Operation]:
        return {
            _name(what, link, size): repeated(timed(_bound(action, link.client)), _repeats(size))
            for size, traffic in self._traffic.items()
            for link in self.links
            for what, action in _actions(traffic).items()
        }

    def rows(self, seconds: Seconds) -> tuple[Row, ...]:
        """Milliseconds for the smallest size, GB/s for the others; the largest size beside its ceiling."""
        return tuple(
            self._row(_name(what, link, size), size, link, seconds)
            for link in self.links
            for what in _actions(next(iter(self._traffic.values())))
            for size in self._traffic
        )

    def fits(self, seconds: Seconds) -> dict[str, Fit]:
        """For each operation and link, the line through its sizes."""
        found = {}
        for link in self.links:
            for what in _actions(next(iter(self._traffic.values()))):
                medians = [median(seconds[_name(what, link, size)]) for size in self._traffic]
                if line := fit_line(list(self._traffic), medians):
                    found[f"{what}, {link.name}"] = line
        return found

    def _row(self, name: str, size: int, link: Link, seconds: Seconds) -> Row:
        if size <= SMALL_SIZES[0]:
            return Row(name, "ms", tuple(1000 * s for s in seconds[name]))
        beside = link.ceiling and link.ceiling in seconds and size == max(self._traffic)
        needs = (Need(against=link.ceiling),) if beside else ()
        return Row(name, "GB/s", tuple(size / s / GIGA for s in seconds[name]), needs)


def ceiling_rows(nbytes: int, seconds: Seconds) -> tuple[Row, ...]:
    """The rows of the raw loops that were measured."""
    return tuple(
        Row(name, "GB/s", tuple(nbytes / s / GIGA for s in seconds[name]))
        for name in (RAW_TCP, RAW_UNIX)
        if name in seconds
    )


def _actions(traffic: Traffic) -> dict[str, Callable[[EmaClient], None]]:
    return {"push": traffic.push, "pull into tensors": traffic.pull_into, "pull, new tensors": traffic.pull_fresh}


def _bound(action: Callable[[EmaClient], None], client: EmaClient) -> Callable[[], None]:
    return lambda: action(client)


def _name(what: str, link: Link, size: int) -> str:
    return f"{what}, {link.name}, {show_size(size)}"


def _repeats(size: int) -> int:
    return next((times for most, times in _REPEATS if size <= most), 1)
