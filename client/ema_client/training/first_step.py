"""The moment ahead of the first step of a torch optimizer that may change a model's tensors.

Whatever the tensors hold then are the weights that a training begins, or goes on, with, whoever wrote them and however.

Knows: a model's tensors, torch's hook ahead of steps. Does not know: runs, values, or what is done in that moment.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema_client.errors import NameCollision, UsageError
from ema_client.forks import Home
from ema_client.training.kinds import AnySelection
from ema_client.training.step_hook import is_capturing, may_change

__all__ = ["FirstStep"]


class FirstStep:
    """Waits for the first step; drop the object to wait no more.

    Refers weakly to everything but ``selection``: neither the model nor whoever waits for the step is kept alive. For
    the process that made the object; a step in a fork is no concern of it.

    Args:
        model: whose tensors are selected.
        selection: finds the tensors in the model.
        ahead: a method, called with the optimizer ahead of the first step that may change the tensors. Must leave the
            object alive: torch goes through its hooks then.
    """

    def __init__(self, model: nn.Module, selection: AnySelection, ahead: Callable[[Optimizer], None]) -> None:
        self._model = weakref.ref(model)
        # Of its own: a selection tells each piece of news once.
        self._selection = copy.copy(selection)
        self._ahead = weakref.WeakMethod(ahead)
        self._home = Home()
        #: Whether there was a step that may have changed the tensors.
        self.over = False
        handle = register_optimizer_step_pre_hook(partial(_ahead_of, weakref.ref(self)))
        weakref.finalize(self, handle.remove).atexit = False

    def tensors(self) -> list[Tensor] | None:
        """The model's tensors of now; None where the model is gone, or is not what it was: an update will say so."""
        model = self._model()
        if model is None or not self._home.is_here:
            return None
        try:
            return self._selection.of(model)[0]
        except (UsageError, NameCollision):
            return None

    def ahead_of(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        if self.over or not self._home.is_here or is_capturing():
            return
        tensors = self.tensors()
        if tensors is None or may_change(optimizer, tensors):
            if ahead := self._ahead():
                ahead(optimizer)
            self.over = True


# A step under torch.compile calls the hook at each step, instead of tracing into it once. Not torch.compiler.disable(),
# which would import the compiler with this module, for two seconds; torch's optimizers do the same.
@_disable_dynamo
def _ahead_of(first: weakref.ref[FirstStep], optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: Any) -> None:
    if (found := first()) is not None:
        found.ahead_of(optimizer)
