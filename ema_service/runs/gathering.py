"""One part of an update on its way, and the gathering of parts that it comes into.

A part's bytes go straight to where its slices belong in the staging that all parts of the step share. A part that is
there already is read and compared, and goes nowhere.

Knows slices, staging and the byte stream. Does not know which steps are put together, or what ends that (parts).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from ema_client.errors import BodyTooLarge, EmaError
from ema_client.wire import LENGTH_BYTES, Box, parse_header
from ema_service.bodies.incoming import Body
from ema_service.bodies.slices import Cover, Piece, pieces_of, slices_of
from ema_service.memory.layout import Layout
from ema_service.memory.staging import Staged

__all__ = ["Claims", "Gathering", "Part", "Terms"]

#: Where the rest of a part that is no longer wanted is read into.
_STRAY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Terms:
    """What all parts of a step must agree on.

    of: how many there are. group: which start of which trainer they come from. num_updates, step: of initial weights.
    writer: as for Run.begin().
    """

    of: int
    group: str = ""
    num_updates: int | None = None
    step: int | None = None
    writer: int | None = None


@dataclass
class Gathering:
    """The parts of one step that are there or on their way. ``done``: index -> fingerprint."""

    step: int | None
    terms: Terms
    staged: Staged
    covers: dict[str, Cover]
    touched: float = field(default_factory=time.monotonic)
    done: dict[int, bytes] = field(default_factory=dict)
    coming: dict[int, Part] = field(default_factory=dict)
    applying: bool = False

    @property
    def missing(self) -> tuple[int, ...]:
        """The parts that are not whole yet."""
        return tuple(index for index in range(self.terms.of) if index not in self.done)

    def gaps(self, layout: Layout) -> list[str]:
        """The tensors of which no part claimed every element."""
        tensors = [entry.name for entry in layout.params if entry.end > entry.begin]
        return [name for name in tensors if name not in self.covers or not self.covers[name].whole]

    def release(self, index: int) -> None:
        """Forget what a part claimed."""
        for cover in self.covers.values():
            cover.release(index)

    def forget(self, part: Part, fault: EmaError) -> None:
        """Give up a part on its way: the part raises ``fault``, and its slices may be claimed again."""
        part.fault = fault
        if self.coming.get(part.index) is part:
            del self.coming[part.index]
            self.release(part.index)


class Claims(Protocol):
    """Whom a part asks for its slices: Parts."""

    layout: Layout
    max_header_bytes: int

    def claim(self, part: Part, slices: dict[str, tuple[Box, ...]]) -> None: ...


class Part(Body):
    """One part on its way. Owned by the request that receives it, from Parts.begin() to complete() or give_up().

    It goes into the memory of its gathering; one that is there already is only read and compared with ``known``.
    """

    def __init__(self, parts: Claims, gathering: Gathering | None, index: int, known: bytes | None) -> None:
        super().__init__(parts.max_header_bytes, None)
        self.index = index
        self.gathering = gathering
        self.known = known
        self.received = 0
        #: Set, from any thread, once it is no longer wanted.
        self.fault: EmaError | None = None
        self._parts = parts
        self._slices: dict[str, tuple[Box, ...]] = {}
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._pieces: Iterator[Piece] = iter(())
        self._piece: Piece | None = None
        self._scratch = bytearray()

    @property
    def fingerprint(self) -> bytes:
        """Of its slices and their bytes; in which order they came does not matter."""
        whole = xxhash.xxh3_128()
        for name in sorted(self._slices):
            whole.update(repr((name, self._slices[name])).encode())
            whole.update(self._hashes[name].digest())
        return whole.digest()

    def announce(self, content_length: int | None) -> None:
        """The length of the whole body. Raises BodyTooLarge where no part can be as long."""
        most = LENGTH_BYTES + self._max_header_bytes + self._parts.layout.param_bytes
        if content_length is not None and content_length > most:
            raise BodyTooLarge(f"the body announces {content_length} bytes; a part of this run has at most {most}")
        self._content_length = content_length

    def window(self) -> memoryview:
        # What still comes of a part that is no longer wanted goes nowhere.
        return memoryview(bytearray(_STRAY_BYTES)) if self.fault else super().window()

    def advance(self, count: int) -> None:
        """As of every body; raises what the part was given up for, and LayoutMismatch where another has its slices."""
        if self.fault:
            raise self.fault
        if self.gathering:
            self.gathering.touched = time.monotonic()
        super().advance(count)

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
        self._hashes[piece.entry.name].update(self._window)
        if self.known is None and piece.stretch is None:
            piece.scatter(self._window, self._data)

    @property
    def _data(self) -> memoryview:
        if self.gathering is None:
            raise RuntimeError("a part that is only compared has no place of its own")
        return self.gathering.staged.data
