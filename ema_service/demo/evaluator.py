"""The demo's evaluator, a process of its own: watches the run over HTTP and pulls whenever the version moved.

The evaluator computes the held-out denoising loss of the raw and of the EMA weights of one version, with the same noise
and times every time. It never meets the trainer: the trainer takes a snapshot at its end, and the snapshot tells the
evaluator.

Knows the model, the held-out images and the service's address. Does not know the trainer or who reads its reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ema_client import EmaClient
from ema_client.checkpoints import read
from ema_client.errors import AwaitingWeights, RunNotFound
from ema_client.protocol import RunInfo, WeightsInfo
from ema_service.demo import digits, picture
from ema_service.demo.model import TIMES, Denoiser, denoising_loss, sample
from ema_service.demo.plan import FINAL_SNAPSHOT, RAW, RUN, TRACKED, WIDTHS, Length, Note, Row, report
from ema_service.demo.proof import compare

#: Seconds between two looks at the run's version. Short enough for some twenty rows in a demo.
POLL = 1.5
#: Tries to see the run's info and both averages at one version, while updates go on.
TRIES = 20
#: Each held-out image is measured with this many different times and noises.
DRAWS = 4
ROWS_OF_SAMPLES = 4


class Seen(NamedTuple):
    """A run at one version: its info, its EMA weights, its raw weights."""

    info: RunInfo
    ema: Mapping[str, Tensor]
    raw: Mapping[str, Tensor]


class Meter:
    """Measures the held-out loss of weights; every call uses the same images, times and noise."""

    def __init__(self) -> None:
        _, held_out = digits.load()
        self.model = Denoiser()
        self.images = held_out.images.repeat(DRAWS, 1, 1, 1)
        self.labels = held_out.labels.repeat(DRAWS)
        # 7 and TIMES share no factor: the times are spread evenly, and each image meets several.
        self.t = torch.arange(len(self.labels)) * 7 % TIMES
        self.noise = torch.randn(self.images.shape, generator=Generator().manual_seed(1))

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Mean squared error of the noise that the model predicts with these weights."""
        self.model.load_state_dict(dict(weights))
        return denoising_loss(self.model, self.images, self.labels, self.t, self.noise).item()

    def samples(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Digits 0 to 9 drawn with these weights, [ROWS_OF_SAMPLES, 10, 8, 8]; the same noise for all weights."""
        self.model.load_state_dict(dict(weights))
        labels = torch.arange(10).repeat(ROWS_OF_SAMPLES)
        return sample(self.model, labels, Generator().manual_seed(2)).view(ROWS_OF_SAMPLES, 10, 8, 8)

    def row(self, seen: Seen) -> Row:
        """The losses of one version."""
        info = seen.info
        return Row(info.step or 0, info.num_updates, info.effective_decay, self.loss(seen.raw), self.loss(seen.ema))


def main() -> None:
    """Watch until the final snapshot, then measure the snapshot, and EMAs of other lengths, and draw the picture."""
    options = _options()
    torch.set_num_threads(1)
    meter = Meter()
    with EmaClient(options.url) as client:
        rows = _watch(client, meter)
        _finish(client, meter, rows, options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _watch(client: EmaClient, meter: Meter) -> list[Row]:
    """Measure the run each time its version has moved, until the final snapshot is there."""
    rows: list[Row] = []
    version = None
    while not _is_over(client):
        seen = _look(client, version)
        if seen is not None:
            version = seen.info.version
            rows.append(meter.row(seen))
            report(rows[-1])
        time.sleep(POLL)
    return rows


def _is_over(client: EmaClient) -> bool:
    try:
        return any(snapshot.name == FINAL_SNAPSHOT for snapshot in client.snapshots(RUN))
    except RunNotFound:
        return False  # the trainer has not created the run yet


def _look(client: EmaClient, known: str | None) -> Seen | None:
    """The run at one version other than ``known``, or None.

    Each answer is of one version, but an update may come between two answers: then all are asked for again.
    """
    try:
        for _ in range(TRIES):
            info = client.run(RUN)
            if info.version in (known, None):
                return None
            ema, raw = client.pull(RUN), client.pull(RUN, average=RAW)
            if info.version == ema.info.version == raw.info.version:
                return Seen(info, ema, raw)
    except (RunNotFound, AwaitingWeights):
        pass  # the trainer is about to create the run
    return None


def _finish(client: EmaClient, meter: Meter, rows: list[Row], out: Path) -> None:
    """Measure the final snapshot, compare it with the live EMA, draw the picture."""
    info = client.run(RUN)
    ema = client.pull(RUN, snapshot=FINAL_SNAPSHOT)
    raw = client.pull(RUN, average=RAW, snapshot=FINAL_SNAPSHOT)
    final = meter.row(Seen(info, ema, raw))
    if not rows or rows[-1].step != final.step:
        rows.append(final)
        report(final)
    report(compare(f"snapshot '{FINAL_SNAPSHOT}' = live EMA", final.step, client.pull(RUN), ema))
    report(Note("trying EMAs of other lengths"))
    lengths = _lengths(client, meter)
    report(Note("drawing samples"))
    picture.draw(out, rows, lengths, raw=meter.samples(raw), ema=meter.samples(ema))


def _lengths(client: EmaClient, meter: Meter) -> list[Length]:
    """The losses of EMAs of several lengths, worked out after the training, and of some that were tracked in it."""

    def evaluate(path: Path, info: WeightsInfo) -> float:
        loss = meter.loss(read(path).tensors)
        report(Length(info.sigma_rel or 0.0, loss))
        return loss

    swept = client.sweep(RUN, evaluate, sigma_rel=WIDTHS)
    found = [Length(point.value, point.result) for point in swept.points if point.result is not None]
    for width in TRACKED:
        found.append(Length(width, meter.loss(client.pull(RUN, average=f"power-{width}")), tracked=True))
        report(found[-1])
    return found


if __name__ == "__main__":
    main()
