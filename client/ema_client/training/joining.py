"""How a trainer joins a run: goes on with an existing run, or makes a new run, and fences off earlier trainers.

Knows what a trainer and a resumed run must agree on. Does not know models, which rank does what (plan), updates, or
when an update is due: the initial weights come from the caller.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ema_client.client import EmaClient
from ema_client.errors import UsageError, listed
from ema_client.protocol import RunConfig, RunInfo
from ema_client.training.plan import Initial, Plan

__all__ = ["Joining"]


@dataclass(frozen=True, slots=True)
class Joining:
    """What a trainer needs to join a run. All ranks of a sharded model join together: if one fails, all do.

    config: the run as the trainer means it, with the layout of the whole model.
    initial: gives this rank's tensors as the first shadow, by name; called where the tensors are sent, and only there.
    """

    client: EmaClient
    config: RunConfig
    plan: Plan
    initial: Initial

    def join(self, *, resume: bool) -> tuple[RunInfo | None, int | None]:
        """The run and the writer's number. None for the run where another rank makes the run; None for the number on a
        rank that sends nothing.

        For a constructor to call: a warning names the line that called the constructor. Raises as RemoteEma says.
        """
        # First of all: from here on no earlier trainer pushes.
        writer = self._take_over() if resume else None
        info = self.plan.together(self._compatible) if resume else None
        if info is not None and _float32(info.decay) != _float32(self.config.decay):
            warnings.warn(
                f"run {self._run!r} goes on with its decay {info.decay:.6g}, not {self.config.decay:.6g}; "
                "set_decay() changes it",
                stacklevel=4,
            )
        if info is None or info.status == "awaiting_weights":
            info = self.plan.create(self.client, self.config, self.initial)
        return info, writer or self._take_over()

    @property
    def _run(self) -> str:
        return self.config.run

    def _take_over(self) -> int | None:
        """The writer's number, which fences off earlier trainers, the same on all sending ranks."""
        return self.plan.once(lambda: self.client.attach(self._run))

    def _compatible(self) -> RunInfo:
        """The run to go on with. Raises UsageError where the run is not as the trainer means it."""
        info = self.client.run(self._run)
        self._check_same("use_num_updates", info.use_num_updates, self.config.use_num_updates)
        self._check_same("decay_per", info.decay_per, self.config.decay_per)
        self._check_same_copied(info.copied)
        layout = self.config.layout
        tensors, elements = len(layout), sum(torch.Size(spec.shape).numel() for spec in layout)
        if (info.tensors, info.parameters) != (tensors, elements):
            raise UsageError(
                f"run {self._run!r} has {info.tensors} tensors with {info.parameters} elements in all, "
                f"the model {tensors} with {elements}",
                hint="resume with the model the run was made with, frozen as it was then",
            )
        return info

    def _check_same(self, name: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise UsageError(
                f"run {self._run!r} has {name}={theirs!r}", hint=f"resume it with {name}={theirs!r}, or make a new run"
            )

    def _check_same_copied(self, theirs: int) -> None:
        ours = self.config.copied
        if theirs != len(ours):
            named = f": {listed(ours)}" if ours else ""
            raise UsageError(
                f"run {self._run!r} copies {theirs} of its tensors, this trainer {len(ours)}{named}",
                hint="resume with the choice of buffers that the run was made with, or make a new run",
            )


def _float32(decay: float) -> float:
    return float(torch.tensor(decay, dtype=torch.float32))
