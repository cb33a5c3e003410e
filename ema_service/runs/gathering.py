"""The gathering of one step that comes in pieces, and a single piece while it is received.

A *piece* is what one request brings of a step: a part (slices of tensors, of one rank of a sharded trainer), a stretch
of a part, or a stretch of the whole update (stretches.py). The bytes of a piece are received straight to where they
belong, in the staging that all pieces of a step share. A piece that was received before is hashed and compared, and its
bytes are dropped.

Knows slices, staging and the byte stream. Does not know which steps are put together, or when a step is given up
(parts).
"""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol, cast

import xxhash

from ema_client.errors import BodyTooLarge, DigestMismatch, EmaError, MalformedBody, StepConflict
from ema_client.protocol import DIGEST_BYTES, RunInfo, UpdateResult
from ema_client.wire import LENGTH_BYTES, Box, parse_header
from ema_service.averaging import BLOCK_BYTES
from ema_service.bodies.incoming import Body
from ema_service.bodies.slices import Cover, pieces_of, slices_of
from ema_service.bodies.slices import Piece as Slice
from ema_service.memory.layout import Layout
from ema_service.memory.staging import Staged
from ema_service.runs.blocks import PartBlocks
from ema_service.runs.bounds import Bounds
from ema_service.runs.run import Parameters, Run, Update
from ema_service.shadows.passes import Stretch

__all__ = [
    "Claims",
    "Gathering",
    "Key",
    "Lacking",
    "Part",
    "PartGathering",
    "PartStretch",
    "Piece",
    "Terms",
    "Voter",
    "bare",
    "index_of",
    "words_for",
]

#: The rest of a piece that was given up is read into so many bytes, and dropped.
_STRAY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class PartStretch:
    """A stretch of a part: bytes ``start`` to ``stop`` of the data of the part, which are ``size`` in all."""

    part: int
    start: int
    stop: int
    size: int


#: What tells apart the pieces of one step: the index of a part, a stretch of a part, the bounds of a stretch of the
#: whole update.
Key = int | PartStretch | tuple[int, int]


@dataclass(frozen=True, slots=True)
class Terms:
    """What all pieces of a step must agree on.

    of: how many parts there are; None where the pieces are stretches. group: which start of which trainer the parts
    come from, which try of the step the stretches. num_updates, step: of initial weights, see Run.initialise(). writer:
    the number of the trainer, see Run.begin(). replaces: of initial weights given anew, see Run.initialise_anew().
    push: of stretches at a host of a cluster, the key of the push.
    """

    of: int | None
    group: str = ""
    num_updates: int | None = None
    step: int | None = None
    writer: int | None = None
    replaces: str | None = None
    push: str = ""

    def push_key(self, step: int | None) -> str:
        """The key of the push that the pieces of a step are: the same on all hosts of a run, and at each try."""
        if self.push:
            return self.push
        said = f"{self.of} {step} {self.replaces} {self.group}"
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


class Voter(Protocol):
    """What brings complete sets of pieces before all hosts of a run (cluster.ShardRun). key: of the push.

    Futures have what all hosts decided. Raises as ShardRun's methods.
    """

    def push(self, update: Update, key: str) -> Future[UpdateResult]: ...

    def initialise(
        self, parameters: Parameters, key: str, *, num_updates: int | None = None, step: int | None = None
    ) -> Future[RunInfo]: ...

    def initialise_anew(
        self, parameters: Parameters, key: str, replaces: str, writer: int | None = None
    ) -> Future[RunInfo]: ...


@dataclass
class Gathering(ABC):
    """The pieces of one step that have been received or are being received, in one staging.

    step: None for the initial weights. touched: when bytes last arrived, by time.monotonic(). done: key of a piece ->
    its fingerprint. coming: key -> the piece being received. applying: whether the run is applying the complete set.
    verdict: what all hosts decide of a complete set that was voted for. lasts: whether pieces that are whole stay what
    they are where a write fails or the run changes.
    """

    lasts: ClassVar[bool] = True

    step: int | None
    terms: Terms
    staged: Staged
    touched: float = field(default_factory=time.monotonic)
    done: dict[Key, bytes] = field(default_factory=dict)
    coming: dict[Key, Piece] = field(default_factory=dict)
    applying: bool = False
    verdict: Future[UpdateResult] | Future[RunInfo] | None = None

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether all pieces are there."""

    @property
    @abstractmethod
    def indices(self) -> tuple[int, ...]:
        """The indices of the parts that are whole; none where the pieces are stretches."""

    @abstractmethod
    def lacking(self) -> Lacking:
        """What is not there yet, for people to read."""

    @abstractmethod
    def piece(self, claims: Claims, key: Key, known: bytes | None) -> Piece:
        """A piece to be received, or where its fingerprint is ``known`` to be compared.

        Raises StepConflict where it can be none of this gathering.
        """

    def outdated(self, run: Run) -> bool:  # noqa: ARG002 - stretches ask when the next one comes
        """Whether nothing can come of the pieces any more because the run changed."""
        return False

    @abstractmethod
    def gaps(self, layout: Layout, key: Key) -> list[str]:
        """The names of tensors of which some element is missing where the piece ``key`` completes the set; none
        before."""

    @abstractmethod
    def decide(self, run: Run, helpers: Executor) -> UpdateResult | RunInfo:
        """Have the run apply the complete set. Blocks. helpers: threads to divide what is not averaged yet among.

        Raises what the run raises.
        """

    @abstractmethod
    def vote(self, run: Run, helpers: Executor, shard: Voter) -> Future[UpdateResult] | Future[RunInfo]:
        """Have the complete set voted for, whose hosts decide together. Blocks until there is a vote; helpers: as for
        decide().

        Raises what ``shard`` raises, and as Run.begin().
        """

    def replaced(self, what: str) -> EmaError:
        """The fault of pieces in whose place others come of another group. what: the step, in words."""
        return StepConflict(f"{what} is sent by another trainer, or by this one started again")

    def end(self) -> None:
        """Give the staging back: nothing more comes of the gathering."""
        self.staged.release()

    def take(self, piece: Piece) -> None:
        """A piece that was coming is whole."""
        del self.coming[piece.key]
        self.done[piece.key] = piece.fingerprint

    def release(self, key: Key) -> None:  # noqa: B027 - stretches keep their bounds
        """Forget what a piece claimed that is not received any more."""

    def forget(self, piece: Piece, fault: EmaError) -> None:
        """Give up a piece that is being received: the piece raises ``fault``, and its bytes may come again."""
        piece.fault = bare(fault)
        if self.coming.get(piece.key) is piece:
            del self.coming[piece.key]
            self.release(piece.key)


def bare(fault: EmaError) -> EmaError:
    """The fault without its traceback, to be remembered or raised once more.

    The frames of a traceback refer to bodies and versions: a fault that is remembered would hold their memory.
    """
    return copy.copy(fault)


@dataclass(frozen=True, slots=True)
class Lacking:
    """What a step lacks. missing: indices of parts, or bounds of stretches. of: how many parts or bytes, in words."""

    missing: tuple[object, ...]
    of: str


@dataclass
class PartGathering(Gathering):
    """The parts of one step, each block of the parameters in a region of its own.

    A block that one part brings whole is averaged as it comes. That overwrites the block's parameters, and binds the
    step to the version that was current then: where the run changes before the set is whole, the senders, who have
    their parts, send them again.

    A part comes as one body, or in stretches over several connections. Of a block that several stretches of one part
    bring together none is averaged before all of them are whole: no stretch that breaks off takes bytes of another one
    with it.

    covers: which elements of each tensor are claimed. arrived: the indices of the parts that are whole. cut: the bounds
    of the parts that come in stretches. brought: by a part and a block's first byte, bytes of the block that whole
    stretches of the part brought, each some of them. parameters: the set in the run's hands; with an update for as long
    as some block is averaged. block: bytes of a block; all parameters are one where they cannot be averaged apart, and
    where they are initial weights. averaged: by its first byte, which piece a block came with that is averaged. closed:
    whether no block is averaged by itself.
    """

    covers: dict[str, Cover] = field(default_factory=dict)
    arrived: set[int] = field(default_factory=set)
    cut: dict[int, Bounds] = field(default_factory=dict)
    brought: Counter[tuple[int, int]] = field(default_factory=Counter)
    parameters: Parameters = field(init=False)
    block: int = field(init=False)
    averaged: dict[int, Key] = field(default_factory=dict)
    #: Held while an update is begun or given up, and while averaging of a block begins: never while it goes on.
    averaging: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = Parameters(self.staged)
        layout = self.staged.layout
        apart = layout.divisible and self.step is not None
        self.block = BLOCK_BYTES if apart else max(layout.param_bytes, 1)
        self.closed = not apart

    def average(self, run: Run, part: Part, start: int, beside: Stretch | None) -> Stretch | None:
        """The work on a block that a part brought whole; None where the block is averaged with the set. beside: the
        work on an earlier block of the part.

        Begins the update with the first block. Raises as Run.begin().
        """
        with self.averaging:
            if self.closed or part.fault or self.outdated(run):
                return None
            if self.parameters.update is None:
                self.parameters.update = run.begin(self.step or 0, self.staged, self.terms.writer)
            self.averaged[start] = part.key
            return self.parameters.update.preparation.block(start, beside)

    def outdated(self, run: Run) -> bool:
        """Whether parts were averaged upon a version that is not the run's any more: no update comes of them."""
        update, version = self.parameters.update, run.ledger.version
        if update is None or self.parameters.prepared is not None or version is None:
            return False
        return version is not update.plan.base and version.step != self.step

    def memory(self, extent: slice) -> memoryview:
        """Where bytes of the parameters are received that lie in one block."""
        start = extent.start - extent.start % self.block
        stop = min(start + self.block, self.staged.layout.param_bytes)
        return self.staged.region(start, stop).bytes(extent.start, extent.stop)

    @property
    def whole(self) -> bool:
        return len(self.arrived) == self.terms.of

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(sorted(self.arrived))

    def lacking(self) -> Lacking:
        missing = tuple(index for index in range(self.terms.of or 0) if index not in self.arrived)
        return Lacking(missing, f"{self.terms.of} parts")

    def piece(self, claims: Claims, key: Key, known: bytes | None) -> Part:
        if known is None:
            self._begin(key)
        return Part(claims, self, key, known)

    def _begin(self, key: Key) -> None:
        """Raises StepConflict for a piece of a part that comes otherwise: as one body, or in other stretches."""
        index, cut = index_of(key), isinstance(key, PartStretch)
        if index in self.done or index in self.coming if cut else index in self.cut:
            raise StepConflict(
                f"part {index} of step {self.step} comes {'as one body' if cut else 'in stretches'}",
                hint="send a part again as it was begun, or all parts of the step in another group",
            )
        if isinstance(key, PartStretch):
            bounds = self.cut.setdefault(index, Bounds(key.size))
            if bounds.size != key.size:
                raise StepConflict(f"part {index} of step {self.step} has {bounds.size} bytes, not {key.size}")
            bounds.begin(key.start, key.stop, f"part {index} of step {self.step}")

    def take(self, piece: Piece) -> None:
        super().take(piece)
        key = piece.key
        if isinstance(key, PartStretch):
            bounds = self.cut[key.part]
            bounds.came(key.start, key.stop)
            if isinstance(piece, Part):
                self._join(piece, key.part)
            if not bounds.whole:
                return
        self.arrived.add(index_of(key))

    def _join(self, stretch: Part, part: int) -> None:
        """Have a stretch that is whole average the blocks that it completes."""
        for start, nbytes in stretch.blocks.shared().items():
            self.brought[part, start] += nbytes
            if self.brought[part, start] == stretch.blocks.size(start):
                stretch.blocks.completed(start)

    def gaps(self, layout: Layout, key: Key) -> list[str]:
        others = len(self.arrived) + 1 < (self.terms.of or 0)
        if others or (isinstance(key, PartStretch) and self.cut[key.part].left > key.stop - key.start):
            return []
        tensors = [entry.name for entry in layout.params if entry.end > entry.begin]
        return [name for name in tensors if name not in self.covers or not self.covers[name].whole]

    def release(self, key: Key) -> None:
        # Nobody works on the part's blocks any more by the time another part may claim them.
        with self.averaging:
            update = self.parameters.update
            for start in [start for start, owner in self.averaged.items() if owner == key]:
                del self.averaged[start]
                if update:
                    update.preparation.forget(start)
            if update and not self.averaged:
                self._let_go(update)
        for cover in self.covers.values():
            cover.release(key)
        if isinstance(key, PartStretch) and (bounds := self.cut.get(key.part)):
            bounds.forget(key.start)
            if not bounds.begun:
                del self.cut[key.part]

    def end(self) -> None:
        with self.averaging:
            self.closed = True
            if self.parameters.update:
                self._let_go(self.parameters.update)
        super().end()

    def _let_go(self, update: Update) -> None:
        """Give up an update of which nothing is averaged, or wanted, any more. Under the lock."""
        update.preparation.drop()
        self.parameters.update = None

    def decide(self, run: Run, helpers: Executor) -> UpdateResult | RunInfo:
        self._close(helpers)
        terms = self.terms
        if self.step is not None:
            return run.apply(self.step, self.parameters, terms.writer)
        if terms.replaces is not None:
            run.initialise_anew(self.parameters, terms.replaces, terms.writer)
        else:
            run.initialise(self.parameters, num_updates=terms.num_updates, step=terms.step)
        return run.info()

    def vote(self, run: Run, helpers: Executor, shard: Voter) -> Future[UpdateResult] | Future[RunInfo]:
        self._close(helpers)
        terms, key = self.terms, self.terms.push_key(self.step)
        if terms.replaces is not None:
            return shard.initialise_anew(self.parameters, key, terms.replaces, terms.writer)
        if self.step is None:
            return shard.initialise(self.parameters, key, num_updates=terms.num_updates, step=terms.step)
        return shard.push(self.parameters.update or run.begin(self.step, self.staged, terms.writer), key)

    def _close(self, helpers: Executor) -> None:
        """The set is complete: what is not averaged yet is divided among helpers."""
        with self.averaging:
            self.closed = True
        if self.step is not None and self.staged.layout.divisible:
            self.staged.divide(helpers)


def index_of(key: Key) -> int:
    """The index of a part, or of the part that a stretch is of."""
    if isinstance(key, tuple):
        raise TypeError(f"a part has an index, not {key}")
    return key.part if isinstance(key, PartStretch) else key


def words_for(key: Key) -> str:
    """A piece, for people to read."""
    if isinstance(key, PartStretch):
        return f"stretch {key.start}-{key.stop} of part {key.part}"
    return f"stretch {key[0]}-{key[1]}" if isinstance(key, tuple) else f"part {key}"


class Claims(Protocol):
    """What a piece needs of Parts: the layout, a way to claim a part's slices, and whether its step is the next."""

    layout: Layout
    max_header_bytes: int

    def claim(self, part: Part, slices: dict[str, tuple[Box, ...]]) -> None: ...

    def leads(self, gathering: Gathering) -> bool: ...


class Piece(Body):
    """The body of one piece. Owned by the request that receives it, from Parts.begin() to complete() or give_up().

    gathering: the step whose staging the piece is received into. known: the fingerprint of the same piece received
    before; then the bytes are only hashed, to be compared, and go nowhere. received: bytes of tensors.
    """

    def __init__(self, gathering: Gathering | None, key: Key, known: bytes | None, max_header_bytes: int) -> None:
        super().__init__(max_header_bytes, None)
        self.key = key
        self.gathering = gathering
        self.known = known
        self.received = 0
        #: Whether work is left once the body is whole, see settle().
        self.settles = False
        #: Why the piece was given up, None while it is wanted. Set from any thread.
        self.fault: EmaError | None = None

    @property
    @abstractmethod
    def fingerprint(self) -> bytes:
        """A hash of what the piece is and of its bytes, once they are whole."""

    @abstractmethod
    def announce(self, content_length: int | None) -> None:
        """Note the length of the whole body. Raises BodyTooLarge or MalformedBody where no such piece is as long."""

    def begin(self, run: Run) -> None:  # noqa: ARG002 - what is averaged as it arrives asks the run
        """Take the memory of the step, before the first byte. Off the event loop where the memory is a device's.

        Raises Overloaded; what Run.begin() raises, of a stretch.
        """
        if self.gathering:
            self.gathering.staged.allocate()

    @property
    def waits(self) -> bool:
        """Whether the piece has brought a block whole that is not averaged yet."""
        return False

    @abstractmethod
    def average(self, arrived: int = 0) -> None:
        """Average what has come and can be averaged by itself, on the calling thread. arrived: as Body.arrived.

        Raises as Run.begin(), and Overloaded.
        """

    def settle(self) -> None:
        """Do what is left once the body is whole. Blocks. Raises DigestMismatch where the piece is to be sent again."""

    def window(self) -> memoryview:
        # The rest of a piece that was given up is read, so that its sender gets an answer, and dropped.
        return memoryview(bytearray(_STRAY_BYTES)) if self.fault else super().window()

    def advance(self, count: int) -> None:
        """As Body.advance().

        Raises the fault that the piece was given up for, and LayoutMismatch where another part has a slice.
        """
        if self.fault:
            raise bare(self.fault)
        if self.gathering:
            self.gathering.touched = time.monotonic()
        super().advance(count)


class Part(Piece):
    """The body of one part, or of a stretch of one: slices of tensors.

    blocks: those that the piece brings, some of each or all.
    """

    def __init__(self, parts: Claims, gathering: PartGathering | None, key: Key, known: bytes | None) -> None:
        super().__init__(gathering, key, known, parts.max_header_bytes)
        #: Whose memory the bytes are received into; None where they are only compared.
        self._gathering = gathering if known is None else None
        self._parts = parts
        self._slices: dict[str, tuple[Box, ...]] = {}
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._pieces: Iterator[Slice] = iter(())
        self._piece: Slice | None = None
        self._scratch = bytearray()
        self._run: Run | None = None
        size = parts.layout.param_bytes
        self.blocks = PartBlocks(gathering.block if gathering else max(size, 1), size)

    def begin(self, run: Run) -> None:
        super().begin(run)
        self._run = run

    @property
    def arrived(self) -> int:
        """Bytes of all blocks that the part has brought whole so far."""
        return self.blocks.arrived

    @property
    def waits(self) -> bool:
        return self.blocks.waiting

    def average(self, arrived: int = 0) -> None:  # noqa: ARG002 - the part knows which blocks have arrived
        """Average the blocks that the part has brought whole, on the calling thread, where the step is the run's next;
        else they are averaged with the set.

        Raises as Run.begin(), and Overloaded.
        """
        run, gathering = self._run, self._gathering
        if run and gathering and self.waits and self._parts.leads(gathering):
            self.blocks.average(partial(gathering.average, run, self))

    @property
    def fingerprint(self) -> bytes:
        """A hash of the part's slices and their bytes; in which order the slices came does not matter."""
        whole = xxhash.xxh3_128()
        for name in sorted(self._slices):
            whole.update(repr((name, self._slices[name])).encode())
            whole.update(self._hashes[name].digest())
        return whole.digest()

    def claim(self, name: str, boxes: tuple[Box, ...]) -> int | None:
        """Claim slices of one tensor. Returns None; or the index of the part that has some of their elements, and
        claims nothing."""
        if self._gathering is None:
            return None
        cover = self._gathering.covers.setdefault(name, Cover(self._parts.layout.entry(name).shape))
        other = cover.claim(self.key, boxes)
        return None if other is None else index_of(cast(Key, other))

    def announce(self, content_length: int | None) -> None:
        most = LENGTH_BYTES + self._max_header_bytes + self._parts.layout.param_bytes + DIGEST_BYTES
        if content_length is not None and content_length > most:
            raise BodyTooLarge(f"the body announces {content_length} bytes; a part of this run has at most {most}")
        self._content_length = content_length

    def finish(self) -> None:
        """As Body.finish(). Raises DigestMismatch where the part is not the one that was sent."""
        super().finish()
        if self.digest is not None:
            whole = xxhash.xxh3_128()
            for each in self._hashes.values():
                whole.update(each.digest())
            if whole.digest() != bytes(self.digest):
                raise DigestMismatch(f"{words_for(self.key)} is not the one that was sent: the digests differ")

    def _begin_data(self, raw: bytes) -> None:
        header = parse_header(raw)
        self._check_length(len(raw), header.data_bytes)
        if isinstance(self.key, PartStretch) and header.data_bytes != self.key.stop - self.key.start:
            raise MalformedBody(f"{words_for(self.key)} has {header.data_bytes} bytes of tensors")
        self._slices = slices_of(header, self._parts.layout)
        self._hashes = {name: xxhash.xxh3_128() for name in self._slices}
        self._pieces = pieces_of(self._slices, self._parts.layout, self.blocks.block_bytes)
        self.received = header.data_bytes
        if self.known is None:
            self._parts.claim(self, self._slices)

    def _next_window(self) -> memoryview:
        if self._piece:
            self._place(self._piece)
        self._piece = next(self._pieces, None)
        if self._piece is None:
            return memoryview(b"")
        if self._gathering and self._piece.box is None:
            return self._gathering.memory(self._piece.extent)
        if len(self._scratch) < self._piece.nbytes:
            self._scratch = bytearray(self._piece.nbytes)
        return memoryview(self._scratch)[: self._piece.nbytes]

    def _place(self, piece: Slice) -> None:
        """Hash the piece that has arrived, and put it in place if its elements are scattered."""
        self._hashes[piece.entry.name].update(self._window)
        if self._gathering:
            if piece.box is not None:
                piece.scatter(self._window, self._gathering.memory(piece.extent))
            self.blocks.bring(piece.extent, piece.nbytes)
