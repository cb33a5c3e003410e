"""Every call under a default device that is not the CPU: memory of the host is made on the host all the same.

Knows torch's default device, and the package's source as text. Does not know what the calls make.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import ema_client
from ema_client import EmaClient, RemoteEma
from ema_client.checkpoints.reading import read
from ema_client.checkpoints.writing import write
from tests.client.trainers import same, values

#: What makes a tensor on the default device unless told otherwise.
FACTORIES = _device_constructors()  # type: ignore[no-untyped-call]
PACKAGE = Path(ema_client.__file__).parent


def test_each_factory_names_its_device() -> None:
    """No tensor of the client's own lies where a user's default device happens to point."""
    names = {factory.__name__ for factory in FACTORIES}
    assert {"empty", "zeros", "tensor"} <= names
    unnamed, named = [], 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in names}:
                named += 1
                if "device" not in {keyword.arg for keyword in node.keywords}:
                    unnamed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert unnamed == []
    assert named >= 8


@contextlib.contextmanager
def as_default() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


#: The two ways to set a default device, of one that is on every machine.
WAYS: dict[str, Callable[[], Any]] = {"block": lambda: torch.device("meta"), "default": as_default}


@pytest.fixture(params=WAYS)
def elsewhere(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return WAYS[request.param]


@pytest.mark.parametrize("uds", [False, True])
@pytest.mark.parametrize("size", [3, 600])
def test_an_evaluator(
    elsewhere: Callable[[], Any], server: Any, run_name: str, tmp_path: Path, *, uds: bool, size: int
) -> None:
    """Creating, pushing, shared memory, pulls of each kind, slices, and files."""
    model, other = nn.Linear(size, size).double(), nn.Linear(size, size).bfloat16()
    before = values(model)
    transposed = {name: torch.zeros(tensor.t().shape).t() for name, tensor in before.items()}
    with elsewhere(), EmaClient(server.uds if uds else server.url) as client:
        client.create_run(run_name, model, decay=0.0, use_num_updates=False)
        client.push(run_name, client.shared_state(model))
        client.push(run_name, model)
        pulled = client.pull(run_name)
        client.pull(run_name, out=transposed)
        client.copy_to(run_name, other)
        client.download(run_name, tmp_path / "w.safetensors")
        for suffix in ("pt", "safetensors"):
            write(tmp_path / f"litema.{suffix}", "litema", pulled, pulled.info)
        files = [read(path).tensors for path in tmp_path.iterdir()]

    assert same(pulled, before)
    assert len(files) == 3
    assert all(same(found, before) for found in files)
    assert same(transposed, {name: tensor.float() for name, tensor in before.items()})
    assert same(values(other), {name: tensor.bfloat16() for name, tensor in before.items()})


@pytest.mark.parametrize(
    "options", [{}, {"borrow": True}, {"push_dtype": torch.bfloat16}, {"buffers": "copy"}], ids=str
)
def test_a_trainer(elsewhere: Callable[[], Any], server: Any, run_name: str, options: dict[str, Any]) -> None:
    """A RemoteEma made, resumed, updated, read and rewound."""
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))
    before = values(model)
    with elsewhere():
        with RemoteEma(model, 0.5, False, run=run_name, url=server.url, **options) as ema:
            ema(model)
            state = ema.state_dict()
        with RemoteEma(model, 0.5, False, run=run_name, url=server.url, resume=True, **options) as ema:
            ema(model)
            ema.load_state_dict(state)
            with ema.scope(model):
                inside = values(model)
    assert same(values(model), before)
    assert all(torch.allclose(inside[name], before[name], rtol=0.01) for name in before)
