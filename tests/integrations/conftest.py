"""What the tests of all frameworks share. Knows modules and LitEma's arithmetic; does not know a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

from ema_client import EmaClient


@pytest.fixture
def client(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmaClient]:
    """A client of the shared server, which is also where RemoteEma looks by default."""
    monkeypatch.setenv("EMA_SERVICE_URL", server.url)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with EmaClient(server.url) as made:
        yield made


@pytest.fixture
def trained() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of the parameters that are trained, by name."""

    def copies(module: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    return copies


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], bool]:
    """Whether two sets of tensors are equal, bit for bit."""

    def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
        return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)

    return equal
