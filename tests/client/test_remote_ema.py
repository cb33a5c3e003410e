"""RemoteEma against the real service, and against LitEma's arithmetic written down in its own words.

Knows what a training loop does with a LitEma. Does not know how updates travel (training/), or what fails
(test_remote_ema_updates.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.errors import RunExists, ServiceUnreachable, UsageError
from tests.client.trainers import ONCE, LitEmaOracle, Zoo, same, train, values

# --- the same numbers as LitEma ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_num_updates", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_bit_identical_to_litema(
    make_ema: Callable[..., RemoteEma], client: EmaClient, decay: float, use_num_updates: bool
) -> None:
    """Over many updates, with a reset among them, EMA and counter are LitEma's, bit for bit, after each one."""
    model = Zoo()
    ema, oracle = make_ema(model, decay, use_num_updates), LitEmaOracle(model, decay, use_num_updates)

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
def test_other_dtypes_keep_a_wide_shadow(
    make_ema: Callable[..., RemoteEma], client: EmaClient, dtype: torch.dtype
) -> None:
    """Half precision is averaged in float32 and double precision in double, bit for bit as the oracle does."""
    model = Zoo().to(dtype)
    ema, oracle = make_ema(model, 0.99), LitEmaOracle(model, 0.99)

    for _ in range(20):
        train(model)
        ema.update(model)
        oracle(model)
    ema.flush()

    assert same(client.pull(ema.run), oracle.shadow)


def test_copy_to_gives_the_ema(make_ema: Callable[..., RemoteEma]) -> None:
    """copy_to() writes the average of all updates so far into the trained parameters, and leaves frozen ones."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
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


# --- making one -------------------------------------------------------------------------------------------------------


def test_run_is_made_at_step_zero(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """The constructor clones the parameters into a new run; updates are its steps 1, 2, 3."""
    model = Zoo()
    ema = make_ema(model)
    info = client.run(ema.run)
    assert (info.status, info.step, info.num_updates, info.tensors) == ("ready", 0, 0, 9)
    for step in (1, 2, 3):
        ema(model)
        ema.flush()
        assert client.run(ema.run).step == step


def test_defaults_are_litemas(make_ema: Callable[..., RemoteEma]) -> None:
    """decay 0.9999, and the counter on."""
    ema = make_ema(nn.Linear(1, 1))

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
def test_both_spellings_are_understood(
    make_ema: Callable[..., RemoteEma], options: dict[str, bool], expected: int
) -> None:
    """LitEma's misspelt keyword means the same as the right one."""
    assert make_ema(nn.Linear(1, 1), **options).num_updates == expected


def test_spellings_that_contradict_each_other(free_url: str) -> None:
    """Two keywords for one thing must not say two things (True is the default, so only a False can contradict)."""
    with pytest.raises(UsageError, match="contradict"):
        RemoteEma(nn.Linear(1, 1), run="r", url=free_url, use_num_updates=False, use_num_upates=True)


@pytest.mark.parametrize("decay", [-0.01, 1.01, float("nan")])
def test_decay_outside_its_range(free_url: str, decay: float) -> None:
    """A ValueError, as LitEma raises it, before the service is asked for anything."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        RemoteEma(nn.Linear(1, 1), decay, run="r", url=free_url)


def test_existing_run_is_not_taken_over(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A second trainer of the same run name is refused and told of resume=True; the run stays as it was."""
    model = Zoo()
    first = make_ema(model)
    before = client.pull(first.run)
    train(model)
    with pytest.raises(RunExists, match=first.run) as raised:
        make_ema(model)

    assert "resume=True" in raised.value.hint
    assert same(client.pull(first.run), before)


def test_several_averages(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """One update feeds all averages of the run; decay and copy_to() are of the first."""
    model = nn.Linear(2, 2)
    ema = make_ema(model, 0.5, False, averages=[AverageConfig("ema"), AverageConfig("raw", decay=0.0)])
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


def test_own_client_is_closed(make_ema: Callable[..., RemoteEma]) -> None:
    """After close() an update is refused as a mistake."""
    model = nn.Linear(1, 1)
    ema = make_ema(model)
    ema.close()

    with pytest.raises(UsageError, match="closed"):
        ema(model)


def test_it_is_no_module(make_ema: Callable[..., RemoteEma]) -> None:
    """As an attribute of a model it adds nothing to the model's state."""
    model = nn.Linear(1, 1)
    model.ema = make_ema(model)  # type: ignore[assignment]

    assert sorted(model.state_dict()) == ["bias", "weight"]


# --- names and parameters ---------------------------------------------------------------------------------------------


def test_wrapped_model_is_the_same_model(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A model compiled or made parallel after the EMA was made is updated and filled like the bare one."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema, oracle = make_ema(model, 0.5), LitEmaOracle(model, 0.5)
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
    make_ema: Callable[..., RemoteEma], client: EmaClient, change: Callable[[Zoo], object], message: str
) -> None:
    """A parameter removed, unfrozen, added or changed later is an error that names it, and the EMA stays as it was."""
    model = Zoo()
    ema = make_ema(model)
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
