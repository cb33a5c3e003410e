"""The gathering of the parts of one step, and a single part while it is received.

The bytes of a part are received straight to where its slices belong, in the staging that all parts of a step share. A
part that was received before is hashed and compared, and its bytes are dropped.

Knows slices, staging and the byte stream. Does not know which steps are put together, or when a step is given up
(parts).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from ema_client.errors import BodyTooLarge, DigestMismatch, EmaError
from ema_client.protocol import DIGEST_BYTES
from ema_client.wire import LENGTH_BYTES, Box, parse_header
from ema_service.bodies.incoming import Body
from ema_service.bodies.slices import Cover, Piece, pieces_of, slices_of
from ema_service.memory.layout import Layout
from ema_service.memory.staging import Staged
from ema_service.runs.run import Parameters

__all__ = ["Claims", "Gathering", "Part", "Terms"]

#: The rest of a part that was given up is read into so many bytes, and dropped.
_STRAY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Terms:
    """What all parts of a step must agree on.

    of: how many parts there are. group: which start of which trainer the parts come from. num_updates, step: of initial
    weights, see Run.initialise(). writer: the number of the trainer, see Run.begin(). replaces: of initial weights
    given anew, see Run.initialise_anew().
    """

    of: int
    group: str = ""
    num_updates: int | None = None
    step: int | None = None
    writer: int | None = None
    replaces: str | None = None


@dataclass
class Gathering:
    """The parts of one step that have been received or are being received, in one staging.

    step: None for the initial weights. covers: which elements of each tensor are claimed. touched: when bytes last
    arrived, by time.monotonic(). done: index of a part -> its fingerprint. coming: index -> the part being received.
    applying: whether the run is applying the complete set. parameters: the set in the run's hands.
    """

    step: int | None
    terms: Terms
    staged: Staged
    covers: dict[str, Cover]
    touched: float = field(default_factory=time.monotonic)
    done: dict[int, bytes] = field(default_factory=dict)
    coming: dict[int, Part] = field(default_factory=dict)
    applying: bool = False
    parameters: Parameters = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = Parameters(self.staged)

    @property
    def whole(self) -> bool:
        """Whether all parts are there."""
        return len(self.done) == self.terms.of

    @property
    def missing(self) -> tuple[int, ...]:
        """The indices of parts that are not whole yet."""
        return tuple(index for index in range(self.terms.of) if index not in self.done)

    def gaps(self, layout: Layout) -> list[str]:
        """The names of tensors of which some element is claimed by no part."""
        tensors = [entry.name for entry in layout.params if entry.end > entry.begin]
        return [name for name in tensors if name not in self.covers or not self.covers[name].whole]

    def release(self, index: int) -> None:
        """Forget the claims of a part."""
        for cover in self.covers.values():
            cover.release(index)

    def forget(self, part: Part, fault: EmaError) -> None:
        """Give up a part that is being received: the part raises ``fault``, and its slices may be claimed again."""
        part.fault = fault
        if self.coming.get(part.index) is part:
            del self.coming[part.index]
            self.release(part.index)


class Claims(Protocol):
    """What a part needs of Parts: the layout, and a way to claim its slices."""

    layout: Layout
    max_header_bytes: int

    def claim(self, part: Part, slices: dict[str, tuple[Box, ...]]) -> None: ...


class Part(Body):
    """The body of one part. Owned by the request that receives it, from Parts.begin() to complete() or give_up().

    gathering: the step whose staging the part is received into. known: the fingerprint of the same part received
    before; then the bytes are only hashed, to be compared, and go nowhere. received: bytes of tensors.
    """

    def __init__(self, parts: Claims, gathering: Gathering | None, index: int, known: bytes | None) -> None:
        super().__init__(parts.max_header_bytes, None)
        self.index = index
        self.gathering = gathering
        self.known = known
        self.received = 0
        #: Why the part was given up, None while it is wanted. Set from any thread.
        self.fault: EmaError | None = None
        self._parts = parts
        self._slices: dict[str, tuple[Box, ...]] = {}
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._pieces: Iterator[Piece] = iter(())
        self._piece: Piece | None = None
        self._scratch = bytearray()

    @property
    def fingerprint(self) -> bytes:
        """A hash of the part's slices and their bytes; in which order the slices came does not matter."""
        whole = xxhash.xxh3_128()
        for name in sorted(self._slices):
            whole.update(repr((name, self._slices[name])).encode())
            whole.update(self._hashes[name].digest())
        return whole.digest()

    def announce(self, content_length: int | None) -> None:
        """Note the length of the whole body. Raises BodyTooLarge where no part of this run can be as long."""
        most = LENGTH_BYTES + self._max_header_bytes + self._parts.layout.param_bytes + DIGEST_BYTES
        if content_length is not None and content_length > most:
            raise BodyTooLarge(f"the body announces {content_length} bytes; a part of this run has at most {most}")
        self._content_length = content_length

    def window(self) -> memoryview:
        # The rest of a part that was given up is read, so that its sender gets an answer, and dropped.
        return memoryview(bytearray(_STRAY_BYTES)) if self.fault else super().window()

    def advance(self, count: int) -> None:
        """As Body.advance().

        Raises the fault that the part was given up for, and LayoutMismatch where another part has a slice.
        """
        if self.fault:
            raise self.fault
        if self.gathering:
            self.gathering.touched = time.monotonic()
        super().advance(count)

    def finish(self) -> None:
        """As Body.finish(). Raises DigestMismatch where the part is not the one that was sent."""
        super().finish()
        if self.digest is not None:
            whole = xxhash.xxh3_128()
            for each in self._hashes.values():
                whole.update(each.digest())
            if whole.digest() != bytes(self.digest):
                raise DigestMismatch(f"part {self.index} is not the one that was sent: the digests differ")

    def _begin_data(self, raw: bytes) -> None:
        header = parse_header(raw)
        self._check_length(len(raw), header.data_bytes)
        self._slices = slices_of(header, self._parts.layout)
        self._hashes = {name: xxhash.xxh3_128() for name in self._slices}
        self._pieces = pieces_of(self._slices, self._parts.layout)
        self.received = header.data_bytes
        if self.known is None:
            self._parts.claim(self, self._slices)

    def _next_window(self) -> memoryview:
        if self._piece:
            self._place(self._piece)
        self._piece = next(self._pieces, None)
        if self._piece is None:
            return memoryview(b"")
        if self.known is None and self._piece.stretch:
            return self._data[self._piece.stretch]
        if len(self._scratch) < self._piece.nbytes:
            self._scratch = bytearray(self._piece.nbytes)
        return memoryview(self._scratch)[: self._piece.nbytes]

    def _place(self, piece: Piece) -> None:
        """Hash the piece that has arrived, and put it in place if its elements are scattered."""
        self._hashes[piece.entry.name].update(self._window)
        if self.known is None and piece.stretch is None:
            piece.scatter(self._window, self._data)

    @property
    def _data(self) -> memoryview:
        """The parameters' memory of the step."""
        if self.gathering is None:
            raise RuntimeError("a part that is only compared has no place of its own")
        return self.gathering.staged.data
