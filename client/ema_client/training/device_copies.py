"""Copies from CUDA devices to host memory, beside the work of the devices and of the training thread.

Knows: streams and events of CUDA, and the thread that asks a device. Does not know: what is copied or why, optimizers,
updates.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Copy", "DeviceCopies", "PendingCopy"]


class Copy(Protocol):
    """A copy under way: synchronize() returns once the bytes are there, and raises what went wrong with the copy."""

    def synchronize(self) -> None: ...


class PendingCopy:
    """A copy that a device is asked for by another thread. asking: gives the CUDA event of the copy's end."""

    def __init__(self, asking: Future[torch.cuda.Event]) -> None:
        self._asking = asking

    def end(self) -> torch.cuda.Event | None:
        """The event of the copy's end, None where asking failed. Waits for the asking, which outlasts no step."""
        return None if self._asking.exception() else self._asking.result()

    def synchronize(self) -> None:
        self._asking.result().synchronize()


class DeviceCopies:
    """Copies from CUDA devices to pinned memory, on a stream of each device beside the stream that computes.

    A device has to be asked for each tensor by itself: 0.9 ms for the 148 tensors of GPT-2, 2.4 ms for 580 tensors.
    Another thread asks, without the interpreter's lock; the training thread records an event in its stream and goes on.

    current_stream: the stream that the calling thread gives a device work on. latest: the latest copy of each device,
    until a step finds the copy there.
    """

    def __init__(
        self, *, current_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.current_stream
    ) -> None:
        self._current_stream = current_stream
        self.latest: dict[torch.device, PendingCopy] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._asking: ThreadPoolExecutor | None = None

    def takes(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` are copied by start(); others are copied at once."""
        return device.type == "cuda"

    def start(self, device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> Copy:
        """Begin a copy of the values that ``sources`` have after all work on the device's current stream.

        The caller holds both lists of tensors until the copy is there.
        """
        if self._asking is None:
            self._asking = ThreadPoolExecutor(1, "ema copies")
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record(self._current_stream(device))
        copy = PendingCopy(self._asking.submit(_ask, self._streams[device], made, targets, sources))
        self.latest[device] = copy
        return copy

    def before_step(self) -> None:
        """Let each device's current stream wait for the copies from that device; the calling thread goes on.

        At every step, as long as a copy is under way: another optimizer may step on another stream. Callable from any
        thread: a step within the backward pass runs on a thread of torch's.
        """
        for device, copy in list(self.latest.items()):
            end = copy.end()
            if end is not None and not end.query():  # type: ignore[no-untyped-call]
                self._current_stream(device).wait_event(end)
            elif self.latest.get(device) is copy:
                # The other streams of the device have nothing to wait for either.
                self.latest.pop(device, None)


def _ask(
    stream: torch.cuda.Stream, made: torch.cuda.Event, targets: list[Tensor], sources: list[Tensor]
) -> torch.cuda.Event:
    """Ask a device for a copy, after ``made``, the event of the sources' values. Returns the event of its end."""
    stream.wait_event(made)
    with torch.no_grad(), torch.cuda.stream(stream):
        torch._foreach_copy_(targets, sources, non_blocking=True)
    # blocking: a thread that waits for the event sleeps instead of spinning beside the training.
    end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    end.record(stream)
    return end
