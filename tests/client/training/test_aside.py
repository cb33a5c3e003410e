"""Training weights set aside. Knows tensors; RemoteEma's scope() and the service are in test_remote_ema_swapping.py."""

from __future__ import annotations

import pytest
import torch

from ema_client.errors import AlreadyStored, NothingStored, UsageError
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
