"""A hook ahead of every step of every torch optimizer: the moment before parameters change.

Not every step comes by a hook: a captured CUDA graph is replayed without one, and an optimizer that is not torch's has
none. So the hook also tells, from the steps so far, whether it will come before the next change of given tensors.

Knows: torch's optimizers, and which parameters each holds. Does not know: what has to be done before a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema_client.forks import Home
from ema_client.training.sharding import local_memory

__all__ = ["StepHook", "is_capturing", "may_change"]


class StepHook:
    """Calls ``before`` ahead of every step of every torch optimizer, and knows which optimizers step so.

    A step that is captured into a CUDA graph changes nothing and waits for nothing (waiting would end the capture):
    ``before`` is not called. From then on the optimizer is taken to be replayed, without the hook, even where it steps
    by itself now and then, as trainings do for a batch that does not fit their graph.

    For the process that made the hook: steps in its forks are no concern of it.

    capturing: tells whether the calling thread captures a CUDA graph; by default torch is asked.
    """

    def __init__(self, before: Callable[[], None], *, capturing: Callable[[], bool] | None = None) -> None:
        self._before = before
        self._capturing = capturing or is_capturing
        self._fired = False
        #: Optimizer that stepped -> whether a step of it was captured.
        self._captured: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._home = Home()
        self._handle = register_optimizer_step_pre_hook(self._fire)

    def fired(self) -> bool:
        """Whether ``before`` was called since the latest call: then parameters are changed by an optimizer."""
        fired, self._fired = self._fired, False
        return fired

    def guards(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``before`` comes ahead of the next change of the tensors, as far as steps so far tell.

        Parameters that require gradients have to be held by an optimizer that fires the hook. Whose other tensors are,
        such as parameters of which mixed precision's optimizer holds float32 copies, cannot be told: for these it is
        enough that no optimizer is replayed.
        """
        held, replayed = self._held(captured=False), self._held(captured=True)
        if replayed and len(_apart(tensors, replayed)) < len(tensors):
            return False
        if not (others := _apart(tensors, held)):
            return True
        has_copies = any(not isinstance(each, nn.Parameter) for each in held)
        return not replayed and (has_copies or not any(_is_trained(each) for each in others))

    def remove(self) -> None:
        """Call ``before`` no more."""
        self._handle.remove()

    def _held(self, *, captured: bool) -> list[Tensor]:
        """What the optimizers hold that stepped so far, and of which a step was captured, or none was."""
        optimizers = [optimizer for optimizer, was in list(self._captured.items()) if was == captured]
        return [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]

    def _fire(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if self._home.is_here:
            captured = self._capturing()
            self._captured[optimizer] = captured or self._captured.get(optimizer, False)
            if not captured:
                self._fired = True
                self._before()


def _apart(tensors: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that are none of those held, no views of them, and no rank's own memory of them."""
    identities = set(map(id, held))
    others = [each for each in tensors if id(each) not in identities]
    if not others:
        # Looking at the addresses of 580 parameters takes 0.4 ms.
        return []
    addresses = {local_memory(each).data_ptr() for each in held}
    return [each for each in others if each.data_ptr() not in addresses]


def may_change(optimizer: Optimizer, tensors: Sequence[Tensor]) -> bool:
    """Whether a step of the optimizer may change the tensors.

    An optimizer changes tensors that it holds, or has memory of. Where an optimizer holds tensors that are no
    parameters, such as mixed precision's float32 copies, whose tensors follow cannot be told: they may be these.
    """
    held = [each for group in optimizer.param_groups for each in group["params"]]
    if any(not isinstance(each, nn.Parameter) for each in held):
        return True
    identities = set(map(id, tensors))
    return any(id(each) in identities for each in held) or not _storages(held).isdisjoint(_storages(tensors))


def is_capturing() -> bool:
    """Whether the calling thread captures a CUDA graph."""
    # Where CUDA is not in use, torch cannot be asked.
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    """The addresses of the tensors' memory, in which others may have their own parts."""
    return {local_memory(each).untyped_storage().data_ptr() for each in tensors} - {0}


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad
