"""Parts: one update (or the initial weights) that arrives over several requests, put together in one staging.

The first piece of a step reserves staging for the whole step; each piece is received straight to where its bytes
belong; the piece that completes the set has the run apply the update as one. Until then nothing of the run has changed.

Pieces are of two kinds (gathering.py, stretches.py). *Parts* come from the ranks of a sharded trainer: slices of
tensors, of which whole blocks are averaged as they arrive, and the rest once all are there. *Stretches* come from one
sender over several connections: runs of bytes, averaged as they arrive, upon the version that was current when the
first came.

Ranks of one trainer are not at the same step at the same time, so several steps of a run are put together at once. A
part that is sent again is compared and not received into place: with the staged part while others are awaited,
afterwards with the part that was applied.

Where a complete set of parts cannot be written the set stays, and a part that is sent again has it written anew. A set
of which something was averaged before the run changed is given up: each sender keeps its part and asks what became of
it. A set that was refused for its content is remembered: each sender learns the reason by sending its part again.
A set of a shard (cluster.ShardRun), of parts or of stretches, is voted for, and stays until all hosts have decided; its
parameters are averaged by then, so its staging is given back. What comes to nothing by another's doing is sent again by
everyone.

Stretches whose set came to nothing are over, whatever the reason: what they were averaged upon, or into, is gone. Their
sender has every byte, and sends the step anew, in another group.

Knows which pieces of which steps are there. Does not know HTTP, or what an update computes
and whether it is applied (run).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ema_client.errors import (
    EmaError,
    InvalidRequest,
    LayoutMismatch,
    Overloaded,
    StaleStep,
    StepConflict,
    StorageFailed,
    Superseded,
    listed,
)
from ema_client.protocol import RunInfo, UpdateResult, UpdateStatus
from ema_client.wire import Box
from ema_service.memory.staging import Staged
from ema_service.runs.gathering import (
    Gathering,
    Key,
    Lacking,
    Part,
    PartGathering,
    Piece,
    Terms,
    Voter,
    bare,
    index_of,
    words_for,
)
from ema_service.runs.run import Run
from ema_service.runs.stretches import StretchBody, StretchGathering
from ema_service.runs.verdicts import Verdicts

__all__ = ["Expired", "Outcome", "Parts"]

#: What became of a piece: "staged", it waits for others; "applied", its update was applied before; "complete", it was
#: the last one missing.
Outcome = Literal["staged", "applied", "complete"]

#: How many steps of one run are put together at once: while one rank sends its part of a step, another, with its queue
#: of one, may be two steps ahead.
_MOST_STEPS = 3

#: How many groups of stretches that came to nothing are told so: a late stretch must not begin its group anew.
_REMEMBERED_GROUPS = 16

#: A step of which no byte has arrived for so many seconds makes room for a newer one, where staging has no other.
_STALLED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Expired:
    """A step that was given up because some of its pieces did not arrive."""

    step: int | None
    lacking: Lacking

    def __str__(self) -> str:
        missing = listed(map(str, self.lacking.missing))
        return f"{_what(self.step)} was given up: of {self.lacking.of}, {missing} did not come"


@dataclass(frozen=True, slots=True)
class _Applied:
    """The pieces of the latest applied set. digest: of the state that the set made."""

    step: int | None
    terms: Terms
    fingerprints: dict[Key, bytes]
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Refused:
    """A complete set that the run refused for its content."""

    step: int | None
    terms: Terms
    fingerprints: dict[Key, bytes]
    fault: EmaError


class Parts:
    """The parts and stretches of one run. Thread-safe.

    More than twenty methods: the way of a piece, from its admission to the set's end, and what is told of sets.

    max_header_bytes: most bytes of a part's header.
    """

    def __init__(self, run: Run) -> None:
        self.layout = run.layout
        #: A part's header names each tensor once more, in its metadata.
        self.max_header_bytes = 2 * run.layout.max_header_bytes
        self._run = run
        self._gatherings: list[Gathering] = []
        self._applied: _Applied | None = None
        self._refused: _Refused | None = None
        #: What became of stretches that came to nothing, by step and terms; of the latest groups.
        self._over: dict[tuple[int | None, Terms], EmaError] = {}
        #: Of the sets of a shard.
        self._verdicts = Verdicts()
        self._lock = threading.Lock()

    # --- a piece's way ----------------------------------------------------------------------------------------------

    def leads(self, gathering: Gathering) -> bool:
        """Whether a step is the run's next, as far as pieces tell: an update, and no older one is being put
        together."""
        with self._lock:
            first = gathering is min(self._gatherings, key=_order, default=None)
            return gathering.step is not None and first and not self._ahead_of(gathering)

    def admit(self, step: int | None, key: Key, terms: Terms) -> bool:
        """Whether staging must be reserved for a piece, before its body is read. step: None for the initial weights.

        Raises InvalidRequest, StepConflict, StaleStep, what Ledger.admit() raises, and what the stretches of a group
        came to nothing for.
        """
        if terms.of is not None and not 0 <= index_of(key) < terms.of:
            raise InvalidRequest(f"part {key} of {terms.of}: parts are numbered from 0 to {terms.of - 1}")
        if step is not None:
            self._run.ledger.admit(step, terms.writer)
        elif terms.replaces is not None:
            self._run.ledger.admit_anew(terms.writer)
        with self._lock:
            self._drop_outdated()
            if self._known_of_applied(step, key, terms) is not None:
                return False
            if fault := self._over.get((step, terms)):
                raise bare(fault)
            found = self._find(step)
            if found is None or found.terms.group != terms.group:
                self._check_not_given_up(step)
                return True
            if found.terms != terms:
                raise StepConflict(
                    f"{_what(step)} is being put together of {found.lacking().of}, not {terms.of or 'stretches'}",
                    hint="all ranks must send the same number of parts, num_updates and step",
                )
            return False

    def begin(self, step: int | None, key: Key, terms: Terms, reserve: Callable[[], Staged]) -> Piece:
        """A piece to be received, after admit(). reserve: called where the piece is the first of its step.

        Raises what ``reserve`` raises; StaleStep where newer steps have taken the place of the piece's step;
        StepConflict where a stretch overlaps another; RunNotFound, Superseded once the run is gone.
        """
        with self._lock:
            self._run.ledger.check_exists()  # under the lock of close(): nothing is put together after it
            self._drop_outdated()
            known = self._known_of_applied(step, key, terms)
            if known is not None:
                return self._compared(key, terms, known)
            if fault := self._over.get((step, terms)):
                raise bare(fault)
            gathering = self._find(step)
            if gathering is None or gathering.terms != terms:
                gathering = self._open(step, terms, reserve)
            if key in gathering.done:
                return gathering.piece(self, key, gathering.done[key])
            if key in gathering.coming:
                again = Superseded(f"{words_for(key)} of {_what(step)} was sent again", retry_after=1.0)
                gathering.forget(gathering.coming[key], again)
            piece = gathering.coming[key] = gathering.piece(self, key, None)
            return piece

    def _compared(self, key: Key, terms: Terms, known: bytes) -> Piece:
        """A piece whose bytes are compared with one that was applied, and go nowhere."""
        return Part(self, None, key, known) if terms.of is not None else StretchBody(None, key, known)

    def prepare(self, piece: Piece) -> None:
        """Take the memory of a piece that is about to be received. Off the event loop where the memory is a device's.

        Raises as Piece.begin(); a step that cannot come to anything any more is given up.
        """
        try:
            piece.begin(self._run)
        except Superseded as fault:
            with self._lock:
                if piece.gathering in self._gatherings:
                    self._drop(piece.gathering, fault)
            raise

    def claim(self, part: Part, slices: dict[str, tuple[Box, ...]]) -> None:
        """Claim slices for a part.

        Raises LayoutMismatch where another part has some of their elements, and claims nothing.
        """
        gathering = part.gathering
        if gathering is None:
            return
        with self._lock:
            if part.fault:
                raise bare(part.fault)
            for name, boxes in slices.items():
                other = part.claim(name, boxes)
                if other is not None:
                    gathering.release(part.key)
                    raise LayoutMismatch(_overlap(name, index_of(part.key), other))

    def complete(self, piece: Piece) -> Outcome:
        """Take a piece whose body is whole. After "complete", apply() must follow.

        Raises StepConflict where the piece was received before with other bytes. Raises LayoutMismatch where the part
        is the last and elements are missing: then the part is dropped and the others stay. Raises what the set was
        refused for where the part, with these bytes, was in a set that the run refused.
        """
        with self._lock:
            self._drop_outdated()
            if piece.fault:
                raise bare(piece.fault)
            if piece.known is not None and piece.fingerprint != piece.known:
                raise StepConflict(f"{words_for(piece.key)} came before with other bytes")
            gathering = piece.gathering
            if gathering is None:
                return "applied"
            if gathering not in self._gatherings:
                return self._outcome_of_gone(gathering)
            if piece.known is not None:
                if gathering.applying or not gathering.whole:
                    return "staged"
                gathering.applying = True
                return "complete"
            if fault := self._refusal_of(piece, gathering) or self._lack_of(piece, gathering):
                gathering.forget(piece, fault)
                raise bare(fault)
            gathering.take(piece)
            gathering.applying = gathering.whole
            if gathering.applying and gathering.lasts and self._run.shard:
                self._verdicts.begin(gathering.step, gathering.terms)
            return "complete" if gathering.applying else "staged"

    def give_up(self, piece: Piece) -> None:
        """Drop a piece that will not become whole: it may be sent again. Staging that holds no other piece is given
        back."""
        with self._lock:
            gathering = piece.gathering
            if piece.known is not None or gathering is None:
                return
            if piece.fault is None:
                gathering.forget(piece, Superseded("the piece was given up", retry_after=0.0))
            if not gathering.done and not gathering.coming and gathering in self._gatherings:
                self._drop(gathering, None)

    def apply(self, piece: Piece, helpers: Executor) -> UpdateResult | RunInfo:
        """Have the run apply the complete set. Blocks. helpers: threads to divide what is not averaged yet among.

        Raises what Run.apply(), Run.initialise() and, for stretches, Run.commit() raise.
        """
        gathering = piece.gathering
        if gathering is None:
            raise RuntimeError("apply() is for a piece that completed its set")
        try:
            result = gathering.decide(self._run, helpers)
        except BaseException as fault:
            if isinstance(fault, StorageFailed) and gathering.lasts:
                with self._lock:
                    gathering.applying, gathering.touched = False, time.monotonic()
                raise
            self._end(gathering, fault)
            raise
        self._note(gathering)
        self._end(gathering)
        return result

    # --- a complete set of a shard ----------------------------------------------------------------------------------

    def ahead(self, piece: Piece) -> list[Future[None]]:
        """Done once the sets before a complete one, of the same trainer, are decided: vote() is to wait for them, and
        not for ever."""
        with self._lock:
            return self._ahead_of(piece.gathering) if piece.gathering else []

    def vote(self, piece: Piece, helpers: Executor, shard: Voter) -> Future[UpdateResult] | Future[RunInfo]:
        """Have the complete set voted for; the future has what all hosts decide. In place of apply(), and as that.

        Raises Superseded where the set was given up meanwhile, and as Gathering.vote().
        """
        gathering = piece.gathering
        if gathering is None:
            raise RuntimeError("vote() is for a piece that completed its set")
        try:
            with self._lock:
                if gathering not in self._gatherings:
                    raise _given_up(gathering)
            verdict = gathering.verdict = gathering.vote(self._run, helpers, shard)
        except BaseException as fault:
            self._decided(gathering, fault)
            raise
        gathering.end()
        verdict.add_done_callback(partial(self._came, gathering))
        return verdict

    def verdict(self, piece: Piece) -> Future[Any] | None:
        """What all hosts decide of the set that a piece is of; None where there is no vote yet, or no set any more."""
        return piece.gathering.verdict if piece.gathering else None

    def _came(self, gathering: Gathering, verdict: Future[Any]) -> None:
        fault = verdict.exception()
        if fault is None:
            self._note(gathering)
        self._decided(gathering, fault)

    def _decided(self, gathering: Gathering, fault: BaseException | None) -> None:
        """Forget a set of a shard. fault: why it was not applied; where that passes, its parts come again."""
        comes_again = isinstance(fault, EmaError) and fault.retryable
        self._end(gathering, fault)
        gathering.verdict = None  # which knows the gathering: a cycle would hold the staging's memory
        if not comes_again:
            with self._lock:
                self._verdicts.end(gathering.step, gathering.terms)

    def _ahead_of(self, gathering: Gathering) -> list[Future[None]]:
        version = self._run.ledger.version
        return self._verdicts.ahead(gathering.step, gathering.terms, version.step if version else None)

    # --- the whole --------------------------------------------------------------------------------------------------

    def staged(self, step: int | None) -> tuple[int, ...] | None:
        """The indices of a step's parts that are whole; None where the step is not being put together."""
        with self._lock:
            self._drop_outdated()
            found = self._find(step)
            return found.indices if found else None

    def status_of_first(self, step: int, group: str) -> UpdateStatus:
        """Which parts of initial weights are there, of one group; applied once an update was, which comes after them.

        step: the trainer's, for the answer.
        """
        version = self._run.ledger.version
        with self._lock:
            found, applied = self._find(None), self._applied
            if found and found.terms.group == group:
                return UpdateStatus(step, "staged", found.indices)
            latest = applied is not None and applied.step is None and applied.terms.group == group
            return UpdateStatus(step, "applied" if latest or (version and version.n) else "unknown")

    def count(self) -> int:
        """How many steps are being put together."""
        return len(self._gatherings)

    def expire(self, silence: float) -> list[Expired]:
        """Give up the steps of which nothing arrived for ``silence`` seconds, and give their staging back."""
        now = time.monotonic()
        with self._lock:
            self._drop_outdated()
            idle = [g for g in self._gatherings if not g.applying and now - g.touched > silence]
            expired = [Expired(g.step, g.lacking()) for g in idle]
            for gathering, why in zip(idle, expired, strict=True):
                self._drop(gathering, StaleStep(str(why)))
        return expired

    def close(self, fault: EmaError) -> None:
        """Give up every step that is not being applied: the run is gone. fault: raised by parts that are coming."""
        with self._lock:
            for gathering in [g for g in self._gatherings if not g.applying]:
                self._drop(gathering, fault)
            self._verdicts.end_all()

    # ----------------------------------------------------------------------------------------------------------------

    def _end(self, gathering: Gathering, fault: BaseException | None = None) -> None:
        """Forget a gathering that the run has decided on, and give its staging back. fault: why it was refused."""
        with self._lock, contextlib.suppress(ValueError):
            self._gatherings.remove(gathering)
        gathering.end()
        if not isinstance(fault, EmaError):
            return
        if not gathering.lasts:
            self._remember_over(gathering, fault)
        elif not fault.retryable:
            self._refused = _Refused(gathering.step, gathering.terms, gathering.done, bare(fault))

    def _remember_over(self, gathering: Gathering, fault: EmaError) -> None:
        """Answer every later stretch of a group that came to nothing with what it came to nothing for."""
        self._over[gathering.step, gathering.terms] = bare(fault)
        if len(self._over) > _REMEMBERED_GROUPS:
            del self._over[next(iter(self._over))]

    def _refusal_of(self, piece: Piece, gathering: Gathering) -> EmaError | None:
        """What the set of a part was refused for; None where a part with other bytes has come since."""
        refused = self._refused
        if refused is None or (refused.step, refused.terms) != (gathering.step, gathering.terms):
            return None
        if refused.fingerprints.get(piece.key) == piece.fingerprint:
            return bare(refused.fault)
        self._refused = None
        return None

    def _lack_of(self, piece: Piece, gathering: Gathering) -> EmaError | None:
        """What pieces lack that are all there; None where they lack nothing, or some are not there."""
        if gaps := gathering.gaps(self.layout, piece.key):
            return LayoutMismatch(f"all {gathering.lacking().of} are there and elements are missing: {listed(gaps)}")
        return None

    def _find(self, step: int | None) -> Gathering | None:
        """The gathering of a step, None where the step is not being put together."""
        return next((gathering for gathering in self._gatherings if gathering.step == step), None)

    def _open(self, step: int | None, terms: Terms, reserve: Callable[[], Staged]) -> Gathering:
        """A new gathering for a step, in place of one with other terms, or of the oldest where there are too many."""
        self._check_not_given_up(step)
        staged = self._reserve(step, reserve)
        # Only once staging is reserved: where there is no room, no older step is given up in vain.
        if old := self._find(step):
            self._drop(old, old.replaced(_what(step)))
        if len(self._gatherings) >= _MOST_STEPS:
            oldest = min((g for g in self._gatherings if not g.applying), key=_order, default=None)
            if oldest:
                self._drop(oldest, StaleStep(f"{_what(oldest.step)} was given up: newer ones came before its parts"))
        kind = StretchGathering if terms.of is None else PartGathering
        gathering: Gathering = kind(step, terms, staged)
        self._gatherings.append(gathering)
        return gathering

    def _reserve(self, step: int | None, reserve: Callable[[], Staged]) -> Staged:
        """Reserve staging for a step. Older steps that have stalled make room.

        Raises Overloaded where there is none to be had.
        """
        while True:
            try:
                return reserve()
            except Overloaded:
                # Parts of an older step that nobody completes make room for those of a newer step.
                late = time.monotonic() - _STALLED_SECONDS
                stalled = [
                    g for g in self._gatherings if not g.applying and g.touched < late and _order(g) < (step or 0)
                ]
                if not stalled:
                    raise
                old = min(stalled, key=_order)
                self._drop(old, StaleStep(f"{_what(old.step)} was given up: the rest of its parts did not come"))

    def _check_not_given_up(self, step: int | None) -> None:
        """Raises StaleStep for a step older than all those being put together, where no more can be."""
        steps = [g.step for g in self._gatherings if g.step is not None]
        if step is not None and len(steps) >= _MOST_STEPS and step < min(steps):
            raise StaleStep(f"{_what(step)} was given up: parts of steps {', '.join(map(str, sorted(steps)))} came")

    def _known_of_applied(self, step: int | None, key: Key, terms: Terms) -> bytes | None:
        """The fingerprint of a piece of the update that made the run's current state; None for any other piece.

        Raises StepConflict for a stretch with other bounds than those of its group that were applied.
        """
        applied, state = self._applied, self._run.state
        if applied is None or state is None or state.version.digest != applied.digest:
            return None
        if (applied.step, applied.terms) != (step, terms) or (step is None and state.version.n):
            return None
        if terms.of is None and key not in applied.fingerprints:
            raise StepConflict(f"{_what(step)} was applied, of stretches with other bounds")
        return applied.fingerprints.get(key)

    def _outcome_of_gone(self, gathering: Gathering) -> Outcome:
        """What became of a part whose gathering is gone: applied, or given up (Superseded)."""
        applied = self._applied
        if applied and (applied.step, applied.terms) == (gathering.step, gathering.terms):
            return "applied"
        raise _given_up(gathering)

    def _drop_outdated(self) -> None:
        """Give up steps of which nothing can come any more: their senders ask, and send their parts again."""
        for gathering in [g for g in self._gatherings if not g.applying and g.outdated(self._run)]:
            changed = f"run {self._run.config.run!r} changed while {_what(gathering.step)} was put together"
            self._drop(gathering, Superseded(changed, retry_after=0.0))

    def _drop(self, gathering: Gathering, fault: EmaError | None) -> None:
        """Give up a gathering: its pieces raise ``fault``, its staging is given back. fault: None where no piece is
        coming or whole, and the same pieces may come again."""
        self._gatherings.remove(gathering)
        if fault:
            for piece in gathering.coming.values():
                piece.fault = bare(fault)
            gathering.coming.clear()
            if not gathering.lasts:
                self._remember_over(gathering, fault)
        gathering.end()

    def _note(self, gathering: Gathering) -> None:
        """Remember the parts that were applied, and give up older steps."""
        state = self._run.state
        with self._lock:
            # If the run moved on meanwhile, its digest is not that of these parts, and repeats of them are stale.
            if state:
                self._applied = _Applied(gathering.step, gathering.terms, gathering.done, state.version.digest)
            for older in [g for g in self._gatherings if not g.applying and _order(g) < _order(gathering)]:
                self._drop(older, StaleStep(f"{_what(older.step)} is older than {_what(gathering.step)}, now applied"))


def _given_up(gathering: Gathering) -> EmaError:
    return Superseded(f"{_what(gathering.step)} was given up meanwhile", retry_after=0.0)


def _order(gathering: Gathering) -> int:
    return -1 if gathering.step is None else gathering.step


def _what(step: int | None) -> str:
    return "the initial weights" if step is None else f"step {step}"


def _overlap(name: str, part: int, other: int) -> str:
    if part == other:
        return f"part {part} has elements of {name} twice"
    return f"part {part} has elements of {name} that part {other} has too"
