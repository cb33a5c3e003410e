"""A pull from all hosts of a run at once: one version, each host's rows received where they belong in the tensors.

    each host    opens its weights: the head says the version, which stays while the answer is open
    all agree?   each reads on          else those that are behind open again

Knows: which rows go where, and when versions are one. Does not know: sockets, how one host's weights are read (Pulls).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ema_client import wire
from ema_client.errors import ProtocolError
from ema_client.hosts.finding import GivenUp, Host, HostedRun, at_all
from ema_client.protocol import WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Progress
from ema_client.reading.laned import Listener
from ema_client.reading.pulls import Pulls
from ema_client.reading.weights import Into, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pull"]

#: Seconds in which all hosts must have opened their weights once one has.
_OPEN_SECONDS = 30.0


def pull(
    run: HostedRun,
    asked: Asked,
    entries: tuple[wire.Entry, ...],
    into: Into,
    *,
    wait: float | None = None,
    progress: Progress | None = None,
) -> Weights | None:
    """The current weights of one version, in the tensors that ``into`` gives for ``entries``, those of the whole run.

    None where a host had left the version before all of it was read; the tensors are then part old, part new. wait: as
    for Pulls.pull(). Raises ProtocolError where the map is of another run than ``entries``, what ``into`` raises, what
    hosts answer, and what their transports raise.
    """
    _check_whole(run, entries)
    whole = into(entries)
    agreement, told = _Agreement(len(run.hosts), wait or 0.0), _Told(progress)

    def read(host: Host) -> WeightsInfo:
        place = host.shard.place
        listener = Listener(begins=told.of_host(place), wants=lambda info: agreement.settled(place, info))
        with agreement.party():
            # Replicas have no ring.
            pulls = host.pulls if asked.is_stored else Pulls(host.transport)
            return pulls.pull_into(asked, partial(_rows, whole, host), listener, wait=wait).info

    infos = at_all(run.hosts, read)
    return Weights(whole, infos[0]) if len(set(map(_version, infos))) == 1 else None


def _check_whole(run: HostedRun, entries: Iterable[wire.Entry]) -> None:
    """Raises ProtocolError unless the hosts have these tensors, all of their rows, and no others: what another run of
    this name has would stay as it is in the tensors."""
    have = {name: rows and rows[1] for host in run.hosts for name, rows in host.rows.items()}
    if {entry.name: entry.shape[0] if entry.shape else None for entry in entries} != have:
        raise ProtocolError(f"the map of run {run.run!r} is of other tensors than the service has")


def _rows(whole: Mapping[str, Tensor], host: Host, entries: Iterable[wire.Entry]) -> Mapping[str, Tensor]:
    """Of the run's tensors, the rows that a host has. Raises ProtocolError where the host sends others."""
    parts = {}
    for name, rows in host.rows.items():
        tensor = whole[name].detach()
        parts[name] = tensor if rows is None else tensor[slice(*rows)]
    if {entry.name: entry.shape for entry in entries} != {name: tuple(part.shape) for name, part in parts.items()}:
        raise ProtocolError(f"{host.transport.url} sent other tensors than the map of its run has")
    return parts


def _version(info: WeightsInfo) -> tuple[int, ...]:
    return tuple(map(int, info.version.split(".")))


class _Agreement:
    """Which version the hosts are read at. Thread-safe: each host's thread says what it has opened, and is told."""

    def __init__(self, parties: int, wait: float) -> None:
        """wait: seconds that a host may wait for a step before it opens."""
        self._parties = parties
        self._seconds = wait + _OPEN_SECONDS
        #: By place: the version that is open.
        self._open: dict[int, tuple[int, ...]] = {}
        self._agreed: tuple[int, ...] | None = None
        self._ended = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def party(self) -> Iterator[None]:
        """Within the block one of the hosts is read; with the block's error nobody waits for that host any more."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._end)
            yield
            undo.pop_all()

    def settled(self, place: int, info: WeightsInfo) -> bool:
        """Whether the version that a host has opened is the one to be read; False: the host opens again.

        Waits for the other hosts. Raises GivenUp where one of them cannot be read.
        """
        mine = _version(info)
        with self._changed:
            self._open[place] = mine
            self._changed.notify_all()
            while self._agreed is None:
                if self._ended:
                    raise GivenUp
                if mine < max(self._open.values()):
                    return False
                if len(self._open) == self._parties and len(set(self._open.values())) == 1:
                    self._agreed = mine
                    self._changed.notify_all()
                elif not self._changed.wait(self._seconds):
                    raise ProtocolError(f"run {info.run!r}: not all of its hosts began to answer")
        # Another version than the others have: the connection broke, and the version had gone. The pull begins anew
        # once all have ended.
        return True

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _nobody(_: int, __: int) -> None:
    pass


class _Told:
    """Tells of the bytes that have come from all hosts. Thread-safe."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        #: By place: bytes that have come, and bytes in all.
        self._come: dict[int, int] = {}
        self._totals: dict[int, int] = {}
        self._lock = threading.Lock()

    def of_host(self, place: int) -> Callable[[int], Callable[[int], None]]:
        """What is told the length of a host's body that begins now, as Listener.begins."""
        progress = self._progress or _nobody

        def begin(total: int) -> Callable[[int], None]:
            with self._lock:
                self._come[place], self._totals[place] = 0, total

            def moved(count: int) -> None:
                with self._lock:
                    self._come[place] += count
                    progress(sum(self._come.values()), sum(self._totals.values()))

            return moved

        return begin
