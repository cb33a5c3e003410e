"""Trainers that join a run that is there. Knows RemoteEma and the real service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import ConnectionLost, RunNotFound, UsageError
from tests.client.trainers import ONCE, LitEmaOracle, Zoo, same, train, values


def test_resume_goes_on_where_the_run_is(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A trainer that starts again continues EMA, counter and steps; its own parameters do not replace the EMA."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    for _ in range(3):
        train(model)
        ema(model)
        oracle(model)
    ema.close()

    again = make_ema(model, 0.9, resume=True)
    assert same(client.pull(again.run), oracle.shadow)
    train(model)
    again(model)
    oracle(model)

    assert again.num_updates == 4
    assert same(client.pull(again.run), oracle.shadow)
    assert client.run(again.run).step == 4


def test_resume_of_no_run(make_ema: Callable[..., RemoteEma], run_name: str) -> None:
    """resume=True is for a run that exists: a new EMA is not begun unnoticed."""
    with pytest.raises(RunNotFound, match=run_name):
        make_ema(nn.Linear(1, 1), resume=True)


class Coder(nn.Module):
    """Two layers, by the names that are given."""

    def __init__(self, first: str = "enc", second: str = "dec", *, turned: bool = False) -> None:
        super().__init__()
        self.add_module(first, nn.Linear(8, 4) if turned else nn.Linear(4, 8))
        self.add_module(second, nn.Linear(4, 8) if turned else nn.Linear(8, 4))


OTHERS: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "renamed": (Coder("encoder"), {}, "'enc.weight' is missing"),
    "more": (nn.Sequential(Coder(), nn.Linear(1, 1)), {}, "'1.weight' is not the run's"),
    "turned": (Coder(turned=True), {}, r"'enc.weight' is F32 \(4, 8\), the run's F32 \(8, 4\)"),
    "bf16": (Coder().bfloat16(), {}, r"'enc.weight' is BF16 \(8, 4\), the run's F32 \(8, 4\).*push_dtype='F32'"),
    "push_dtype": (Coder(), {"push_dtype": torch.bfloat16}, "'dec.bias' is BF16"),
}


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize("other", OTHERS)
def test_resume_with_another_model(make_ema: Callable[..., RemoteEma], other: str, resume: Any) -> None:
    """Names, shapes and dtypes that are not the run's are refused by the constructor, which names them."""
    make_ema(nn.Sequential(Coder()) if other == "more" else Coder())
    model, options, message = OTHERS[other]

    with pytest.raises(UsageError, match=message):
        make_ema(model, resume=resume, **options)


def test_a_model_in_another_dtype_goes_on(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """With the push_dtype that the error asks for."""
    make_ema(Coder())
    model = Coder().bfloat16()
    again = make_ema(model, resume=True, push_dtype=torch.float32)
    again(model)
    again.flush()
    assert client.run(again.run).step == 1


# --- one line for the first start and every later one -----------------------------------------------------------------


def steps(ema: RemoteEma, model: nn.Module, count: int) -> None:
    for _ in range(count):
        train(model)
        ema(model)
    ema.flush()


def test_auto(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Makes the run, then goes on with it; the numbers are those of a training that never ended."""
    model = Zoo()
    oracle = LitEmaOracle(model, 0.9)
    for _ in range(3):
        ema = make_ema(model, 0.9, resume="auto")
        for _ in range(2):
            train(model)
            ema(model)
            oracle(model)
        ema.close()
    assert client.run(ema.run).step == 6
    assert same(client.pull(ema.run), oracle.shadow)


def test_auto_after_a_constructor_that_died(
    make_ema: Callable[..., RemoteEma], relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """A run that was declared, and never had weights, gets them."""
    model = nn.Linear(2, 2)
    with (
        EmaClient(relay(lambda request: request.method == "POST").url, retry=ONCE) as dying,
        pytest.raises(ConnectionLost),
    ):
        RemoteEma(model, run=run_name, client=dying, resume="auto")
    make_ema(model, resume="auto")
    assert same(client.pull(run_name), values(model))


def test_a_trainer_that_is_behind_is_told(
    make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str, server: Any
) -> None:
    """Without a state to go back to, the run goes on where it is, and a warning names both steps."""
    model = nn.Linear(2, 2)
    steps(make_ema(model, resume="auto"), model, 6)
    with pytest.warns(UserWarning, match="at step 6 and the training comes back at step 4") as warned:
        again = RemoteEma(model, run=run_name, url=server.url, resume="auto", step=4)
    assert [each.filename for each in warned] == [__file__]
    with again:
        steps(again, model, 1)
    assert client.run(run_name).step == 7


@pytest.mark.parametrize("told", ["state", "step"])
def test_a_trainer_that_goes_back(make_ema: Callable[..., RemoteEma], client: EmaClient, told: str) -> None:
    """With its checkpoint's state, or with its step where the run has a snapshot of that step: no step counts twice."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9, resume="auto"), LitEmaOracle(model, 0.9)
    for _ in range(2):
        train(model)
        ema(model)
        oracle(model)
    state, weights = ema.state_dict(), values(model)
    steps(ema, model, 3)
    model.load_state_dict(weights, strict=False)
    again = make_ema(model, 0.9, resume="auto", **({"state": state} if told == "state" else {"step": 2}))
    assert (again.num_updates, client.run(ema.run).step) == (2, 2)
    assert same(client.pull(ema.run), oracle.shadow)
    train(model)
    again(model)
    oracle(model)
    again.flush()
    assert client.run(ema.run).step == 3
    assert same(client.pull(ema.run), oracle.shadow)


@pytest.mark.parametrize(("step", "update_every"), [(5, 1), (7, 3)])
def test_a_trainer_that_is_not_behind(
    make_ema: Callable[..., RemoteEma],
    client: EmaClient,
    recwarn: pytest.WarningsRecorder,
    step: int,
    update_every: int,
) -> None:
    """Updates count on from the trainer's step, which the run may lag behind by steps that were not due."""
    model = nn.Linear(2, 2)
    steps(make_ema(model, resume="auto"), model, 5)
    again = make_ema(model, resume="auto", step=step, update_every=update_every)
    steps(again, model, update_every)
    assert client.run(again.run).step == step + update_every
    assert list(recwarn) == []


def test_a_trainer_that_is_ahead_is_told(
    make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str, server: Any
) -> None:
    """Of a run that was taken back behind the training's checkpoint, one warning names both steps, and says what to do;
    updates count on from the training's step."""
    model = nn.Linear(2, 2)
    steps(make_ema(model, resume="auto"), model, 5)
    said = "at step 5 and the training comes back at step 9.*the 4 steps between are missing.*checkpoint of step 5"
    with pytest.warns(UserWarning, match=said) as warned:
        again = RemoteEma(model, run=run_name, url=server.url, resume="auto", step=9, update_every=4)
    assert [each.filename for each in warned] == [__file__]
    with again:
        steps(again, model, 4)
    assert client.run(run_name).step == 13


def test_a_trainer_that_is_ahead_of_its_run_and_not_of_a_snapshot(
    make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The run goes to its snapshot of the training's step, and nothing is missing."""
    model = nn.Linear(2, 2)
    ema = make_ema(model, resume="auto")
    steps(ema, model, 3)
    ema.flush()
    client.snapshot(run_name, "three")
    for _ in range(2):
        train(model)
        steps(ema, model, 1)
    ema.flush()
    client.snapshot(run_name, "five")
    expected = client.pull(run_name)
    client.rewind(run_name, "three")
    again = make_ema(model, resume=True, step=5)
    assert (again.step, client.run(run_name).step) == (5, 5)
    assert same(client.pull(run_name), expected)
    assert list(recwarn) == []


def test_a_new_run_of_a_training_under_way(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A training that adds an EMA at step 40 counts from there."""
    model = nn.Linear(2, 2)
    ema = make_ema(model, resume="auto", step=40)
    assert client.run(ema.run).step == 40
    steps(ema, model, 1)
    assert client.run(ema.run).step == 41


def test_a_run_that_is_gone(make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str, server: Any) -> None:
    """With "auto" its EMA begins anew, at the checkpoint's step, and a warning says so; with True that is an error."""
    model = nn.Linear(2, 2)
    ema = make_ema(model)
    steps(ema, model, 3)
    state = ema.state_dict()
    ema.close()
    client.delete_run(run_name)
    with pytest.raises(RunNotFound):
        make_ema(model, resume=True, state=state)
    with pytest.warns(UserWarning, match="begins anew, at step 3"):
        again = RemoteEma(model, run=run_name, url=server.url, resume="auto", state=state)
    with again:
        assert client.run(run_name).step == 3


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"resume": "maybe"}, "resume='maybe' is unknown"),
        ({"resume": "auto", "step": -1}, "step -1"),
        ({"resume": True, "step": 1, "state": {}}, "both a step and a state"),
        ({"state": {}}, "a state is of a run that exists"),
        ({"resume": True, "state": {"run": "x"}}, "not the state of a run"),
        (
            {"resume": True, "state": {"run": "x", "version": "1.0", "step": 1, "snapshot": None}},
            "the state is of run 'x'",
        ),
    ],
)
def test_starts_that_cannot_be_meant(
    make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str, start: dict[str, Any], message: str
) -> None:
    """Are refused before anything is made."""
    with pytest.raises(UsageError, match=message):
        make_ema(nn.Linear(2, 2), **start)
    with pytest.raises(RunNotFound):
        client.run(run_name)


def test_resume_with_another_choice_of_buffers(make_ema: Callable[..., RemoteEma]) -> None:
    """What is copied cannot become averaged, or the other way round; the same choice goes on."""
    model = nn.BatchNorm1d(3)
    copying = make_ema(model, buffers="copy")
    for buffers in ("average", "none"):
        with pytest.raises(UsageError, match="copies 2 of its tensors, this trainer 0"):
            make_ema(model, resume=True, buffers=buffers)
    model(torch.randn(8, 3))
    again = make_ema(model, resume=True, buffers="copy")
    again(model)
    mean = model.running_mean.clone()
    with again.scope(model):
        assert torch.equal(model.running_mean, mean)
    make_ema(model, run=f"{copying.run}-averaging", buffers="average")

    with pytest.raises(UsageError, match="copies 0 of its tensors, this trainer 2: running_mean, running_var"):
        make_ema(model, run=f"{copying.run}-averaging", resume=True, buffers="copy")


def test_resume_with_another_counter(make_ema: Callable[..., RemoteEma]) -> None:
    """Whether the decay warms up cannot be changed by resuming."""
    make_ema(nn.Linear(2, 2), use_num_updates=False)

    with pytest.raises(UsageError, match="use_num_updates=False"):
        make_ema(nn.Linear(2, 2), resume=True)


def test_resume_with_another_decay_warns(make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str) -> None:
    """The run's decay stands, as in LitEma's state dict, and whoever passes another one is told."""
    model = nn.Linear(2, 2)
    make_ema(model, 0.9)

    with pytest.warns(UserWarning, match=r"decay 0\.9, not 0\.5") as warned:
        again = RemoteEma(model, 0.5, run=run_name, client=client, resume=True)
    assert warned[0].filename == __file__
    with again:
        assert again.decay == pytest.approx(0.9)


def test_resume_of_a_run_that_awaits_weights(
    make_ema: Callable[..., RemoteEma], relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """A trainer that died between creating the run and sending its weights can be started again either way."""
    model = nn.Linear(2, 2)
    with (
        EmaClient(relay(lambda request: request.method == "POST").url, retry=ONCE) as dying,
        pytest.raises(ConnectionLost),
    ):
        RemoteEma(model, run=run_name, client=dying)
    assert client.run(run_name).status == "awaiting_weights"

    make_ema(model, resume=True)

    assert same(client.pull(run_name), values(model))
