"""The memory that an update lies in while it is sent: pages that are there already, filled anew, or the model's own.

A copy into memory of the first use costs five times as much as one into warm pages, so buffers are kept and filled
anew. Copies from a CUDA device run on a stream of their own, behind the work that makes the parameters, into pinned
memory: no memory of the device is used, and what waits for them is the stream of the next optimizer step and the
sender, never the training thread.

Knows torch, devices, and when parameters may change. Does not know models, names' origins, threads, or the service.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema_client import wire
from ema_client.bulk import SHARE_ABOVE
from ema_client.connection import Body
from ema_client.protocol import TensorSpec
from ema_client.publisher import Update
from ema_client.shared import shared_body
from ema_client.tensors import dtype_of, memory, on_host

__all__ = ["DeviceCopies", "Sending", "StepHook"]


class Sending:
    """Makes updates of tensors. One thread makes them; another may be done with them.

    Args:
        specs: of the tensors of every update, in canonical order and with the dtypes that are sent.
        pinned: whether they lie on a CUDA device.
        slices: which slices of the run's tensors they are, for a rank of a sharded model; the others are whole.
        shared: whether copies are to lie in memory that a service on this host can read. Not while they are pinned.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        *,
        pinned: bool,
        slices: Mapping[str, Sequence[wire.Box]] | None = None,
        shared: bool = False,
    ) -> None:
        self._entries = wire.place(specs)
        self._header = wire.build_header(self._entries, wire.write_slices(slices or {}))
        self._body = partial(_body, self._header, self._entries, pinned=pinned, shared=shared)
        self._free: deque[_Buffer] = deque()
        self.devices = DeviceCopies()

    def copied(self, step: int, tensors: Sequence[Tensor], *, hooked: bool) -> Update:
        """An update of a copy. The tensors may change once this returns or, if ``hooked``, in an optimizer's step.

        hooked: whether before_step() will be called before the tensors change.
        """
        buffer = self._free.popleft() if self._free else _Buffer(self._entries, *self._body())
        ready = buffer.fill(tensors, self.devices)
        if not hooked:
            ready()
        return Update(step, buffer.body, ready, lambda: self._free.append(buffer))

    def warmed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of the tensors as they are sent, in the memory of the first update to come; valid until that one."""
        buffer = _Buffer(self._entries, *self._body())
        buffer.fill(tensors, self.devices)()
        self._free.append(buffer)
        return buffer.targets

    def borrowed(self, step: int, tensors: Sequence[Tensor]) -> Update:
        """An update of the tensors' own memory: they must not change before it is done with."""
        # Detached: whoever gives a parameter other memory meanwhile does not change what is sent.
        live = [tensor.detach() for tensor in tensors]

        def pieces() -> Iterator[memoryview]:
            yield memoryview(self._header)
            for tensor in live:
                yield memory(on_host(tensor))

        length = len(self._header) + (self._entries[-1].end if self._entries else 0)
        return Update(step, Body(length, pieces), _nothing, _nothing, borrowed=True)

    def can_borrow(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors' own memory holds what is to be sent."""
        pairs = zip(tensors, self._entries, strict=True)
        return all(tensor.is_cpu and tensor.dtype == dtype_of(entry) for tensor, entry in pairs)


class StepHook:
    """Calls ``before`` ahead of every step of every torch optimizer, and knows whether there was one."""

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._fired = False
        self._handle = register_optimizer_step_pre_hook(self._fire)

    def fired(self) -> bool:
        """Whether there was a step since the last call: then the parameters are changed where the hook sees it."""
        fired, self._fired = self._fired, False
        return fired

    def remove(self) -> None:
        self._handle.remove()

    def _fire(self, _optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self._fired = True
        self._before()


class DeviceCopies:
    """Copies from CUDA devices to pinned memory, each device's on a stream beside the one that computes."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._latest: dict[torch.device, torch.cuda.Event] = {}

    def start(self, device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> torch.cuda.Event:
        """Begin the copy, behind all work that is on the device's current stream. The event is that of its end."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            torch._foreach_copy_(targets, sources, non_blocking=True)
        # blocking: a thread that waits for it sleeps instead of spinning beside the training.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(side)
        self._latest[device] = event
        return event

    def before_step(self) -> None:
        """Let each device's current stream wait for the copies of it; the calling thread goes on."""
        while self._latest:
            device, event = self._latest.popitem()
            torch.cuda.current_stream(device).wait_event(event)


class _Buffer:
    """Host memory for one update, its tensors in the order of the stream."""

    def __init__(self, entries: Sequence[wire.Entry], body: Body, flat: Tensor) -> None:
        self.targets = [flat[e.begin : e.end].view(dtype_of(e)).view(e.shape) for e in entries]
        self.body = body

    def fill(self, sources: Sequence[Tensor], devices: DeviceCopies) -> Callable[[], None]:
        """Copy the sources, cast where they are of another dtype. What it returns waits until all is here."""
        events = []
        with torch.no_grad():
            for device, (targets, group) in _by_device(self.targets, sources).items():
                if device.type == "cuda":
                    events.append(devices.start(device, targets, group))
                else:
                    torch._foreach_copy_(targets, group)
        if not events:
            return _nothing
        # Held until then: the memory of a model that is dropped meanwhile would be given to somebody else.
        held = list(sources)

        def ready() -> None:
            for event in events:
                event.synchronize()
            held.clear()

        return ready


def _by_device(
    targets: Iterable[Tensor], sources: Iterable[Tensor]
) -> dict[torch.device, tuple[list[Tensor], list[Tensor]]]:
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, of = groups.setdefault(source.device, ([], []))
        into.append(target)
        of.append(source)
    return groups


def _body(header: bytes, entries: Sequence[wire.Entry], *, pinned: bool, shared: bool) -> tuple[Body, Tensor]:
    """A body of these tensors, and the memory of its data."""
    size = entries[-1].end if entries else 0
    if shared and not pinned and size > SHARE_ABOVE:
        return shared_body(header, entries)
    flat = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else _pages(size)
    return Body(len(header) + size, lambda: (memoryview(header), memory(flat))), flat


def _pages(size: int) -> Tensor:
    """So many bytes of memory, in huge pages where the system has them: half the time of a first use, and of any."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def _nothing() -> None:
    pass
