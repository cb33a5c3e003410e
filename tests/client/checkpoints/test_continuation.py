"""An average goes on in a run with the decay that its program's next update would have had; where not, that is told.

Every program is the real one. Knows: how each is trained and saved, and the decay of an update by what the update did.
Does not know: how the command finds out formats.
"""

from __future__ import annotations

import argparse
import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.schedules import constant, half_life, inverse_gamma, litema, power, uniform
from tests.client.checkpoints.litema import LitEma
from tests.client.checkpoints.timm_file import timm_model_ema

Ema = Callable[..., tuple[int, str, str]]

#: A run computes its decay in float32, torch_ema and EMAModel in float64.
ROUNDING = 1e-6


class Net(nn.Module):
    """One parameter in float64, in which a decay can be read off an update."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(1, 2, 4, dtype=torch.float64))


def move(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("w").add_(1.0)


class Program(Protocol):
    """An EMA as a program keeps it.

    like: whether its file holds no names. state(): what is saved by torch.save.
    """

    like: bool

    def __init__(self, model: nn.Module, **options: Any) -> None: ...
    def update(self, model: nn.Module) -> None: ...
    def average(self) -> Tensor: ...
    def state(self) -> Any: ...


class OfLitEma:
    like = True

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.ema = LitEma(model, **options)

    def update(self, model: nn.Module) -> None:
        self.ema(model)

    def average(self) -> Tensor:
        return self.ema.w

    def state(self) -> Any:
        return self.ema.state_dict()


class OfTorchEma:
    like = True

    def __init__(self, model: nn.Module, **options: Any) -> None:
        package = pytest.importorskip(
            "torch_ema", reason="torch-ema is not installed: pip install -e '.[integrations]'"
        )
        self.ema = package.ExponentialMovingAverage(model.parameters(), **options)

    def update(self, model: nn.Module) -> None:
        self.ema.update(model.parameters())

    def average(self) -> Tensor:
        average: Tensor = self.ema.shadow_params[0]
        return average

    def state(self) -> Any:
        return self.ema.state_dict()


class OfEmaModel:
    """diffusers'."""

    like = True

    def __init__(self, model: nn.Module, **options: Any) -> None:
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[integrations]'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers.training_utils import EMAModel
        self.ema = EMAModel(model.parameters(), **options)

    def update(self, model: nn.Module) -> None:
        self.ema.step(model.parameters())

    def average(self) -> Tensor:
        average: Tensor = self.ema.shadow_params[0]
        return average

    def state(self) -> Any:
        return self.ema.state_dict()


class OfAveragedModel:
    like = False

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.ema = AveragedModel(model, **options)

    def update(self, model: nn.Module) -> None:
        self.ema.update_parameters(model)

    def average(self) -> Tensor:
        return self.ema.module.get_parameter("w").detach()

    def state(self) -> Any:
        return self.ema.state_dict()


class OfModelEmaV3:
    """timm's, and ModelEmaV2 likewise."""

    like = False
    name = "ModelEmaV3"

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.ema = getattr(timm_model_ema(), self.name)(model, **options)

    def update(self, model: nn.Module) -> None:
        self.ema.update(model)

    def average(self) -> Tensor:
        average: Tensor = self.ema.module.w.detach()
        return average

    def state(self) -> Any:
        return self.ema.state_dict()


class OfModelEmaV2(OfModelEmaV3):
    name = "ModelEmaV2"


class OfModelEma(OfModelEmaV3):
    """timm's first, saved as timm's CheckpointSaver saves one."""

    name = "ModelEma"

    def average(self) -> Tensor:
        average: Tensor = self.ema.ema.w
        return average

    def state(self) -> Any:
        beside = {"epoch": 1, "arch": "net", "state_dict": Net().state_dict()}
        return {**beside, "state_dict_ema": self.ema.ema.state_dict()}


class OfEmaPytorch:
    like = False

    def __init__(self, model: nn.Module, **options: Any) -> None:
        package = pytest.importorskip(
            "ema_pytorch", reason="ema-pytorch is not installed: pip install -e '.[integrations]'"
        )
        self.ema = package.EMA(model, **options)

    def update(self, _: nn.Module) -> None:
        self.ema.update()

    def average(self) -> Tensor:
        average: Tensor = self.ema.ema_model.w.detach()
        return average

    def state(self) -> Any:
        return self.ema.state_dict()


@dataclass(frozen=True)
class Case:
    """A program with its options. words: for ``ema import``, beyond the file."""

    program: type[Program]
    options: Mapping[str, Any]
    words: tuple[str, ...] = ()


_BY_HAND = ("--decay", "0.9")
#: Programs whose schedule a run can have, and what num_updates is in the run after 5 updates in the program.
ALIKE: dict[str, tuple[Case, int]] = {
    "LitEma": (Case(OfLitEma, {"decay": 0.9}), 5),
    "LitEma without counter": (Case(OfLitEma, {"decay": 0.9, "use_num_updates": False}), -1),
    "torch_ema": (Case(OfTorchEma, {"decay": 0.9}), 5),
    "torch_ema without counter": (Case(OfTorchEma, {"decay": 0.9, "use_num_updates": False}), -1),
    "EMAModel": (Case(OfEmaModel, {"decay": 0.9}), 4),
    "EMAModel, begun later": (Case(OfEmaModel, {"decay": 0.9, "update_after_step": 3}), 5),
    "EMAModel at its largest": (Case(OfEmaModel, {"decay": 0.25}), 4),
    "EMAModel above its smallest": (Case(OfEmaModel, {"decay": 0.9, "min_decay": 0.2}), 4),
    "EMAModel, constant": (Case(OfEmaModel, {"decay": 0.5, "min_decay": 0.7}), 4),
    "EMAModel by power": (Case(OfEmaModel, {"decay": 0.9, "use_ema_warmup": True}), 5),
    "EMAModel by power, at its largest": (Case(OfEmaModel, {"decay": 0.5, "use_ema_warmup": True}), 5),
    "EMAModel by another power": (
        Case(OfEmaModel, {"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 4.0, "power": 0.9, "min_decay": 0.3}),
        5,
    ),
    "EMAModel by power, begun later": (
        Case(OfEmaModel, {"decay": 0.9, "use_ema_warmup": True, "update_after_step": 3}),
        5,
    ),
    "EMAModel by power, not begun": (
        Case(OfEmaModel, {"decay": 0.9, "use_ema_warmup": True, "update_after_step": 9}),
        5,
    ),
    "EMAModel, not begun": (Case(OfEmaModel, {"decay": 0.9, "update_after_step": 9}), 5),
    "AveragedModel": (Case(OfAveragedModel, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, _BY_HAND), 5),
    "AveragedModel as torch has it": (Case(OfAveragedModel, {"avg_fn": get_ema_avg_fn()}), 5),
    "ModelEma": (Case(OfModelEma, {"decay": 0.9}, _BY_HAND), -1),
    "ModelEmaV2": (Case(OfModelEmaV2, {"decay": 0.9}, _BY_HAND), -1),
    "ModelEmaV3": (Case(OfModelEmaV3, {"decay": 0.9}, _BY_HAND), -1),
}
#: Programs that a run cannot follow, and what the command says of their next update.
TOLD: dict[str, tuple[Case, str]] = {
    "EMAModel at its smallest": (
        Case(OfEmaModel, {"decay": 0.9, "min_decay": 0.8}),
        r"0\.8 \(min_decay, which a run does not have\); the run's first has 0\.4",
    ),
    "ema-pytorch": (
        Case(OfEmaPytorch, {"beta": 0.9, "update_after_step": 0, "update_every": 1}, _BY_HAND),
        r"warm-up, 1 - \(1 \+ n\)\^-p, is not carried on",
    ),
}


def trained(case: Case, updates: int = 5) -> tuple[nn.Module, Program]:
    model = Net()
    program = case.program(model, **case.options)
    for _ in range(updates):
        move(model)
        program.update(model)
    return model, program


def saved(program: Program, model: nn.Module, folder: Path) -> list[str | Path]:
    """Save what the program saves; returns the words that name it for ``ema import``, without the run."""
    torch.save(program.state(), folder / "ema.pt")
    torch.save(model.state_dict(), folder / "model.pt")
    return [folder / "ema.pt", *(["--like", folder / "model.pt"] if program.like else [])]


def imported(ema: Ema, case: Case, program: Program, model: nn.Module, run: str, folder: Path) -> str:
    """Import what the program saves; returns what the command says."""
    path, *like = saved(program, model, folder)
    code, out, err = ema("import", path, run, *like, *case.words)
    assert (code, err) == (0, "")
    return out


def decay_of(before: Tensor, after: Tensor, parameter: Tensor) -> float:
    """after = before - (1 - decay) * (before - parameter), solved for the decay."""
    return float(((after - parameter) / (before - parameter)).detach().mean())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ALIKE)
def test_next_update_has_the_same_decay(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, name: str) -> None:
    """The average is the program's, bit for bit; the next update, and ten more, do in the run what they do there."""
    case, num_updates = ALIKE[name]
    model, program = trained(case)
    out = imported(ema, case, program, model, run_name, tmp_path)
    assert "would have" not in out
    assert client.run(run_name).num_updates == num_updates
    assert torch.equal(client.pull(run_name)["w"], program.average())

    before = program.average().clone()
    move(model)
    program.update(model)
    effective = client.push(run_name, model).effective_decay
    assert effective == pytest.approx(decay_of(before, program.average(), model.get_parameter("w")), abs=ROUNDING)
    for _ in range(10):
        move(model)
        program.update(model)
        client.push(run_name, model)
    assert torch.allclose(client.pull(run_name)["w"], program.average(), rtol=ROUNDING)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", TOLD)
def test_what_a_run_cannot_have_is_told(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, name: str) -> None:
    """The command says what the next update would have been there, and what it is here; both are true."""
    case, words = TOLD[name]
    model, program = trained(case)
    out = imported(ema, case, program, model, run_name, tmp_path)
    assert re.search(words, out), out
    assert torch.equal(client.pull(run_name)["w"], program.average())

    before = program.average().clone()
    move(model)
    program.update(model)
    effective = client.push(run_name, model).effective_decay
    if told := re.search(r"have the decay ([\d.]+)", out):
        there = decay_of(before, program.average(), model.get_parameter("w"))
        assert float(told[1]) == pytest.approx(there, abs=1e-5)
    assert effective == pytest.approx(float(re.findall(r"(?:decay|first has) ([\d.]+)", out)[-1]), abs=1e-5)


def test_an_averaged_model_that_has_not_begun(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """AveragedModel's first update copies the parameters: where none came yet, that is told, and equal averages too."""
    case = Case(OfAveragedModel, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, _BY_HAND)
    model, program = trained(case, updates=0)
    out = imported(ema, case, program, model, run_name, tmp_path)
    assert "decay 0 (the first update copies the parameters" in out
    assert "SWA" in out
    assert client.push(run_name, model).effective_decay == pytest.approx(0.9)


@pytest.mark.parametrize("warmup", [True, False])
def test_timm_says_its_decay_in_its_arguments(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, warmup: bool
) -> None:
    """A checkpoint of timm's train.py holds its command line, with the decay; a warm-up there is told."""
    _, program = trained(Case(OfModelEma, {"decay": 0.9998}))
    args = argparse.Namespace(model="net", model_ema=True, model_ema_decay=0.9998, model_ema_warmup=warmup)
    torch.save({**program.state(), "args": args}, tmp_path / "last.pth.tar")
    code, out, _ = ema("import", tmp_path / "last.pth.tar", run_name)
    assert (code, "decay 0.9998\n" in out) == (0, True)
    assert ("is not carried on" in out) == warmup
    assert client.run(run_name).decay == 0.9998


# --- and back -------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "warm-up": {"decay": 0.9, "num_updates": 7},
    "just begun": {"decay": 0.9, "num_updates": 0},
    "at its largest": {"decay": 0.25, "num_updates": 7},
    "without counter": {"decay": 0.9, "use_num_updates": False},
    "counted, constant": {"decay": 0.9, "averages": [AverageConfig(schedule="constant")], "num_updates": 7},
    "inverse gamma": {"decay": 0.95, "schedule": inverse_gamma(inv_gamma=3.0, min_decay=0.1), "num_updates": 7},
    "inverse gamma, not begun": {"decay": 0.95, "schedule": inverse_gamma(start=9), "num_updates": 7},
    "LitEma begun later": {"decay": 0.9, "schedule": litema(start=3), "num_updates": 7},
}
#: Runs with a schedule that no other program's file holds: there the decay of the next update goes on, constant.
OURS: dict[str, dict[str, Any]] = {
    "half-life": {"schedule": half_life(4.0), "num_updates": 7},
    "power": {"schedule": power(0.1), "num_updates": 7},
    "uniform": {"schedule": uniform(start=2), "num_updates": 7},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", RUNS | OURS)
@pytest.mark.parametrize("format", ["litema", "diffusers"])
def test_exported_average_goes_on_there(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, format: str, case: str
) -> None:
    """What LitEma or EMAModel loads, it goes on with as the run does."""
    model = Net()
    client.create_run(run_name, model, **(RUNS | OURS)[case])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    like = ("--like", tmp_path / "model.pt") if format == "diffusers" else ()
    assert ema("export", run_name, tmp_path / "ema.pt", "--format", format, *like)[0] == 0

    state = torch.load(tmp_path / "ema.pt", weights_only=True)
    program: OfLitEma | OfEmaModel
    if format == "litema":
        program = OfLitEma(model, decay=0.5)
        program.ema.load_state_dict({key.removeprefix("model_ema."): v for key, v in state["state_dict"].items()})
    else:
        program = OfEmaModel(model)
        program.ema.load_state_dict(state)
    before = program.average().clone()
    move(model)
    program.update(model)
    there = decay_of(before, program.average(), model.get_parameter("w"))
    assert client.push(run_name, model).effective_decay == pytest.approx(there, abs=ROUNDING)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("file", ["ema.safetensors", "pulled.safetensors", "lit.ckpt", "lit.safetensors", "diffusers"])
def test_own_file_comes_back_as_it_was(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, file: str, case: str
) -> None:
    """Export, then import: counter, decay, schedule, step, and so every update to come, are the run's own."""
    model = Net()
    client.create_run(run_name, model, step=12, **RUNS[case])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    like = ("--like", tmp_path / "model.pt") if file == "diffusers" else ()
    words = ("--format", "litema") if "lit" in file else ("--format", file) if file == "diffusers" else ()
    path = tmp_path / file
    done = ema("pull", run_name, "-o", path) if file[0] == "p" else ema("export", run_name, path, *words, *like)
    assert done[0] == 0
    again = f"{run_name}-again"
    assert ema("import", path, again, *like)[0] == 0

    was, now = client.run(run_name), client.run(again)
    assert (now.num_updates, now.decay, now.use_num_updates) == (was.num_updates, was.decay, was.use_num_updates)
    # EMAModel keeps no step of the trainer's.
    assert now.step == (None if file == "diffusers" else 12)
    for _ in range(3):
        move(model)
        assert client.push(again, model).effective_decay == client.push(run_name, model).effective_decay
    assert torch.equal(client.pull(again)["w"], client.pull(run_name)["w"])


def test_a_snapshot_says_its_schedule(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """Weights say the schedule of their average, as a snapshot's file does; LitEma's is not written out."""
    averages = [AverageConfig(schedule="constant"), AverageConfig(name="warm", decay=0.5)]
    client.create_run(run_name, Net(), averages=averages)
    client.snapshot(run_name, "kept")
    client.download(run_name, tmp_path / "kept.safetensors", snapshot="kept")
    with safe_open(tmp_path / "kept.safetensors", "pt") as file:
        assert file.metadata()["ema_schedule"] == "constant"
    for snapshot in (None, "kept"):
        said = [client.pull(run_name, average=name, snapshot=snapshot).info for name in (None, "warm")]
        assert [info.schedule for info in said] == ["constant", "litema"]
        assert "ema_schedule" not in said[1].to_metadata()


def test_own_names_and_buffers_come_back(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """Of an own file no name is changed and nothing is left out; --copied holds the newest values, as the run did."""
    state = {"module.w": torch.randn(2), "_orig_mod.v": torch.randn(2), "bn.running_mean": torch.randn(3)}
    client.create_run(run_name, state, copied=["bn.running_mean"])
    assert ema("pull", run_name, "-o", tmp_path / "ema.safetensors")[0] == 0
    again = f"{run_name}-again"
    code, out, _ = ema("import", tmp_path / "ema.safetensors", again, "--copied", "*.running_*")
    assert (code, "ema-service" in out, "left out" in out) == (0, True, False)
    assert set(client.pull(again)) == set(state)
    assert client.run(again).copied == 1
    code, _, err = ema("import", tmp_path / "ema.safetensors", f"{run_name}-3", "--copied", "nothing*")
    assert (code, "fits no tensor" in err) == (1, True)


def test_bits_go_on_where_both_are_float32(ema: Ema, server: Any, run_name: str, tmp_path: Path) -> None:
    """torch_ema in float32 with a decay that float32 has: after the import, the same bits for a hundred updates."""
    package = pytest.importorskip("torch_ema", reason="torch-ema is not installed: pip install -e '.[integrations]'")
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    kept = package.ExponentialMovingAverage(model.parameters(), decay=0.25)
    kept.update()
    torch.save(kept.state_dict(), tmp_path / "ema.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert ema("import", tmp_path / "ema.pt", run_name, "--like", tmp_path / "model.pt")[0] == 0
    evaluated = copy.deepcopy(model)
    with RemoteEma(model, 0.25, run=run_name, url=server.url, resume=True) as resumed:
        for _ in range(100):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            kept.update()
            resumed(model)
        resumed.copy_to(evaluated)
    assert all(map(torch.equal, evaluated.parameters(), kept.shadow_params))


def test_statistics_go_on_beside_the_averages(ema: Ema, server: Any, run_name: str, tmp_path: Path) -> None:
    """AveragedModel holds the newest statistics of BatchNorm; named by --copied they come along, and go on so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def train() -> None:
        model(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        kept.update_parameters(model)

    train()
    torch.save(kept.state_dict(), tmp_path / "ema.pt")
    words = (tmp_path / "ema.pt", run_name, "--decay", "0.9", "--copied", "*.running_*")
    assert "6 tensors" in ema("import", *words)[1]
    evaluated = copy.deepcopy(model)
    with RemoteEma(
        model, 0.9, run=run_name, url=server.url, schedule=constant(), resume=True, buffers="copy"
    ) as resumed:
        for _ in range(5):
            train()
            resumed(model)
        resumed.copy_to(evaluated)
    expected = kept.module.state_dict()
    for name, tensor in evaluated.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, expected[name])
        elif "num_batches" not in name:
            # AveragedModel lerps: one rounding where LitEma has three.
            assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)


# --- which format is which ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_formats_of_a_list_are_told_apart(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """torch_ema's list is not EMAModel's: each is found by its own fields, and neither is read as the other."""
    for kind, name, other in ((OfTorchEma, "torch-ema", "diffusers"), (OfEmaModel, "diffusers", "torch-ema")):
        model, program = trained(Case(kind, {"decay": 0.9}))
        path, *like = saved(program, model, tmp_path)
        words = ("import", path, f"{run_name}-{name}", *like)
        code, _, err = ema(*words, "--format", other)
        assert (code, "the file has no `" in err) == (1, True)
        assert f"ema.pt: {name}, 1 tensors" in ema(*words)[1]
    assert {info.num_updates for info in client.runs() if info.run.startswith(run_name)} == {5, 4}


def test_tied_parameters_and_buffers_beside_a_list(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """A list of averages has each tied parameter once, and no buffer: --like may have both, with --drop for buffers."""
    package = pytest.importorskip("torch_ema", reason="torch-ema is not installed: pip install -e '.[integrations]'")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.register_buffer("positions", torch.randn(2))
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.norm = nn.LayerNorm(3)

    model = Tied()
    kept = package.ExponentialMovingAverage(model.parameters(), decay=0.9)
    torch.save(kept.state_dict(), tmp_path / "ema.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    words = ("import", tmp_path / "ema.pt", run_name, "--like", tmp_path / "model.pt")
    code, _, err = ema(*words)
    assert (code, "--drop" in err) == (1, True)
    assert ema(*words, "--drop", "positions")[0] == 0
    assert set(client.pull(run_name)) == {"embedding.weight", "norm.weight", "norm.bias"}


@pytest.mark.filterwarnings("ignore")
def test_lightnings_checkpoint(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """EMAWeightAveraging puts the average where the model was: taken from there, with its count and the step."""
    lightning = pytest.importorskip(
        "lightning.pytorch", reason="lightning is not installed: pip install -e '.[integrations]'"
    )
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    averaging = EMAWeightAveraging(decay=0.9)
    module = Module()
    trainer = lightning.Trainer(
        max_steps=6,
        callbacks=[averaging],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    kept = {}

    class Save(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                kept.update({name: t.clone() for name, t in averaging._average_model.module.state_dict().items()})

    trainer.callbacks.append(Save())
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(24, 2), batch_size=4))
    code, out, _ = ema("import", tmp_path / "last.ckpt", run_name, "--decay", "0.9")
    assert (code, "averaged-model (WeightAveraging" in out) == (0, True)
    pulled = client.pull(run_name)
    assert set(pulled) == set(kept) == {"net.weight", "net.bias"}
    assert all(torch.equal(pulled[name], kept[name]) for name in kept)
    info = client.run(run_name)
    assert (info.num_updates, info.step, info.averages[0].schedule) == (6, 6, "constant")


@pytest.mark.parametrize("case", OURS)
def test_own_schedule_comes_back_as_it_was(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, case: str
) -> None:
    """A file of ``ema pull`` carries a schedule with its fields: imported, the average goes on as the run's own."""
    model = Net()
    client.create_run(run_name, model, step=12, **OURS[case])
    assert ema("pull", run_name, "-o", tmp_path / "ema.safetensors")[0] == 0
    assert ema("import", tmp_path / "ema.safetensors", f"{run_name}-again")[0] == 0
    for _ in range(5):
        move(model)
        was, now = client.push(run_name, model), client.push(f"{run_name}-again", model)
        assert now.effective_decay == was.effective_decay
    assert torch.equal(client.pull(f"{run_name}-again")["w"], client.pull(run_name)["w"])
