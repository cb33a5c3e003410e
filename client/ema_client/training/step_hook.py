"""A hook ahead of every step of every torch optimizer: the moment before parameters change.

Knows: torch's optimizers. Does not know: whose parameters a step changes, or what has to be done before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema_client.forks import Home

__all__ = ["StepHook"]


class StepHook:
    """Calls ``before`` ahead of every step of every torch optimizer, and knows whether there was a step.

    For the process that made the hook: steps in its forks are no concern of it.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._fired = False
        self._home = Home()
        self._handle = register_optimizer_step_pre_hook(self._fire)

    def fired(self) -> bool:
        """Whether there was a step since the latest call: then parameters are changed by an optimizer."""
        fired, self._fired = self._fired, False
        return fired

    def remove(self) -> None:
        """Call ``before`` no more."""
        self._handle.remove()

    def _fire(self, _optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if self._home.is_here:
            self._fired = True
            self._before()
