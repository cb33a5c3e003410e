"""Pulls: weights as tensors, tried again where a connection breaks, waited for, and in halves where they are large.

Knows: how long the service holds a request, which weights are large, and where such weights were parted at the latest
pull. Does not know: routes, sockets, how halves and slices are read (halves, slices).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ema_client.errors import StepNotReached
from ema_client.forks import Lock
from ema_client.http.downloads import Download
from ema_client.http.transport import Query, Transport
from ema_client.protocol import MAX_WAIT, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Checked, Progress, Tally
from ema_client.reading.halves import pull_halves, split_of
from ema_client.reading.ranges import OpenRange, check_part
from ema_client.reading.slices import Wanted, fetch
from ema_client.reading.weights import Into, Weights, read_header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SPLIT_ABOVE", "Pulls"]

#: A body of at most so many bytes has come before a second connection would be worth its thread.
SPLIT_ABOVE = 64 << 20
#: Pause between two requests for a step that the service answers without waiting, in seconds.
_POLL_SECONDS = 0.05
#: So many requests are remembered with the byte at which their weights are parted.
_MOST_SPLITS = 1000


class Pulls:
    """The pulls of one client. Thread-safe.

    Args:
        transport: opens bodies and repeats requests.
        split_above: weights of more bytes than this are pulled in halves, from their second pull on.
        check_halves: whether large weights are compared with the service's digest; by default where the service is on
            another host, as two connections on one host use both of its cores already.
        longest_wait: seconds for which the service holds a request; a longer wait is several requests.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        split_above: int = SPLIT_ABOVE,
        longest_wait: float = MAX_WAIT,
        check_halves: bool | None = None,
    ) -> None:
        self._transport = transport
        self._split_above = split_above
        self._longest_wait = longest_wait
        self._check_halves = not transport.same_host if check_halves is None else check_halves
        #: request -> the byte at which the weights are parted, 0 for weights to be pulled whole.
        self._splits: dict[Asked, int] = {}
        self._lock = Lock()

    def pull(
        self,
        asked: Asked,
        out: Mapping[str, Tensor] | None = None,
        *,
        wait: float | None = None,
        progress: Progress | None = None,
    ) -> Weights:
        """The weights asked for, in the tensors of ``out`` or in new ones; see EmaClient.pull().

        wait: seconds to wait for the step asked for, after which StepNotReached is raised.
        """
        from ema_client.tensors.body import targets_in

        into = targets_in(out)
        if asked.min_step is None or wait is None:
            return self._pull(asked, into, {"min_step": asked.min_step}, progress=progress)
        deadline = time.monotonic() + wait
        while True:
            now = max(0.0, min(deadline - time.monotonic(), self._longest_wait))
            try:
                waiting = {"min_step": asked.min_step, "wait": now}
                return self._pull(asked, into, waiting, patience=now, progress=progress)
            except StepNotReached:
                if time.monotonic() + _POLL_SECONDS >= deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def copy(self, asked: Asked, out: Mapping[str, Tensor], memory: Tensor | None = None) -> WeightsInfo:
        """The weights asked for to the tensors of ``out``, none of which is written before all weights have come.

        memory: where the weights may lie until then, see Staging.
        """
        from ema_client.tensors.writing import Staging

        staging = Staging(out, memory)
        info = self._pull(asked, staging.tensors, {}).info
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
        waiting: Query,
        patience: float = 0.0,
        progress: Progress | None = None,
    ) -> Weights:
        from ema_client.tensors.body import receive

        open_range, request = self._opener(asked, waiting, patience), asked.without_step

        def attempt(_: int) -> Weights:
            split = self._splits.get(request, 0)
            tally = None if progress is None else Tally(progress)
            halves = (
                pull_halves(asked, open_range, split, into, check=self._check_halves, tally=tally) if split else None
            )
            if halves is not None:
                return halves
            with open_range(0, None, None) as download:
                header, info = read_header(download, asked)
                large = download.length > self._split_above
                self._remember(request, split_of(header, download.length) if large else 0)
                data = Checked(download, moved=None if tally is None else tally.of(header.data_bytes))
                weights = Weights(receive(header.entries, data.readinto, into(header.entries)), info)
                data.check()
                return weights

        return self._transport.retrying(attempt)

    def _opener(self, asked: Asked, waiting: Query, patience: float) -> OpenRange:
        def open_range(start: int, stop: int | None, etag: str | None) -> Download:
            # Only the first request waits for the step: the others name the first one's ETag, and so its version.
            query, seconds = (asked.query, 0.0) if etag else ({**asked.query, **waiting}, patience)
            part = self._transport.download(
                asked.path, query=query, start=start, stop=stop, etag=etag, patience=seconds + asked.work_seconds
            )
            check_part(part, start, etag)
            return part

        return open_range

    def _remember(self, request: Asked, split: int) -> None:
        with self._lock:
            if len(self._splits) >= _MOST_SPLITS:
                self._splits.clear()
            self._splits[request] = split
