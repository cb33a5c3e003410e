"""The promise of the whole service: through a real server, the numbers are those of in-process LitEma, bit for bit.

Knows models and what LitEma makes of them (the fixture ``litema``). Does not know how the service does it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.errors import NonFinite


class Odd(nn.Module):
    """Scalars, empty tensors, convolutions, an embedding of several blocks, odd lengths, something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.embedding = nn.Embedding(1031, 257)  # 1.06 MB: crosses the kernel's blocks at no round number
        self.norm = nn.LayerNorm(7)
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.transposed = nn.Parameter(torch.randn(6, 10).t())  # not contiguous
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: nn.Module, generator: torch.Generator) -> None:
    """What an optimizer does, as far as an EMA can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype) * 10 ** random.Random(parameter.numel()).uniform(-4, 1))


def assert_same(pulled: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(pulled) == set(expected)
    for name, tensor in expected.items():
        assert pulled[name].dtype == tensor.dtype, name
        assert pulled[name].shape == tensor.shape, name
        assert torch.equal(bits(pulled[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: NaN equals itself, and 0.0 is not -0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def client(server):
    with EmaClient(server.url) as client:
        yield client


@pytest.mark.parametrize("use_num_updates", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_500_updates_equal_litema_bit_for_bit(server, client, run_name, use_num_updates, litema):
    """Random updates of every shape, at decays from 0 to 1 and with a reset, end in LitEma's very bytes."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Odd()
    oracle = litema(parameters(model), 0.9999, use_num_updates)
    changes = {120: 0.5, 180: 0.0, 183: 0.9999, 300: 1.0, 310: 0.999, 400: 0.9999}
    with RemoteEma(model, 0.9999, use_num_updates, run=run_name, url=server.url) as ema:
        for number in range(500):
            if number in changes:
                ema.flush()
                client.set_decay(run_name, changes[number])
                oracle.decay.fill_(changes[number])
            if number == 250:
                ema.reset_num_updates()
                if use_num_updates:
                    oracle.num_updates.zero_()
            disturb(model, generator)
            ema(model)
            oracle.update(parameters(model))
            if number in (0, 7, 182, 251, 305):
                ema.flush()
                assert_same(client.pull(run_name), oracle.shadow)
        assert ema.num_updates == int(oracle.num_updates)
    assert_same(client.pull(run_name), oracle.shadow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.soak)])
def test_half_precision_models_have_a_float32_shadow(server, client, run_name, dtype, litema):
    """100 updates of a bf16 or fp16 model equal the oracle that casts the parameter, never the shadow."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Odd().to(dtype)
    model.norm.float()  # and mixed precisions in one model
    oracle = litema(parameters(model), 0.9999, True)
    with RemoteEma(model, run=run_name, url=server.url) as ema:
        for _ in range(100):
            disturb(model, generator)
            ema(model)
            oracle.update(parameters(model))
    assert_same(client.pull(run_name), oracle.shadow)


def test_a_bf16_shadow_moves_where_litemas_stands_still(client, run_name, litema):
    """500 updates at decay .9999 toward 1.5 move the average; a bf16 shadow would still be 1.0."""
    start, target = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1.5, dtype=torch.bfloat16)
    client.create_run(run_name, {"w": start}, use_num_updates=False)
    oracle = litema({"w": start}, 0.9999, False)
    for _ in range(500):
        client.push(run_name, {"w": target})
        oracle.update({"w": target})
    pulled = client.pull(run_name)
    assert_same(pulled, oracle.shadow)
    assert 1.024 < float(pulled["w"][0]) < 1.025  # 1.5 - 0.5 * 0.9999**500 = 1.0244


def test_one_push_feeds_several_averages(client, run_name, litema):
    """Each average of a run equals an oracle of its own, in every mixture of dtypes."""
    torch.manual_seed(0)
    state = {"d": torch.randn(9, dtype=torch.float64), "f": torch.randn(300_001), "h": torch.randn(5).bfloat16()}
    averages = [AverageConfig("slow"), AverageConfig("fast", decay=0.9), AverageConfig("flat", "constant", 0.5)]
    client.create_run(run_name, state, decay=0.999, averages=averages)
    oracles = {
        "slow": litema(state, 0.999, True),
        "fast": litema(state, 0.9, True),
        "flat": litema(state, 0.5, False),
    }
    for _ in range(20):
        state = {name: tensor + torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}
        client.push(run_name, state)
        for oracle in oracles.values():
            oracle.update(state)
    for name, oracle in oracles.items():
        assert_same(client.pull(run_name, average=name), oracle.shadow)


def test_names_that_confuse_litema(server, client, run_name, litema):
    """a.bc beside ab.c, and parameters called decay and num_updates, are tensors like any other."""

    class Confusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Module()
            self.a.bc = nn.Parameter(torch.ones(2))
            self.ab = nn.Module()
            self.ab.c = nn.Parameter(torch.full((2,), 5.0))
            self.decay = nn.Parameter(torch.zeros(1))
            self.num_updates = nn.Parameter(torch.zeros(1))

    model = Confusing()
    oracle = litema(parameters(model), 0.9, True)
    with RemoteEma(model, 0.9, run=run_name, url=server.url) as ema:
        for _ in range(5):
            disturb(model, torch.Generator().manual_seed(2))
            ema(model)
            oracle.update(parameters(model))
        assert ema.num_updates == 5
    assert_same(client.pull(run_name), oracle.shadow)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_wrappers_do_not_enter_the_names(server, client, run_name):
    """module. and _orig_mod. are removed, so a compiled or wrapped model updates and reads the run of the plain one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wrapped = nn.DataParallel(torch.compile(model))
    with RemoteEma(wrapped, 0.5, run=run_name, url=server.url) as ema:
        assert set(client.pull(run_name)) == set(parameters(model))
        ema(model)
        ema(wrapped)
        ema.copy_to(model)


def test_scope_shows_the_average_and_gives_the_weights_back(server, run_name):
    """Inside the scope the model holds the EMA; after it, and after an error in it, the training weights."""
    model = Odd()
    before = {name: tensor.clone() for name, tensor in parameters(model).items()}
    with RemoteEma(model, 0.5, False, run=run_name, url=server.url) as ema:
        disturb(model, torch.Generator().manual_seed(3))
        trained = {name: tensor.clone() for name, tensor in parameters(model).items()}
        ema(model)
        with contextlib.suppress(ZeroDivisionError), ema.scope(model):
            middle = {name: before[name] - 0.5 * (before[name] - trained[name]) for name in before}
            assert_same(parameters(model), middle)
            raise ZeroDivisionError
        assert_same(parameters(model), trained)


def test_a_nan_leaves_the_average_as_it_was(client, run_name):
    """The refusal names the tensor; weights, counter and step stay, and training may go on with the next step."""
    state = {"good": torch.ones(3), "bad": torch.ones(2, 2)}
    client.create_run(run_name, state)
    client.push(run_name, {name: tensor * 2 for name, tensor in state.items()}, step=1)
    before, info = client.pull(run_name), client.run(run_name)
    with pytest.raises(NonFinite, match="bad"):
        client.push(run_name, {"good": torch.ones(3), "bad": torch.tensor([[1.0, float("nan")], [0, 0]])}, step=2)
    assert_same(client.pull(run_name), dict(before))
    assert replace(client.run(run_name), refused=None) == info
    assert client.push(run_name, state, step=2).applied
