"""The training weights, set aside while a model holds its EMA: LitEma's store() and restore().

Knows copies of tensors and their shapes. Does not know models, names, or what is written to the model meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ema_client.errors import AlreadyStored, NothingStored, UsageError

__all__ = ["SetAside"]


class SetAside:
    """At most one set of copies at a time, on the devices of the tensors that were copied. Not thread-safe."""

    def __init__(self) -> None:
        self._copies: list[Tensor] | None = None

    def check_empty(self) -> None:
        """Raises AlreadyStored where there are copies."""
        if self._copies is not None:
            raise AlreadyStored("training weights are stored and wait for restore()")

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Copy the parameters. Raises AlreadyStored."""
        self.check_empty()
        self._copies = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write the copies into ``parameters`` and free the copies.

        Raises NothingStored; UsageError before anything is written, where number or shapes differ.
        """
        if self._copies is None:
            raise NothingStored("restore() was called, and nothing is stored")
        targets = list(parameters)
        _check_same_shapes(self._copies, targets)
        with torch.no_grad():
            for copy, target in zip(self._copies, targets, strict=True):
                target.copy_(copy)
        self._copies = None


def _check_same_shapes(copies: list[Tensor], targets: list[Tensor]) -> None:
    if len(copies) != len(targets):
        raise UsageError(
            f"{len(copies)} tensors are stored, {len(targets)} are to be restored",
            hint="restore the parameters that were stored; nothing was written",
        )
    for index, (copy, target) in enumerate(zip(copies, targets, strict=True)):
        if copy.shape != target.shape:
            raise UsageError(
                f"tensor {index} was stored with shape {tuple(copy.shape)} and now has {tuple(target.shape)}",
                hint="restore the parameters that were stored, in the same order; nothing was written",
            )
