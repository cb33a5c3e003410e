"""Copies from devices, as far as they can be seen without one; with one, test_buffers.py sees their bytes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import pytest
import torch

from ema_client.training.device_copies import DeviceCopies, PendingCopy


def test_a_copy_that_could_not_be_asked_for() -> None:
    """The sender is told; an optimizer's step goes on."""
    asking: Future[torch.cuda.Event] = Future()
    asking.set_exception(RuntimeError("CUDA out of memory"))
    copies, copy = DeviceCopies(), PendingCopy(asking)
    copies.latest[torch.device("cuda", 0)] = copy
    copies.before_step()

    assert copies.latest == {}
    with pytest.raises(RuntimeError, match="out of memory"):
        copy.synchronize()


class Stream:
    """What a stream was told to wait for."""

    def __init__(self) -> None:
        self.waits_for: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waits_for.append(event)


class End:
    """The end of a copy, there once ``passed``."""

    passed = False

    def query(self) -> bool:
        return self.passed


def test_every_stream_that_steps_waits() -> None:
    """Two optimizers on two streams, a device after the other: each waits until the copy is there, and then none."""
    devices = [torch.device("cuda", index) for index in range(2)]
    current: dict[torch.device, Any] = {}
    copies = DeviceCopies(current_stream=lambda device: current[device])
    ends = {device: End() for device in devices}
    for device, end in ends.items():
        asking: Future[torch.cuda.Event] = Future()
        asking.set_result(cast(torch.cuda.Event, end))
        copies.latest[device] = PendingCopy(asking)

    def waits_of_a_step() -> list[list[object]]:
        current.update({device: Stream() for device in devices})
        copies.before_step()
        return [current[device].waits_for for device in devices]

    one, other = ends.values()
    assert waits_of_a_step() == [[one], [other]]
    assert waits_of_a_step() == [[one], [other]]
    one.passed = True
    assert waits_of_a_step() == [[], [other]]
    other.passed = True
    assert waits_of_a_step() == [[], []]
    assert copies.latest == {}


def test_only_cuda_devices_are_copied_beside() -> None:
    """A tensor on the CPU is copied at once."""
    assert DeviceCopies().takes(torch.device("cuda", 1))
    assert not DeviceCopies().takes(torch.device("cpu"))
