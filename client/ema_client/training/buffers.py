"""The memory that an update lies in while it is sent: pages that are there already, filled anew, or the model's own.

A copy into memory of the first use costs five times as much as one into warm pages, so buffers are kept and filled
anew. Copies from a CUDA device run on a stream of their own, behind the work that makes the parameters, into pinned
memory: no memory of the device is used (but for one tensor at a time that is cast), and what waits for them is the
stream of the next optimizer step and the sender, never the training thread.

Knows torch, devices, and when parameters may change. Does not know models, names' origins, threads, or the service.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema_client import wire
from ema_client.http.body import Body
from ema_client.http.uploads import SHARE_ABOVE
from ema_client.protocol import TensorSpec
from ema_client.tensors.body import memory, on_host
from ema_client.tensors.layout import dtype_of
from ema_client.tensors.shared import shared_body
from ema_client.training.publisher import Update

__all__ = ["Copy", "DeviceCopies", "Sending", "StepHook"]

_log = logging.getLogger("ema_client")


class Sending:
    """Makes updates of tensors. One thread makes them; another may be done with them.

    Args:
        specs: of the tensors of every update, in canonical order and with the dtypes that are sent.
        pinned: whether they lie on a CUDA device.
        slices: which slices of the run's tensors they are, for a rank of a sharded model; the others are whole.
        shared: whether copies are to lie in memory that a service on this host can read.
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
        self._pinned = pinned
        self._body = partial(_body, self._header, self._entries, shared=shared)
        self._free: deque[_Buffer] = deque()
        self.devices = DeviceCopies()

    def copied(self, step: int, tensors: Sequence[Tensor], *, hooked: bool) -> Update:
        """An update of a copy. The tensors may change once this returns or, if ``hooked``, in an optimizer's step.

        hooked: whether before_step() will be called before the tensors change.
        """
        buffer = self._free.popleft() if self._free else self._new_buffer()
        ready = buffer.fill(tensors, self.devices)
        if not hooked:
            ready()
        return Update(step, buffer.body, ready, lambda: self._free.append(buffer))

    def warmed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of the tensors as they are sent, in the memory of the first update to come; valid until that one."""
        buffer = self._new_buffer()
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

    def _new_buffer(self) -> _Buffer:
        return _Buffer(self._entries, *self._body(), pinned=self._pinned)

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


class Copy(Protocol):
    """A copy under way: synchronize() returns once it is there, and raises what went wrong with it."""

    def synchronize(self) -> None: ...


class DeviceCopies:
    """Copies from CUDA devices to pinned memory, each device's on a stream beside the one that computes.

    A device has to be asked for each tensor by itself: 0.9 ms for the 148 tensors of GPT-2, 2.4 ms for 580. A thread
    does that, without the interpreter's lock; the training thread leaves a mark in its stream and goes on.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._latest: dict[torch.device, _Asked] = {}
        self._asking: ThreadPoolExecutor | None = None

    def start(self, device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> Copy:
        """Begin a copy of what the sources are after all work that is on the device's current stream."""
        if self._asking is None:
            self._asking = ThreadPoolExecutor(1, "ema copies")
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record(torch.cuda.current_stream(device))
        asked = _Asked(self._asking.submit(_ask, self._streams[device], made, targets, sources))
        self._latest[device] = asked
        return asked

    def before_step(self) -> None:
        """Let each device's current stream wait for the copies of it; the calling thread goes on."""
        while self._latest:
            device, asked = self._latest.popitem()
            if (end := asked.end()) is not None:
                torch.cuda.current_stream(device).wait_event(end)


def _ask(
    stream: torch.cuda.Stream, made: torch.cuda.Event, targets: list[Tensor], sources: list[Tensor]
) -> torch.cuda.Event:
    """On the thread that asks devices. Returns the event of the copy's end."""
    stream.wait_event(made)
    with torch.no_grad(), torch.cuda.stream(stream):
        torch._foreach_copy_(targets, sources, non_blocking=True)
    # blocking: a thread that waits for it sleeps instead of spinning beside the training.
    end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    end.record(stream)
    return end


class _Asked:
    """A copy that a device is being asked for, or was."""

    def __init__(self, asking: Future[torch.cuda.Event]) -> None:
        self._asking = asking

    def end(self) -> torch.cuda.Event | None:
        """The event of its end, None where asking failed. Waits for the asking, which outlasts no step."""
        return None if self._asking.exception() else self._asking.result()

    def synchronize(self) -> None:
        self._asking.result().synchronize()


class _Buffer:
    """Host memory for one update, its tensors in the order of the stream. pinned: page-locked, for CUDA devices."""

    def __init__(self, entries: Sequence[wire.Entry], body: Body, flat: Tensor, *, pinned: bool) -> None:
        self.targets = [flat[e.begin : e.end].view(dtype_of(e)).view(e.shape) for e in entries]
        self.body = body
        self._under_way: list[Copy] = []
        if pinned and flat.numel():
            self._lock_pages(flat)

    def fill(self, sources: Sequence[Tensor], devices: DeviceCopies) -> Callable[[], None]:
        """Copy the sources, cast where they are of another dtype. What it returns waits until all is here."""
        copies = self._under_way
        copies.clear()
        with torch.no_grad():
            for device, (targets, group) in _by_device(self.targets, sources).items():
                if device.type == "cuda":
                    copies.append(devices.start(device, targets, group))
                else:
                    torch._foreach_copy_(targets, group)
        if not copies:
            return _nothing
        # Held until then: the memory of a model that is dropped meanwhile would be given to somebody else.
        held = list(sources)

        def ready() -> None:
            for copy in copies:
                copy.synchronize()
            held.clear()

        return ready

    def _lock_pages(self, flat: Tensor) -> None:
        """Not torch's own pinned memory: that is no memory to share, and takes the next power of two."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(flat.data_ptr(), flat.numel(), _PORTABLE))
        if code:
            _log.warning("%d bytes could not be page-locked (CUDA error %d); updates wait for copies", len(flat), code)
            return
        unlock = partial(_unlock_pages, runtime, flat.data_ptr(), self._under_way, os.getpid())
        weakref.finalize(self, unlock).atexit = False


#: cudaHostRegisterPortable: for every device, not only the current one.
_PORTABLE = 1


def _unlock_pages(runtime: Any, address: int, under_way: list[Copy], process: int) -> None:
    if os.getpid() != process:
        return  # a fork has none of it
    for copy in under_way:
        copy.synchronize()
    runtime.cudaHostUnregister(address)


def _by_device(
    targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> dict[torch.device, tuple[list[Tensor], list[Tensor]]]:
    first = sources[0].device if sources else torch.device("cpu")
    if all(source.device == first for source in sources):
        return {first: (list(targets), list(sources))}
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, of = groups.setdefault(source.device, ([], []))
        into.append(target)
        of.append(source)
    return groups


def _body(header: bytes, entries: Sequence[wire.Entry], *, shared: bool) -> tuple[Body, Tensor]:
    """A body of these tensors, and the memory of its data."""
    size = entries[-1].end if entries else 0
    if shared and size > SHARE_ABOVE:
        return shared_body(header, entries)
    flat = _pages(size)
    return Body(len(header) + size, lambda: (memoryview(header), memory(flat))), flat


def _pages(size: int) -> Tensor:
    """So many bytes of memory, in huge pages where the system has them: half the time of a first use, and of any."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    if hasattr(mmap, "MADV_DONTFORK"):
        # A fork of the trainer (a loader's worker) would get copies of its pages, and a device copy to those.
        region.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(region, dtype=torch.uint8)


def _nothing() -> None:
    pass
