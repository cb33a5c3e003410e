"""Group gpu-trainer: what an EMA costs a training on a CUDA device. Without one each row says that it was skipped.

A transformer of a billion parameters in 16 layers, as Pythia's, is trained; the service is on the same host, on its
processors. What is counted is a step and the update behind it, two in a row without a wait for the device between them,
as trainings run, with all that goes on meanwhile for the updates: asking the device for the parameters, copying them to
the host, pushing them. Forward and backward pass outlast the copy.

Knows RemoteEma, CUDA's clock and memory, and which time is counted. Does not know how updates are sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from litema import LitEma
from scale import Scale
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_client import EmaClient, RemoteEma
from ema_service.bench.children import Service
from ema_service.bench.rounds import Operation, interleave, repeated, timed
from ema_service.bench.rows import Group, Need, Row

__all__ = ["measure"]

NONE, OURS, BUSY = "no EMA", "RemoteEma", "RemoteEma, on_busy='skip', the sender never idle"
LITEMA, AVERAGED = "LitEma on the device", "AveragedModel on the device, foreach"
INSIDE, COPY = "inside RemoteEma.update", "copy of the parameters to the host"
MEMORY, THEIRS = "RemoteEma: memory of the device", "LitEma: memory of the device"
NEEDS: dict[str, tuple[Need, ...]] = {
    NONE: (),
    OURS: (Need(1.01, NONE, most=True),),
    BUSY: (Need(against=NONE),),
    LITEMA: (Need(against=NONE),),
    AVERAGED: (Need(against=NONE),),
    INSIDE: (Need(1.0, most=True),),
    COPY: (Need(against=NONE),),
    # In MB of 10^6 bytes: one MiB, which may be the allocator's own.
    MEMORY: (Need(1.05, most=True),),
    THEIRS: (),
}
STEPS = 5
LAYERS, HEAD = 16, 64
#: Of each step: sequences, and tokens of each.
BATCH, LENGTH = 24, 512


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Milliseconds of a step and an update; MB of the device's peak beyond that of the same training without an EMA."""
    if not torch.cuda.is_available():
        rows = tuple(Row(name, "ms", (), needs, "skipped: no CUDA device") for name, needs in NEEDS.items())
        return Group("gpu-trainer", "gpu-trainer: no device", rows)
    with contextlib.ExitStack() as stack:
        on_step("starting the service, making the model")
        service = stack.enter_context(Service("--device", "cpu"))
        client = stack.enter_context(EmaClient(service.url))
        training = _Training(max(HEAD, scale.gpt2_width * 3 // HEAD * HEAD))
        model = training.model
        figures = _memory(training, client)
        ours, busy = (stack.enter_context(_remote(model, client, name)) for name in ("ours", "busy"))
        operations = _operations(training, ours, busy)
        seconds = interleave(operations, scale.rounds, on_step=on_step)
        link, stats = client.link, busy.stats
    figures |= {name: Row(name, "ms", tuple(1000 * s for s in values)) for name, values in seconds.items()}
    rows = tuple(Row(name, figures[name].unit, figures[name].values, needs) for name, needs in NEEDS.items())
    return Group(
        "gpu-trainer", f"gpu-trainer: {torch.cuda.get_device_name()}, {training}", rows, _facts(link, stats.sent)
    )


def _facts(link: str, sent: int) -> tuple[str, ...]:
    return (
        f"AdamW, bf16 autocast, {BATCH} x {LENGTH} tokens; forward, backward, optimizer, update, the mean of two",
        f"pushes by {link}; with on_busy='skip' {sent} updates were sent, the others left out",
    )


class _Training:
    """A model, and one step of its training."""

    def __init__(self, width: int) -> None:
        layer = partial(nn.TransformerEncoderLayer, width, width // HEAD, 4 * width, dropout=0.0, batch_first=True)
        self.model = nn.Sequential(*(layer(device="cuda") for _ in range(LAYERS)))
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self._batch = torch.randn(BATCH, LENGTH, width, device="cuda")

    def step(self) -> None:
        self._optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(self._batch).square().mean()
        loss.backward()
        self._optimizer.step()

    def followed_by(self, update: Callable[[], object]) -> Operation:
        """A step and an update, the mean of two, until the device is through with them."""

        def both() -> None:
            for _ in range(2):
                self.step()
                update()
            torch.cuda.current_stream().synchronize()

        operation = timed(both)
        return lambda: operation() / 2

    def __str__(self) -> str:
        elements = sum(parameter.numel() for parameter in self.model.parameters())
        return f"a transformer of {elements / 1e9:.2f} B parameters in {len(list(self.model.parameters()))} tensors"


def _remote(model: nn.Module, client: EmaClient, run: str) -> RemoteEma:
    return RemoteEma(model, run=run, client=client, on_busy="skip")


def _operations(training: _Training, ours: RemoteEma, busy: RemoteEma) -> dict[str, Operation]:
    model = training.model
    litema, averaged = LitEma(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    averaged.update_parameters(model)  # the first call only copies
    step = training.followed_by(lambda: None)

    def alone(operation: Operation) -> Operation:
        def run() -> float:
            ours.flush()
            torch.cuda.synchronize()
            return operation()

        return run

    def inside() -> float:
        step()
        return timed(partial(ours.update, model))()

    return {
        NONE: alone(step),
        OURS: alone(training.followed_by(partial(ours.update, model))),
        BUSY: repeated(training.followed_by(partial(busy.update, model)), STEPS),
        LITEMA: alone(training.followed_by(partial(litema, model))),
        AVERAGED: alone(training.followed_by(partial(averaged.update_parameters, model))),
        INSIDE: alone(inside),
        COPY: alone(_copy(model)),
    }


def _copy(model: nn.Module) -> Operation:
    sources = [parameter.detach() for parameter in model.parameters()]
    targets = [torch.empty(source.shape, pin_memory=True) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return timed(copy)


def _memory(training: _Training, client: EmaClient) -> dict[str, Row]:
    """From the making of an EMA on, over two steps."""

    def peak(update: Callable[[], object]) -> int:
        for _ in range(2):
            training.step()
            update()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def fresh() -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    peak(lambda: None)
    fresh()
    without = peak(lambda: None)
    fresh()
    with _remote(training.model, client, "memory") as ema:
        ours = peak(lambda: ema.update(training.model))
    client.delete_run("memory")
    fresh()
    litema = LitEma(training.model)
    theirs = peak(lambda: litema(training.model))
    return {name: Row(name, "MB", ((most - without) / 1e6,)) for name, most in ((MEMORY, ours), (THEIRS, theirs))}
