"""How a trainer joins a run: goes on with an existing run, or makes a new run, and fences off earlier trainers.

Knows what a trainer and a resumed run must agree on, and which of the two is ahead. Does not know models, which rank
does what (plan), updates, or when an update is due: the initial weights come from the caller.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ema_client.client import EmaClient
from ema_client.errors import RunNotFound, UsageError, listed
from ema_client.protocol import MAX_STEP, SCHEDULE_FIELDS, RunConfig, RunInfo, RunLayout
from ema_client.training.plan import Initial, Plan
from ema_client.training.state import check_state_is_of, rewind_to, snapshot_of_step

__all__ = ["Joined", "Joining", "Resume", "Start"]

#: Whether a trainer makes a run (False), goes on with a run (True), or does whichever can be done.
Resume = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a training begins: at most one of ``step`` and ``state``, both None where no checkpoint was loaded.

    step: the step of the checkpoint that was loaded. state: what state_dict() gave for the checkpoint.

    Raises UsageError for what cannot be meant.
    """

    resume: Resume = False
    step: int | None = None
    state: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.resume not in (True, False, "auto"):
            raise UsageError(f"resume={self.resume!r} is unknown", hint="give True, False or 'auto'")
        if self.step is not None and self.state is not None:
            raise UsageError("both a step and a state are given", hint="give the state: it has its own step")
        if self.state is not None and not self.resume:
            raise UsageError("a state is of a run that exists", hint="give resume='auto' or resume=True with the state")
        if self.step is not None and not 0 <= self.step <= MAX_STEP:
            raise UsageError(f"step {self.step} is not between 0 and {MAX_STEP}")

    @property
    def at(self) -> int | None:
        """The step at which the training begins, None where that was not told."""
        return self.step if self.state is None else self.state["step"]

    def from_where_it_is(self, client: EmaClient, run: str) -> Start:
        """The start at the run's step of now, where no step was told and there is a run to go on with."""
        if not self.resume or self.at is not None:
            return self
        try:
            return replace(self, step=client.run(run).step or 0)
        except RunNotFound:
            return self


@dataclass(frozen=True, slots=True)
class Joined:
    """What came of joining: the step from which updates count on, and the writer's number.

    writer: None on a rank that sends nothing. made: the run as this trainer's initial weights made it; None where the
    run was there, and on a rank that sends nothing of a whole model. taken: the run as it was found, where the training
    is taken to be where the run is, as nothing told its step.
    """

    step: int
    writer: int | None
    made: RunInfo | None = None
    taken: RunInfo | None = None


@dataclass(frozen=True, slots=True)
class Joining:
    """What a trainer needs to join a run. All ranks of a sharded model join together: if one fails, all do.

    config: the run as the trainer means it, with the layout of the whole model.
    initial: gives this rank's tensors as the first shadow, by name; called where the tensors are sent, and only there.
    ahead: so many steps a training may be ahead of its run without anything missing; None: any number.
    """

    client: EmaClient
    config: RunConfig
    plan: Plan
    initial: Initial
    ahead: int | None = 0

    def join(self, start: Start) -> Joined:
        """For RemoteEma alone: warnings name the line that called its constructor. Raises as RemoteEma says."""
        if start.state is not None:
            check_state_is_of(self._run, start.state)
        writer = info = None
        try:
            if start.resume:
                # First of all: from here on no earlier trainer pushes.
                writer = self._take_over()
                info = self.plan.together(self._compatible)
        except RunNotFound:
            if start.resume != "auto":
                raise
        if info is None or info.status == "awaiting_weights":
            self._tell(_lost(self._run, start), level=4)
            made = self.plan.create(self.client, self.config, self.initial, step=start.at or 0)
            # Also where the run was there: another trainer may have attached before the run was made anew.
            return Joined(start.at or 0, self._take_over(), made)
        self._tell(_other_schedule(info, self.config) or _other_posthoc(info, self.config), level=4)
        step, warning = self._agree_on_step(info, start)
        self._tell(warning, level=4)
        return Joined(step, writer, taken=info if start.at is None and start.state is None else None)

    @property
    def _run(self) -> str:
        return self.config.run

    def _tell(self, warning: str | None, *, level: int) -> None:
        """Warn on a single rank. level: how far above the caller the line to be named is."""
        if warning and (self.plan.part or 0) == 0:
            warnings.warn(warning, stacklevel=level + 1)

    def _take_over(self) -> int | None:
        """The writer's number, which fences off earlier trainers, the same on all sending ranks."""
        return self.plan.once(lambda: self.client.attach(self._run))

    # --- the step ---------------------------------------------------------------------------------------------------

    def _agree_on_step(self, info: RunInfo, start: Start) -> tuple[int, str | None]:
        """The step from which updates count on, and what the user is to be told. Goes back with a trainer that did."""
        theirs, ours = info.step or 0, start.at
        if start.state is not None:
            self.plan.once(lambda: rewind_to(self.client, start.state or {}))
            return ours or 0, None
        if ours is None or ours == theirs or (ours > theirs and self._lags_duly(info, ours)):
            return theirs if ours is None else ours, None
        if self.plan.once(lambda: self._rewind_to_step(ours)) or self.plan.part is None:
            return ours, None
        both = (
            f"run {self._run!r} is at step {theirs} and the training comes back at step {ours}: no snapshot of that "
            f"step is there, and the {abs(ours - theirs)} steps between"
        )
        if ours > theirs:
            return ours, (
                f"{both} are missing in the EMA, as where a power loss took the run back to its checkpoint; load the "
                f"training's checkpoint of step {theirs} to repeat the steps, or go on without them"
            )
        return theirs, (
            f"{both} count twice in the EMA; give the checkpoint's state=, of RemoteEma.state_dict(), to go back with "
            "it"
        )

    def _lags_duly(self, info: RunInfo, ours: int) -> bool:
        """Whether a run that is behind the training misses nothing: by steps that were not to be sent, or before the
        first update, of a run that was imported."""
        return info.step is None or self.ahead is None or ours - info.step <= self.ahead

    def _rewind_to_step(self, step: int) -> str | None:
        """Go back to the newest snapshot of ``step``; its name, None where there is none."""
        name = snapshot_of_step(self.client, self._run, step)
        if name is not None:
            self.client.rewind(self._run, name)
        return name

    # --- what must be the same --------------------------------------------------------------------------------------

    def _compatible(self) -> RunInfo:
        """The run to go on with. Raises UsageError where the run is not as the trainer means it.

        A run that awaits its initial weights is whatever its creator means: it is made anew.
        """
        info = self.client.run(self._run)
        if info.status == "awaiting_weights":
            return info
        self._check_same("use_num_updates", info.use_num_updates, self.config.use_num_updates)
        self._check_same("decay_per", info.decay_per, self.config.decay_per)
        theirs = self.client.layout(self._run)
        self._check_same_copied(theirs.copied)
        self._check_same_layout(theirs)
        return info

    def _check_same(self, name: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise UsageError(
                f"run {self._run!r} has {name}={theirs!r}", hint=f"resume it with {name}={theirs!r}, or make a new run"
            )

    def _check_same_copied(self, theirs: tuple[str, ...]) -> None:
        ours = self.config.copied
        if set(theirs) != set(ours):
            named = f": {listed(ours)}" if ours else ""
            raise UsageError(
                f"run {self._run!r} copies {len(theirs)} of its tensors, this trainer {len(ours)}{named}",
                hint="resume with the choice of buffers that the run was made with, or make a new run",
            )

    def _check_same_layout(self, run: RunLayout) -> None:
        theirs = {spec.name: spec for spec in run.layout}
        ours = {spec.name: spec for spec in self.config.layout}
        faults = [f"{name!r} is missing" for name in theirs if name not in ours]
        faults += [f"{name!r} is not the run's" for name in ours if name not in theirs]
        both = [(theirs[name], spec) for name, spec in ours.items() if name in theirs]
        faults += [
            f"{spec.name!r} is {spec.dtype} {spec.shape}, the run's {was.dtype} {was.shape}"
            for was, spec in both
            if was != spec
        ]
        if faults:
            hint = "resume with the model the run was made with, frozen as it was then, or make a new run"
            dtypes = {spec.dtype for spec in run.layout}
            fit = len(theirs) == len(ours) == len(both) and all(was.shape == spec.shape for was, spec in both)
            if fit and len(dtypes) == 1:
                hint = f"send what the run was made with: push_dtype={dtypes.pop()!r}"
            raise UsageError(
                f"the model's tensors are not those of run {self._run!r}: {listed(faults, '; ')}", hint=hint
            )


def _lost(run: str, start: Start) -> str | None:
    if start.state is None or not start.at:
        return None
    return (
        f"run {run!r} is not on the service any more: its EMA begins anew, at step {start.at}, with the model's weights"
    )


def _other_schedule(info: RunInfo, config: RunConfig) -> str | None:
    """What a run that is gone on with keeps, where the trainer asks for another schedule, decay or average; None where
    it has what is asked for."""
    told = {average.name: average for average in info.averages}
    for asked in config.averages:
        if (theirs := told.get(asked.name)) is None:
            return f"run {info.run!r} has no average {asked.name!r}; add_average() adds one to a run that exists"
        fields = asked.schedule_fields()
        same = all(math.isclose(getattr(theirs, name) or 0.0, value, rel_tol=1e-9) for name, value in fields.items())
        if theirs.schedule != asked.schedule or theirs.start != asked.start or not same:
            return (
                f"run {info.run!r} goes on with schedule {theirs.schedule!r} of average {asked.name!r} as it was made, "
                f"not with {asked.schedule!r} {fields}: add_average() adds one of another schedule, under another name"
            )
        decay = config.decay if asked.decay is None else asked.decay
        if "decay" in SCHEDULE_FIELDS[asked.schedule] and _float32(theirs.decay) != _float32(decay):
            return (
                f"run {info.run!r} goes on with its decay {theirs.decay:.6g}, not {decay:.6g}; set_decay() changes it"
            )
    return None


def _other_posthoc(info: RunInfo, config: RunConfig) -> str | None:
    """What a run that is gone on with keeps for averages of any length, where the trainer asks for something else."""
    asked, ring = config.posthoc, info.ring
    if asked is None or (
        ring is not None
        and (ring.snapshots, ring.dtype) == (asked.snapshots, asked.dtype)
        and sorted(ring.sigma_rel) == sorted(asked.sigma_rel)
    ):
        return None
    has = "without posthoc" if ring is None else f"with its posthoc of {ring.snapshots} snapshots in {ring.dtype}"
    return f"run {info.run!r} goes on {has}, as it was made: make a new run for another"


def _float32(decay: float) -> float:
    return float(torch.tensor(decay, dtype=torch.float32, device="cpu"))
