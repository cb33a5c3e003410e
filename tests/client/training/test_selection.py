"""Which tensors of a model are averaged, and that a changed model is noticed, by name.

Knows models and what becomes of them in training. Does not know the service.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ema_client.errors import NameCollision, UsageError
from ema_client.training.selection import Selection


class Model(nn.Module):
    """Tied, frozen and plain parameters; a BatchNorm; a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("angles", torch.ones(2), persistent=False)


BODY = {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"}
STATISTICS = {"body.1.running_mean", "body.1.running_var"}


def names(selection: Selection) -> set[str]:
    return {spec.name for spec in selection.specs}


def found(selection: Selection, model: nn.Module) -> dict[str, Tensor]:
    tensors, _ = selection.of(model)
    return dict(zip([spec.name for spec in selection.specs], tensors, strict=True))


def test_trained_parameters_once() -> None:
    """Those that require gradients; tied ones under their first name; no buffers, unless asked for."""
    model = Model()

    assert names(Selection(model)) == {"table.weight"} | BODY
    assert names(Selection(model, buffers="average")) == {"table.weight"} | BODY | STATISTICS
    assert names(Selection(model, buffers="copy")) == {"table.weight"} | BODY | STATISTICS


def test_copied_buffers() -> None:
    """They are told from what is averaged, and sent as they are where the parameters are sent as something narrower."""
    selection = Selection(Model(), buffers="copy", dtype=torch.bfloat16)

    assert selection.copied == STATISTICS
    assert {spec.name for spec in selection.specs if spec.dtype == "F32"} == STATISTICS
    assert not Selection(Model(), buffers="average").copied


def test_the_models_own_tensors_are_found() -> None:
    """Under their names, the first time and again, with the values of now."""
    model = Model()
    selection = Selection(model, buffers="average")
    for _ in range(3):
        tensors = found(selection, model)
        assert tensors["table.weight"] is model.table.weight
        assert tensors["body.1.running_mean"] is model.body[1].running_mean


def test_replaced_tensors_are_found() -> None:
    """A parameter, a buffer or a module that took another's place is the one that counts from then on."""
    model = Model()
    selection = Selection(model, buffers="average")
    found(selection, model)
    model.body[0].weight = nn.Parameter(torch.zeros(3, 3))
    model.body[1].running_mean = torch.ones(3)
    assert found(selection, model)["body.0.weight"] is model.body[0].weight
    assert found(selection, model)["body.1.running_mean"] is model.body[1].running_mean
    model.body[0] = nn.Linear(3, 3)

    assert found(selection, model)["body.0.weight"] is model.body[0].weight


def test_other_models_of_the_same_kind() -> None:
    """A copy, and the model inside wrappers, are told from each other although their names are the same."""
    model = Model()
    other = copy.deepcopy(model)
    selection = Selection(model)
    for each in (model, other, nn.DataParallel(model), torch.compile(other, backend="eager"), model):
        bare = model if each is model or isinstance(each, nn.DataParallel) else other
        assert found(selection, each)["body.0.bias"] is bare.body[0].bias  # type: ignore[arg-type]


CHANGES: list[tuple[Callable[[Model], object], str]] = [
    (lambda m: delattr(m, "table") or delattr(m, "head"), "'table.weight' is missing"),
    (lambda m: m.frozen.requires_grad_(True), "'frozen.bias' is new or no longer frozen"),
    (lambda m: m.add_module("more", nn.Linear(1, 1, bias=False)), "'more.weight' is new"),
    (lambda m: m.half(), r"'body\.0\.bias' is F16 \(3,\), was F32 \(3,\)"),
    (lambda m: setattr(m.body[0], "bias", nn.Parameter(torch.ones(4))), r"'body\.0\.bias' is F32 \(4,\), was"),
    (lambda m: setattr(m.body[0].bias, "data", torch.ones(4)), r"'body\.0\.bias' is F32 \(4,\), was F32 \(3,\)"),
    (lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(5, 3))), "'head.weight' is no longer tied to 'ta"),
    (lambda m: m.body.to("meta"), "is on the meta device"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_changed_model_is_an_error(change: Callable[[Model], object], message: str) -> None:
    """Noticed at the next update, whatever the quick comparison saw before, with the tensor's name; and every time."""
    model = Model()
    selection = Selection(model)
    found(selection, model)
    change(model)

    for _ in range(2):
        with pytest.raises(UsageError, match=message):
            selection.of(model)


def test_many_faults_are_counted() -> None:
    """A message stays readable, however much is wrong."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(9)])
    selection = Selection(model)

    with pytest.raises(UsageError, match=r"'4' is missing and 4 more"):
        selection.of(nn.ParameterList())


def test_frozen_parameters_are_held() -> None:
    """A parameter that is frozen later is still found, and told of; thawed again, it is as before."""
    model = Model()
    selection = Selection(model)
    assert selection.of(model)[1] == []
    model.body[0].requires_grad_(False)
    tensors, frozen = selection.of(model)

    assert len(tensors) == 5
    assert frozen == ["body.0.bias", "body.0.weight"]
    model.body[0].requires_grad_(True)
    assert selection.of(model)[1] == []


def test_frozen_parameters_are_an_error_if_asked_for() -> None:
    """With frozen="error", by name; buffers never count as frozen."""
    model = Model()
    selection = Selection(model, frozen="error", buffers="average")
    selection.of(model)
    model.body[0].requires_grad_(False)

    with pytest.raises(UsageError, match=r"'body\.0\.bias' is frozen; 'body\.0\.weight' is frozen"):
        selection.of(model)


def test_sent_as_another_dtype() -> None:
    """What is sent has the dtype asked for, whatever the model's own is, then and later."""
    model = Model()
    selection = Selection(model, dtype=torch.bfloat16)
    found(selection, model)

    assert {spec.dtype for spec in selection.specs} == {"BF16"}
    assert found(selection, model.half())["body.0.bias"].dtype == torch.float16


def test_targets_are_the_averaged_tensors() -> None:
    """Frozen or not; those of a model whose tied parameters are apart are both named."""
    model = Model()
    selection = Selection(model)
    model.requires_grad_(False)
    targets, twins = selection.targets(model)
    assert (set(targets), twins) == (names(selection), [])
    other = Model()
    other.head.weight = nn.Parameter(torch.zeros(5, 3))
    targets, twins = selection.targets(other)

    assert targets["table.weight"] is other.table.weight
    assert [(twin is other.head.weight, name) for twin, name in twins] == [(True, "table.weight")]


def test_targets_tied_in_another_order() -> None:
    """A tied tensor is found by whichever of its names the model has."""
    model = Model()
    selection = Selection(model)
    del model.table

    assert selection.targets(model)[0]["table.weight"] is model.head.weight


@pytest.mark.parametrize(("change", "message"), CHANGES[:1] + CHANGES[1:3])
def test_targets_that_are_not_the_runs(change: Callable[[Model], object], message: str) -> None:
    """Missing ones and trained ones without an average are named."""
    model = Model()
    selection = Selection(model)
    change(model)

    with pytest.raises(UsageError, match=message):
        selection.targets(model)


def test_colliding_names() -> None:
    """Two parameters with one name once wrappers' prefixes are gone are named, and not mixed up."""
    model = nn.ModuleDict({"_checkpoint_wrapped_module": nn.Linear(1, 1), "_orig_mod": nn.Linear(1, 1)})

    with pytest.raises(NameCollision, match=r"'_checkpoint_wrapped_module\.weight' and '_orig_mod\.weight' are both"):
        Selection(model)


@pytest.mark.parametrize("options", [{"buffers": "drop"}, {"frozen": "drop"}])
def test_unknown_policies(options: dict[str, str]) -> None:
    """A policy that does not exist is an error that lists those that do."""
    with pytest.raises(UsageError, match=r"is unknown \(give one of '(none', 'average', 'copy|hold', 'error)'"):
        Selection(Model(), **options)  # type: ignore[arg-type]


def test_the_model_is_not_kept() -> None:
    """A model that is dropped is gone, with its memory."""
    model = Model()
    selection = Selection(model)
    selection.of(model)
    gone = weakref.ref(model.table.weight)
    del model
    gc.collect()

    assert gone() is None
