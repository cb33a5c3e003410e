"""Pulls: weights as tensors, tried again where a connection breaks, waited for, and in lanes where they are large.

Knows: how long the service holds a request, which weights are large, and how large they were at the latest pull. Does
not know: routes, sockets, how lanes and slices are read (laned, slices).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ema_client.errors import StepNotReached
from ema_client.forks import Lock
from ema_client.http.downloads import Download
from ema_client.http.pace import PULLS, Pace
from ema_client.http.stretches import SMALLEST_BYTES
from ema_client.http.transport import Query, Transport
from ema_client.protocol import MAX_WAIT, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Progress, Tally
from ema_client.reading.holders import Holders
from ema_client.reading.laned import LanedPull, Listener
from ema_client.reading.ranges import OpenRange, check_part
from ema_client.reading.slices import Wanted, fetch
from ema_client.reading.weights import Into, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from ema_client.tensors.writing import Staging

__all__ = ["SPLIT_ABOVE", "Pulls"]

#: A body of at most so many bytes has come before a second connection would be worth its thread.
SPLIT_ABOVE = 64 << 20
#: Pause between two requests for a step that the service answers without waiting, in seconds.
_POLL_SECONDS = 0.05
#: So many requests are remembered with the sizes of what came.
_MOST_SIZES = 1000
#: Weights that the service works out while it sends them are read over so many connections.
_WORKED_OUT = 2
#: The first request asks for this fraction of large weights, where lanes may turn out to be unlike.
_LEADS = 16
#: Of weights that several servers hold, so many stretches for each: the fastest then bring more than the others.
_EACH_HOLDER = 4
#: Even parts are no larger: a part that breaks off comes again.
_EVEN_BYTES = 256 << 20


class Pulls:
    """The pulls of one client. Thread-safe.

    Args:
        transport: opens bodies and repeats requests.
        replicas: to servers that may hold the same versions: of large weights they are asked for stretches.
        twin: to a server that has the same versions, and is asked where the first one is away.
        split_above: weights of more bytes than this are pulled over several connections.
        check_large: whether large weights are compared with the service's digest; by default where the service is on
            another host, as several connections on one host use all of its cores already.
        longest_wait: seconds for which the service holds a request; a longer wait is several requests.
    """

    def __init__(
        self,
        transport: Transport,
        replicas: Sequence[Transport] = (),
        *,
        twin: Transport | None = None,
        split_above: int = SPLIT_ABOVE,
        longest_wait: float = MAX_WAIT,
        check_large: bool | None = None,
    ) -> None:
        self._transport = transport
        self._holders = Holders(transport, replicas, twin)
        self._split_above = split_above
        self._longest_wait = longest_wait
        self._check_large = not transport.same_host if check_large is None else check_large
        #: request -> bytes of the head, and of the data section, at the latest pull.
        self._sizes: dict[Asked, tuple[int, int]] = {}
        self._lock = Lock()

    def pull(
        self,
        asked: Asked,
        out: Mapping[str, Tensor] | None = None,
        *,
        wait: float | None = None,
        progress: Progress | None = None,
        direct: bool = False,
    ) -> Weights:
        """The weights asked for, in the tensors of ``out`` or in new ones; see EmaClient.pull().

        wait: seconds to wait for the step asked for, after which StepNotReached is raised. direct: large weights that a
        gateway's hosts have raise OnSeveralHosts, before anything is written.
        """
        from ema_client.tensors.body import targets_in

        listener = self._listener(direct)
        if progress is not None:
            listener = replace(listener, begins=Tally(progress).of)
        return self.pull_into(asked, targets_in(out), listener, wait=wait)

    def pull_into(
        self,
        asked: Asked,
        into: Into,
        listener: Listener,
        *,
        wait: float | None = None,
    ) -> Weights:
        """The weights asked for, in the tensors that ``into`` gives. listener: of LanedPull. wait: as for pull()."""
        if asked.min_step is None or wait is None:
            return self._pull(asked, into, listener, {"min_step": asked.min_step})
        deadline = time.monotonic() + wait
        while True:
            now = max(0.0, min(deadline - time.monotonic(), self._longest_wait))
            try:
                waiting = {"min_step": asked.min_step, "wait": now}
                return self._pull(asked, into, listener, waiting, patience=now)
            except StepNotReached:
                if time.monotonic() + _POLL_SECONDS >= deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def copy(self, asked: Asked, staging: Staging, *, direct: bool = False) -> WeightsInfo:
        """The weights asked for to the tensors of a staging, none of which is written before all weights have come.
        direct: as for pull()."""
        info = self._pull(asked, staging.tensors, self._listener(direct), {}).info
        staging.write()
        return info

    def pull_slices(self, asked: Asked, wanted: Mapping[str, Wanted]) -> WeightsInfo:
        """Slices of the weights asked for into their targets; see EmaClient.pull_slices()."""
        waiting = {} if asked.min_step is None else {"min_step": asked.min_step, "wait": self._longest_wait}
        open_range = self._opener(asked, waiting, self._longest_wait)
        return self._transport.retrying(lambda _: fetch(asked, open_range, wanted))

    def _pull(
        self,
        asked: Asked,
        into: Into,
        listener: Listener,
        waiting: Query,
        patience: float = 0.0,
    ) -> Weights:
        request = asked.without_step
        head, size = self._sizes.get(request, (0, 0))
        pull = LanedPull(
            asked,
            self._opener(asked, waiting, patience),
            into,
            lead=self._lead(asked, size),
            head=head,
            pace=partial(self._pace, asked),
            smallest=lambda size: self._even(asked, size) or SMALLEST_BYTES,
            wants_digest=lambda size: self._check_large or size <= self._split_above,
            listener=listener,
        )
        weights = self._transport.retrying(lambda _: pull.attempt(), brought=lambda: pull.brought)
        self._remember(request, pull.sizes)
        return weights

    def _listener(self, direct: bool) -> Listener:
        return Listener(leaves=lambda size: direct and size > self._split_above)

    def _lead(self, asked: Asked, size: int) -> int | None:
        """Bytes of the data section to ask for with the head, of weights of ``size`` bytes, 0 where that is unknown."""
        if size > self._split_above and self._holders.several:
            return SMALLEST_BYTES
        if size > self._split_above:
            return self._even(asked, size) or max(SMALLEST_BYTES, size // _LEADS)
        return self._split_above if asked.is_stored else None

    def _even(self, asked: Asked, size: int) -> int | None:
        """Bytes of an even part of weights of ``size`` bytes; None where stretches had better follow the lanes' rates.

        Weights that are worked out go in even parts, as each request has the service look for the stored weights that
        they are worked out of. So do others over lanes that are alike: a request for each of many stretches would let
        the processors wait.
        """
        if not asked.is_stored:
            return -(-size // _WORKED_OUT)
        if self._holders.several:
            return min(_EVEN_BYTES, max(SMALLEST_BYTES, size // (_EACH_HOLDER * self._holders.count)))
        alike = self._transport.alike(PULLS)
        return None if alike is None else min(_EVEN_BYTES, -(-size // alike))

    def _pace(self, asked: Asked, size: int) -> Pace:
        if size <= self._split_above:
            return Pace.fixed(1)
        return self._transport.pace(PULLS) if asked.is_stored else Pace.fixed(_WORKED_OUT)

    def _opener(self, asked: Asked, waiting: Query, patience: float) -> OpenRange:
        def open_range(start: int, stop: int | None, etag: str | None) -> Download:
            # Only the first request waits for the step: the others name the first one's ETag, and so its version.
            query, seconds = (asked.query, 0.0) if etag else ({**asked.query, **waiting}, patience)
            part = self._holders.download(
                asked.path, query=query, start=start, stop=stop, etag=etag, patience=seconds + asked.work_seconds
            )
            check_part(part, start, etag)
            return part

        return open_range

    def _remember(self, request: Asked, sizes: tuple[int, int]) -> None:
        with self._lock:
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes.clear()
            self._sizes[request] = sizes
