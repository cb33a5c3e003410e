"""Tensors in memory that a service on this host can read.

Knows: torch, where in a body each tensor lies. Does not know: how the memory is shared (memfd), runs, HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ema_client import wire
from ema_client.errors import UsageError
from ema_client.http.body import Body
from ema_client.http.memfd import SharedBody
from ema_client.tensors.body import digesting, memory
from ema_client.tensors.layout import specs_of, state_of
from ema_client.tensors.pages import views_of
from ema_client.tensors.writing import write

__all__ = ["SharedState", "shared_body"]

_log = logging.getLogger("ema_client")


class SharedState(Mapping[str, Tensor]):
    """Named tensors, in the order and memory of a push: see EmaClient.shared_state().

    body: what is pushed. The caller owns state and tensors; the memory lives as long as the state or one tensor does.
    """

    def __init__(self, state: Mapping[str, Tensor] | nn.Module) -> None:
        named = state_of(state)
        entries = wire.place(specs_of(named))
        self.body, flat = shared_body(wire.build_header(entries), entries)
        self._tensors = {e.name: view for e, view in zip(entries, views_of(entries, flat), strict=True)}
        self.fill(named)

    def fill(self, state: Mapping[str, Tensor] | nn.Module) -> None:
        """Copy the values of ``state``, whose tensors must have the same names and shapes, cast where dtypes differ.

        Raises UsageError, before anything is written, where names or shapes differ.
        """
        named = state_of(state)
        if {name: t.shape for name, t in named.items()} != {name: t.shape for name, t in self.items()}:
            raise UsageError("the state has other tensors than this one", hint="make a new shared_state() for it")
        write(list(self.values()), [named[name] for name in self])

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def shared_body(header: bytes, entries: Sequence[wire.Entry], *, part: bool = False) -> tuple[Body, Tensor]:
    """A body of ``header`` and tensors, and the memory of its data as a uint8 tensor. part: of a part of an update.

    The memory is shared if the system has memory to share; if not, that is logged and the memory is ordinary.
    """
    size = entries[-1].end
    shared = _share(header, size)
    with torch.inference_mode(False):
        if shared and size:
            flat = torch.frombuffer(shared.data, dtype=torch.uint8)
        else:
            # torch.frombuffer() refuses a buffer of no bytes.
            flat = torch.zeros(size, dtype=torch.uint8, device="cpu")
    return Body(
        len(header) + size,
        lambda: (memoryview(header), memory(flat)),
        shared,
        digest=digesting(header, entries, part=part),
        data=lambda: (memory(flat),),
    ), flat


def _share(header: bytes, size: int) -> SharedBody | None:
    try:
        return SharedBody(header, size)
    except OSError as fault:
        _log.warning("there is no shared memory for pushes: %s", fault)
        return None
