"""Parts: one update (or the initial weights) that arrives over several requests, put together in one staging.

The first part of a step reserves staging for the whole step; each part is received straight to where its slices belong;
the part that completes the set has the run apply the update as one. Until then the run knows nothing of the parts.

Ranks of one trainer are not at the same step at the same time, so several steps of a run are put together at once. A
part that is sent again is compared and not received into place: with the staged part while others are awaited,
afterwards with the part that was applied.

Where the complete set cannot be written the set stays, and a part that is sent again has it written anew. A set that
was refused for its content is remembered: a sender keeps its part until it learns what became of the update, and learns
the reason by sending the part again.

Knows which parts of which steps are there and which slices they hold. Does not know HTTP, or what an update computes
and whether it is applied (run).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
from ema_service.bodies.slices import Cover
from ema_service.memory.staging import Staged
from ema_service.runs.gathering import Gathering, Part, Terms
from ema_service.runs.run import Run

__all__ = ["Expired", "Outcome", "Parts"]

#: What became of a part: "staged", it waits for others; "applied", its update was applied before; "complete", it was
#: the last one missing.
Outcome = Literal["staged", "applied", "complete"]

#: How many steps of one run are put together at once: while one rank sends its part of a step, another, with its queue
#: of one, may be two steps ahead.
_MOST_STEPS = 3

#: A step of which no byte has arrived for so many seconds makes room for a newer one, where staging has no other.
_STALLED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Expired:
    """A step that was given up because some of its parts did not arrive."""

    step: int | None
    missing: tuple[int, ...]
    of: int

    def __str__(self) -> str:
        return f"{_what(self.step)} was given up: of {self.of} parts, {listed(map(str, self.missing))} did not come"


@dataclass(frozen=True, slots=True)
class _Applied:
    """The parts of the latest applied set. digest: of the state that the set made."""

    step: int | None
    terms: Terms
    fingerprints: dict[int, bytes]
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Refused:
    """A complete set that the run refused for its content."""

    step: int | None
    terms: Terms
    fingerprints: dict[int, bytes]
    fault: EmaError


class Parts:
    """The parts of one run. Thread-safe.

    More than twenty methods: the way of a part, from its admission to the set's end, and what is told of sets.

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
        self._lock = threading.Lock()

    # --- a part's way -----------------------------------------------------------------------------------------------

    def admit(self, step: int | None, index: int, terms: Terms) -> bool:
        """Whether staging must be reserved for a part, before its body is read. step: None for the initial weights.

        Raises InvalidRequest, StepConflict, StaleStep, and what Ledger.admit() raises.
        """
        if not 0 <= index < terms.of:
            raise InvalidRequest(f"part {index} of {terms.of}: parts are numbered from 0 to {terms.of - 1}")
        if step is not None:
            self._run.ledger.admit(step, terms.writer)
        elif terms.replaces is not None:
            self._run.ledger.admit_anew(terms.writer)
        with self._lock:
            if self._known_of_applied(step, index, terms) is not None:
                return False
            found = self._find(step)
            if found is None or found.terms.group != terms.group:
                self._check_not_given_up(step)
                return True
            if found.terms != terms:
                raise StepConflict(
                    f"{_what(step)} is being put together of {found.terms.of} parts, not {terms.of}",
                    hint="all ranks must send the same number of parts, num_updates and step",
                )
            return False

    def begin(self, step: int | None, index: int, terms: Terms, reserve: Callable[[], Staged]) -> Part:
        """A part to be received, after admit(). reserve: called where the part is the first of its step.

        Raises what ``reserve`` raises; StaleStep where newer steps have taken the place of the part's step.
        """
        with self._lock:
            known = self._known_of_applied(step, index, terms)
            if known is not None:
                return Part(self, None, index, known)
            gathering = self._find(step)
            if gathering is None or gathering.terms != terms:
                gathering = self._open(step, terms, reserve)
            if index in gathering.done:
                return Part(self, gathering, index, gathering.done[index])
            if index in gathering.coming:
                again = Superseded(f"part {index} of {_what(step)} was sent again", retry_after=1.0)
                gathering.forget(gathering.coming[index], again)
            part = gathering.coming[index] = Part(self, gathering, index, None)
            return part

    def claim(self, part: Part, slices: dict[str, tuple[Box, ...]]) -> None:
        """Claim slices for a part.

        Raises LayoutMismatch where another part has some of their elements, and claims nothing.
        """
        gathering = part.gathering
        if gathering is None:
            return
        with self._lock:
            if part.fault:
                raise part.fault
            for name, boxes in slices.items():
                cover = gathering.covers.setdefault(name, Cover(self.layout.entry(name).shape))
                other = cover.claim(part.index, boxes)
                if other is not None:
                    gathering.release(part.index)
                    raise LayoutMismatch(_overlap(name, part.index, other))

    def complete(self, part: Part) -> Outcome:
        """Take a part whose body is whole. After "complete", apply() must follow.

        Raises StepConflict where the part was received before with other bytes. Raises LayoutMismatch where the part is
        the last and elements are missing: then the part is dropped and the others stay. Raises what the set was refused
        for where the part, with these bytes, was in a set that the run refused.
        """
        with self._lock:
            if part.fault:
                raise part.fault
            if part.known is not None and part.fingerprint != part.known:
                raise StepConflict(f"part {part.index} came before with other bytes")
            gathering = part.gathering
            if gathering is None:
                return "applied"
            if gathering not in self._gatherings:
                return self._outcome_of_gone(gathering)
            if part.known is not None:
                if gathering.applying or not gathering.whole:
                    return "staged"
                gathering.applying = True
                return "complete"
            if fault := self._refusal_of(part, gathering):
                gathering.forget(part, fault)
                raise fault
            if len(gathering.done) + 1 == gathering.terms.of and (gaps := gathering.gaps(self.layout)):
                fault = LayoutMismatch(
                    f"all {gathering.terms.of} parts are there and elements are missing: {listed(gaps)}"
                )
                gathering.forget(part, fault)
                raise fault
            del gathering.coming[part.index]
            gathering.done[part.index] = part.fingerprint
            gathering.applying = gathering.whole
            return "complete" if gathering.applying else "staged"

    def give_up(self, part: Part) -> None:
        """Drop a part that will not become whole: it may be sent again. Staging that holds no other part is given
        back."""
        with self._lock:
            gathering = part.gathering
            if part.known is not None or gathering is None:
                return
            if part.fault is None:
                gathering.forget(part, Superseded("the part was given up", retry_after=0.0))
            if not gathering.done and not gathering.coming and gathering in self._gatherings:
                self._drop(gathering, Superseded("the step was given up", retry_after=0.0))

    def apply(self, part: Part) -> UpdateResult | RunInfo:
        """Have the run apply the complete set. Blocks. Raises what Run.apply() and Run.initialise() raise."""
        gathering = part.gathering
        if gathering is None:
            raise RuntimeError("apply() is for a part that completed its set")
        try:
            result = self._decide(gathering)
        except StorageFailed:
            with self._lock:
                gathering.applying, gathering.touched = False, time.monotonic()
            raise
        except BaseException as fault:
            self._end(gathering)
            if isinstance(fault, EmaError) and not fault.retryable:
                self._refused = _Refused(gathering.step, gathering.terms, gathering.done, fault)
            raise
        self._note(gathering)
        self._end(gathering)
        return result

    # --- the whole --------------------------------------------------------------------------------------------------

    def staged(self, step: int | None) -> tuple[int, ...] | None:
        """The indices of a step's parts that are whole; None where the step is not being put together."""
        with self._lock:
            found = self._find(step)
            return tuple(sorted(found.done)) if found else None

    def status_of_first(self, step: int, group: str) -> UpdateStatus:
        """Which parts of initial weights are there, of one group; applied once an update was, which comes after them.

        step: the trainer's, for the answer.
        """
        version = self._run.ledger.version
        with self._lock:
            found, applied = self._find(None), self._applied
            if found and found.terms.group == group:
                return UpdateStatus(step, "staged", tuple(sorted(found.done)))
            latest = applied is not None and applied.step is None and applied.terms.group == group
            return UpdateStatus(step, "applied" if latest or (version and version.n) else "unknown")

    def count(self) -> int:
        """How many steps are being put together."""
        return len(self._gatherings)

    def expire(self, silence: float) -> list[Expired]:
        """Give up the steps of which nothing arrived for ``silence`` seconds, and give their staging back."""
        now = time.monotonic()
        with self._lock:
            idle = [g for g in self._gatherings if not g.applying and now - g.touched > silence]
            expired = [Expired(g.step, g.missing, g.terms.of) for g in idle]
            for gathering, why in zip(idle, expired, strict=True):
                self._drop(gathering, StaleStep(str(why)))
        return expired

    def close(self, fault: EmaError) -> None:
        """Give up every step that is not being applied: the run is gone. fault: raised by parts that are coming."""
        with self._lock:
            for gathering in [g for g in self._gatherings if not g.applying]:
                self._drop(gathering, fault)

    # ----------------------------------------------------------------------------------------------------------------

    def _end(self, gathering: Gathering) -> None:
        """Forget a gathering that the run has decided on, and give its staging back."""
        with self._lock, contextlib.suppress(ValueError):
            self._gatherings.remove(gathering)
        gathering.staged.release()

    def _refusal_of(self, part: Part, gathering: Gathering) -> EmaError | None:
        """What the set of a part was refused for; None where a part with other bytes has come since."""
        refused = self._refused
        if refused is None or (refused.step, refused.terms) != (gathering.step, gathering.terms):
            return None
        if refused.fingerprints.get(part.index) == part.fingerprint:
            return refused.fault
        self._refused = None
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
            self._drop(old, StepConflict(f"{_what(step)} is sent by another trainer, or by this one started again"))
        if len(self._gatherings) >= _MOST_STEPS:
            oldest = min((g for g in self._gatherings if not g.applying), key=_order, default=None)
            if oldest:
                self._drop(oldest, StaleStep(f"{_what(oldest.step)} was given up: newer ones came before its parts"))
        gathering = Gathering(step, terms, staged, {})
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

    def _known_of_applied(self, step: int | None, index: int, terms: Terms) -> bytes | None:
        """The fingerprint of a part of the update that made the run's current state; None for any other part."""
        applied, state = self._applied, self._run.state
        if applied is None or state is None or state.version.digest != applied.digest:
            return None
        if (applied.step, applied.terms) != (step, terms) or (step is None and state.version.n):
            return None
        return applied.fingerprints.get(index)

    def _outcome_of_gone(self, gathering: Gathering) -> Outcome:
        """What became of a part whose gathering is gone: applied, or given up (Superseded)."""
        applied = self._applied
        if applied and (applied.step, applied.terms) == (gathering.step, gathering.terms):
            return "applied"
        raise Superseded(f"{_what(gathering.step)} was given up meanwhile", retry_after=0.0)

    def _drop(self, gathering: Gathering, fault: EmaError) -> None:
        """Give up a gathering: its parts raise ``fault``, its staging is given back."""
        self._gatherings.remove(gathering)
        for part in gathering.coming.values():
            part.fault = fault
        gathering.staged.release()

    def _decide(self, gathering: Gathering) -> UpdateResult | RunInfo:
        """Have the run apply a gathering, or take it as the initial weights."""
        if gathering.step is not None:
            return self._run.apply(gathering.step, gathering.parameters, gathering.terms.writer)
        terms = gathering.terms
        if terms.replaces is not None:
            self._run.initialise_anew(gathering.parameters, terms.replaces, terms.writer)
        else:
            self._run.initialise(gathering.parameters, num_updates=terms.num_updates, step=terms.step)
        return self._run.info()

    def _note(self, gathering: Gathering) -> None:
        """Remember the parts that were applied, and give up older steps."""
        state = self._run.state
        with self._lock:
            # If the run moved on meanwhile, its digest is not that of these parts, and repeats of them are stale.
            if state:
                self._applied = _Applied(gathering.step, gathering.terms, gathering.done, state.version.digest)
            for older in [g for g in self._gatherings if not g.applying and _order(g) < _order(gathering)]:
                self._drop(older, StaleStep(f"{_what(older.step)} is older than {_what(gathering.step)}, now applied"))


def _order(gathering: Gathering) -> int:
    return -1 if gathering.step is None else gathering.step


def _what(step: int | None) -> str:
    return "the initial weights" if step is None else f"step {step}"


def _overlap(name: str, part: int, other: int) -> str:
    if part == other:
        return f"part {part} has elements of {name} twice"
    return f"part {part} has elements of {name} that part {other} has too"
