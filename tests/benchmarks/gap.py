"""Group gap: what is lost, and what is saved, by pushing each k-th step only, with and without compensation.

A real small training (the demo's model and digits) is run once. LitEma follows every step of it in this process, in
float64; a RemoteEma for each k and decay, of either kind, follows the same steps. None warms up, so that the decays are
those named. The figure is the distance between its average and LitEma's, as a share of the distance between LitEma's
average and the weights of the last step: 0 % is the same average, 100 % is as far off as the weights themselves.

Knows the training and both kinds of average. Does not know clocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scale import Scale
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_service.bench.children import Service
from ema_service.bench.rows import Group, Need, Row
from ema_service.demo import digits
from ema_service.demo.model import TIMES, Denoiser, denoising_loss

__all__ = ["measure"]

EVERY = (1, 10, 100)
DECAYS = (0.999, 0.9999)
KINDS = {"step": "compensated", "update": "not compensated"}
BATCH = 32
LEARNING_RATE = 4e-3


class _Exact:
    """LitEma at every step, in float64."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = [parameter.detach().double() for parameter in model.parameters()]

    def __call__(self, model: nn.Module) -> None:
        for shadow, parameter in zip(self.shadow, model.parameters(), strict=True):
            shadow.lerp_(parameter.detach().double(), 1 - self.decay)


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    torch.manual_seed(0)
    model = Denoiser()
    with contextlib.ExitStack() as stack:
        # Small tensors: a second thread would only wait.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        service = stack.enter_context(Service())
        client = stack.enter_context(EmaClient(service.uds))
        exact = {decay: _Exact(model, decay) for decay in DECAYS}
        followers = {
            (decay, every, kind): stack.enter_context(_follower(model, client, decay, every, kind))
            for decay in DECAYS
            for every in EVERY
            for kind in KINDS
            # With every step pushed there is no gap to make good.
            if every > 1 or kind == "step"
        }
        for step in _training(model, scale.gap_steps):
            on_step(f"step {step} of {scale.gap_steps}")
            for follow in (*exact.values(), *followers.values()):
                follow(model)
        rows = tuple(_row(model, client, ema, exact[key[0]], key) for key, ema in followers.items())
    nbytes = sum(4 * parameter.numel() for parameter in model.parameters())
    facts = (
        f"{scale.gap_steps} steps of the demo's model on its digits; off by: 100 % is as far as the raw weights are",
        *(f"k = {every}: {nbytes / every / 1e6:.3f} MB are sent a step" for every in EVERY),
    )
    return Group("gap", "gap: each k-th step pushed, beside LitEma at every step", rows, facts)


def _follower(model: nn.Module, client: EmaClient, decay: float, every: int, kind: Any) -> RemoteEma:
    name = f"d{decay}-k{every}-{kind}"
    return RemoteEma(model, decay, False, run=name, client=client, update_every=every, decay_per=kind)


def _training(model: nn.Module, steps: int) -> Iterator[int]:
    training, _ = digits.load()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, steps + 1):
        batch = torch.randint(len(training), (BATCH,))
        images = training.images[batch]
        t = torch.randint(TIMES, (BATCH,))
        optimizer.zero_grad()
        denoising_loss(model, images, training.labels[batch], t, torch.randn_like(images)).backward()
        optimizer.step()
        yield step


def _row(model: nn.Module, client: EmaClient, ema: RemoteEma, exact: _Exact, key: tuple[float, int, str]) -> Row:
    ema.flush()
    pulled = client.pull(ema.run)
    averages = [pulled[name].double() for name, _ in model.named_parameters()]
    raw = [parameter.detach().double() for parameter in model.parameters()]
    decay, every, kind = key
    name = f"decay {decay}, k = {every}" + (f", {KINDS[kind]}" if every > 1 else "")
    off = 100 * _distance(averages, exact.shadow) / _distance(raw, exact.shadow)
    # What remains is float32, and that LitEma rounds the decay to it.
    needs = (Need(0.1, most=True),) if every == 1 else ()
    return Row(name, "%", (off,), needs)


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    return float(sum((a - b).square().sum() for a, b in zip(one, other, strict=True)).sqrt())  # type: ignore[union-attr]
