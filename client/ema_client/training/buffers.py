"""The host memory that updates are sent from: buffers that are filled anew, or the model's own memory.

A copy into memory that was never used costs five times as much as a copy into warm pages. So a thread makes buffers and
uses their pages once, the first buffer while the run is made; and buffers are filled anew update after update. Copies
from a CUDA device go to page-locked buffers beside the training (device_copies): no memory
of the device is used (but for one tensor at a time that is cast), and only the sender and the stream of the next
optimizer step wait for a copy, never the training thread.

Knows torch, host memory, and when parameters may change. Does not know models, names' origins, threads, or the service.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ema_client import wire
from ema_client.forks import Home
from ema_client.http.body import Body
from ema_client.http.uploads import SHARE_ABOVE
from ema_client.protocol import TensorSpec
from ema_client.tensors.body import digesting, is_plain, memory, on_host
from ema_client.tensors.layout import dtype_of
from ema_client.tensors.pages import pages, use_pages, views_of
from ema_client.tensors.shared import shared_body
from ema_client.training.device_copies import Copy, DeviceCopies
from ema_client.training.updates import Update

__all__ = ["UpdateBuffers"]

_log = logging.getLogger("ema_client")

#: cudaHostRegisterPortable: for every device, not only the current one.
_PORTABLE = 1


class UpdateBuffers:
    """Makes updates of tensors, in host buffers. One thread makes updates; another may give their buffers back.

    Args:
        specs: of the tensors of every update, in canonical order and with the dtypes that are sent.
        pinned: whether the tensors lie on a CUDA device.
        slices: for a rank of a sharded model, which slices of the run's tensors are sent; other tensors are whole. None
            where updates are no parts.
        shared: whether buffers are to lie in memory shared with a service on the same host. A run's hosts are found
            with the first update: where that is known later, buffers are made anew.
        devices: copies from devices.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        *,
        pinned: bool,
        slices: Mapping[str, Sequence[wire.Box]] | None = None,
        shared: Callable[[], bool] = lambda: False,
        devices: DeviceCopies | None = None,
    ) -> None:
        self._entries = wire.place(specs)
        self._header = wire.build_header(self._entries, wire.write_slices(slices or {}))
        self._part = slices is not None
        self._digest = digesting(self._header, self._entries, part=self._part)
        self._pinned = pinned
        self._shared = shared
        self._free: deque[_Buffer] = deque()
        #: Held while buffers are given and taken, by the thread that makes them, too.
        self._change = threading.Condition()
        self._making = False
        self._fault: Exception | None = None
        self.devices = devices or DeviceCopies()

    def prepare(self) -> None:
        """Begin to make the first buffer, which takes 0.7 s a GiB."""
        with self._change:
            self._make()

    def update(self, step: int | None, tensors: Sequence[Tensor], *, hooked: bool, borrow: bool) -> Update:
        """An update of the tensors: borrowed where that is wanted and possible, else copied.

        hooked: whether a StepHook guards the tensors until an optimizer's step.
        borrow: send from the tensors' own memory, where their memory holds what is sent and a hook guards them.
        """
        if borrow and hooked and self.can_borrow(tensors):
            return self.borrowed(step, tensors)
        return self.copied(step, tensors, hooked=hooked)

    def copied(self, step: int | None, tensors: Sequence[Tensor], *, hooked: bool) -> Update:
        """An update of a copy; without a step, of initial weights given anew.

        The tensors may change once copied() returns or, if ``hooked``, in an optimizer's step.

        hooked: whether ``devices.before_step()`` will be called before the tensors change.
        """
        buffer = self._take()
        ready = buffer.fill(tensors, self.devices)
        if not hooked:
            ready()
        return Update(step, buffer.body.of_another_push(), ready, partial(self._give, buffer))

    def borrowed(self, step: int | None, tensors: Sequence[Tensor]) -> Update:
        """An update of the tensors' own memory: they must not change before the update's ``done`` is called."""
        # Detached: a parameter that is given other memory meanwhile does not change what is sent.
        live = [tensor.detach() for tensor in tensors]

        def pieces() -> Iterator[memoryview]:
            yield memoryview(self._header)
            for tensor in live:
                yield memory(on_host(tensor))

        length = len(self._header) + self._size
        data = (lambda: tuple(map(memory, live))) if all(map(is_plain, live)) else None
        return Update(step, Body(length, pieces, digest=self._digest, data=data), _nothing, _nothing, borrowed=True)

    def initial(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as they are sent: the tensors themselves where their memory holds that, else a copy.

        The copy lies in the buffer of the first update; valid until the first update.
        """
        if self.can_borrow(tensors):
            return list(tensors)
        buffer = self._take()
        buffer.fill(tensors, self.devices)()
        self._give(buffer)
        return buffer.targets

    @contextlib.contextmanager
    def spare(self) -> Iterator[Tensor | None]:
        """The memory of a buffer that no update uses, as a uint8 tensor, for the block; None where there is none."""
        with self._change:
            buffer = self._free.popleft() if self._free else None
        try:
            yield buffer.flat if buffer else None
        finally:
            if buffer:
                self._give(buffer)

    def can_borrow(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors' own memory holds what is to be sent."""
        pairs = zip(tensors, self._entries, strict=True)
        return all(tensor.is_cpu and tensor.dtype == dtype_of(entry) for tensor, entry in pairs)

    def _take(self) -> _Buffer:
        """A buffer that no update uses: whichever comes first, one that is given back or one that is made.

        Raises what making one raised.
        """
        with self._change:
            while not self._free:
                if self._fault is not None:
                    try:
                        raise self._fault
                    finally:
                        self._fault = None
                self._make()
                self._change.wait()
            return self._free.popleft()

    def _give(self, buffer: _Buffer) -> None:
        outdated = not buffer.to_share and self._is_shared()
        with self._change:
            if not outdated:
                self._free.append(buffer)
            self._change.notify_all()

    def _make(self) -> None:
        """Begin to make another buffer, unless one is being made. The caller holds ``_change``."""
        if not self._making:
            self._making = True
            threading.Thread(target=self._made, name="ema buffer", daemon=True).start()

    def _made(self) -> None:
        """On a thread of its own: a new buffer for whoever waits."""
        made: list[_Buffer] = []
        fault: Exception | None = None
        try:
            made = [self._new_buffer()]
        except (MemoryError, OSError, RuntimeError) as trouble:
            fault = trouble
        with self._change:
            self._making, self._fault = False, fault
            self._free.extend(made)
            self._change.notify_all()

    def _new_buffer(self) -> _Buffer:
        to_share = self._is_shared()
        body, flat = self._new_body(to_share=to_share)
        use_pages(flat)
        return _Buffer(body, flat, views_of(self._entries, flat), pinned=self._pinned, to_share=to_share)

    @property
    def _size(self) -> int:
        """Bytes of an update's tensors."""
        return self._entries[-1].end if self._entries else 0

    def _is_shared(self) -> bool:
        return self._size > SHARE_ABOVE and self._shared()

    def _new_body(self, *, to_share: bool) -> tuple[Body, Tensor]:
        """A body of new memory, and the memory of its data as a uint8 tensor."""
        if to_share:
            return shared_body(self._header, self._entries, part=self._part)
        size = self._size
        header, flat = self._header, pages(size)

        def pieces() -> Iterator[memoryview]:
            return iter((memoryview(header), memory(flat)))

        return Body(len(header) + size, pieces, digest=self._digest, data=lambda: (memory(flat),)), flat


class _Buffer:
    """Host memory for an update. flat: the memory; targets: its tensors, in the order of the stream.

    pinned: whether the memory is page-locked, for copies from CUDA devices. to_share: whether the memory was made to be
    shared, if the system has such memory.
    """

    def __init__(self, body: Body, flat: Tensor, targets: list[Tensor], *, pinned: bool, to_share: bool) -> None:
        self.to_share = to_share
        self.flat = flat
        self.targets = targets
        self.body = body
        self._under_way: list[Copy] = []
        if pinned and flat.numel():
            self._lock_pages(flat)

    def fill(self, sources: Sequence[Tensor], devices: DeviceCopies) -> Callable[[], None]:
        """Copy the sources, cast to the targets' dtypes. Returns a function that waits until all bytes are here."""
        copies = self._under_way
        copies.clear()
        with torch.no_grad():
            for device, (targets, group) in _by_device(self.targets, sources).items():
                if devices.takes(device):
                    copies.append(devices.start(device, targets, group))
                else:
                    torch._foreach_copy_(targets, group)
        if not copies:
            return _nothing
        # Held until then: the device would give the memory of a model that is dropped meanwhile to somebody else.
        held = list(sources)

        def ready() -> None:
            for copy in copies:
                copy.synchronize()
            held.clear()

        return ready

    def _lock_pages(self, flat: Tensor) -> None:
        """Page-lock the memory, until the buffer is gone.

        Not by torch's own pinned memory, which cannot be shared and takes the next power of two.
        """
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(flat.data_ptr(), flat.numel(), _PORTABLE))
        if code:
            _log.warning("%d bytes could not be page-locked (CUDA error %d); updates wait for copies", len(flat), code)
            return
        unlock = partial(_unlock_pages, runtime, flat.data_ptr(), self._under_way, Home())
        weakref.finalize(self, unlock).atexit = False


def _unlock_pages(runtime: Any, address: int, under_way: list[Copy], home: Home) -> None:
    if not home.is_here:
        # A fork has neither the pages nor the copies.
        return
    for copy in under_way:
        copy.synchronize()
    runtime.cudaHostUnregister(address)


def _by_device(
    targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> dict[torch.device, tuple[list[Tensor], list[Tensor]]]:
    """device -> its sources and their targets."""
    first = sources[0].device if sources else torch.device("cpu")
    if all(source.device == first for source in sources):
        return {first: (list(targets), list(sources))}
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, of = groups.setdefault(source.device, ([], []))
        into.append(target)
        of.append(source)
    return groups


def _nothing() -> None:
    pass
