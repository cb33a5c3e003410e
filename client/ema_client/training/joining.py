"""How a trainer joins its run: goes on with one that is there, or makes it, and fences off the trainers before it.

Knows what a trainer and the run it resumes must agree on, and which rank does what of it. Does not know models, updates
or when they are due: the initial weights come from whoever joins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ema_client.client import EmaClient
from ema_client.errors import RunExists, UsageError, listed
from ema_client.protocol import RunConfig, RunInfo
from ema_client.training.sharding import Plan, agreed, together

__all__ = ["Joining"]

_EXISTS_HINT = "pass resume=True to go on with it, choose another name, or delete the old run first"


@dataclass(frozen=True, slots=True)
class Joining:
    """What is needed to join a run. All ranks of a sharded model do it together: none goes on where one failed.

    config: the run as the trainer means it, with the layout of the whole model.
    initial: gives this rank's tensors as the first shadow, by name; called where they are sent, and only there.
    """

    client: EmaClient
    config: RunConfig
    plan: Plan
    initial: Callable[[], Mapping[str, Tensor]]

    def join(self, *, resume: bool) -> tuple[RunInfo | None, int | None]:
        """The run, None on a rank that left it to rank 0; and the writer's number, None on a rank that sends nothing.

        To be called by a constructor: a warning points at that one's caller. Raises as RemoteEma says.
        """
        # First of all: no trainer that was replaced pushes from here on.
        writer = self._take_over() if resume else None
        info = self._together(self._compatible) if resume else None
        if info is not None and _float32(info.decay) != _float32(self.config.decay):
            warnings.warn(
                f"run {self._run!r} goes on with its decay {info.decay:.6g}, not {self.config.decay:.6g}; "
                "set_decay() changes it",
                stacklevel=3,
            )
        if info is None or info.status == "awaiting_weights":
            info = self._create()
        return info, writer or self._take_over()

    @property
    def _run(self) -> str:
        return self.config.run

    def _take_over(self) -> int | None:
        """The number that fences off trainers before this one, the same on all ranks that send."""
        if self.plan.sharded:
            return agreed(lambda: self.client.attach(self._run) if self.plan.part == 0 else None)
        return self.client.attach(self._run) if self.plan.part is not None else None

    def _together(self, work: Callable[[], RunInfo]) -> RunInfo:
        return together(work) if self.plan.sharded else work()

    # --- a run that is there ----------------------------------------------------------------------------------------

    def _compatible(self) -> RunInfo:
        """The run to go on with. Raises UsageError where it is not as the trainer means it."""
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

    # --- a new run --------------------------------------------------------------------------------------------------

    def _create(self) -> RunInfo | None:
        if self.plan.sharded:
            together(self._declare)
            together(self._send_part)
            return self.client.wait_for_step(self._run, 0)
        # Where all ranks hold the whole model, rank 0 does it.
        return self._create_whole() if self.plan.part is not None else None

    def _create_whole(self) -> RunInfo:
        config, state = self.config, self.initial()
        try:
            return self.client.create_run(
                config.run,
                state,
                decay=config.decay,
                use_num_updates=config.use_num_updates,
                decay_per=config.decay_per,
                averages=config.averages,
                durability=config.durability,
                copied=config.copied,
                step=0,
            )
        except RunExists as exists:
            raise RunExists(exists.detail, hint=_EXISTS_HINT) from None

    def _declare(self) -> None:
        if self.plan.part != 0:
            return
        try:
            self.client.declare_run(self.config)
        except RunExists as exists:
            raise RunExists(exists.detail, hint=_EXISTS_HINT) from None

    def _send_part(self) -> None:
        plan = self.plan
        if plan.part is not None:
            part = {"part": plan.part, "of": plan.of}
            state, slices = self.initial(), plan.slices
            self.client.send_weights_part(self._run, state, slices=slices, group=plan.group, step=0, **part)


def _float32(decay: float) -> float:
    return float(torch.tensor(decay, dtype=torch.float32))
