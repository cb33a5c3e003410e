"""A training on handwritten digits: averages worked out afterwards against averages that were tracked all along.

The tracked ones are float64 loops in this process, one for each length, which know nothing of the service. Between them
and what the service works out lie its schedules, the thinning of its ring, least squares, its files and its restarts.

Knows the client's calls, and Karras et al. 2024 (arXiv 2312.02696). Does not know how the service does any of this.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ema_client import EmaClient, RemoteEma
from tests.waiting import settled

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

datasets = pytest.importorskip("sklearn.datasets")

WIDTHS = tuple(float(width) for width in np.geomspace(0.015, 0.25, 12))
STEPS = 600
LONG = 8000
#: Of the parameters, relative to their norm.
MOST_ERROR = 5e-4
#: Of the held-out loss, by the number of steps: a wide average of a short training lies on a slope of the loss.
MOST_LOSS = {STEPS: 1e-3, LONG: 5e-5}

State = dict[str, Tensor]


def flat(state: Mapping[str, Tensor]) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power average: the positive root of (g + 1) / ((g + 2)^2 (g + 3)) = sigma_rel^2."""
    inverse = sigma_rel**-2
    return float(max(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real))


GAMMAS = tuple(gamma_of(width) for width in WIDTHS)


class Tracked:
    """Power averages in float64, one for each of WIDTHS: (widths, parameters), exact over gaps of the counter n."""

    def __init__(self) -> None:
        self.averages, self.n = torch.zeros(len(WIDTHS), 1, dtype=torch.float64), 0

    def update(self, state: Mapping[str, Tensor], n: int) -> None:
        kept = torch.tensor([[(self.n / n) ** (gamma + 1.0)] for gamma in GAMMAS], dtype=torch.float64)
        self.averages, self.n = kept * self.averages + (1.0 - kept) * flat(state), n

    def copy(self) -> Tracked:
        made = Tracked()
        made.averages, made.n = self.averages, self.n
        return made


class Training:
    """A classifier with 13 k parameters, at a high and constant rate: its parameters jitter around a good solution."""

    def __init__(self) -> None:
        images, labels = datasets.load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.images = (torch.tensor(images, dtype=torch.float32) / 8.0 - 1.0)[order]
        self.labels = torch.tensor(labels)[order]
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=2e-2, momentum=0.9)

    @property
    def state(self) -> State:
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}

    def step(self) -> None:
        batch = torch.randint(1400, (32,))
        self._optimizer.zero_grad()
        # Smoothed labels: the held-out loss then has an optimum in the average's length.
        loss = F.cross_entropy(self.model(self.images[batch]), self.labels[batch], label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    @torch.no_grad()
    def loss(self, weights: Tensor) -> float:
        """The held-out loss of these weights, of all parameters as flat() has them, in float64."""
        names = sorted(self.state)
        parts = weights.split([self.state[name].numel() for name in names])
        held_out = {name: part.view_as(self.state[name]) for name, part in zip(names, parts, strict=True)}
        scores = torch.func.functional_call(self.model, held_out, (self.images[1400:].double(),))
        return F.cross_entropy(scores, self.labels[1400:]).item()


def check(client: EmaClient, run: str, training: Training, tracked: Tracked) -> None:
    """Each of WIDTHS, worked out by the service, is what was tracked here."""
    most_loss = MOST_LOSS[STEPS if tracked.n <= STEPS else LONG]
    settled(client, run)
    found = [client.pull(run, sigma_rel=width) for width in WIDTHS]
    errors = [distance(pulled, average) for pulled, average in zip(found, tracked.averages, strict=True)]
    losses = [training.loss(average) for average in tracked.averages]
    differences = [abs(training.loss(flat(pulled)) - loss) for pulled, loss in zip(found, losses, strict=True)]

    assert {pulled.info.num_updates for pulled in found} == {tracked.n}
    assert max(errors) <= MOST_ERROR
    assert max(differences) <= most_loss
    # The lengths differ by far more than they are wrong.
    assert max(losses) - min(losses) > 20 * most_loss
    assert distance(found[-1], tracked.averages[0]) > 20 * MOST_ERROR


def distance(found: Mapping[str, Tensor], expected: Tensor) -> float:
    return float((flat(found) - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps of such a model take 60 ms on two threads of a machine that runs other tests, and 2 ms on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[STEPS, pytest.param(LONG, marks=[pytest.mark.soak, pytest.mark.timeout(300)])])
def steps(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[EmaClient]:
    with EmaClient(server.url) as made:
        yield made


@pytest.mark.parametrize("every", [1, 7])
def test_update_every(client: EmaClient, run_name: str, steps: int, every: int) -> None:
    """Every update sent, or every seventh with the decays of all seven."""
    training, tracked = Training(), Tracked()
    steps -= steps % every
    with RemoteEma(
        training.model, run=run_name, client=client, posthoc=True, update_every=every, decay_per="step"
    ) as ema:
        for step in range(1, steps + 1):
            training.step()
            ema(training.model)
            if step % every == 0:
                tracked.update(training.state, step)
        ema.flush()
        check(client, run_name, training, tracked)


def test_random_skips(client: EmaClient, run_name: str, steps: int) -> None:
    """Updates that were left out, as where a service is busy: three of four, at random, and once a hundred at once."""
    training, tracked, chance = Training(), Tracked(), random.Random(1)
    client.create_run(run_name, training.model, posthoc=True, decay_per="step")
    for step in range(1, steps + 1):
        training.step()
        away = steps // 2 < step < steps // 2 + 100
        if step == steps or (chance.random() < 0.25 and not away):
            client.push(run_name, training.state, step=step)
            tracked.update(training.state, step)
    check(client, run_name, training, tracked)


@pytest.mark.soak
def test_a_rewind_in_the_middle(client: EmaClient, run_name: str, steps: int) -> None:
    """What a rewind gave up has no part in any average."""
    training, tracked = Training(), Tracked()
    client.create_run(run_name, training.model, posthoc=True)

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            training.step()
            client.push(run_name, training.state, step=step)
            tracked.update(training.state, step)

    train(1, steps // 2)
    client.snapshot(run_name, "middle")
    kept, weights = tracked.copy(), {name: tensor.clone() for name, tensor in training.state.items()}
    train(steps // 2 + 1, steps * 3 // 4)
    client.rewind(run_name, "middle")
    tracked = kept
    # Another branch: the other one's parameters are far away.
    training.model.load_state_dict(weights)
    torch.manual_seed(77)
    train(steps // 2 + 1, steps)
    check(client, run_name, training, tracked)


def test_killed_in_the_middle(start_server: Callable[..., ServerProcess], run_name: str, steps: int) -> None:
    """kill -9 in the middle of the training, twice: the ring and the averages go on as if nothing had been.

    At most the snapshot under way is lost: what a slow disk has waiting goes with the process.
    """
    running, training, tracked = start_server(), Training(), Tracked()
    with EmaClient(running.uds) as client:
        client.create_run(run_name, training.model, posthoc=True)
        for step in range(1, steps + 1):
            training.step()
            if step in (steps // 3, steps * 2 // 3):
                settled(client, run_name, but_for=1)
                running.kill()
                running.start()
            client.push(run_name, training.state, step=step)
            tracked.update(training.state, step)
        check(client, run_name, training, tracked)
