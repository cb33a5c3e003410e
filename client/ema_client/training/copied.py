"""A copied trainer: in which process the copy was made, at which step, and which EMA belongs to the copy.

Knows: processes by their names, and a run's snapshots. Does not know: what a copy takes along, how a copy joins its run
(joining), models.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

from ema_client.client import EmaClient
from ema_client.forks import this_process
from ema_client.training.state import snapshot_of_step

__all__ = ["Copied"]


@dataclass(frozen=True, slots=True)
class Copied:
    """Where and when a copy was made. Travels with the copy, into other processes too.

    step: the trainer's. sent: the step of the trainer's latest update sent. Both None where they are not known.
    process: the name of the process in which the copy was made.
    """

    step: int | None = None
    sent: int | None = None
    process: str = field(default_factory=this_process)

    @property
    def is_here(self) -> bool:
        """Whether this is the process in which the copy was made, where the original may train on."""
        return self.process == this_process()

    def again(self) -> Copied:
        """Of a copy of the copy, made now."""
        return replace(self, process=this_process())

    def snapshot(self, client: EmaClient, run: str) -> str | None:
        """Of a run that went on since, the snapshot of the copy's step; None where there is none, or no need."""
        if self.sent is None or (client.run(run).step or 0) <= self.sent:
            return None
        return snapshot_of_step(client, run, self.sent)

    def tell_if_later(self, run: str, step: int | None) -> None:
        """Warn where the EMA that the copy reads is of a later step than the copy."""
        if self.sent is not None and (step or 0) > self.sent:
            # 3: the line that called the RemoteEma.
            warnings.warn(
                f"a copy of step {self.sent} of run {run!r} reads the EMA of step {step}: no snapshot of the copy's "
                "step is there; a state_dict() when the copy is made keeps one",
                stacklevel=3,
            )
