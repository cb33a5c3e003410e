"""Copies from devices, as far as they can be seen without one; with one, test_buffers.py sees their bytes."""

from __future__ import annotations

from concurrent.futures import Future

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


def test_only_cuda_devices_are_copied_beside() -> None:
    """A tensor on the CPU is copied at once."""
    assert DeviceCopies().takes(torch.device("cuda", 1))
    assert not DeviceCopies().takes(torch.device("cpu"))
