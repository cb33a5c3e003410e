"""Writing to tensors that torch has computed with: so that torch notices and, for a model, all of it or nothing.

Torch counts the writes to each tensor, by which a backward pass sees that a tensor it needs has changed; bytes received
into a tensor's memory are not counted. An autocast region keeps casts of parameters and uses the casts on, whoever
writes to the parameters, copy_() included.

Knows: what torch remembers of tensors. Does not know: models, names' origins, HTTP, runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ema_client import wire
from ema_client.tensors.layout import check_targets
from ema_client.tensors.pages import pages, views_of

__all__ = ["Staging", "noticed", "write"]


def write(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, cast and moved as copy_() does, in a single call: Ctrl-C comes before or after.

    Inside and outside of torch.inference_mode(), and of tensors made there.
    """
    if not targets:
        return
    mode = torch.inference_mode() if any(target.is_inference() for target in targets) else torch.no_grad()
    with mode:
        if any(target.is_neg() for target in targets):
            # Which torch cannot write to together.
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        else:
            torch._foreach_copy_(list(targets), list(sources))
    torch.clear_autocast_cache()


def noticed(tensors: Iterable[Tensor]) -> None:
    """Let torch know that the memory of ``tensors`` was written to, as copy_() would let it know."""
    for tensor in tensors:
        # A tensor made in inference mode has no count.
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    torch.clear_autocast_cache()


class Staging:
    """Memory of the host in which weights come, all of them, before a tensor of ``out`` is written.

    Of the weights' size; freed with the staging. Not thread-safe.

    memory: a uint8 tensor to be used in place of new memory, where it is large enough.
    """

    def __init__(self, out: Mapping[str, Tensor], memory: Tensor | None = None) -> None:
        self._out = out
        self._flat = memory
        self._came: dict[str, Tensor] = {}

    def tensors(self, entries: Sequence[wire.Entry]) -> Mapping[str, Tensor]:
        """Tensors to receive a stream in; the memory of an earlier try is used again. Raises as check_targets() does.

        entries: of the stream's header, in the order of their bytes.
        """
        check_targets(tuple(entries), self._out)
        size = entries[-1].end if entries else 0
        if self._flat is None or self._flat.numel() < size:
            self._flat = pages(size)
        names = (entry.name for entry in entries)
        self._came = dict(zip(names, views_of(entries, self._flat), strict=True))
        return self._came

    def write(self) -> None:
        """Write what came to the tensors of ``out``."""
        write([self._out[name] for name in self._came], list(self._came.values()))
