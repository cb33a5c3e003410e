"""Stretches: one update that one sender sends over several connections, averaged as each of them receives.

A stretch is a run of whole blocks of the digest, ``[start, stop)`` of the canonical parameters, without a header. The
server knows stretches, never connections: who sends decides how many lanes there are, and which takes what.

The first stretch of a group begins the update, upon the version that is current then; each stretch is averaged behind
its own socket; the one that covers the last byte commits what all of them made, as a push of one body is committed. A
stretch that broke off may be sent again alone, with the same bounds: nothing but its own bytes was touched.

Knows stretches, the update that they are of, and the byte stream. Does not know which steps are put together (parts),
or how many connections there may be (api).
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import ClassVar

from ema_client.errors import DigestMismatch, EmaError, InvalidRequest, MalformedBody, Superseded
from ema_client.protocol import DIGEST_BYTES, UpdateResult
from ema_service.averaging import BLOCK_BYTES, Digest
from ema_service.memory.layout import Layout
from ema_service.runs.bounds import Bounds
from ema_service.runs.gathering import Claims, Gathering, Key, Lacking, PartStretch, Piece, Voter
from ema_service.runs.run import Run, Update
from ema_service.shadows.passes import Stretch

__all__ = ["StretchBody", "StretchGathering", "bounds_of", "check_bounds", "check_part_bounds"]

#: Bytes of a stretch that is only compared are received at once into so many.
_SCRATCH_BYTES = 256 << 10


@dataclass
class StretchGathering(Gathering):
    """The stretches of one step. bounds: of each. update: begun with the first; None before."""

    lasts: ClassVar[bool] = False

    bounds: Bounds = field(init=False)
    update: Update | None = None
    beginning: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.bounds = Bounds(self.staged.layout.param_bytes)

    @property
    def whole(self) -> bool:
        return self.bounds.whole

    @property
    def indices(self) -> tuple[int, ...]:
        return ()

    def lacking(self) -> Lacking:
        return Lacking(self.bounds.missing(), f"{self.bounds.size} bytes")

    def piece(self, claims: Claims, key: Key, known: bytes | None) -> StretchBody:  # noqa: ARG002 - bounds are claimed here
        self.bounds.begin(*bounds_of(key), f"step {self.step}")
        return StretchBody(self, key, known)

    def take(self, piece: Piece) -> None:
        super().take(piece)
        self.bounds.came(*bounds_of(piece.key))

    def gaps(self, layout: Layout, key: Key) -> list[str]:  # noqa: ARG002 - a set of stretches is whole, or lacks some
        return []

    def replaced(self, what: str) -> EmaError:
        return Superseded(f"{what} was begun anew, in another group", retry_after=0.0)

    def begin(self, run: Run) -> Update:
        """The update that the stretches are of. Raises as Run.begin(); Superseded where the run changed meanwhile."""
        with self.beginning:
            if self.update is None:
                self.staged.allocate()
                self.update = run.begin(self.step or 0, self.staged, self.terms.writer)
        run.ledger.check_planned(self.update.plan)
        return self.update

    def decide(self, run: Run, helpers: Executor) -> UpdateResult:  # noqa: ARG002 - stretches are averaged by then
        return run.commit(self.begin(run))

    def vote(self, run: Run, helpers: Executor, shard: Voter) -> Future[UpdateResult]:  # noqa: ARG002 - as of decide()
        return shard.push(self.begin(run), self.terms.push_key(self.step))

    def end(self) -> None:
        if self.update:
            self.update.preparation.drop()
        super().end()


class StretchBody(Piece):
    """The body of one stretch: bytes of the parameters as they lie, and nothing before them."""

    def __init__(self, gathering: StretchGathering | None, key: Key, known: bytes | None) -> None:
        super().__init__(gathering, key, known, 0)
        self.start, self.stop = bounds_of(key)
        self.settles = True
        self._begun = True
        self._header = bytearray()
        self._update_of = gathering.begin if gathering and known is None else None
        #: The work on the stretch, once the step has its memory; None where the bytes are only compared.
        self.work: Stretch | None = None
        self._compared = Digest()
        self._left = self.stop - self.start
        self._window = memoryview(bytearray(min(self._left, _SCRATCH_BYTES)))

    def begin(self, run: Run) -> None:
        """Take the memory of the step, and begin the update with the first of its stretches. May block on a device.

        Raises as StretchGathering.begin().
        """
        if self._update_of:
            self.work = self._update_of(run).preparation.stretch(self.start, self.stop)
            self._window = self.work.data

    @property
    def arrived(self) -> int:
        """How far the push's parameters are in place, as far as they are of this stretch."""
        if self._data_over:
            return self.stop
        return self.start + self._filled

    @property
    def fingerprint(self) -> bytes:
        return self._compared.digest() if self.work is None else self.work.digest()

    def announce(self, content_length: int | None) -> None:
        length = self.stop - self.start
        if content_length not in (None, length, length + DIGEST_BYTES):
            raise MalformedBody(f"the body announces {content_length} bytes, the stretch has {length}")
        self.received = length

    def average(self, arrived: int = 0) -> None:
        if self.work is not None:
            self.work.advance(arrived)

    def settle(self) -> None:
        """Average what is not averaged yet, once the body is whole. Blocks.

        Raises DigestMismatch where the stretch is not the one that was sent; then the stretch may be sent again.
        """
        if self.work is not None:
            self.work.finish()
        if self.digest is not None and self.fingerprint != bytes(self.digest):
            raise DigestMismatch(f"stretch {self.start}-{self.stop} is not the one that was sent: the digests differ")

    def _begin_data(self, raw: bytes) -> None:
        raise NotImplementedError("a stretch has no header")

    def _next_window(self) -> memoryview:
        """Of a stretch in place the whole is one window; one that is compared is hashed window by window."""
        if self.work is not None:
            return memoryview(b"")
        self._compared.update(self._window)
        self._left -= len(self._window)
        return self._window[: self._left]


def bounds_of(key: Key) -> tuple[int, int]:
    """The bounds of a stretch of an update."""
    if not isinstance(key, tuple):
        raise TypeError(f"a stretch of an update has bounds, not {key}")
    return key


def check_bounds(layout: Layout, start: int, stop: int) -> None:
    """Raises InvalidRequest where bytes ``start`` to ``stop`` are no stretch of the parameters."""
    if not layout.divisible:
        raise InvalidRequest(
            "this run takes no stretches: it has float64 beside a dtype whose shadow is wider",
            hint="send the update as one body; the run's layout tells it (lanes: 1)",
        )
    _check_whole_blocks(start, stop, layout.param_bytes)


def check_part_bounds(layout: Layout, stretch: PartStretch) -> None:
    """Raises InvalidRequest where a part can have no such stretch."""
    if stretch.size > layout.param_bytes:
        raise InvalidRequest(f"size: a part of {stretch.size} bytes, of an update that has {layout.param_bytes}")
    _check_whole_blocks(stretch.start, stretch.stop, stretch.size)


def _check_whole_blocks(start: int, stop: int, size: int) -> None:
    """Raises InvalidRequest where a body of ``size`` bytes has no stretch with these bounds."""
    ends = stop % BLOCK_BYTES == 0 or stop == size
    if not (0 <= start < stop <= size and start % BLOCK_BYTES == 0 and ends):
        raise InvalidRequest(
            f"stretch {start}-{stop}: a stretch begins and ends at multiples of {BLOCK_BYTES} bytes, the last one at "
            f"{size}",
        )
