"""Sweeps over the length of an average: which lengths are fetched, evaluated, and looked at next.

Knows: that several averages come from one reading of the ring, that some may be refused, where a better length may lie,
what the service is told of the results.
Does not know: how averages come (swept), tensors, what an evaluation does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ema_client import protocol
from ema_client.errors import EmaError, SynthesisRefused, UsageError
from ema_client.http.transport import Transport
from ema_client.protocol import (
    FINITE,
    MAX_SWEPT,
    SWEEP_POINTS,
    SWEEP_TEXT,
    ProfileInfo,
    SweepKind,
    SweepPoint,
    SweepReport,
    WeightsInfo,
    to_json,
)
from ema_client.reading.checking import Progress
from ema_client.reading.swept import AskedSweep
from ema_client.scratch import scratch_folder
from ema_client.targets import Target, between

__all__ = ["Evaluate", "Sweep", "Sweeper", "SweptPoint", "checked_label", "lengths_of", "log_unreported"]

_log = logging.getLogger("ema_client")

#: Called with a safetensors file and what is in it; gives a number, or None where it came to nothing.
Evaluate = Callable[[Path, WeightsInfo], "float | None"]


@dataclass(frozen=True, slots=True)
class SweptPoint:
    """An average of a sweep.

    value: its sigma_rel, decay or half-life. result: what the evaluation gave, None where there is none. info: what the
    weights said of themselves; None of an average that was refused. refused: why, and what could be had instead.
    """

    value: float
    result: float | None = None
    info: WeightsInfo | None = None
    refused: str | None = None

    @property
    def counts(self) -> bool:
        """Whether the average has a result that can be compared."""
        return self.result is not None and math.isfinite(self.result)

    def to_report(self) -> SweepPoint:
        """The point as the service is told: without a result that is no number, which JSON has not."""
        told = self.result if self.result is not None and FINITE[0] <= self.result <= FINITE[1] else None
        return SweepPoint(self.value, told, None if self.refused is None else self.refused[:SWEEP_TEXT])


@dataclass(frozen=True, slots=True)
class Sweep:
    """The averages of one run and time that were looked at, ascending by value.

    kind: "sigma_rel", "decay" or "half_life". at: the time, as it can be asked for again: the name of a snapshot, or a
    counter; None where all averages were refused. highest: whether the highest result is the best, not the lowest.
    """

    run: str
    kind: str
    at: str | int | None
    points: tuple[SweptPoint, ...]
    highest: bool = False

    @property
    def best(self) -> SweptPoint | None:
        """The average with the best result; None where there are no results."""
        counted = [point for point in self.points if point.counts]
        return min(counted, key=self._badness, default=None)

    @property
    def at_edge(self) -> bool:
        """Whether the best average is the first or the last that has a result: a better one may lie beyond."""
        counted = [point for point in self.points if point.counts]
        return bool(counted) and self.best in (counted[0], counted[-1])

    def _badness(self, point: SweptPoint) -> float:
        result = point.result or 0.0
        return -result if self.highest else result

    def to_report(self, name: str | None = None) -> SweepReport:
        """The sweep as the service is told, with as many of the points as a report may have, the best. name: what the
        results are."""
        ranked = sorted(self.points, key=lambda point: (not point.counts, self._badness(point)))
        told = sorted(ranked[: SWEEP_POINTS[1]], key=lambda point: point.value)
        points = tuple(point.to_report() for point in told)
        time = Target(self.kind, 0.0, self.at).time
        return SweepReport(cast(SweepKind, self.kind), points, time, self.highest, name)

    def around_best(self) -> tuple[float, ...]:
        """The values in the middle between the best average and its neighbours: at most two, none where none is new."""
        counted, best = [point.value for point in self.points if point.counts], self.best
        if best is None:
            return ()
        index = counted.index(best.value)
        beside = counted[max(index - 1, 0) : index] + counted[index + 1 : index + 2]
        known = {point.value for point in self.points}
        return tuple(sorted({between(self.kind, best.value, other) for other in beside} - known))


@dataclass
class Sweeper:
    """Evaluates averages of a run, all of one time: the first ones' where ``at`` is None.

    evaluate: called in the caller's thread, one average at a time; what it raises ends the sweep. The file is deleted
    when it returns. profiles: answers ``GET .../profiles``. told: called with each point as it comes.
    progress: called with the bytes of averages that have come, and in all, of each request. name: what the results are.
    unreported: called where the service does not take the results; None: the service is not told of them.
    """

    transport: Transport
    run: str
    kind: str
    evaluate: Evaluate
    profiles: Callable[[Target], ProfileInfo]
    told: Callable[[SweptPoint], None]
    at: str | int | None = None
    max_error: float | None = None
    dtype: str | None = None
    highest: bool = False
    progress: Progress | None = None
    name: str | None = None
    unreported: Callable[[EmaError], None] | None = None
    _points: dict[float, SweptPoint] = field(default_factory=dict)

    @property
    def sweep(self) -> Sweep:
        """What was looked at so far."""
        points = tuple(self._points[value] for value in sorted(self._points))
        return Sweep(self.run, self.kind, self.at, points, self.highest)

    def go_through(self, values: Sequence[float], refine: int) -> Sweep:
        """Evaluate averages of these lengths, then ``refine`` others, and report what was found, also where the sweep
        ends early: hours of evaluations are in it."""
        whole = False
        try:
            self.look_at(values)
            self.refine(refine)
            whole = True
        finally:
            self._report(patient=whole)
        return self.sweep

    def look_at(self, values: Sequence[float]) -> None:
        """Evaluate averages of these lengths, as many of them at a time as the service sends at once."""
        for first in range(0, len(values), MAX_SWEPT):
            with scratch_folder() as folder:
                for point in self._evaluated(values[first : first + MAX_SWEPT], folder):
                    self._points[point.value] = point
                    self.told(point)

    def refine(self, count: int) -> None:
        """Evaluate up to ``count`` further averages, each beside the best one so far."""
        while count > 0 and (values := self.sweep.around_best()[:count]):
            self.look_at(values)
            count -= len(values)

    def _report(self, *, patient: bool) -> None:
        """Tell the service of the results, if there are any. patient: with retries; somebody who ends a sweep early, or
        whose service does not answer, waits for no more than one try."""
        if self.unreported is None or self.sweep.best is None:
            return
        ask = self.transport.json if patient else self.transport.json_once
        try:
            ask("POST", protocol.sweeps_path(self.run), to_json(self.sweep.to_report(self.name)))
        except EmaError as error:
            self.unreported(error)

    def _evaluated(self, values: Sequence[float], folder: Path) -> Iterator[SweptPoint]:
        paths = [folder / f"{self.kind}-{value:.9g}.safetensors" for value in values]
        targets = tuple(Target(self.kind, value, self.at, self.max_error) for value in values)
        try:
            infos = AskedSweep(self.run, targets, self.dtype).save(self.transport, paths, self.progress)
        except SynthesisRefused as fault:
            yield from self._without_refused(values, targets, fault, folder)
            return
        if self.at is None:
            self.at = infos[0].num_updates
        for value, path, info in zip(values, paths, infos, strict=True):
            result = self.evaluate(path, info)
            path.unlink(missing_ok=True)
            yield SweptPoint(value, result, info)

    def _without_refused(
        self, values: Sequence[float], targets: Sequence[Target], fault: SynthesisRefused, folder: Path
    ) -> Iterator[SweptPoint]:
        """The averages that can be had, of those of which the service refused one and with it all."""
        refused = {value: why for value, target in zip(values, targets, strict=True) if (why := self._why(target))}
        # Where each could be had by itself, the run has gone on in between.
        refused = refused or dict.fromkeys(values, fault.detail)
        yield from (SweptPoint(value, refused=why) for value, why in refused.items())
        if rest := [value for value in values if value not in refused]:
            yield from self._evaluated(rest, folder)

    def _why(self, target: Target) -> str | None:
        try:
            return self.profiles(target).refused
        except SynthesisRefused as fault:
            return fault.detail


def lengths_of(
    given: Mapping[str, Sequence[float] | None], at: str | int | None, max_error: float | None
) -> tuple[str, list[float], str | int | None]:
    """The kind of lengths that is given, as the only one, the lengths, each once, and the time, as a Target has it.

    given: lengths by their kind. at, max_error: as for Target. Raises UsageError where that makes no sweep.
    """
    kinds = [kind for kind, values in given.items() if values is not None]
    if len(kinds) != 1:
        raise UsageError(f"{len(kinds)} kinds of lengths are given", hint="give sigma_rel=, decay= or half_life=")
    values = given[kind := kinds[0]] or ()
    targets = [Target.of({kind: value, "at": at, "max_error": max_error}, called="sweep") for value in values]
    lengths = {target.value: target.at for target in targets if target and isinstance(target.value, float)}
    if not lengths:
        raise UsageError(f"{kind}=[] names no average", hint=f"{kind}=[0.05, 0.1]")
    return kind, list(lengths), next(iter(lengths.values()))


def checked_label(name: str | None) -> str | None:
    """What results are, as the service keeps it. Raises UsageError."""
    if name is not None and len(name) > SWEEP_TEXT:
        raise UsageError(f"name= has {len(name)} characters", hint=f"at most {SWEEP_TEXT}, such as 'FID'")
    return name


def log_unreported(run: str, error: EmaError) -> None:
    """Log that the service did not take the results of a sweep, and why."""
    _log.warning("run %r: the service did not keep what the sweep found: %s", run, error)
