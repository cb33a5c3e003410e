"""The pulls of one client: from its service or, of large weights that lie on several hosts, straight from each of them.

A gateway says in its answer's head that there are hosts; nobody else is asked. Where the hosts cannot be read, because
they are in a network of their own, or one of them is away, the gateway sends all.

Knows: which weights every host has its rows of. Does not know: how weights are read (reading.pulls, hosts.pulling).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from ema_client.errors import EmaError, ProtocolError, RunNotFound, StepNotReached, TransportError
from ema_client.hosts.finding import HostedRun, Hosts
from ema_client.hosts.pulling import pull
from ema_client.http.transport import Transport
from ema_client.protocol import WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Progress
from ema_client.reading.laned import OnSeveralHosts
from ema_client.reading.pulls import Pulls
from ema_client.reading.slices import Wanted
from ema_client.reading.weights import Weights
from ema_client.wire import Entry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DirectPulls"]

T = TypeVar("T")

#: So many requests are remembered with the tensors of their answers.
_MOST_REQUESTS = 1000


class DirectPulls:
    """As Pulls, whose methods these are. Thread-safe."""

    def __init__(self, transport: Transport, hosts: Hosts) -> None:
        self._pulls = Pulls(transport)
        self._hosts = hosts
        #: By request: the tensors of the gateway's answer.
        self._entries: dict[Asked, tuple[Entry, ...]] = {}

    def pull(
        self,
        asked: Asked,
        out: Mapping[str, Tensor] | None = None,
        *,
        wait: float | None = None,
        progress: Progress | None = None,
    ) -> Weights:
        """As Pulls.pull()."""
        from ema_client.tensors.body import targets_in

        def through(direct: bool) -> Weights:
            return self._pulls.pull(asked, out, wait=wait, progress=progress, direct=direct)

        def straight(hosted: HostedRun, entries: tuple[Entry, ...], asked: Asked) -> Weights | None:
            return pull(hosted, asked, entries, targets_in(out), wait=wait, progress=progress)

        return self._read(asked, through, straight)

    def copy(self, asked: Asked, out: Mapping[str, Tensor], memory: Tensor | None = None) -> WeightsInfo:
        """As Pulls.copy()."""
        from ema_client.tensors.writing import Staging

        staging = Staging(out, memory)

        def straight(hosted: HostedRun, entries: tuple[Entry, ...], asked: Asked) -> WeightsInfo | None:
            weights = pull(hosted, asked, entries, staging.tensors)
            if weights is None:
                return None
            staging.write()
            return weights.info

        return self._read(asked, lambda direct: self._pulls.copy(asked, staging, direct=direct), straight)

    def pull_slices(self, asked: Asked, wanted: Mapping[str, Wanted]) -> WeightsInfo:
        """As Pulls.pull_slices(), from the service."""
        return self._pulls.pull_slices(asked, wanted)

    def _read(
        self,
        asked: Asked,
        through: Callable[[bool], T],
        straight: Callable[[HostedRun, tuple[Entry, ...], Asked], T | None],
    ) -> T:
        """Read weights. through: reads from the service; given whether large weights are left to several hosts.
        straight: reads from the hosts; None where they could not be read as one."""
        if asked.target is not None:
            return self._read_worked_out(asked, through, straight)
        hosted, entries = self._hosts.known(asked.run), self._entries.get(asked.without_step)
        if hosted is None or entries is None:
            try:
                return through(asked.is_hosted)
            except OnSeveralHosts as begun:
                entries = begun.entries
            self._remember(asked, entries)
            hosted = self._hosts.of(asked.run)
        try:
            found = straight(hosted, entries, asked) if hosted else None
        except EmaError as fault:
            # Of a host that was left behind by its twin no word counts.
            alone = hosted is not None and hosted.twins and not isinstance(fault, StepNotReached)
            if not (alone or isinstance(fault, TransportError | RunNotFound | ProtocolError)):
                raise
            # A host that was started anew has another address, or the run is another one: the gateway knows.
            self._hosts.forget(asked.run)
            self._entries.pop(asked.without_step, None)
            found = None
        return through(False) if found is None else found

    def _read_worked_out(
        self,
        asked: Asked,
        through: Callable[[bool], T],
        straight: Callable[[HostedRun, tuple[Entry, ...], Asked], T | None],
    ) -> T:
        """As _read(), an average that the hosts work out: by the recipe of the gateway's answer, which is asked for
        each time. Where a host does not follow it the gateway says why, or sends all."""
        try:
            return through(asked.is_hosted)
        except OnSeveralHosts as begun:
            entries, recipe = begun.entries, begun.recipe
        found = None
        with contextlib.suppress(EmaError):
            hosted = self._hosts.of(asked.run)
            if hosted and recipe:
                found = straight(hosted, entries, replace(asked, recipe=recipe))
        return through(False) if found is None else found

    def _remember(self, asked: Asked, entries: tuple[Entry, ...]) -> None:
        if len(self._entries) >= _MOST_REQUESTS:
            self._entries.clear()
        self._entries[asked.without_step] = entries
