"""Groups trainer and loop: what an EMA costs the thread that trains, in the service and in the trainer's own process.

The service is on the last core and the trainer on the others, as on a machine where a core is free for it; where the
system has no affinities they share all.

Knows RemoteEma, the libraries of ``models`` and which time is counted. Does not know how updates are sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import LITEMA, MAKERS, Gpt2
from scale import Scale
from torch import nn

from ema_client import RemoteEma
from ema_service.bench.children import Service
from ema_service.bench.rounds import Operation, interleave, repeated, timed
from ema_service.bench.rows import Group, Need, Row

__all__ = ["measure", "measure_loop"]

COPY = "copy_ of every parameter"
OURS, BUSY = "RemoteEma.update", "RemoteEma.update, the last one still on its way"
BORROWED, TENTH = "RemoteEma.update, borrow=True", "RemoteEma.update, update_every=10, amortised"
TIMM = "timm ModelEmaV3"
NONE, LOOP, LOOP_BORROWED = "no EMA", "RemoteEma", "RemoteEma, borrow=True"

NEEDS: dict[str, tuple[Need, ...]] = {
    COPY: (),
    OURS: (Need(1.3, COPY, most=True), Need(1.0, TIMM, most=True)),
    BUSY: (Need(against=COPY),),
    BORROWED: (Need(against=COPY),),
    TENTH: (Need(0.13, COPY, most=True),),
    **{name: (Need(against=COPY),) for name in MAKERS if name != "lerp_ on one flat tensor"},
    LITEMA: (Need(4, OURS),),
}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Milliseconds inside one call; what the sender does meanwhile counts only as far as it slows the call."""
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service())
        cores = stack.enter_context(_apart(service.pid))
        model = Gpt2(scale.gpt2_width)
        operations = {COPY: timed(_copier(model)), **_ours(model, service, stack)}
        for name in NEEDS:
            if name in MAKERS and (update := MAKERS[name](model)) is not None:
                operations[name] = timed(update)
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    rows = [
        Row(
            name,
            "ms",
            tuple(1000 * s for s in seconds.get(name, ())),
            needs,
            "" if name in seconds else "not installed",
        )
        for name, needs in NEEDS.items()
    ]
    elements = sum(parameter.numel() for parameter in model.parameters())
    title = f"trainer: one call with {elements / 1e6:.1f} M parameters in {len(list(model.parameters()))} tensors"
    return Group("trainer", title, tuple(rows), (cores, "RemoteEma over the Unix socket, warm"))


def _ours(model: nn.Module, service: Service, stack: contextlib.ExitStack) -> dict[str, Operation]:
    def make(run: str, **options: Any) -> RemoteEma:
        return stack.enter_context(RemoteEma(model, run=run, url=service.uds, **options))

    plain, borrowing, tenth = make("plain"), make("borrowing", borrow=True), make("tenth", update_every=10)
    step = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step
    return {
        OURS: _alone(plain, lambda: plain.update(model)),
        BUSY: _alone(plain, lambda: plain.update(model), before=lambda: plain.update(model)),
        BORROWED: _alone(borrowing, lambda: borrowing.update(model), before=step),
        TENTH: _tenth(tenth, model),
    }


def _alone(ema: RemoteEma, update: Callable[[], object], before: Callable[[], object] = lambda: None) -> Operation:
    operation = timed(update)

    def run() -> float:
        ema.flush()
        before()
        seconds = operation()
        ema.flush()
        return seconds

    return run


def _tenth(ema: RemoteEma, model: nn.Module) -> Operation:
    ten = timed(lambda: [ema.update(model) for _ in range(10)])

    def run() -> float:
        seconds = ten() / 10
        ema.flush()
        return seconds

    return run


def _copier(model: nn.Module) -> Callable[[], None]:
    sources = [parameter.detach() for parameter in model.parameters()]
    targets = [torch.zeros_like(source) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


# --- a whole training loop ------------------------------------------------------------------------------------------

LOOP_MAKERS = (LITEMA, "AveragedModel, foreach")
LOOP_NEEDS: dict[str, tuple[Need, ...]] = {
    NONE: (),
    COPY: (Need(against=NONE),),
    LOOP: (Need(against=NONE), Need(1.05, COPY, most=True)),
    LOOP_BORROWED: (Need(against=NONE),),
    **{name: (Need(against=NONE),) for name in LOOP_MAKERS},
}
STEPS = 5


def measure_loop(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Milliseconds of a whole step: forward, backward, optimizer, EMA."""
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service())
        cores = stack.enter_context(_apart(service.pid))
        width = max(64, scale.gpt2_width * 2)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)))
        plain = stack.enter_context(RemoteEma(model, run="loop", url=service.uds))
        borrowing = stack.enter_context(RemoteEma(model, run="loop-borrowing", url=service.uds, borrow=True))
        updates: dict[str, Callable[[], Any]] = {
            NONE: lambda: None,
            COPY: _copier(model),
            LOOP: lambda: plain.update(model),
            LOOP_BORROWED: lambda: borrowing.update(model),
        }
        for name in LOOP_MAKERS:
            if (update := MAKERS[name](model)) is not None:  # type: ignore[arg-type]
                updates[name] = update
        train = _training(model, width)
        operations = {name: repeated(timed(lambda u=update: train(u)), STEPS) for name, update in updates.items()}  # type: ignore[misc]
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    rows = tuple(Row(name, "ms", tuple(1000 * s for s in seconds[name]), needs) for name, needs in LOOP_NEEDS.items())
    elements = sum(parameter.numel() for parameter in model.parameters())
    title = f"loop: one training step of a perceptron with {elements / 1e6:.1f} M parameters"
    return Group("loop", title, rows, (cores, f"the median of {STEPS} steps is a round's figure"))


def _training(model: nn.Module, width: int) -> Callable[[Callable[[], Any]], None]:
    batch = torch.randn(256, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(update: Callable[[], Any]) -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        update()

    return step


# --- cores ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _apart(service: int) -> Iterator[str]:
    """Put the service on the last core and this process on the others. Gives the sentence that says so."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        yield "trainer and service share all cores"
        return
    threads, others = torch.get_num_threads(), cores[:-1]
    _pin(service, {cores[-1]})
    _pin(os.getpid(), set(others))
    torch.set_num_threads(len(others))
    try:
        yield f"the service on one core, the trainer on {len(others)}, with as many threads; its sender shares them"
    finally:
        torch.set_num_threads(threads)
        _pin(os.getpid(), set(cores))


def _pin(process: int, cores: set[int]) -> None:
    for thread in Path(f"/proc/{process}/task").iterdir():
        # A thread may have ended meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
