"""Weights that are loaded after the RemoteEma was made: the average begins with them, as LitEma's that is made later.

Knows RemoteEma, LitEma's arithmetic, the ways in which programs write weights, and the real service.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ema_client import EmaClient, RemoteEma
from ema_client.errors import Fenced, NonFinite, UsageError
from tests.client.trainers import LitEmaOracle, Zoo, same, values
from tests.waiting import wait_until


def loaded() -> dict[str, Tensor]:
    """Weights from elsewhere, of a model without buffers."""
    torch.manual_seed(7)
    return Zoo().state_dict()


def by_load_state_dict(model: nn.Module) -> None:
    model.load_state_dict(loaded())


def in_part(model: nn.Module) -> None:
    model.load_state_dict({"gain": loaded()["gain"]}, strict=False)


def assigned(model: nn.Module) -> None:
    """Other parameters, in the place of the old ones, tied again."""
    model.load_state_dict({name: tensor.clone() for name, tensor in loaded().items()}, assign=True)
    model.head.weight = model.table.weight  # type: ignore[union-attr,assignment]


def by_copy(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(loaded()[name])


def behind_torch(model: nn.Module) -> None:
    """A write that torch does not count."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(loaded()[name])


def by_data(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = loaded()[name].clone()


def drawn(model: nn.Module) -> None:
    nn.init.normal_(model.get_parameter("conv.weight"))


WAYS = [by_load_state_dict, in_part, assigned, by_copy, behind_torch, by_data, drawn]


class Training:
    """A model whose gradients are drawn: steps of a real optimizer, and the EMA beside."""

    def __init__(self, model: nn.Module, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        self.model = model
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)  # type: ignore[call-arg]

    def step(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def go_on(self, ema: RemoteEma, oracle: LitEmaOracle, steps: int = 3) -> None:
        for _ in range(steps):
            self.step()
            ema(self.model)
            oracle(self.model)
        ema.flush()


@pytest.fixture
def hooks() -> Iterator[None]:
    """No hook of a RemoteEma is left behind."""
    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    yield
    assert len(_global_optimizer_pre_hooks) == before


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("hooks")
def test_same_as_litema_made_later(
    make_ema: Callable[..., RemoteEma], client: EmaClient, way: Callable[[nn.Module], None], counted: bool
) -> None:
    """However weights are written after the constructor: bit for bit the average of a LitEma that was made then."""
    model = Zoo()
    ema = make_ema(model, 0.9, counted)
    first = client.pull(ema.run)
    way(model)
    oracle = LitEmaOracle(model, 0.9, counted)
    Training(model).go_on(ema, oracle)

    assert not same(first, oracle.shadow)
    assert same(client.pull(ema.run), oracle.shadow)
    info = client.run(ema.run)
    assert (info.version, info.step, info.num_updates) == ("2.3", 3, 3 if counted else -1)
    assert (ema.stats.sent, ema.stats.failed) == (3, 0)


def test_what_is_sent(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Casts to push_dtype, borrowed memory, frozen parameters, buffers: the first shadow is of what is sent."""
    options: list[dict[str, Any]] = [
        {"push_dtype": torch.bfloat16},
        {"borrow": True},
        {"frozen": "average"},
        {"buffers": "copy"},
        {"update_every": 2},
    ]
    name = run_of(make_ema)
    for number, option in enumerate(options):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False))
        ema = make_ema(model, 0.9, run=f"{name}-{number}", **option)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        begun = values(model)
        Training(model).step()
        ema.flush()
        pulled = client.pull(ema.run)
        sent = {name: value.to(option.get("push_dtype", value.dtype)).float() for name, value in begun.items()}
        assert all(torch.equal(pulled[name], sent[name]) for name in sent if name in pulled), option
        assert client.run(ema.run).version == "2.0"


def run_of(make_ema: Callable[..., RemoteEma]) -> str:
    """A name of the test's own."""
    return make_ema(nn.Linear(1, 1)).run


def test_nothing_was_loaded(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A model that was moved, cast there and back, or written with its own values begins as it was: nothing is sent."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    model.double().float()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    Training(model).go_on(ema, oracle)

    assert client.run(ema.run).version == "1.3"
    assert same(client.pull(ema.run), oracle.shadow)


def read_scope(ema: RemoteEma, model: nn.Module) -> dict[str, Tensor]:
    with ema.scope(model):
        return values(model)


def read_copy(ema: RemoteEma, model: nn.Module) -> dict[str, Tensor]:
    other = copy.deepcopy(model)
    ema.copy_to(other)
    return values(other)


def read_snapshot(ema: RemoteEma, model: nn.Module) -> dict[str, Tensor]:
    state = ema.state_dict()
    return values(model) | dict(ema._client.pull(ema.run, snapshot=state["snapshot"]))


def read_copied(ema: RemoteEma, model: nn.Module) -> dict[str, Tensor]:
    """A deep copy of the RemoteEma reads."""
    return read_copy(copy.deepcopy(ema), model)


@pytest.mark.parametrize("read", [read_scope, read_copy, read_snapshot, read_copied])
def test_read_before_the_first_step(
    make_ema: Callable[..., RemoteEma], client: EmaClient, read: Callable[[RemoteEma, nn.Module], dict[str, Tensor]]
) -> None:
    """What is read has the weights loaded so far; a later load counts as well, and reading alone sends nothing."""
    model = Zoo()
    ema = make_ema(model, 0.9, False)
    for load in (by_load_state_dict, drawn):
        load(model)
        now = values(model)
        for _ in range(2):
            assert same(read(ema, model), now)
            assert same(values(model), now)
    assert client.run(ema.run).version == "3.0"
    oracle = LitEmaOracle(model, 0.9, False)
    Training(model).go_on(ema, oracle)
    assert client.run(ema.run).version == "3.3"
    assert same(client.pull(ema.run), oracle.shadow)


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize("updates", [0, 2])
def test_a_run_that_is_there_keeps_its_ema(
    make_ema: Callable[..., RemoteEma], client: EmaClient, resume: Any, updates: int
) -> None:
    """A trainer that goes on with a run loads its checkpoint after the constructor: the EMA stays the run's."""
    model = Zoo()
    first, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    Training(model).go_on(first, oracle, updates)
    first.close()
    again = make_ema(Zoo(), 0.9, resume=resume)
    model = Zoo()
    again = make_ema(model, 0.9, resume=resume, step=updates)
    by_load_state_dict(model)
    read_scope(again, model)
    Training(model).go_on(again, oracle)

    assert client.run(again.run).version == f"1.{updates + 3}"
    assert same(client.pull(again.run), oracle.shadow)


def test_a_state_is_the_beginning(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """load_state_dict() says which EMA the training begins with: weights loaded beside are not it."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    state = ema.state_dict()
    by_load_state_dict(model)
    ema.load_state_dict(state)
    Training(model).go_on(ema, oracle)
    assert same(client.pull(ema.run), oracle.shadow)


def test_resume_auto_makes_the_run(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """The one line for every start: at the first, what is loaded later is the beginning; step and counter stay."""
    model = Zoo()
    ema = make_ema(model, 0.9, resume="auto", step=40)
    by_load_state_dict(model)
    oracle = LitEmaOracle(model, 0.9)
    Training(model).go_on(ema, oracle)
    assert same(client.pull(ema.run), oracle.shadow)
    assert client.run(ema.run).step == 43


def test_written_by_hand(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Without a torch optimizer a load and a step look alike: the average begins with the constructor's weights."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    for load in WAYS[:2]:
        load(model)
        ema(model)
        oracle(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)


@pytest.mark.usefixtures("hooks")
def test_the_first_update_is_no_beginning(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """What is loaded after a step or an update, also one that is not due, is training."""
    name = run_of(make_ema)
    for is_step in (True, False):
        model = Zoo()
        training = Training(model)
        ema, oracle = make_ema(model, 0.9, run=f"{name}-{is_step}"), LitEmaOracle(model, 0.9)
        if is_step:
            training.step()
        else:
            ema.update(model, due=False)
        by_load_state_dict(model)
        training.go_on(ema, oracle)
        assert same(client.pull(ema.run), oracle.shadow)


def test_steps_of_others(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """An optimizer of other parameters, such as a discriminator's, begins nothing, before the first step or after."""
    model, other = Zoo(), Training(nn.Linear(2, 2))
    ema = make_ema(model, 0.9)
    other.step()
    by_load_state_dict(model)
    oracle, training = LitEmaOracle(model, 0.9), Training(model)
    for _ in range(3):
        training.step()
        other.step()
        ema(model)
        oracle(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)


class Copies(torch.optim.SGD):
    """Mixed precision by hand: the optimizer has float32 copies, and writes them back."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        self.followers = params
        super().__init__([p.detach().clone().float() for p in params], lr=lr)

    def step(self, closure: Any = None) -> Any:
        held = self.param_groups[0]["params"]
        for mine, theirs in zip(held, self.followers, strict=True):
            mine.copy_(theirs.detach())
            mine.grad = theirs.grad.float()
        super().step(closure)
        with torch.no_grad():
            torch._foreach_copy_(self.followers, held)


class Flat(torch.optim.SGD):
    """An optimizer of one flat parameter, which has the memory of the model's."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        flat = torch.cat([p.detach().reshape(-1) for p in params])
        start = 0
        for each in params:
            each.data = flat[start : start + each.numel()].view(each.shape)
            start += each.numel()
        self.followers = params
        super().__init__([nn.Parameter(flat)], lr=lr)

    def step(self, closure: Any = None) -> Any:
        grads = [p.grad.reshape(-1) for p in self.followers if p.grad is not None]
        self.param_groups[0]["params"][0].grad = torch.cat(grads)
        return super().step(closure)


@pytest.mark.parametrize("kind", [Copies, Flat, torch.optim.AdamW])
def test_optimizers_that_hold_something_else(
    make_ema: Callable[..., RemoteEma], client: EmaClient, kind: type[torch.optim.Optimizer]
) -> None:
    model = Zoo()
    ema = make_ema(model, 0.9)
    training = Training(model, kind)
    by_load_state_dict(model)
    oracle = LitEmaOracle(model, 0.9)
    training.go_on(ema, oracle)
    assert same(client.pull(ema.run), oracle.shadow)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A model, and the optimizer's step, under torch.compile."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    ema = make_ema(model, 0.9)
    model.load_state_dict(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).state_dict())
    oracle = LitEmaOracle(model, 0.9)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.ones(4, 2)).square().mean().backward()
        step()
        ema(compiled)
        oracle(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)


def test_a_mapping(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Tensors by name in place of a module."""
    model = Zoo()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = make_ema(named, 0.9)  # type: ignore[arg-type]
    by_load_state_dict(model)
    oracle, training = LitEmaOracle(model, 0.9), Training(model)
    for _ in range(2):
        training.step()
        ema(dict(named))
        oracle(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)


def test_another_model_is_told_by_the_update(make_ema: Callable[..., RemoteEma]) -> None:
    """Parameters that were added since the constructor (LoRA): no step of the optimizer raises, the update does."""
    model = nn.Sequential(nn.Linear(2, 2))
    ema = make_ema(model)
    model.add_module("lora", nn.Linear(2, 2))
    Training(model).step()
    with pytest.raises(UsageError, match=r"'lora\.weight' is new"):
        ema(model)


def test_refused(make_ema: Callable[..., RemoteEma], client: EmaClient, caplog: pytest.LogCaptureFixture) -> None:
    """Loaded weights with a NaN: no step raises; flush() does, and the average goes on from what it had."""
    model = nn.Linear(2, 2)
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    kept = values(model)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with caplog.at_level(logging.ERROR, "ema_client"):
        Training(model).step()
        with pytest.raises(NonFinite, match="weight") as raised:
            ema.flush()
    assert "initial weights" in "".join(raised.value.__notes__)
    assert "initial weights failed" in caplog.text
    model.load_state_dict(kept)
    Training(model).go_on(ema, oracle)
    assert same(client.pull(ema.run), oracle.shadow)


def test_the_service_is_away_at_the_first_step(start_server: Callable[..., Any], run_name: str) -> None:
    """No step raises or waits; the weights go when the service is back, ahead of the first update."""
    server = start_server()
    model = Zoo()
    ema = RemoteEma(model, 0.9, run=run_name, url=server.uds)
    server.kill()
    by_load_state_dict(model)
    oracle, training = LitEmaOracle(model, 0.9), Training(model)
    training.step()
    ema(model)
    oracle(model)
    assert ema.pending == 2
    server.start()
    wait_until(lambda: not ema.pending, "the initial weights and the update")
    training.go_on(ema, oracle)
    with EmaClient(server.url) as client:
        assert same(client.pull(run_name), oracle.shadow)
    ema.close()


def test_a_lost_answer(
    make_ema: Callable[..., RemoteEma], client: EmaClient, relay: Callable[..., Any], run_name: str
) -> None:
    """Weights whose answer was lost are not taken twice."""
    lost: list[str] = []

    def loses(request: Any) -> bool:
        loses_this = "replaces" in request.target and not lost
        if loses_this:
            lost.append(request.target)
        return loses_this

    model = Zoo()
    ema = make_ema(model, 0.9, url=relay(loses).url)
    by_load_state_dict(model)
    oracle = LitEmaOracle(model, 0.9)
    Training(model).go_on(ema, oracle)
    assert len(lost) == 1
    assert client.run(run_name).version == "2.3"
    assert same(client.pull(run_name), oracle.shadow)


@pytest.mark.usefixtures("hooks")
def test_dropped(make_ema: Callable[..., RemoteEma], server: Any, run_name: str) -> None:
    """A RemoteEma that is dropped, or closed, before the first step leaves no hook, and keeps no model alive."""
    model = nn.Linear(2, 2)
    ema = RemoteEma(model, run=run_name, url=server.url)
    before = len(_global_optimizer_pre_hooks)
    del ema
    assert len(_global_optimizer_pre_hooks) == before - 1
    closed = make_ema(model, run=f"{run_name}-closed")
    closed.close()
    gone = make_ema(nn.Linear(2, 2), run=f"{run_name}-gone")
    Training(model).step()
    gone.flush()
    gone.close()


def test_launched_by_number(
    make_ema: Callable[..., RemoteEma], client: EmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that its launcher numbers joins with the first use: with the weights ahead of its first step."""
    monkeypatch.setenv("RANK", "3")
    model = Zoo()
    ema = make_ema(model, 0.9)
    by_load_state_dict(model)
    oracle = LitEmaOracle(model, 0.9)
    Training(model).go_on(ema, oracle)
    assert same(client.pull(ema.run), oracle.shadow)
    assert client.run(ema.run).version == "1.3"


def test_a_fork_begins_nothing(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A step in a forked process, such as a worker's, is not the training's; the parent's still is."""
    model = Zoo()
    ema, training = make_ema(model, 0.9), Training(model)
    child = os.fork()
    if child == 0:
        try:
            by_load_state_dict(model)
            training.step()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    by_load_state_dict(model)
    oracle = LitEmaOracle(model, 0.9)
    training.go_on(ema, oracle)
    assert same(client.pull(ema.run), oracle.shadow)
    assert client.run(ema.run).version == "2.3"


def test_a_run_that_was_taken_over(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Another trainer's run keeps its EMA, which a read has; that this trainer was replaced the update tells."""
    model = Zoo()
    ema = make_ema(model, 0.9)
    other, oracle = Zoo(), LitEmaOracle(model, 0.9)
    Training(other).go_on(make_ema(other, 0.9, resume=True), oracle)
    by_load_state_dict(model)
    ema.copy_to(copied := Zoo())
    assert all(torch.equal(values(copied)[name], shadow) for name, shadow in oracle.shadow.items())
    Training(model).step()
    ema.flush()
    ema(model)
    with pytest.raises(Fenced):
        ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)
