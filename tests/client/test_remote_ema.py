"""RemoteEma against the real service, and against LitEma's arithmetic written down here in its own words.

Knows what a training loop does with a LitEma. Does not know how updates travel (test_client.py, test_transport.py).
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ema_client import AverageConfig, EmaClient, RemoteEma, RetryPolicy
from ema_client.errors import (
    AlreadyStored,
    ConnectionLost,
    EmaError,
    LayoutMismatch,
    NonFinite,
    NothingStored,
    RunExists,
    RunNotFound,
    ServiceUnreachable,
    TransportError,
    UsageError,
)
from ema_client.training.selection import BufferPolicy

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ONCE = RetryPolicy(attempts=1)


class LitEmaOracle:
    """LitEma's arithmetic in process, with float32 scalars; shadows are float32, float64 for float64 parameters.

    Of parameters in bf16 or fp16 the shadow is float32 and the incoming value is cast.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        self.decay = torch.tensor(decay, dtype=torch.float32)
        self.num_updates = torch.tensor(0 if use_num_updates else -1, dtype=torch.int)
        self.shadow = {
            name: self._wide(parameter.detach()).clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def __call__(self, model: nn.Module) -> None:
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        keep_out = 1.0 - decay
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                shadow = self.shadow[name]
                shadow.sub_(keep_out * (shadow - self._wide(parameter.detach())))

    def reset_num_updates(self) -> None:
        if self.num_updates >= 0:
            self.num_updates = torch.tensor(0, dtype=torch.int)

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        tensor = tensor.cpu()
        return tensor if tensor.dtype == torch.float64 else tensor.float()


class Zoo(nn.Module):
    """Parameters of many shapes: a 0-d one, an empty one, a convolution, an embedding, frozen and tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.conv = nn.Conv2d(3, 5, 3)
        self.table = nn.Embedding(301, 7)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(7, 301, bias=False)
        self.head.weight = self.table.weight
        # What LitEma cannot hold: names that are its own, and names that are one without dots.
        self.decay = nn.Parameter(torch.randn(2))
        self.num_updates = nn.Parameter(torch.randn(3))
        self.a = nn.ParameterDict({"bc": torch.randn(2)})
        self.ab = nn.ParameterDict({"c": torch.randn(3)})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make(server: Any, run_name: str) -> Iterator[Callable[..., RemoteEma]]:
    """Make RemoteEmas of one run on the real service, closed after the test."""
    made: list[RemoteEma] = []

    def make(model: nn.Module, *args: Any, **options: Any) -> RemoteEma:
        made.append(RemoteEma(model, *args, **{"run": run_name, "url": server.url, **options}))
        return made[-1]

    yield make
    for ema in made:
        ema.close()


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    with EmaClient(server.url) as made:
        yield made


def train(model: nn.Module) -> None:
    """Something that moves all trained parameters, as an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: Any, other: Any) -> bool:
    """The same names, dtypes and bits."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- the same numbers as LitEma -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_num_updates", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_bit_identical_to_litema(
    make: Callable[..., RemoteEma], client: EmaClient, decay: float, use_num_updates: bool
) -> None:
    """Over many updates, with a reset among them, EMA and counter are LitEma's, bit for bit, after each one."""
    model = Zoo()
    ema, oracle = make(model, decay, use_num_updates), LitEmaOracle(model, decay, use_num_updates)

    for number in range(30):
        if number == 17:
            ema.reset_num_updates()
            oracle.reset_num_updates()
        train(model)
        ema(model)
        oracle(model)
        assert ema.num_updates == int(oracle.num_updates)
        assert same(client.pull(ema.run), oracle.shadow), f"after update {number}"
    assert torch.equal(torch.tensor(ema.decay, dtype=torch.float32), oracle.decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_a_wide_shadow(make: Callable[..., RemoteEma], client: EmaClient, dtype: torch.dtype) -> None:
    """Half precision is averaged in float32 and double precision in double, bit for bit as the oracle does."""
    model = Zoo().to(dtype)
    ema, oracle = make(model, 0.99), LitEmaOracle(model, 0.99)

    for _ in range(20):
        train(model)
        ema.update(model)
        oracle(model)
    ema.flush()

    assert same(client.pull(ema.run), oracle.shadow)


def test_copy_to_gives_the_ema(make: Callable[..., RemoteEma]) -> None:
    """copy_to() writes the average of all updates so far into the trained parameters, and leaves frozen ones."""
    model = Zoo()
    ema, oracle = make(model, 0.9), LitEmaOracle(model, 0.9)
    for _ in range(3):
        train(model)
        ema(model)
        oracle(model)
    frozen = model.frozen.weight.clone()
    other = Zoo()
    other.frozen.load_state_dict(model.frozen.state_dict())

    ema.copy_to(other)

    assert all(torch.equal(dict(other.named_parameters())[name], shadow) for name, shadow in oracle.shadow.items())
    assert torch.equal(other.frozen.weight, frozen)


# --- making one -----------------------------------------------------------------------------------------------------


def test_run_is_made_at_step_zero(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """The constructor clones the parameters into a new run; updates are its steps 1, 2, 3."""
    model = Zoo()
    ema = make(model)
    info = client.run(ema.run)
    assert (info.status, info.step, info.num_updates, info.tensors) == ("ready", 0, 0, 9)
    for step in (1, 2, 3):
        ema(model)
        ema.flush()
        assert client.run(ema.run).step == step


def test_defaults_are_litemas(make: Callable[..., RemoteEma]) -> None:
    """decay 0.9999, and the counter on."""
    ema = make(nn.Linear(1, 1))

    assert ema.decay == pytest.approx(0.9999)
    assert ema.num_updates == 0
    assert (type(ema.decay), type(ema.num_updates)) == (float, int)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0),
        ({"use_num_updates": True}, 0),
        ({"use_num_updates": False}, -1),
        ({"use_num_upates": True}, 0),
        ({"use_num_upates": False}, -1),
        ({"use_num_updates": False, "use_num_upates": False}, -1),
    ],
)
def test_both_spellings_are_understood(make: Callable[..., RemoteEma], options: dict[str, bool], expected: int) -> None:
    """LitEma's misspelt keyword means the same as the right one."""
    assert make(nn.Linear(1, 1), **options).num_updates == expected


def test_spellings_that_contradict_each_other(free_url: str) -> None:
    """Two keywords for one thing must not say two things (True is the default, so only a False can contradict)."""
    with pytest.raises(UsageError, match="contradict"):
        RemoteEma(nn.Linear(1, 1), run="r", url=free_url, use_num_updates=False, use_num_upates=True)


@pytest.mark.parametrize("decay", [-0.01, 1.01, float("nan")])
def test_decay_outside_its_range(free_url: str, decay: float) -> None:
    """A ValueError, as LitEma raises it, before the service is asked for anything."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        RemoteEma(nn.Linear(1, 1), decay, run="r", url=free_url)


def test_existing_run_is_not_taken_over(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A second trainer of the same run name is refused and told of resume=True; the run stays as it was."""
    model = Zoo()
    first = make(model)
    before = client.pull(first.run)
    train(model)
    with pytest.raises(RunExists, match=first.run) as raised:
        make(model)

    assert "resume=True" in raised.value.hint
    assert same(client.pull(first.run), before)


def test_several_averages(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """One update feeds all averages of the run; decay and copy_to() are of the first."""
    model = nn.Linear(2, 2)
    ema = make(model, 0.5, False, averages=[AverageConfig("ema"), AverageConfig("raw", decay=0.0)])
    train(model)
    ema(model)
    ema.flush()

    assert ema.decay == 0.5
    assert same(client.pull(ema.run, average="raw"), values(model))


def test_unreachable_service(free_url: str) -> None:
    """Where no service is, the constructor says so, with the URL."""
    with EmaClient(free_url, retry=ONCE) as client, pytest.raises(ServiceUnreachable, match=free_url):
        RemoteEma(nn.Linear(1, 1), run="r", client=client)


@pytest.mark.parametrize("options", [{"url": "http://127.0.0.1:1"}, {"token": "t"}])
def test_client_and_address_exclude_each_other(client: EmaClient, options: dict[str, str]) -> None:
    """A client has its address; a second one would be ignored."""
    with pytest.raises(UsageError, match="both a client and"):
        RemoteEma(nn.Linear(1, 1), run="r", client=client, **options)  # type: ignore[arg-type]


def test_given_client_stays_open(client: EmaClient, run_name: str) -> None:
    """close() closes what the RemoteEma opened, and no client of the caller's."""
    with RemoteEma(nn.Linear(1, 1), run=run_name, client=client) as ema:
        pass
    client.run(run_name)
    assert repr(ema) == f"RemoteEma(run={run_name!r}, url={client.url!r})"


def test_own_client_is_closed(make: Callable[..., RemoteEma]) -> None:
    """After close() an update is refused as a mistake."""
    model = nn.Linear(1, 1)
    ema = make(model)
    ema.close()

    with pytest.raises(UsageError, match="closed"):
        ema(model)


def test_it_is_no_module(make: Callable[..., RemoteEma]) -> None:
    """As an attribute of a model it adds nothing to the model's state."""
    model = nn.Linear(1, 1)
    model.ema = make(model)  # type: ignore[assignment]

    assert sorted(model.state_dict()) == ["bias", "weight"]


# --- names and parameters -------------------------------------------------------------------------------------------


def test_wrapped_model_is_the_same_model(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A model compiled or made parallel after the EMA was made is updated and filled like the bare one."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema, oracle = make(model, 0.5), LitEmaOracle(model, 0.5)
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    wrapped = nn.DataParallel(compiled)

    train(model)
    ema(wrapped)
    oracle(model)
    ema.copy_to(wrapped)

    assert same(client.pull(ema.run), oracle.shadow)
    # Where there is a GPU, DataParallel has moved it there.
    assert same(values(model.cpu()), oracle.shadow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: delattr(model, "conv"), r"'conv\.bias' is missing; 'conv\.weight' is missing"),
        (lambda model: model.frozen.requires_grad_(True), r"'frozen\.weight' is new or no longer frozen"),
        (lambda model: setattr(model, "gain", nn.Parameter(torch.ones(2))), r"'gain' is F32 \(2,\), was F32 \(\)"),
        (lambda model: model.half(), r"is F16 .*, was F32"),
        (lambda model: model.add_module("more", nn.Linear(1, 1)), r"'more\.weight' is new"),
    ],
)
def test_changed_parameters_are_named(
    make: Callable[..., RemoteEma], client: EmaClient, change: Callable[[Zoo], object], message: str
) -> None:
    """A parameter removed, unfrozen, added or changed later is an error that names it, and the EMA stays as it was."""
    model = Zoo()
    ema = make(model)
    before = client.pull(ema.run)
    change(model)

    with pytest.raises(UsageError, match=message):
        ema(model)
    assert same(client.pull(ema.run), before)
    assert client.run(ema.run).step == 0


def test_meta_parameters_are_refused(free_url: str) -> None:
    """A model without values has no average."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)

    with pytest.raises(UsageError, match="'weight' is on the meta device"):
        RemoteEma(model, run="r", url=free_url)


# --- updates that fail ----------------------------------------------------------------------------------------------


def test_refused_update_does_not_stop_the_next(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """NaN is refused with the parameter's name, the EMA is as it was, and the next update is a step of its own."""
    model = Zoo()
    ema, oracle = make(model, 0.9), LitEmaOracle(model, 0.9)
    good = values(model)
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    ema(model)
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)

    with torch.no_grad():
        model.conv.weight.copy_(good["conv.weight"])
    train(model)
    ema(model)
    oracle(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)
    assert client.run(ema.run).step == 2


def test_update_of_unknown_outcome_does_not_stop_the_next(
    relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """Where an update was applied and its answer lost, it is sent again, applied once, and the next one follows."""
    lost: list[str] = []

    def loses(request: Any) -> bool:
        if request.method == "PUT" and "/updates/1" in request.target and len(lost) < 3:
            lost.append(request.target)
            return True
        return False

    model = nn.Linear(2, 2)
    with EmaClient(relay(loses).url, retry=ONCE) as shaky:
        ema, oracle = RemoteEma(model, 0.5, run=run_name, client=shaky), LitEmaOracle(model, 0.5)
        train(model)
        oracle(model)
        ema(model)
        with pytest.raises(ConnectionLost):
            ema.flush()
        train(model)
        oracle(model)
        ema(model)
        while ema.pending:
            with contextlib.suppress(ConnectionLost):
                ema.flush()
        ema.close()

    assert len(lost) == 3
    assert same(client.pull(run_name), oracle.shadow)


def test_step_is_decayed_for_what_was_left_out(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """update_every=k sends each k-th call with its own step; with decay_per="step" a constant model's EMA is exact."""
    model = nn.Linear(3, 3)
    ema, oracle = make(model, 0.9, update_every=5, decay_per="step"), LitEmaOracle(model, 0.9)
    train(model)
    for _ in range(23):
        ema(model)
        oracle(model)
    ema.flush()

    info = client.run(ema.run)
    assert (info.step, ema.num_updates, ema.stats.sent) == (20, 20, 4)
    for _ in range(2):
        ema(model)
        oracle(model)
    ema.flush()
    pulled = client.pull(ema.run)
    assert all(torch.allclose(pulled[name], shadow, rtol=1e-6, atol=0) for name, shadow in oracle.shadow.items())


def test_each_kth_update_is_an_update(make: Callable[..., RemoteEma]) -> None:
    """With decay_per="update", as with a LitEma that is called each k-th time."""
    model = nn.Linear(2, 2)
    ema, oracle = make(model, 0.9, update_every=3), LitEmaOracle(model, 0.9)
    for number in range(1, 10):
        train(model)
        ema(model)
        if number % 3 == 0:
            oracle(model)
    ema.copy_to(model)

    assert ema.num_updates == 3
    assert same(values(model), oracle.shadow)


@pytest.mark.parametrize("options", [{"update_every": 0}, {"on_busy": "wait"}])
def test_unknown_cadence(free_url: str, options: dict[str, Any]) -> None:
    """What cannot be meant is refused before the service is asked for anything."""
    with pytest.raises(UsageError, match=next(iter(options))):
        RemoteEma(nn.Linear(1, 1), run="r", url=free_url, **options)


def test_a_trainer_of_another_dtype_goes_on_with_a_run(
    make: Callable[..., RemoteEma], client: EmaClient, run_name: str
) -> None:
    """A float32 EMA, imported for example, that a bf16 model goes on with: refused with the way out, which works."""
    model = nn.Linear(3, 2).bfloat16()
    average = {name: torch.randn(parameter.shape) for name, parameter in model.named_parameters()}
    client.create_run(run_name, average, decay=0.5, use_num_updates=False)
    refused = make(model, 0.5, False, resume=True)
    refused(model)
    with pytest.raises(LayoutMismatch, match="push_dtype"):
        refused.flush()
    ema = make(model, 0.5, False, resume=True, push_dtype=torch.float32)
    ema(model)
    ema.flush()

    expected = {n: average[n] - 0.5 * (average[n] - p.detach().float()) for n, p in model.named_parameters()}
    assert same(client.pull(run_name), expected)


@pytest.mark.parametrize("borrow", [False, True])
def test_mixed_precision(make: Callable[..., RemoteEma], client: EmaClient, borrow: bool) -> None:
    """Autocast and a scaler of gradients: the float32 parameters are averaged, also where the scaler leaves out a step
    (and no hook of the optimizer is called)."""
    model = nn.Linear(8, 4)
    ema, oracle = make(model, 0.9, borrow=borrow), LitEmaOracle(model, 0.9)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    left_out = 0
    for step in range(6):
        before = values(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(16, 8)).square().mean() * (float("inf") if step == 3 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        left_out += same(values(model), before)
        ema(model)
        oracle(model)
    ema.flush()

    assert left_out == 1
    assert same(client.pull(ema.run), oracle.shadow)


def test_push_dtype_halves_the_traffic(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Parameters are sent in bf16, of which the float32 shadow is the average that LitEma's arithmetic gives."""
    model = nn.Linear(3, 3)
    ema = make(model, 0.9, push_dtype=torch.bfloat16)
    sent = nn.Linear(3, 3).bfloat16()
    sent.load_state_dict(model.state_dict())
    oracle = LitEmaOracle(sent, 0.9)
    for _ in range(5):
        train(model)
        ema(model)
        sent.load_state_dict(model.state_dict())
        oracle(sent)
    ema.copy_to(model)

    assert client.run(ema.run).shadow_dtype == "F32"
    assert same(values(model), oracle.shadow)


def test_buffers_are_averaged_if_asked_for(make: Callable[..., RemoteEma]) -> None:
    """BatchNorm's statistics become tensors of the run; copy_to() and scope() write and restore them; counters stay."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = make(model, 0.5, False, buffers="average")
    began = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(8, 2) + 3)
    ema(model)
    now = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ema.scope(model):
        inside = dict(model.named_buffers())
        middle = began["1.running_mean"] - 0.5 * (began["1.running_mean"] - now["1.running_mean"])
        assert torch.equal(inside["1.running_mean"], middle)
        assert inside["1.num_batches_tracked"] == 1

    assert all(torch.equal(buffer, now[name]) for name, buffer in model.named_buffers())


def test_buffers_are_copied_if_asked_for(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Beside averages are the statistics of the latest update, in every average, as with torch's AveragedModel."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    averages = (AverageConfig("slow"), AverageConfig("fast", decay=0.1))
    ema = make(model, 0.5, False, buffers="copy", averages=averages, update_every=2, push_dtype=torch.bfloat16)
    theirs = AveragedModel(model, use_buffers=False)
    for step in range(1, 6):
        model(torch.randn(8, 2) + 3)
        train(model)
        ema(model)
        if step % 2 == 0:
            theirs.update_parameters(model)
    newest = {n: b for n, b in theirs.module.named_buffers() if b.is_floating_point()}
    now = {**values(model), **{name: buffer.clone() for name, buffer in model.named_buffers()}}
    with ema.scope(model):
        inside = dict(model.named_buffers())
        assert all(torch.equal(inside[name], buffer) for name, buffer in newest.items())
        assert inside["1.num_batches_tracked"] == 5
        assert not torch.equal(model[0].weight, now["0.weight"])

    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())
    for average in ("slow", "fast"):
        pulled = client.pull(ema.run, average=average)
        assert all(torch.equal(pulled[name], buffer) for name, buffer in newest.items())


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_forward_right_after_the_update(make: Callable[..., RemoteEma], buffers: BufferPolicy) -> None:
    """Buffers change in the next forward pass, where no step of an optimizer waits: that is not in the update."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000))
    ema = make(model, 0.0, False, borrow=True, buffers=buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(10):
        optimizer.step()
        ema(model)
        mean = model[1].running_mean.clone()
        model[1].running_mean.add_(1)
        target = copy.deepcopy(model)
        ema.copy_to(target)
        assert torch.equal(target[1].running_mean, mean)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_forward_on_a_gpu_right_after_the_update(make: Callable[..., RemoteEma], buffers: BufferPolicy) -> None:
    """The same where the copy to the host runs beside the training, behind 256 MiB of parameters."""
    model = nn.Sequential(nn.Linear(8192, 8192, device="cuda"), nn.BatchNorm1d(8192, device="cuda"))
    ema = make(model, 0.0, False, buffers=buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.step()
        ema(model)
        mean = model[1].running_mean.clone()
        model[1].running_mean.add_(1)
        target = copy.deepcopy(model)
        ema.copy_to(target)
        assert torch.equal(target[1].running_mean, mean)


def test_frozen_later(make: Callable[..., RemoteEma]) -> None:
    """A parameter frozen in the middle goes on being averaged, with one warning; copy_to() and scope() include it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema, oracle = make(model, 0.5), LitEmaOracle(model, 0.5)
    train(model)
    ema(model)
    oracle(model)
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"were frozen; .*: 0\.bias, 0\.weight") as warned:
        ema(model)
    ema(model)
    model[0].requires_grad_(True)
    for _ in range(2):
        oracle(model)
    model[0].requires_grad_(False)
    training = values(model)
    with ema.scope(model):
        assert same(values(model), oracle.shadow)

    assert len(warned) == 1
    assert same(values(model), training)


def test_tied_weights_in_a_model_that_has_them_apart(make: Callable[..., RemoteEma]) -> None:
    """The average of a tied tensor goes to both of its names, and scope() gives both back."""
    model = Zoo()
    ema = make(model, 0.5)
    train(model)
    ema(model)
    apart = Zoo()
    apart.head.weight = nn.Parameter(torch.zeros_like(apart.head.weight))
    before = values(apart)
    with ema.scope(apart):
        assert torch.equal(apart.head.weight, apart.table.weight)

    assert same(values(apart), before)


def test_reads_wait_for_what_was_sent(make: Callable[..., RemoteEma]) -> None:
    """Right after update(), each of them is of the state with it."""
    model = nn.Linear(300, 300)
    ema = make(model, 0.0, False)
    for _ in range(5):
        train(model)
        ema(model)
        target = nn.Linear(300, 300)
        ema.copy_to(target)
        assert same(values(target), values(model))
    counted = make(model, run=ema.run + "-counted")
    for number in range(1, 5):
        counted(model)
        assert counted.num_updates == number
        assert counted.pending == 0
    assert counted.stats.sent == 4


@pytest.mark.parametrize("borrow", [False, True])
def test_optimizer_right_after_the_update(make: Callable[..., RemoteEma], borrow: bool) -> None:
    """What the optimizer does while the update is on its way is not in it: the EMA is LitEma's, bit for bit."""
    model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(5)))
    ema, oracle = make(model, 0.9, borrow=borrow), LitEmaOracle(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        ema(model)
        oracle(model)
    ema.copy_to(model)

    assert same(values(model), oracle.shadow)


def test_borrowing_waits_in_the_optimizers_step(make: Callable[..., RemoteEma]) -> None:
    """update() returns while the parameters are being sent; the step that would change them waits. Before a step was
    seen, and where no optimizer is, a copy is sent."""
    model = nn.Linear(2000, 2000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = make(model, borrow=True)
    made: list[bool] = []
    submit = ema._publisher.submit
    ema._publisher.submit = lambda update: (made.append(update.borrowed), submit(update))[1]  # type: ignore[method-assign,func-returns-value]
    ema(model)
    optimizer.step()
    assert ema.pending == 1
    ema(model)
    optimizer.step()
    assert ema.pending == 0
    ema(model)
    ema(model)

    assert made == [False, True, True, False]


def test_dropped_without_close(server: Any, client: EmaClient, run_name: str) -> None:
    """What was sent is applied, and neither thread nor hook is left."""
    model = nn.Linear(50, 50)
    ema = RemoteEma(model, run=run_name, url=server.url, borrow=True)
    ema(model)
    thread = ema._publisher._thread
    hook = ema._hook
    assert thread is not None
    assert hook is not None
    del ema
    gc.collect()
    thread.join(20)

    assert not thread.is_alive()
    assert client.run(run_name).step == 1
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not hook.fired()


def test_close_reports_what_failed_and_closes(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """close() raises what nobody was told of yet, once; a block that raised keeps its own error."""
    model = nn.Linear(2, 2)
    ema = make(model)
    client.delete_run(ema.run)
    ema(model)
    with pytest.raises(RunNotFound):
        ema.close()
    ema.close()
    with pytest.raises(UsageError, match="closed"):
        ema(model)
    other = make(model)
    client.delete_run(other.run)
    with pytest.raises(_Oops), other:
        raise _oops_after(lambda: other(model))


def test_service_gone_for_good(relay: Callable[..., Any], run_name: str) -> None:
    """A trainer whose service never comes back trains on; flush() and reads say so, and close() ends it."""
    model = nn.Linear(2, 2)
    gate = relay(lambda _: False)
    with EmaClient(gate.url, retry=ONCE) as client:
        ema = RemoteEma(model, run=run_name, client=client)
        ema(model)
        ema.flush()
        gate.close()
        for _ in range(100):
            ema(model)
        with pytest.raises(TransportError):
            ema.flush()
        with pytest.raises(TransportError):
            _ = ema.num_updates
        with pytest.raises(TransportError):
            ema.copy_to(model)
        with pytest.raises(TransportError):
            ema.close()

    assert ema.stats.sent == 1
    assert ema.stats.skipped >= 98


# --- resuming -------------------------------------------------------------------------------------------------------


def test_resume_goes_on_where_the_run_is(make: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A trainer that starts again continues EMA, counter and steps; its own parameters do not replace the EMA."""
    model = Zoo()
    ema, oracle = make(model, 0.9), LitEmaOracle(model, 0.9)
    for _ in range(3):
        train(model)
        ema(model)
        oracle(model)
    ema.close()

    again = make(model, 0.9, resume=True)
    assert same(client.pull(again.run), oracle.shadow)
    train(model)
    again(model)
    oracle(model)

    assert again.num_updates == 4
    assert same(client.pull(again.run), oracle.shadow)
    assert client.run(again.run).step == 4


def test_resume_of_no_run(make: Callable[..., RemoteEma], run_name: str) -> None:
    """resume=True is for a run that exists: a new EMA is not begun unnoticed."""
    with pytest.raises(RunNotFound, match=run_name):
        make(nn.Linear(1, 1), resume=True)


def test_resume_with_another_model(make: Callable[..., RemoteEma]) -> None:
    """A model of another size is refused at once, with both sizes."""
    make(nn.Linear(2, 2))

    with pytest.raises(UsageError, match="2 tensors with 6 elements in all, the model 2 with 12"):
        make(nn.Linear(3, 3), resume=True)


def test_resume_with_another_choice_of_buffers(make: Callable[..., RemoteEma]) -> None:
    """What is copied cannot become averaged, or the other way round; the same choice goes on."""
    model = nn.BatchNorm1d(3)
    copying = make(model, buffers="copy")
    for buffers in ("average", "none"):
        with pytest.raises(UsageError, match="copies 2 of its tensors, this trainer 0"):
            make(model, resume=True, buffers=buffers)
    model(torch.randn(8, 3))
    again = make(model, resume=True, buffers="copy")
    again(model)
    mean = model.running_mean.clone()
    with again.scope(model):
        assert torch.equal(model.running_mean, mean)
    make(model, run=f"{copying.run}-averaging", buffers="average")

    with pytest.raises(UsageError, match="copies 0 of its tensors, this trainer 2: running_mean, running_var"):
        make(model, run=f"{copying.run}-averaging", resume=True, buffers="copy")


def test_resume_with_another_counter(make: Callable[..., RemoteEma]) -> None:
    """Whether the decay warms up cannot be changed by resuming."""
    make(nn.Linear(2, 2), use_num_updates=False)

    with pytest.raises(UsageError, match="use_num_updates=False"):
        make(nn.Linear(2, 2), resume=True)


def test_resume_with_another_decay_warns(make: Callable[..., RemoteEma]) -> None:
    """The run's decay stands, as in LitEma's state dict, and whoever passes another one is told."""
    model = nn.Linear(2, 2)
    make(model, 0.9)

    with pytest.warns(UserWarning, match=r"decay 0\.9, not 0\.5") as warned:
        again = make(model, 0.5, resume=True)
    assert warned[0].filename == __file__
    assert again.decay == pytest.approx(0.9)


def test_resume_of_a_run_that_awaits_weights(
    make: Callable[..., RemoteEma], relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """A trainer that died between creating the run and sending its weights can be started again either way."""
    model = nn.Linear(2, 2)
    with (
        EmaClient(relay(lambda request: request.method == "POST").url, retry=ONCE) as dying,
        pytest.raises(ConnectionLost),
    ):
        RemoteEma(model, run=run_name, client=dying)
    assert client.run(run_name).status == "awaiting_weights"

    make(model, resume=True)

    assert same(client.pull(run_name), values(model))


# --- swapping weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def swapped(make: Callable[..., RemoteEma]) -> tuple[RemoteEma, nn.Sequential]:
    """A model whose training weights differ from its EMA."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).requires_grad_(False))
    ema = make(model, 0.9)
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


class _Oops(Exception):
    pass


def _oops_after(action: Callable[[], object]) -> _Oops:
    action()
    return _Oops()


def test_scope_whose_body_raises(swapped: tuple[RemoteEma, nn.Sequential]) -> None:
    """Training weights come back although the evaluation failed, and its error is the one that is seen."""
    ema, model = swapped
    training = values(model)
    with pytest.raises(_Oops), ema.scope(model):
        raise _Oops

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


def test_scope_whose_pull_breaks_off(make: Callable[..., RemoteEma], relay: Callable[..., Any], run_name: str) -> None:
    """Where the EMA came in part, the training weights come back whole."""
    model = nn.Linear(40, 40)
    make(model)
    training = values(model)
    with EmaClient(relay(lambda request: "/weights" in request.target, after=3000).url, retry=ONCE) as shaky:
        ema = RemoteEma(model, run=run_name, client=shaky, resume=True)
        with pytest.raises(ConnectionLost), ema.scope(model):
            pytest.fail("the block was entered without EMA weights")

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
