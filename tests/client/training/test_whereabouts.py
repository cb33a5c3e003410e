"""A training that goes on with a run and does not say its step: silent where it is where the run is, loud elsewhere.

Knows RemoteEma, torch's optimizers, the real service, and what a training loads when it comes back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma

ADAM, SGD = torch.optim.AdamW, torch.optim.SGD
#: What the warning says: both steps where the optimizer counts its own, the run's where it does not.
BOTH = "at step 6 and the training comes back at step 4, by its optimizer's count: the 2 steps between count twice"
ITS_OWN = "goes on at step 6, and the model does not have the weights of that step: where it comes from an older"
MISSING = "its optimizer has made 9 steps: where both count alike, the 3 steps between are missing in the EMA"


@dataclass(frozen=True)
class Case:
    """What a training comes back with. saved: the step of its checkpoint. expected: the warning, None for silence."""

    optimizer: Any
    saved: int
    expected: str | None
    load_optimizer: bool = True
    options: dict[str, Any] | None = None
    batch_norm: bool = False


CASES = {
    "where the run is": Case(ADAM, 6, None),
    "where the run is, sent in bf16": Case(ADAM, 6, None, options={"push_dtype": torch.bfloat16}),
    "where the run is, no count": Case(SGD, 6, None),
    "where the run is, with a new optimizer": Case(ADAM, 6, None, load_optimizer=False),
    "where the run is, with buffers": Case(ADAM, 6, None, options={"buffers": "copy"}, batch_norm=True),
    "behind": Case(ADAM, 4, BOTH),
    "behind, no count": Case(SGD, 4, ITS_OWN),
    "behind, with a new optimizer": Case(ADAM, 4, ITS_OWN, load_optimizer=False),
    "behind, with buffers, no count": Case(SGD, 4, ITS_OWN, options={"buffers": "copy"}, batch_norm=True),
    "ahead, by less than an update": Case(ADAM, 7, None, options={"update_every": 3}),
    "behind, of every third": Case(ADAM, 4, BOTH, options={"update_every": 3}),
}


class Training:
    """A model that an optimizer trains, and its checkpoints, by step."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3) if case.batch_norm else nn.Identity())
        self.optimizer = case.optimizer(self.model.parameters(), lr=0.1)
        self.checkpoints: dict[int, Any] = {}

    def go_on(self, ema: RemoteEma, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(8, 3)).square().sum().backward()
            self.optimizer.step()
            ema(self.model)
            self.checkpoints[ema.step] = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, checkpoint: Any, *, optimizer: bool) -> None:
        self.model.load_state_dict(checkpoint[0])
        if optimizer:
            self.optimizer.load_state_dict(checkpoint[1])


@pytest.mark.parametrize("loaded", ["before the RemoteEma", "after it"])
@pytest.mark.parametrize("name", CASES)
def test_a_training_that_does_not_say_its_step(
    make_ema: Callable[..., RemoteEma], recwarn: pytest.WarningsRecorder, name: str, loaded: str
) -> None:
    """Warned is once, ahead of the first step, and only where the model is not where the run is."""
    case = CASES[name]
    options = case.options or {}
    first, again = Training(case), Training(case)
    ema = make_ema(first.model, **options)
    first.go_on(ema, max(6, case.saved))
    ema.close()
    assert not recwarn.list

    checkpoint = first.checkpoints[case.saved]
    if loaded == "before the RemoteEma":
        again.load(checkpoint, optimizer=case.load_optimizer)
    elif case.saved == 4:
        # Settled is nothing by the constructor, which finds the weights of the run here.
        again.load(first.checkpoints[6], optimizer=False)
    ema = make_ema(again.model, resume="auto", **options)
    if loaded == "after it":
        again.load(checkpoint, optimizer=case.load_optimizer)
    assert not recwarn.list
    if loaded == "after it" and "with buffers, no count" in name:
        return  # a forward pass has changed the buffers: nobody can tell
    again.go_on(ema, 3)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (case.expected is not None)
    assert case.expected is None or case.expected in said[0]


def test_without_an_optimizer(make_ema: Callable[..., RemoteEma], recwarn: pytest.WarningsRecorder) -> None:
    """A loop that moves the weights itself is judged by the weights that the constructor finds, at the first update."""
    model = nn.Linear(2, 2)
    ema = make_ema(model)
    saved = [copy.deepcopy(model.state_dict())]
    for _ in range(6):
        nn.init.normal_(model.weight)
        ema(model)
        saved.append(copy.deepcopy(model.state_dict()))
    ema.close()
    for step, expected in ((6, []), (4, [ITS_OWN])):
        model.load_state_dict(saved[step])
        ema = make_ema(model, resume=True)
        assert not recwarn.list
        nn.init.normal_(model.weight)
        if expected:
            ema(model)
        ema.close()
        said = [str(warning.message) for warning in recwarn]
        assert len(said) == len(expected)
        assert all(text in one for text, one in zip(expected, said, strict=True))


def test_a_training_that_says_where_it_is(
    make_ema: Callable[..., RemoteEma], client: EmaClient, recwarn: pytest.WarningsRecorder
) -> None:
    """With a state, given late or early, and of a run without an update nothing is to be found out."""
    case = CASES["behind"]
    first = Training(case)
    ema = make_ema(first.model)
    first.go_on(ema, 4)
    state = ema.state_dict()
    first.go_on(ema, 2)
    ema.close()
    for given in ({"state": state}, {}):
        again = Training(case)
        ema = make_ema(again.model, resume=True, **given)
        again.load(first.checkpoints[4], optimizer=True)
        if not given:
            ema.load_state_dict(state)
        again.go_on(ema, 1)
        ema.flush()
        assert client.run(ema.run).step == 5
    new = Training(case)
    other = {"run": f"{ema.run}-other"}
    make_ema(new.model, **other)
    for parameter in new.model.parameters():
        nn.init.normal_(parameter)
    new.go_on(make_ema(new.model, resume=True, **other), 1)
    assert not recwarn.list


def test_a_training_whose_run_was_taken_back(
    make_ema: Callable[..., RemoteEma], recwarn: pytest.WarningsRecorder
) -> None:
    """An optimizer that has made more steps than the run, with other weights: its steps are missing, and not twice."""
    case = CASES["behind"]
    first, again = Training(case), Training(case)
    ema = make_ema(first.model)
    first.go_on(ema, 6)
    ema.close()
    lost = make_ema(first.model, run=f"{ema.run}-lost", resume="auto", step=6)
    first.go_on(lost, 3)
    again.load(first.checkpoints[9], optimizer=True)
    again.go_on(make_ema(again.model, resume=True), 1)
    [said] = [str(warning.message) for warning in recwarn]
    assert MISSING in said
