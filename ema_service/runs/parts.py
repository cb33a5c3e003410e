"""Parts: one update (or the initial weights) that comes over several requests, put together in one staging.

The first part of a step takes staging for the whole of it; each part is received straight to where its slices
belong; the part that completes the set has the run apply it, as one. Until then the run knows nothing of it.

Ranks of one trainer are not at the same step at the same time, so a run puts a few steps together at once. A part sent
again is compared, not taken: with the staged part while the others are awaited, with what was applied afterwards.

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
    Superseded,
    listed,
)
from ema_client.protocol import RunInfo, UpdateResult
from ema_client.wire import Box
from ema_service.bodies.slices import Cover
from ema_service.memory.staging import Staged
from ema_service.runs.gathering import Gathering, Part, Terms
from ema_service.runs.run import Run

__all__ = ["Expired", "Outcome", "Parts"]

#: What became of a part: it waits for the others; its update was applied before; it was the last one missing.
Outcome = Literal["staged", "applied", "complete"]

#: So many steps of one run are put together at once. One rank sends its part of a step while another, with its queue of
#: one, is at the next but one.
_MOST_STEPS = 3

#: A step of which nothing has come for so long makes room for a newer one where there is no other.
_STALLED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Expired:
    """A step that was given up because the rest of its parts did not come."""

    step: int | None
    missing: tuple[int, ...]
    of: int

    def __str__(self) -> str:
        return f"{_what(self.step)} was given up: of {self.of} parts, {listed(map(str, self.missing))} did not come"


@dataclass(frozen=True, slots=True)
class _Applied:
    """What the latest applied set was made of. ``digest``: of the state it made."""

    step: int | None
    terms: Terms
    fingerprints: dict[int, bytes]
    digest: bytes


class Parts:
    """The parts of one run. Thread-safe."""

    def __init__(self, run: Run) -> None:
        self.layout = run.layout
        #: A part's header names each tensor in its metadata as well.
        self.max_header_bytes = 2 * run.layout.max_header_bytes
        self._run = run
        self._gatherings: list[Gathering] = []
        self._applied: _Applied | None = None
        self._lock = threading.Lock()

    # --- a part's way -----------------------------------------------------------------------------------------------

    def admit(self, step: int | None, index: int, terms: Terms) -> bool:
        """Whether staging is needed for this part. ``step`` None: of the initial weights.

        Raises, before its body is read, InvalidRequest, StepConflict, StaleStep and what Ledger.admit() raises.
        """
        if not 0 <= index < terms.of:
            raise InvalidRequest(f"part {index} of {terms.of}: parts are numbered from 0 to {terms.of - 1}")
        if step is not None:
            self._run.ledger.admit(step, terms.writer)
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
        """A part to receive, now that admit() let it in. ``reserve`` is called where staging is needed."""
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
        """Take the part's slices. Raises LayoutMismatch where another part has some of them, and claims none."""
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
        """The part's body is whole. After ``complete``, apply() must follow.

        Raises StepConflict where it was there with other bytes; LayoutMismatch where it is the last and elements are
        missing: the part is dropped, the others stay.
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
                return "staged"
            if len(gathering.done) + 1 == gathering.terms.of and (gaps := gathering.gaps(self.layout)):
                fault = LayoutMismatch(
                    f"all {gathering.terms.of} parts are there and elements are missing: {listed(gaps)}"
                )
                gathering.forget(part, fault)
                raise fault
            del gathering.coming[part.index]
            gathering.done[part.index] = part.fingerprint
            gathering.applying = len(gathering.done) == gathering.terms.of
            return "complete" if gathering.applying else "staged"

    def give_up(self, part: Part) -> None:
        """The part will not come: make room for it to be sent again, and give back staging that holds no other."""
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
        except BaseException:
            with self._lock, contextlib.suppress(ValueError):
                self._gatherings.remove(gathering)
            raise
        else:
            self._note(gathering)
            return result
        finally:
            gathering.staged.release()

    # --- the whole --------------------------------------------------------------------------------------------------

    def staged(self, step: int | None) -> tuple[int, ...] | None:
        """The parts of a step that are there; None where it is not being put together."""
        with self._lock:
            found = self._find(step)
            return tuple(sorted(found.done)) if found else None

    def count(self) -> int:
        """How many steps are being put together."""
        return len(self._gatherings)

    def expire(self, silence: float) -> list[Expired]:
        """Give up the steps of which nothing came for ``silence`` seconds, and give their staging back."""
        now = time.monotonic()
        with self._lock:
            idle = [g for g in self._gatherings if not g.applying and now - g.touched > silence]
            expired = [Expired(g.step, g.missing, g.terms.of) for g in idle]
            for gathering, why in zip(idle, expired, strict=True):
                self._drop(gathering, StaleStep(str(why)))
        return expired

    def close(self) -> None:
        """Give everything up: the run is deleted."""
        with self._lock:
            for gathering in [g for g in self._gatherings if not g.applying]:
                self._drop(gathering, StaleStep(f"run {self._run.config.run!r} was deleted"))

    # ----------------------------------------------------------------------------------------------------------------

    def _find(self, step: int | None) -> Gathering | None:
        return next((gathering for gathering in self._gatherings if gathering.step == step), None)

    def _open(self, step: int | None, terms: Terms, reserve: Callable[[], Staged]) -> Gathering:
        self._check_not_given_up(step)
        staged = self._reserve(step, reserve)
        # Only now: where there is no room, nothing is dropped for nothing.
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
        while True:
            try:
                return reserve()
            except Overloaded:
                # Parts of an older step that nobody completes make room for those of a newer one.
                late = time.monotonic() - _STALLED_SECONDS
                stalled = [
                    g for g in self._gatherings if not g.applying and g.touched < late and _order(g) < (step or 0)
                ]
                if not stalled:
                    raise
                old = min(stalled, key=_order)
                self._drop(old, StaleStep(f"{_what(old.step)} was given up: the rest of its parts did not come"))

    def _check_not_given_up(self, step: int | None) -> None:
        steps = [g.step for g in self._gatherings if g.step is not None]
        if step is not None and len(steps) >= _MOST_STEPS and step < min(steps):
            raise StaleStep(f"{_what(step)} was given up: parts of steps {', '.join(map(str, sorted(steps)))} came")

    def _known_of_applied(self, step: int | None, index: int, terms: Terms) -> bytes | None:
        """The fingerprint of a part that is in the run's current state."""
        applied, state = self._applied, self._run.state
        if applied is None or state is None or state.version.digest != applied.digest:
            return None
        if (applied.step, applied.terms) != (step, terms) or (step is None and state.version.n):
            return None
        return applied.fingerprints.get(index)

    def _outcome_of_gone(self, gathering: Gathering) -> Outcome:
        applied = self._applied
        if applied and (applied.step, applied.terms) == (gathering.step, gathering.terms):
            return "applied"
        raise Superseded(f"{_what(gathering.step)} was given up meanwhile", retry_after=0.0)

    def _drop(self, gathering: Gathering, fault: EmaError) -> None:
        self._gatherings.remove(gathering)
        for part in gathering.coming.values():
            part.fault = fault
        gathering.staged.release()

    def _decide(self, gathering: Gathering) -> UpdateResult | RunInfo:
        if gathering.step is not None:
            return self._run.apply(gathering.step, gathering.staged, gathering.terms.writer)
        terms = gathering.terms
        self._run.initialise(gathering.staged, num_updates=terms.num_updates, step=terms.step)
        return self._run.info()

    def _note(self, gathering: Gathering) -> None:
        state = self._run.state
        with self._lock:
            if gathering in self._gatherings:
                self._gatherings.remove(gathering)
            # A state that moved on meanwhile is not the one these parts made: their repeats are stale then.
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
