"""Group gpu: what a CUDA device adds. Without one each row says that it was skipped.

Knows CUDA's clock (a device works on after a call returns) and which figures there are. Does not know how the server
uses its device.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from kernel import WEIGHT
from scale import Scale

from ema_client import EmaClient
from ema_service.averaging import average_into
from ema_service.bench.ceiling import RAW_TCP, Ceiling
from ema_service.bench.children import Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["measure"]

TO_DEVICE, TO_HOST = "pinned host to device", "device to pinned host"
LERP, OURS = "lerp_ on the device", "kernel on the device, float32"
PUSH, PULL = "push, TCP, --device cuda", "pull into tensors, TCP, --device cuda"
KEPT, SHARED = "push, TCP, --device cuda, durability process", "push, state in shared memory, --device cuda"
NEEDS: dict[str, tuple[Need, ...]] = {
    RAW_TCP: (),
    TO_DEVICE: (),
    TO_HOST: (),
    PUSH: (Need(against=RAW_TCP), Need(against=TO_DEVICE)),
    KEPT: (Need(against=RAW_TCP), Need(against=PUSH)),
    SHARED: (Need(against=RAW_TCP),),
    PULL: (Need(against=RAW_TCP), Need(against=TO_HOST)),
    LERP: (),
    OURS: (Need(against=LERP),),
}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """All figures are GB/s of ``scale.wire_bytes`` of float32."""
    nbytes = scale.wire_bytes
    seconds: dict[str, tuple[float, ...]] = {}
    if torch.cuda.is_available():
        with contextlib.ExitStack() as stack:
            ceiling = stack.enter_context(Ceiling(nbytes))
            operations = {RAW_TCP: ceiling.operations()[RAW_TCP], **_device(nbytes), **_served(nbytes, stack)}
            seconds = interleave(operations, scale.rounds, on_step=on_step)
        name, note = torch.cuda.get_device_name(), ""
    else:
        name, note = "no device", "skipped: no CUDA device"
    rows = tuple(rate_row(row, nbytes, seconds, needs, note) for row, needs in NEEDS.items())
    return Group("gpu", f"gpu: {name}, {show_size(nbytes)} of float32", rows)


def _device(nbytes: int) -> dict[str, Operation]:
    host = torch.empty(nbytes // 4).uniform_(0.5, 1.5).pin_memory()
    shadow, other = host.cuda(), host.cuda()
    received = host.cuda()
    return {
        TO_DEVICE: _synchronised(lambda: received.copy_(host, non_blocking=True)),
        TO_HOST: _synchronised(lambda: host.copy_(other, non_blocking=True)),
        LERP: _synchronised(lambda: other.lerp_(shadow, WEIGHT)),
        OURS: _synchronised(lambda: average_into(received, shadow, received, WEIGHT)),
    }


def _served(nbytes: int, stack: contextlib.ExitStack) -> dict[str, Operation]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-")))
    service = stack.enter_context(Service("--device", "cuda", data_dir=folder))
    client = stack.enter_context(EmaClient(service.url))
    traffics = {name: Traffic(name, nbytes) for name in ("memory", "process")}
    for durability, traffic in traffics.items():
        traffic.create(client, durability=durability)
        traffic.push(client)
        traffic.check(client)
    fast, kept = traffics.values()
    shared = client.shared_state(fast.state)
    return {
        PUSH: timed(lambda: fast.push(client)),
        KEPT: timed(lambda: kept.push(client)),
        SHARED: timed(lambda: fast.push(client, shared)),
        PULL: timed(lambda: fast.pull_into(client)),
    }


def _synchronised(action: Callable[[], object]) -> Operation:
    def complete() -> None:
        action()
        torch.cuda.synchronize()

    timed_action = timed(complete)

    def operation() -> float:
        torch.cuda.synchronize()
        return timed_action()

    return operation
