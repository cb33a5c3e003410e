"""A trainer that comes back from a checkpoint has the EMA it had there; the one it replaced cannot push any more.

Knows RemoteEma, LitEma's arithmetic, and what a checkpoint of a training is. Does not know how snapshots are kept.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import Fenced, SnapshotNotFound, UsageError

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, ServerProcess


class Training:
    """A model that moves by a fixed rule, its EMA in process, and what a checkpoint of both holds."""

    def __init__(self, litema: Callable[..., LitEmaOracle]) -> None:
        self.model = nn.Linear(5, 3)
        self.litema = litema(self.weights(), 0.9)
        self.steps = 0

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def step(self, ema: RemoteEma, size: float = 1.0) -> None:
        self.steps += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.9).add_(size * self.steps)
        self.litema.update(self.weights())
        ema(self.model)

    def same(self, ema: RemoteEma) -> bool:
        copy = nn.Linear(5, 3)
        ema.copy_to(copy)
        return all(torch.equal(p, self.litema.shadow[name]) for name, p in copy.named_parameters())


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint gives it back: through torch.save and a loader that takes no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.fixture
def training(litema: Callable[..., LitEmaOracle]) -> Training:
    return Training(litema)


def test_resumed_trainer_has_the_ema_of_its_checkpoint(
    server: ServerProcess, run_name: str, training: Training
) -> None:
    """Steps after the checkpoint are as if they had never been: weights, num_updates, step and decay go on from it."""
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url) as ema:
        for _ in range(5):
            training.step(ema)
        checkpoint = saved({"ema": ema.state_dict(), "model": training.model.state_dict()})
        shadow = {name: tensor.clone() for name, tensor in training.litema.shadow.items()}
        for _ in range(3):
            training.step(ema, size=100.0)

    # Another process would begin here, with the checkpoint.
    training.model.load_state_dict(checkpoint["model"])
    training.steps, training.litema.shadow = 5, shadow
    training.litema.num_updates.fill_(5)
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url, resume=True) as ema:
        ema.load_state_dict(checkpoint["ema"])
        assert ema.num_updates == 5
        assert training.same(ema)
        for _ in range(2):
            training.step(ema, size=-1.0)
        assert training.same(ema)
        assert ema.num_updates == 7


def test_nothing_is_done_where_nothing_came_after(server: ServerProcess, run_name: str, training: Training) -> None:
    """A checkpoint of the very version that is there changes nothing: readers keep their version."""
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url) as ema, EmaClient(server.url) as client:
        training.step(ema)
        state = ema.state_dict()
        before = client.run(run_name)
        ema.load_state_dict(state)
        assert client.run(run_name) == before
        training.step(ema)
        assert training.same(ema)


def test_replaced_trainer_is_told(server: ServerProcess, run_name: str, training: Training) -> None:
    """A trainer that was taken for dead pushes once more after another one has resumed: refused, and it learns why."""
    zombie = RemoteEma(training.model, 0.9, run=run_name, url=server.url)
    training.step(zombie)
    zombie.flush()
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url, resume=True) as ema:
        zombie(training.model)
        with pytest.raises(Fenced):
            zombie.flush()
        zombie.close()
        assert ema.num_updates == 1
        assert training.same(ema)
        training.step(ema)
        assert training.same(ema)


def test_states_are_bounded(server: ServerProcess, run_name: str, training: Training) -> None:
    """The ten newest states of a run stay; other snapshots are left alone; a state that is gone is a clear error."""
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url) as ema, EmaClient(server.url) as client:
        client.snapshot(run_name, "release-1")
        states = []
        for _ in range(12):
            training.step(ema)
            states.append(ema.state_dict())
        names = [snapshot.name for snapshot in client.snapshots(run_name)]
        assert names == ["release-1", *(state["snapshot"] for state in states[2:])]
        with pytest.raises(SnapshotNotFound):
            ema.load_state_dict(states[0])
        ema.load_state_dict(states[2])
        assert ema.num_updates == 3


@pytest.mark.parametrize(("keep", "stay"), [(2, 2), (None, 12)])
def test_so_many_states_stay(
    server: ServerProcess, run_name: str, training: Training, keep: int | None, stay: int
) -> None:
    """keep= says how many states of a run stay, the newest; None keeps all; less than one is refused at once."""
    where = {"run": run_name, "url": server.url}
    with pytest.raises(UsageError, match="keep=0 is less than 1"):
        RemoteEma(training.model, keep=0, **where)
    with RemoteEma(training.model, 0.9, keep=keep, **where) as ema, EmaClient(server.url) as client:
        states = []
        for _ in range(12):
            training.step(ema)
            states.append(ema.state_dict()["snapshot"])
        assert [snapshot.name for snapshot in client.snapshots(run_name)] == states[-stay:]


def test_state_of_another_run_is_refused(server: ServerProcess, run_name: str, training: Training) -> None:
    """A checkpoint of another run is the caller's mistake, named with both runs; nothing changes."""
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url) as ema:
        with pytest.raises(UsageError, match=rf"'other'.*{run_name!r}"):
            ema.load_state_dict({**ema.state_dict(), "run": "other"})
        assert training.same(ema)


def test_without_a_disk(start_server: Callable[..., ServerProcess], run_name: str, training: Training) -> None:
    """Where the service has no disk, a checkpoint can still be taken, with a warning, and goes on from its version."""
    server = start_server(memory=True)
    with RemoteEma(training.model, 0.9, run=run_name, url=server.url) as ema:
        training.step(ema)
        with pytest.warns(UserWarning, match="no disk"):
            state = saved(ema.state_dict())
        ema.load_state_dict(state)
        training.step(ema)
        with pytest.raises(UsageError, match="no snapshot"):
            ema.load_state_dict(state)
        assert training.same(ema)
