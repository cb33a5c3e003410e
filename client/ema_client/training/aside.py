"""The training weights, set aside while a model holds its EMA: LitEma's store() and restore().

Knows copies of tensors and their shapes. Does not know models, names, or what is written to the model meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ema_client.errors import AlreadyStored, NothingStored, UsageError
from ema_client.tensors.layout import check_writable
from ema_client.tensors.writing import write

__all__ = ["SetAside"]


class SetAside:
    """At most one set of copies at a time, on the devices of the tensors that were copied. Not thread-safe."""

    def __init__(self) -> None:
        self._copies: list[Tensor] | None = None
        #: Whether other weights were written over those copied, and whether the copies must not be replaced.
        self._overwritten = self._needed = False

    @property
    def empty(self) -> bool:
        """Whether there are no copies."""
        return self._copies is None

    def check_empty(self) -> None:
        """Raises AlreadyStored where there are copies that are still needed."""
        if self._copies is not None and self._needed:
            raise AlreadyStored("training weights are stored and wait for restore()")

    def store(self, parameters: Iterable[Tensor] | nn.Module) -> None:
        """Copy the parameters. Raises AlreadyStored; UsageError for a tensor that restore() could not write to."""
        self.check_empty()
        stored = _listed(parameters)
        for index, tensor in enumerate(stored):
            if tensor.layout == torch.strided:
                check_writable(f"tensor {index}", tensor)
        self._copies = [tensor.detach().clone() for tensor in stored]
        self._overwritten, self._needed = False, True

    @contextlib.contextmanager
    def overwriting(self) -> Iterator[None]:
        """Around a write over the tensors that were copied, which is done whole or, where it raises, not at all.

        After a first write that raised, store() may copy anew: nothing would be lost.
        """
        try:
            yield
        except BaseException:
            self._needed = self._overwritten
            raise
        self._overwritten = self._needed = True

    def restore(self, parameters: Iterable[Tensor] | nn.Module) -> None:
        """Write the copies into ``parameters`` and free the copies.

        Raises NothingStored; UsageError before anything is written, where number or shapes differ.
        """
        if self._copies is None:
            raise NothingStored("restore() was called, and nothing is stored")
        targets = _listed(parameters)
        _check_same_shapes(self._copies, targets)
        write(targets, self._copies)
        self._copies = None

    def drop(self) -> None:
        """Free the copies without writing them."""
        self._copies = None

    @contextlib.contextmanager
    def lent(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """What is set aside lies in ``parameters`` inside the block; after it, what ``parameters`` held before.

        For a checkpoint in the middle of an evaluation. Costs the memory of one tensor: values are exchanged one tensor
        at a time. Whatever interrupts the exchange, restore() then writes what is set aside. Does nothing where nothing
        is set aside. Raises UsageError before anything is written, where number or shapes differ.
        """
        copies, targets = self._copies, list(parameters)
        if copies is None:
            yield
            return
        _check_same_shapes(copies, targets)
        replaced: list[Tensor | None] = [None] * len(targets)
        try:
            for place, target in enumerate(targets):
                replaced[place] = target.detach().clone()
                write([target], [copies[place]])
                # The parameter itself is what is set aside: its copy is freed.
                copies[place] = target
            yield
        finally:
            # Not after a restore() inside the block.
            if self._copies is copies:
                _take_back(copies, targets, replaced)


def _take_back(copies: list[Tensor], targets: list[Tensor], replaced: list[Tensor | None]) -> None:
    """The other half of an exchange, of all tensors that have a value to go back to."""
    for place, target in enumerate(targets):
        if (value := replaced[place]) is not None:
            if copies[place] is target:
                copies[place] = target.detach().clone()
            write([target], [value])
            replaced[place] = None


def _listed(parameters: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    found = list(parameters.values() if isinstance(parameters, Mapping) else parameters)
    if not all(isinstance(each, Tensor) for each in found):
        raise UsageError("tensors are stored and restored", hint="give model.parameters(), or the model")
    return found


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
