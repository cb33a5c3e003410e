"""EMA weights into a model, training weights back: store(), copy_to(), restore(), scope(). Knows the real service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import (
    AlreadyStored,
    ConnectionLost,
    EmaError,
    NonFinite,
    NothingStored,
    RunExists,
    RunNotFound,
    UsageError,
)
from tests.client.trainers import ONCE, Oops, same, train, values


@pytest.fixture
def swapped(make_ema: Callable[..., RemoteEma]) -> tuple[RemoteEma, nn.Sequential]:
    """A model whose training weights differ from its EMA."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).requires_grad_(False))
    ema = make_ema(model, 0.9)
    train(model)
    ema(model)
    return ema, model


def test_store_copy_restore(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """LitEma's own three calls, with a generator of parameters as LitEma's users pass it."""
    ema, model = swapped
    training = values(model)

    ema.store(model.parameters())
    ema.copy_to(model)
    assert not torch.equal(model[0].weight, training["0.weight"])
    ema.restore(model.parameters())

    assert same(values(model), training)
    assert model[0].weight.requires_grad


def test_restore_without_store(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """restore() with nothing stored is an error, and so is a second one: the copy is given up by the first."""
    ema, model = swapped
    with pytest.raises(NothingStored):
        ema.restore(model.parameters())
    ema.store(model.parameters())
    ema.restore(model.parameters())
    with pytest.raises(NothingStored):
        ema.restore(model.parameters())


def test_store_twice(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """A second store() would lose the training weights: it is refused and the first copy stays."""
    ema, model = swapped
    training = values(model)
    ema.store(model.parameters())
    ema.copy_to(model)
    with pytest.raises(AlreadyStored):
        ema.store(model.parameters())
    ema.restore(model.parameters())

    assert same(values(model), training)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (lambda model: list(model.parameters())[:-1], "4 tensors are stored, 3 are to be restored"),
        (lambda model: [*model.parameters(), torch.zeros(1)], "4 tensors are stored, 5"),
        (lambda model: [*list(model.parameters())[:-1], torch.zeros(7)], r"tensor 3 .* now has \(7,\)"),
    ],
)
def test_restore_of_other_tensors(
    swapped: tuple[RemoteEma, nn.Sequential], targets: Callable[[nn.Module], list[Tensor]], message: str
) -> None:
    """Tensors of another number or shape are refused before one is written, and the copy can still be restored."""
    ema, model = swapped
    training = values(model)
    ema.store(model.parameters())
    ema.copy_to(model)
    copied = values(model)

    with pytest.raises(UsageError, match=message):
        ema.restore(targets(model))
    assert same(values(model), copied)
    ema.restore(model.parameters())
    assert same(values(model), training)


def test_stored_copies_carry_no_gradient(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """What is stored is values: no graph is kept alive by it."""
    ema, model = swapped
    watched = [parameter * 2 for parameter in model.parameters()]
    ema.store(watched)
    plain = [torch.zeros_like(tensor, requires_grad=False) for tensor in watched]
    ema.restore(plain)

    assert not any(tensor.requires_grad for tensor in plain)
    assert all(torch.equal(tensor, other.detach()) for tensor, other in zip(plain, watched, strict=True))


def test_scope(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """Inside the block the model has its EMA, after it its training weights, and a scope can be entered again."""
    ema, model = swapped
    training = values(model)
    for _ in range(2):
        with ema.scope(model):
            assert not torch.equal(model[0].weight, training["0.weight"])
        assert same(values(model), training)


def test_scope_whose_body_raises(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """Training weights come back although the evaluation failed, and its error is the one that is seen."""
    ema, model = swapped
    training = values(model)
    with pytest.raises(Oops), ema.scope(model):
        raise Oops

    assert same(values(model), training)
    with ema.scope(model):
        pass


def test_scope_whose_pull_raises(swapped: tuple[RemoteEma, nn.Sequential], client: EmaClient) -> None:
    """Training weights are there although the EMA could not be had, and nothing stays stored."""
    ema, model = swapped
    training = values(model)
    client.delete_run(ema.run)
    with pytest.raises(RunNotFound), ema.scope(model):
        pytest.fail("the block was entered without EMA weights")

    assert same(values(model), training)
    ema.store(model.parameters())


def test_scope_whose_pull_breaks_off(
    make_ema: Callable[..., RemoteEma], relay: Callable[..., Any], run_name: str
) -> None:
    """Where the EMA came in part, the training weights come back whole."""
    model = nn.Linear(40, 40)
    make_ema(model)
    training = values(model)
    with EmaClient(relay(lambda request: "/weights" in request.target, after=3000).url, retry=ONCE) as shaky:
        ema = RemoteEma(model, run=run_name, client=shaky, resume=True)
        with pytest.raises(ConnectionLost), ema.scope(model):
            pytest.fail("the block was entered without EMA weights")

    assert same(values(model), training)


def test_a_parameter_that_cannot_be_written_to(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """What expand() made is averaged, and refused by name before any other parameter is overwritten."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("z", nn.Parameter(torch.zeros(1).expand(3)))
    ema = make_ema(model, 0.5, False)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema(model)
    training = values(model)
    ema.flush()
    assert not torch.equal(client.pull(ema.run)["0.weight"], training["0.weight"])
    with pytest.raises(UsageError, match="'z' has several elements in the same memory"):
        ema.copy_to(model)
    with pytest.raises(UsageError, match="'z' has several elements in the same memory"):
        client.pull(ema.run, out=dict(model.state_dict()))
    with pytest.raises(UsageError, match="several elements in the same memory"), ema.scope(model):
        raise AssertionError
    assert same(values(model), training)


def test_nested_scope(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """A scope in a scope is refused before anything is overwritten; the outer one goes on and ends well."""
    ema, model = swapped
    training = values(model)
    with ema.scope(model):
        inside = values(model)
        with pytest.raises(AlreadyStored), ema.scope(model):
            pytest.fail("a nested scope was entered")
        assert same(values(model), inside)

    assert same(values(model), training)


def test_scope_after_store(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """Weights stored by hand are not lost to a scope."""
    ema, model = swapped
    ema.store(model.parameters())
    with pytest.raises(AlreadyStored), ema.scope(model):
        pytest.fail("the scope was entered")
    ema.restore(model.parameters())


def test_scope_in_which_a_parameter_is_frozen(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """What is restored are the tensors that were stored, whatever the block does to their flags."""
    ema, model = swapped
    training = values(model)
    with ema.scope(model):
        model.requires_grad_(False)

    assert same(values(model), training)


def test_all_errors_are_of_one_tree() -> None:
    """One except clause catches everything that a RemoteEma raises on purpose."""
    assert all(issubclass(cls, EmaError) for cls in (AlreadyStored, NothingStored, NonFinite, RunExists, UsageError))
