"""The demo's trainer, a process of its own: an ordinary training loop with ``RemoteEma`` where LitEma would stand.

Beside it, and only because this is a demo, the loop updates an EMA in process; after the last step the service's EMA is
pulled and compared with the one in process. Then the trainer takes a snapshot, which tells the evaluator that the
training is over.

Knows the model, the data and the service's address. Does not know the evaluator or who reads its reports.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_service.demo import digits
from ema_service.demo.litema import InProcessEma
from ema_service.demo.model import TIMES, Denoiser, denoising_loss
from ema_service.demo.plan import AVERAGES, DECAY, FINAL_SNAPSHOT, RUN, Note, Progress, report
from ema_service.demo.proof import compare

#: High for this model, and constant: the raw weights jitter around a good solution and the average settles in it. That
#: is the use of an EMA; with a small or falling rate there would be less to see. Tried: rates of 2e-3 to 1e-2, batches
#: of 16 to 64. With these two the EMA's loss is about 9 % below the raw loss, and both still fall.
LEARNING_RATE = 4e-3
BATCH = 32
#: Steps between two reports to the parent.
REPORT_EVERY = 10


def main() -> None:
    """Train, prove, take the snapshot. Ends with status 1 where the EMAs differ."""
    options = _options()
    # One core for the trainer; the other is for the server and the evaluator.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Denoiser()
    ema = RemoteEma(model, DECAY, run=RUN, url=options.url, averages=AVERAGES, posthoc=True)
    witness = InProcessEma(model, DECAY)
    steps = _train(model, ema, witness, options.steps, options.seconds)
    ema.close()
    with EmaClient(options.url) as client:
        _prove(client, steps, witness)
        client.snapshot(RUN, FINAL_SNAPSHOT)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_args()


def _train(model: nn.Module, ema: RemoteEma, witness: InProcessEma, steps: int, seconds: float) -> int:
    """Train for ``steps`` steps or ``seconds`` seconds, whichever is over first. Returns the last step."""
    training, _ = digits.load()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    deadline = time.monotonic() + seconds
    mean = 1.0
    for step in range(1, steps + 1):
        loss = loss_of(model, training)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema(model)  # the line that a trainer adds
        witness(model)
        mean += (loss.item() - mean) * max(0.02, 1 / step)
        if step % REPORT_EVERY == 0 or step == steps:
            report(Progress(step, steps, mean))
        if time.monotonic() > deadline:
            report(Note(f"training ends at step {step} of {steps}: its {seconds:.0f} seconds are over", lasting=True))
            return step
    return steps


def loss_of(model: nn.Module, training: digits.Digits) -> Tensor:
    """The loss of a batch at random."""
    batch = torch.randint(len(training), (BATCH,))
    images = training.images[batch]
    t = torch.randint(TIMES, (BATCH,))
    return denoising_loss(model, images, training.labels[batch], t, torch.randn_like(images))


def _prove(client: EmaClient, step: int, witness: InProcessEma) -> None:
    """Compare the pulled EMA with the one in process. Ends the process with status 1 where they differ."""
    pulled = client.pull(RUN)
    proof = compare("pulled EMA = in-process EMA", step, witness.shadow, pulled)
    report(proof)
    counted = int(witness.num_updates)
    if proof.differing or pulled.info.num_updates != counted:
        sys.exit(f"the EMAs differ: num_updates is {pulled.info.num_updates} in the service and {counted} in process")


if __name__ == "__main__":
    main()
