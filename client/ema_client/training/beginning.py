"""The beginning of a training: the weights that it begins with, where they are loaded after its run was made.

Programs make the EMA with the model, and load weights into the model later. A training begins with the first step of an
optimizer that may change the model: whatever the tensors hold then are the training's initial weights, whoever wrote
them. Torch counts writes, but not all: ``parameter.data.copy_()`` is not counted, and moving a model to a device is a
write that changes nothing. So values are compared, by their hash.

Knows: the tensors of a model, and the moment before the first step. Does not know: runs, or how weights travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ema_client import wire
from ema_client.http.digests import Digest, blocks, can_digest
from ema_client.protocol import TensorSpec
from ema_client.tensors.body import memory, on_host
from ema_client.tensors.layout import dtype_of
from ema_client.training.first_step import FirstStep
from ema_client.training.kinds import AnySelection

__all__ = ["Beginning", "parameters_data", "parameters_hash"]


class Beginning(FirstStep):
    """A model's tensors from the making of their run to the first step.

    tensors: those that the run was made of, in the selection's order. The other arguments are FirstStep's.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: AnySelection,
        tensors: Sequence[Tensor],
        begins: Callable[[Optimizer], None],
    ) -> None:
        super().__init__(model, selection, begins)
        self._specs = selection.specs
        self._hash = parameters_hash(tensors, self._specs)
        #: How often other values were found.
        self.changes = 0

    def changed(self) -> list[Tensor] | None:
        """The model's tensors, where parameters have other values than at the latest call or, at first, in the run.

        Reads all parameters, once. Buffers come along and are not compared: a forward pass changes buffers.
        """
        tensors = self.tensors()
        if tensors is None or (found := parameters_hash(tensors, self._specs)) == self._hash:
            return None
        self._hash = found
        self.changes += 1
        return tensors


def parameters_hash(tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> bytes:
    """Of the parameters among the tensors, as they are sent."""
    whole = Digest(blocks()) if can_digest() else hashlib.blake2b(digest_size=16)
    for data in parameters_data(tensors, specs):
        whole.update(data)
    return whole.digest()


def parameters_data(
    tensors: Sequence[Tensor], specs: Sequence[TensorSpec], *, buffers: bool = False
) -> Iterator[memoryview]:
    """The data of the parameters among the tensors, as they are sent: one tensor at a time is copied or cast, if need
    be. buffers: of all tensors, which is the data of an update."""
    for tensor, entry in zip(tensors, wire.place(specs), strict=True):
        if buffers or isinstance(tensor, nn.Parameter):
            with torch.no_grad():
                on_cpu = on_host(tensor.detach().to(dtype_of(entry)))
            yield memory(on_cpu)
