"""The diffusion model of the demo: a small U-Net for 8x8 digits, the noise it learns to remove, loss and sampler.

DDPM (Ho et al. 2020, arXiv 2006.11239) with the cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672), told which
digit to draw. Images are float32, shape [batch, 1, 8, 8], -1 (paper) to 1 (ink); labels int64 [batch], 0..9.

Knows torch. Does not know data, training, EMA or the service.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

#: Steps of the noise schedule. 200 are enough for 8x8 images and keep sampling at about a second on one core.
TIMES = 200
WIDTH = 32
CONDITION = 64


class Block(nn.Module):
    """A residual block: two convolutions, between them a scale and shift from time and label."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(CONDITION, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        _zero(self.conv2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv2(F.silu(self.norm2(hidden) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + hidden
        return out


class Denoiser(nn.Module):
    """Predicts the noise in ``x`` at time ``t`` (int64 [batch], 0..TIMES-1) of digit ``label``. 256,097 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION))
        self.label = nn.Embedding(10, CONDITION)
        self.first = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.fine = Block(WIDTH, WIDTH)
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.coarse1 = Block(2 * WIDTH, 2 * WIDTH)
        self.coarse2 = Block(2 * WIDTH, 2 * WIDTH)
        self.up = nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, stride=2)
        self.merge = Block(2 * WIDTH, WIDTH)
        self.norm = nn.GroupNorm(8, WIDTH)
        self.last = nn.Conv2d(WIDTH, 1, 3, padding=1)
        _zero(self.last)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        condition = F.silu(self.time(_waves(t)) + self.label(label))
        fine = self.fine(self.first(x), condition)
        coarse = self.coarse2(self.coarse1(self.down(fine), condition), condition)
        merged = self.merge(torch.cat([self.up(coarse), fine], dim=1), condition)
        noise: Tensor = self.last(F.silu(self.norm(merged)))
        return noise


def _zero(conv: nn.Conv2d) -> None:
    # Each block begins as the identity and the model as "no noise": training starts calm at a high learning rate.
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _waves(t: Tensor) -> Tensor:
    """Sines and cosines of the time, [batch, WIDTH], as in the transformer's positions."""
    half = WIDTH // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angles = 1000 * t[:, None] / TIMES * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _signal() -> Tensor:
    """How much of the image's power is left at each time (alpha-bar), [TIMES], falling from near 1 to near 0."""
    t = torch.arange(TIMES + 1, dtype=torch.float64) / TIMES
    level = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


SIGNAL = _signal().float()


def noised(images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The images at time ``t`` of the forward process."""
    level = SIGNAL[t][:, None, None, None]
    return level.sqrt() * images + (1 - level).sqrt() * noise


def denoising_loss(model: nn.Module, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, a scalar: what training makes small and the evaluator measures."""
    return F.mse_loss(model(noised(images, t, noise), t, labels), noise)


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, generator: Generator) -> Tensor:
    """Draw one image for each label, [len(labels), 1, 8, 8]; the same generator state gives the same noise."""
    x = torch.randn(len(labels), 1, 8, 8, generator=generator)
    for time in reversed(range(TIMES)):
        predicted = model(x, torch.full((len(labels),), time), labels)
        x = _step_back(x, predicted, time)
        if time:
            x = x + _spread(time) * torch.randn(x.shape, generator=generator)
    return x


def _before(time: int) -> Tensor:
    return SIGNAL[time - 1] if time else torch.tensor(1.0)


def _step_back(x: Tensor, noise: Tensor, time: int) -> Tensor:
    """The mean of the image one step less noisy. The guess of the clean image is kept within paper and ink."""
    now, before = SIGNAL[time], _before(time)
    clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
    kept = now / before
    return (before.sqrt() * (1 - kept) * clean + kept.sqrt() * (1 - before) * x) / (1 - now)


def _spread(time: int) -> Tensor:
    now, before = SIGNAL[time], _before(time)
    return ((1 - now / before) * (1 - before) / (1 - now)).sqrt()
