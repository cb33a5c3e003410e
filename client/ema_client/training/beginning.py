"""The beginning of a training: the weights that it begins with, where they are loaded after its run was made.

Programs make the EMA with the model, and load weights into the model later. A training begins with the first step of an
optimizer that may change the model: whatever the tensors hold then are the training's initial weights, whoever wrote
them. Torch counts writes, but not all: ``parameter.data.copy_()`` is not counted, and moving a model to a device is a
write that changes nothing. So values are compared, by their hash.

Knows: the tensors of a model, and the moment before the first step. Does not know: runs, or how weights travel.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema_client import wire
from ema_client.errors import NameCollision, UsageError
from ema_client.forks import Home
from ema_client.http.digests import Digest, blocks, can_digest
from ema_client.tensors.body import memory, on_host
from ema_client.tensors.layout import dtype_of
from ema_client.training.kinds import AnySelection
from ema_client.training.step_hook import is_capturing, may_change

__all__ = ["Beginning"]


class Beginning:
    """A model's tensors from the making of their run to the first step; drop the object to wait for no step any more.

    Refers weakly to everything but ``selection``: neither the model nor whoever waits for the step is kept alive. For
    the process that made the object; a step in a fork is no concern of it.

    Args:
        model: whose tensors are selected.
        selection: finds the tensors in the model.
        tensors: those that the run was made of, in the selection's order.
        begins: a method, called ahead of the first step that may change the tensors. Must leave the object alive: torch
            goes through its hooks then.
    """

    def __init__(
        self, model: nn.Module, selection: AnySelection, tensors: Sequence[Tensor], begins: Callable[[], None]
    ) -> None:
        self._model = weakref.ref(model)
        # Of its own: a selection tells each piece of news once.
        self._selection = copy.copy(selection)
        self._entries = wire.place(selection.specs)
        self._hash = self._hash_of(tensors)
        self._begins = weakref.WeakMethod(begins)
        self._home = Home()
        #: How often other values were found.
        self.changes = 0
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

    def changed(self) -> list[Tensor] | None:
        """The model's tensors, where parameters have other values than at the latest call or, at first, in the run.

        Reads all parameters, once. Buffers come along and are not compared: a forward pass changes buffers.
        """
        tensors = self.tensors()
        if tensors is None or (found := self._hash_of(tensors)) == self._hash:
            return None
        self._hash = found
        self.changes += 1
        return tensors

    def ahead_of(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        if self.over or not self._home.is_here or is_capturing():
            return
        tensors = self.tensors()
        if tensors is None or may_change(optimizer, tensors):
            if begins := self._begins():
                begins()
            self.over = True

    def _hash_of(self, tensors: Sequence[Tensor]) -> bytes:
        """Of the parameters among the tensors, as they are sent: one tensor at a time is copied or cast, if need be."""
        whole = Digest(blocks()) if can_digest() else hashlib.blake2b(digest_size=16)
        with torch.no_grad():
            for tensor, entry in zip(tensors, self._entries, strict=True):
                if isinstance(tensor, nn.Parameter):
                    whole.update(memory(on_host(tensor.detach().to(dtype_of(entry)))))
        return whole.digest()


# A step under torch.compile calls the hook at each step, instead of tracing into it once. Not torch.compiler.disable(),
# which would import the compiler with this module, for two seconds; torch's optimizers do the same.
@_disable_dynamo
def _ahead_of(beginning: weakref.ref[Beginning], optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: Any) -> None:
    if (found := beginning()) is not None:
        found.ahead_of(optimizer)
