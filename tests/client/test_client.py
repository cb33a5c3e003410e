"""EmaClient against the real service, and over ways to it that lose answers.

Knows the client's calls and what they must leave behind in the service. Does not know sockets (test_transport.py).
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RunInfo, errors
from ema_client.errors import (
    AwaitingWeights,
    InvalidDecay,
    LayoutMismatch,
    NonFinite,
    ProtocolError,
    RunExists,
    RunNotFound,
    ServiceUnreachable,
    StaleStep,
    StepConflict,
    UsageError,
)
from ema_client.protocol import RunConfig, TensorSpec, to_json
from tests.client.states import ONCE, QUICK, STATE, assert_equal, first_only, plus


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    """A run of STATE with decay 0.5 and no counter: each update halves the way to the parameters."""
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    return run_name


# --- creating -------------------------------------------------------------------------------------------------------


def test_new_run_has_the_weights_it_was_made_from(client: EmaClient, run_name: str) -> None:
    """After create_run() the run is ready, and its EMA is the state, bit for bit."""
    info = client.create_run(run_name, STATE, decay=0.25, num_updates=7, step=70)

    assert isinstance(info, RunInfo)
    assert (info.status, info.decay, info.num_updates, info.step) == ("ready", 0.25, 7, 70)
    assert (info.tensors, info.parameters) == (3, 9)
    assert_equal(client.pull(run_name), STATE)


def test_copied_tensors_are_the_newest(client: EmaClient, run_name: str) -> None:
    """Of the tensors that are to be copied a pull gives the last push's values, of the others averages."""
    assert client.create_run(run_name, STATE, copied=["scale"]).copied == 1
    client.push(run_name, {name: tensor + 1 for name, tensor in STATE.items()})
    pulled = client.pull(run_name)

    assert pulled["scale"] == STATE["scale"] + 1
    assert not torch.equal(pulled["a.bias"], STATE["a.bias"] + 1)


def test_module_is_its_trained_parameters(client: EmaClient, run_name: str) -> None:
    """A module stands for its parameters that require gradients, by canonical names."""
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).requires_grad_(False)))

    client.create_run(run_name, model)

    assert sorted(client.pull(run_name)) == ["0.bias", "0.weight"]


def test_existing_run_is_refused(client: EmaClient, run: str) -> None:
    """A run that has its weights is not made again by accident, and stays as it was."""
    client.push(run, plus(1))
    with pytest.raises(RunExists, match=f"'{run}' exists already and is at step 1"):
        client.create_run(run, plus(9), decay=0.5, use_num_updates=False)

    assert_equal(client.pull(run), plus(0.5))


def test_exist_ok_sends_nothing(client: EmaClient, run: str) -> None:
    """With exist_ok the run is as it was, and pushing goes on from its step."""
    client.push(run, plus(1), step=5)
    with EmaClient(client.url) as second:
        info = second.create_run(run, plus(9), decay=0.5, use_num_updates=False, exist_ok=True)
        assert_equal(second.pull(run), plus(0.5))
        assert second.push(run, plus(1)).step == 6

    assert info.step == 5


def test_other_config_is_refused_even_with_exist_ok(client: EmaClient, run: str) -> None:
    """exist_ok does not let a run of another configuration pass for this one."""
    with pytest.raises(RunExists):
        client.create_run(run, STATE, decay=0.75, exist_ok=True)


def test_run_that_awaits_weights_gets_them(client: EmaClient, server: Any, run_name: str) -> None:
    """A trainer that died between creating the run and sending its weights is continued by the next one."""
    config = RunConfig(run_name, tuple(TensorSpec(name, tuple(t.shape), "F32") for name, t in STATE.items()))
    with server.http() as http:
        assert http.post("/v1/runs", json=to_json(config)).status_code == 201
    with pytest.raises(AwaitingWeights):
        client.pull(run_name)

    assert client.create_run(run_name, STATE).status == "ready"


def test_durability_is_chosen(client: EmaClient, run_name: str) -> None:
    """create_run hands the durability on; left out it is the server's default, or that of the run."""
    assert client.create_run(run_name, STATE, durability="disk").durability == "disk"
    assert client.create_run(run_name, STATE, exist_ok=True).durability == "disk"
    assert client.create_run(f"{run_name}-default", STATE).durability == "process"


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_lost_answer_does_not_spoil_create_run(
    relay: Callable[..., Any], client: EmaClient, run_name: str, method: str
) -> None:
    """Where the run or its weights arrived and the answer did not, the try after it succeeds."""
    with EmaClient(relay(first_only(method)).url, retry=QUICK) as shaky:
        info = shaky.create_run(run_name, STATE)

    assert info.status == "ready"
    assert_equal(client.pull(run_name), STATE)


@pytest.mark.parametrize("exist_ok", [False, True])
def test_other_trainer_was_quicker(scripted: Callable[..., Any], exist_ok: bool) -> None:
    """Another trainer's weights between our two requests make the run an existing one."""
    ready: dict[str, Any] = {
        "run": "r", "status": "ready", "decay": 0.5, "num_updates": 0, "effective_decay": None, "use_num_updates": True,
        "decay_per": "update", "step": None, "version": "1.0", "durable_step": None, "durability": "memory",
        "non_finite": "refuse", "averages": [], "tensors": 3, "parameters": 9, "bytes": 36, "device": "cpu",
        "shadow_dtype": "F32", "created_at": 0.0, "updated_at": 0.0,
    }  # fmt: skip

    status = iter(["awaiting_weights", "ready"])

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.body(request.length)
            if request.method == "PUT":
                peer.problem(409, "weights_exist")
            else:
                peer.answer(200, ready | {"status": next(status)})

    with EmaClient(scripted(script).url, retry=ONCE) as client:
        if exist_ok:
            assert client.create_run("r", STATE, exist_ok=True).status == "ready"
        else:
            with pytest.raises(RunExists):
                client.create_run("r", STATE)


# --- pushing --------------------------------------------------------------------------------------------------------


def test_push_is_one_update(client: EmaClient, run: str) -> None:
    """One push moves the EMA once, and says where it is now."""
    result = client.push(run, plus(1))

    assert (result.applied, result.step, result.num_updates, result.effective_decay) == (True, 1, -1, 0.5)
    weights = client.pull(run)
    assert weights.info.version == result.version
    assert_equal(weights, plus(0.5))


def test_steps_follow_each_other(client: EmaClient, server: Any, run: str) -> None:
    """Without a step the next one is taken: after the last of this client, else after the run's."""
    assert [client.push(run, plus(1)).step for _ in range(3)] == [1, 2, 3]
    assert client.push(run, plus(1), step=10).step == 10
    assert client.push(run, plus(1)).step == 11
    with EmaClient(server.url) as second:
        assert second.push(run, plus(1)).step == 12


def test_step_is_asked_for_after_a_refusal(client: EmaClient, server: Any, run: str) -> None:
    """A client whose memory of the step is old is refused once, and then knows better."""
    client.push(run, plus(1))
    with EmaClient(server.url) as second:
        second.push(run, plus(2))
        second.push(run, plus(3))
    with pytest.raises(StaleStep):
        client.push(run, plus(4))

    assert client.push(run, plus(4)).step == 4


def test_repeated_step(client: EmaClient, run: str) -> None:
    """The same step with the same bytes is answered and not applied; with other bytes it is a conflict."""
    client.push(run, plus(1), step=4)

    assert client.push(run, plus(1), step=4).applied is False
    with pytest.raises(StepConflict):
        client.push(run, plus(2), step=4)
    assert_equal(client.pull(run), plus(0.5))


def test_lost_answer_does_not_apply_an_update_twice(relay: Callable[..., Any], client: EmaClient, run: str) -> None:
    """A push whose answer is lost is tried again inside the call, and counts once."""
    with EmaClient(relay(first_only("PUT")).url, retry=QUICK) as shaky:
        result = shaky.push(run, plus(1))

    assert (result.step, result.applied) == (1, False)
    assert_equal(client.pull(run), plus(0.5))


def test_step_after_an_unknown_outcome_is_the_services(relay: Callable[..., Any], run: str) -> None:
    """When a push fails without an answer, the next one asks for the run's step: it may have been applied."""
    with EmaClient(relay(first_only("PUT")).url, retry=ONCE) as shaky:
        shaky.run(run)
        with pytest.raises(errors.ConnectionLost):
            shaky.push(run, plus(1))
        assert shaky.push(run, plus(2)).step == 2


@pytest.mark.parametrize(
    ("state", "error", "named"),
    [
        ({name: STATE[name] for name in ("a.weight", "scale")}, LayoutMismatch, "a.bias"),
        ({**STATE, "extra": torch.zeros(1)}, LayoutMismatch, "extra"),
        ({**STATE, "scale": torch.zeros(2)}, LayoutMismatch, "scale"),
        ({**STATE, "scale": torch.tensor(3.0).bfloat16()}, LayoutMismatch, "scale"),
        ({**STATE, "scale": torch.tensor(float("nan"))}, NonFinite, "scale"),
    ],
)
def test_refused_push_names_the_tensor_and_changes_nothing(
    client: EmaClient, run: str, state: dict[str, Tensor], error: type[Exception], named: str
) -> None:
    """What the service refuses is raised by its class with the tensor's name, and the EMA is as it was."""
    with pytest.raises(error, match=named):
        client.push(run, state)

    assert_equal(client.pull(run), STATE)
    assert client.push(run, plus(1)).step == 1


@pytest.mark.parametrize("step", [-1, 2**63])
def test_step_out_of_range(client: EmaClient, run: str, step: int) -> None:
    """A step that no server could keep is refused here."""
    with pytest.raises(UsageError, match=f"step {step}"):
        client.push(run, STATE, step=step)


def test_push_and_pull_make_no_copy_of_the_model(client: EmaClient, run_name: str) -> None:
    """Neither way is a second whole copy of a model's bytes made in this process."""
    state = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(16)}
    out = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    client.create_run(run_name, state)
    tracemalloc.start()
    try:
        client.push(run_name, state)
        client.pull(run_name, out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert_equal(out, state)
    assert peak < 4 << 20


# --- runs -----------------------------------------------------------------------------------------------------------


def test_runs_are_listed_and_deleted(client: EmaClient, run: str) -> None:
    """A run is among the runs until it is deleted."""
    assert client.run(run) in client.runs()
    client.delete_run(run)
    assert run not in {info.run for info in client.runs()}
    with pytest.raises(RunNotFound, match=run):
        client.run(run)
    with pytest.raises(RunNotFound, match=run):
        client.delete_run(run)


def test_run_made_again_begins_at_its_own_step(client: EmaClient, server: Any, run: str) -> None:
    """What a client remembers of a run's steps does not outlive the run."""
    client.push(run, plus(1), step=100)
    with EmaClient(server.url) as second:
        second.delete_run(run)
    client.create_run(run, STATE)

    assert client.push(run, plus(1)).step == 1


def test_lost_answer_does_not_make_a_deletion_fail(relay: Callable[..., Any], client: EmaClient, run: str) -> None:
    """A second try that finds nothing was preceded by a first one that did it."""
    client.snapshot(run, "s")
    with EmaClient(relay(first_only("DELETE")).url, retry=QUICK) as shaky:
        shaky.delete_snapshot(run, "s")
    with EmaClient(relay(first_only("DELETE")).url, retry=QUICK) as shaky:
        shaky.delete_run(run)
    with pytest.raises(RunNotFound):
        client.run(run)


def test_decay_can_be_changed(client: EmaClient, run: str) -> None:
    """A new decay holds from the next update on."""
    assert client.set_decay(run, 0.0).decay == 0.0
    client.push(run, plus(7))

    assert_equal(client.pull(run), plus(7))


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf")])
def test_decay_outside_its_range(free_url: str, decay: float) -> None:
    """Such a decay is a ValueError and an error of ours, raised before anything is sent."""
    with EmaClient(free_url, retry=ONCE) as client:
        for call in (lambda: client.create_run("r", STATE, decay=decay), lambda: client.set_decay("r", decay)):
            with pytest.raises(InvalidDecay, match="between 0 and 1") as raised:
                call()
            assert isinstance(raised.value, ValueError)
            assert isinstance(raised.value, UsageError)


def test_counter_can_be_reset(client: EmaClient, run_name: str) -> None:
    """num_updates begins at 0 again; where there is no counter it stays -1."""
    client.create_run(run_name, STATE, num_updates=50)
    client.create_run(run_name + "-fixed", STATE, use_num_updates=False)

    assert client.reset_num_updates(run_name).num_updates == 0
    assert client.reset_num_updates(run_name + "-fixed").num_updates == -1


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "-x", "x" * 129, "ä"])
def test_names_are_checked_before_they_become_paths(free_url: str, name: str) -> None:
    """A name that could be read as another path never leaves."""
    with EmaClient(free_url, retry=ONCE) as client:
        for call in (
            lambda: client.run(name),
            lambda: client.create_run(name, STATE),
            lambda: client.push(name, STATE, step=1),
            lambda: client.pull(name),
            lambda: client.pull("r", snapshot=name),
            lambda: client.snapshot("r", name),
            lambda: client.delete_run(name),
        ):
            with pytest.raises(UsageError, match="cannot name a"):
                call()


# --- where the service is -------------------------------------------------------------------------------------------


def test_unix_socket(server: Any, run_name: str) -> None:
    """Every kind of request works over the service's Unix socket."""
    with EmaClient(server.uds) as client:
        client.create_run(run_name, STATE, use_num_updates=False, decay=0.5)
        client.push(run_name, plus(1))
        assert_equal(client.pull(run_name), plus(0.5))


def test_environment_says_where(server: Any, free_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """$EMA_SERVICE_URL is used where no URL is given; a given one comes first; without both it is the default."""
    monkeypatch.setenv("EMA_SERVICE_URL", f" {server.url}\n")
    with EmaClient() as from_environment, EmaClient(free_url) as given_one:
        assert (from_environment.url, given_one.url) == (server.url, free_url)
    monkeypatch.delenv("EMA_SERVICE_URL")
    with EmaClient() as default:
        assert default.url == "http://127.0.0.1:8470"


def test_environment_gives_the_token(scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """$EMA_SERVICE_TOKEN goes out as bearer token, without the newline its file ended in, and never into a repr."""
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            seen.append(request.headers.get("authorization"))
            peer.answer(200, {"runs": []})

    url = scripted(script).url
    monkeypatch.setenv("EMA_SERVICE_TOKEN", "sesame\n")
    with EmaClient(url) as from_environment, EmaClient(url, token="other") as given_one:
        from_environment.runs()
        given_one.runs()
        assert "sesame" not in repr(from_environment)
    monkeypatch.delenv("EMA_SERVICE_TOKEN")
    with EmaClient(url) as none:
        none.runs()

    assert seen == ["Bearer sesame", "Bearer other", None]


def test_unreachable_service(free_url: str) -> None:
    """Without a server, a call says which URL it tried and what to start."""
    with EmaClient(free_url, retry=QUICK) as client, pytest.raises(ServiceUnreachable) as raised:
        client.push("r", STATE, step=1)

    assert free_url in str(raised.value)
    assert "ema-service serve" in str(raised.value)


def test_answer_of_another_version(scripted: Callable[..., Any]) -> None:
    """An answer without what it must have is named as such, with the URL."""

    def script(peer: Any) -> None:
        peer.request()
        peer.answer(200, {"run": "r"})

    with EmaClient(scripted(script).url, retry=ONCE) as client, pytest.raises(ProtocolError, match="/v1/runs/r"):
        client.run("r")


def test_closed_client(server: Any) -> None:
    """A call after close() is refused as a mistake."""
    client = EmaClient(server.url)
    client.close()

    with pytest.raises(UsageError, match="closed"):
        client.runs()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from ema_client import EmaClient, errors
with EmaClient(sys.argv[1]) as client:
    print([info.run for info in client.runs()] != [])
    print(client.download(sys.argv[2], sys.argv[3]).run == sys.argv[2])
    for call in (lambda: client.create_run("r", {}), lambda: client.push("r", {}), lambda: client.pull("r")):
        try:
            call()
        except errors.UsageError as error:
            print("pip install torch xxhash" in str(error))
try:
    from ema_client import RemoteEma
except ImportError as error:
    print("pip install torch xxhash" in str(error))
"""


def test_what_needs_no_torch_works_without(server: Any, run: str, tmp_path: Any) -> None:
    """Looking and downloading work where torch is not installed; what needs it says what to install."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, server.url, run, str(tmp_path / "w.safetensors")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.stderr, done.stdout.split()) == ("", ["True"] * 6)
