"""Training weights set aside. Knows tensors; RemoteEma's scope() and the service are in test_remote_ema_swapping.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ema_client.errors import AlreadyStored, NothingStored, UsageError
from ema_client.tensors.writing import write
from ema_client.training import aside as module
from ema_client.training.aside import SetAside


def test_copies_go_back() -> None:
    """restore() writes the values of store() into any tensors of the same shapes, once."""
    parameters = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(()))]
    before = [parameter.detach().clone() for parameter in parameters]
    aside = SetAside()
    aside.store(parameter for parameter in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    aside.restore(iter(parameters))

    assert all(torch.equal(parameter, was) for parameter, was in zip(parameters, before, strict=True))
    with pytest.raises(NothingStored):
        aside.restore(parameters)


def test_one_set_at_a_time() -> None:
    """A second store() is refused, and the first copies stay."""
    tensor, aside = torch.ones(2), SetAside()
    aside.check_empty()
    aside.store([tensor])
    with pytest.raises(AlreadyStored):
        aside.check_empty()
    with pytest.raises(AlreadyStored):
        aside.store([torch.zeros(2)])
    aside.restore([tensor.zero_()])

    assert torch.equal(tensor, torch.ones(2))


def test_other_tensors_are_refused_before_one_is_written() -> None:
    """Where a later tensor does not fit, an earlier one is not written either."""
    aside, fits = SetAside(), torch.zeros(2)
    aside.store([torch.ones(2), torch.ones(3)])
    with pytest.raises(UsageError, match=r"tensor 1 .* now has \(4,\)"):
        aside.restore([fits, torch.zeros(4)])
    with pytest.raises(UsageError, match="2 tensors are stored, 1 are to be restored"):
        aside.restore([fits])

    assert torch.equal(fits, torch.zeros(2))


def test_lent_for_a_while() -> None:
    """Inside lent() the parameters hold what is set aside, after it what they held; restore() works all the same."""
    parameters, aside = [torch.zeros(2), torch.zeros(3)], SetAside()
    with aside.lent(parameters):
        assert aside.empty
    aside.store(parameters)
    for parameter in parameters:
        parameter.fill_(7)
    for _ in range(2):
        with aside.lent(parameters):
            assert not any(parameter.any() for parameter in parameters)
        assert all(parameter.eq(7).all() for parameter in parameters)
    with pytest.raises(UsageError, match="2 tensors are stored"), aside.lent(parameters[:1]):
        pass
    aside.restore(parameters)
    assert not any(parameter.any() for parameter in parameters)


class Interrupted:
    """Writes to tensors, until the n-th time, which is interrupted, as by Ctrl-C; then again."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        write(targets, sources)


@pytest.mark.parametrize("at", range(1, 7))
def test_lending_that_is_interrupted(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the exchange breaks off, on the way there or back, restore() brings all that was set aside."""
    parameters, aside = [torch.full((2,), float(i)) for i in range(3)], SetAside()
    aside.store(parameters)
    for parameter in parameters:
        parameter.fill_(7)
    monkeypatch.setattr(module, "write", Interrupted(at))
    with pytest.raises(KeyboardInterrupt), aside.lent(parameters):
        pass
    aside.restore(parameters)

    assert [parameter.tolist() for parameter in parameters] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_restoring_inside_the_block() -> None:
    """restore() while the copies are lent leaves the parameters what they were; drop() frees without writing."""
    parameter, aside = torch.zeros(2), SetAside()
    aside.store([parameter])
    parameter.fill_(7)
    with aside.lent([parameter]):
        aside.restore([parameter])
    assert not parameter.any()
    aside.store([parameter])
    parameter.fill_(7)
    aside.drop()
    assert aside.empty
    assert parameter.eq(7).all()
