"""``ema import`` and ``ema export``: what other programs wrote comes in, what goes out they load, bit for bit.

Knows how LitEma, torch, diffusers, timm and ema-pytorch keep an EMA, by the programs themselves where they are
installed. Does not know the service beyond what a pull says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_client import EmaClient, RemoteEma, checkpoints
from ema_client.errors import NameCollision, UsageError
from tests.client.checkpoints.litema import LitEma
from tests.client.checkpoints.timm_file import timm_model_ema

Ema = Callable[..., tuple[int, str, str]]


class Net(nn.Module):
    """Nested modules, a norm with buffers, something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(3, 4)))
        self.scale = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


class Engine(nn.Module):
    """What a LightningModule of sgm holds, as far as a checkpoint can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()
        self.model_ema = LitEma(self.model, 0.999)
        self.first_stage_model = nn.Linear(2, 2)


def train(model: nn.Module, update: Callable[[nn.Module], object], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        update(model)


def shadows(ema: LitEma) -> dict[str, Tensor]:
    return {name: getattr(ema, short) for name, short in ema.names.items()}


def assert_same(pulled: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(pulled) == set(expected)
    assert all(torch.equal(pulled[name], tensor) for name, tensor in expected.items())


# --- LitEma ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_litema_goes_on_where_it_stood(
    ema: Ema, client: EmaClient, server: Any, run_name: str, tmp_path: Path, suffix: str
) -> None:
    """A checkpoint of sgm becomes a run with its names, counter and decay, and goes on as LitEma, bit for bit."""
    torch.manual_seed(0)
    engine = Engine()
    train(engine.model, engine.model_ema, 20)
    path = tmp_path / f"last{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": engine.state_dict(), "global_step": 20, "epoch": 1}, path)
    else:
        save_file(engine.state_dict(), path)

    code, out, _ = ema("import", path, run_name)
    assert code == 0
    assert "litema" in out
    assert "num_updates 20, decay 0.999\n" in out
    assert_same(client.pull(run_name), shadows(engine.model_ema))

    with RemoteEma(engine.model, 0.999, run=run_name, url=server.url, resume=True) as resumed:

        def both(model: nn.Module) -> None:
            engine.model_ema(model)
            resumed(model)

        train(engine.model, both, 7)
        assert resumed.num_updates == 27
    assert_same(client.pull(run_name), shadows(engine.model_ema))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_litema_loads_what_is_exported(ema: Ema, server: Any, run_name: str, tmp_path: Path, suffix: str) -> None:
    """The file's state dict goes into an engine as sgm loads one, and the LitEma in it is as if it had run alone."""
    torch.manual_seed(0)
    engine = Engine()
    with RemoteEma(engine.model, 0.999, run=run_name, url=server.url) as remote:
        twin = copy.deepcopy(engine)
        train(engine.model, lambda model: (remote(model), twin.model_ema(model)), 9)
    path = tmp_path / f"ema{suffix}"
    assert ema("export", run_name, path, "--format", "litema")[0] == 0

    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    fresh = Engine()
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if name.startswith("model_ema.")] == []
    assert_same(dict(fresh.model_ema.named_buffers()), dict(twin.model_ema.named_buffers()))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_was_exported_comes_back_alone(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, suffix: str
) -> None:
    """Our own LitEma files keep the dotted names, so that they need no model beside them; -1 stays no counter."""
    state = {"a.b.c": torch.randn(3), "a.bd": torch.randn(2)}
    client.create_run(run_name, state, decay=0.5, use_num_updates=False)
    path = tmp_path / f"ema{suffix}"
    assert ema("export", run_name, path, "--format", "litema")[0] == 0
    code, out, _ = ema("import", path, f"{run_name}-again")
    assert (code, "no counter, constant decay, decay 0.5" in out) == (0, True)
    assert_same(client.pull(f"{run_name}-again"), state)


def test_litema_alone_needs_names(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """The state dict of a LitEma has no dotted names: it is refused saying so, and --like brings them."""
    model = Net()
    litema = LitEma(model)
    torch.save(litema.state_dict(), tmp_path / "ema.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")

    code, _, err = ema("import", tmp_path / "ema.pt", run_name)
    assert (code, "--like" in err) == (1, True)
    assert ema("import", tmp_path / "ema.pt", run_name, "--like", tmp_path / "model.pt")[0] == 0
    assert_same(client.pull(run_name), shadows(litema))


def test_litema_over_the_module_itself(tmp_path: Path) -> None:
    """The autoencoders of latent-diffusion average themselves: names then begin at the checkpoint's root."""
    model = nn.ModuleDict({"encoder": nn.Linear(2, 3), "model": nn.Linear(1, 1)})
    litema = LitEma(model)
    state = {**model.state_dict(), **{f"model_ema.{key}": value for key, value in litema.state_dict().items()}}
    torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
    found = checkpoints.read(tmp_path / "vae.ckpt")
    assert set(found.tensors) == {"encoder.weight", "encoder.bias", "model.weight", "model.bias"}


def test_names_of_wrappers_are_removed(tmp_path: Path) -> None:
    """A LitEma over a compiled model has the prefix in its names; the run has those of the bare model."""
    inner = nn.Linear(2, 2)
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", inner)
    holder = nn.Module()
    holder.add_module("model", wrapped)
    holder.add_module("model_ema", LitEma(wrapped))
    torch.save({"state_dict": holder.state_dict()}, tmp_path / "last.ckpt")
    assert set(checkpoints.read(tmp_path / "last.ckpt").tensors) == {"weight", "bias"}


def test_ambiguous_names_are_refused(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """a.bc and ab.c shared one buffer in LitEma: both are named, in import as in export, and nothing is made."""
    state = {"model.a.bc": torch.ones(2), "model.ab.c": torch.ones(2), "model_ema.abc": torch.ones(2)}
    state |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    code, _, err = ema("import", tmp_path / "last.ckpt", run_name)
    assert (code, "'a.bc'" in err, "'ab.c'" in err) == (1, True, True)
    assert run_name not in {info.run for info in client.runs()}

    client.create_run(run_name, {"a.bc": torch.ones(2), "ab.c": torch.ones(2)})
    code, _, err = ema("export", run_name, tmp_path / "out.ckpt", "--format", "litema")
    assert (code, "'a.bc'" in err, "'ab.c'" in err) == (1, True, True)
    assert not (tmp_path / "out.ckpt").exists()


# --- others ---------------------------------------------------------------------------------------------------------


def test_averaged_model(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """torch's AveragedModel comes in with its count; its buffers are left out and named."""
    model = Net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, averaged.update_parameters)
    torch.save({"epoch": 3, "state_dict": averaged.state_dict()}, tmp_path / "swa.pt")
    code, out, _ = ema("import", tmp_path / "swa.pt", run_name, "--decay", "0.9", "--drop", "frozen")
    assert code == 0
    assert "averaged-model" in out
    assert "running_mean" in out
    assert client.run(run_name).num_updates == 5
    expected = {name: p.detach() for name, p in averaged.module.named_parameters() if name != "frozen"}
    assert_same(client.pull(run_name), expected)


def test_averaged_model_loads_what_is_exported(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """The plain safetensors file goes into any module: here the one inside an AveragedModel."""
    model = nn.Linear(2, 2)
    client.create_run(run_name, model)
    assert ema("export", run_name, tmp_path / "ema.safetensors")[0] == 0
    averaged = AveragedModel(nn.Linear(2, 2))
    averaged.module.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert_same(averaged.module.state_dict(), model.state_dict())


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[integrations]'")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=2,
        **blocks,
    )


def averaged_unet() -> tuple[Any, Any]:
    from diffusers.training_utils import EMAModel

    model = unet()
    ema_model = EMAModel(model.parameters(), decay=0.99, model_cls=type(model), model_config=model.config)
    train(model, lambda trained: ema_model.step(trained.parameters()), 4)
    return model, ema_model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "state dict"])
def test_diffusers_there_and_back(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, as_folder: bool) -> None:
    """EMAModel's folder or state dict comes in with counter and decay, and what goes out EMAModel loads."""
    model = unet()
    from diffusers.training_utils import EMAModel

    model, ema_model = averaged_unet()
    source, like, back = tmp_path / "ema", tmp_path / "model", tmp_path / "back"
    if as_folder:
        ema_model.save_pretrained(source)
        model.save_pretrained(like)
    else:
        torch.save(ema_model.state_dict(), source)
        torch.save(model.state_dict(), like)
    code, out, err = ema("import", source, run_name, *([] if as_folder else ["--like", like]))
    assert (code, err) == (0, "")
    assert "diffusers" in out
    names = [name for name, _ in model.named_parameters()]
    assert_same(client.pull(run_name), dict(zip(names, ema_model.shadow_params, strict=True)))
    info = client.run(run_name)
    # EMAModel's first step copies the parameters, as LitEma's constructor does, and counts.
    assert (info.num_updates, info.decay) == (ema_model.optimization_step - 1, 0.99)

    assert ema("export", run_name, back, "--format", "diffusers", "--like", like)[0] == 0
    if as_folder:
        loaded = EMAModel.from_pretrained(back, type(model))
    else:
        loaded = EMAModel(model.parameters())
        loaded.load_state_dict(torch.load(back, weights_only=True))
    assert (loaded.optimization_step, loaded.decay) == (ema_model.optimization_step, 0.99)
    assert all(map(torch.equal, loaded.shadow_params, ema_model.shadow_params))


def test_shadow_params_need_names(tmp_path: Path) -> None:
    """A list of averages without names is refused saying what brings them; names of another model do not fit."""
    torch.save({"shadow_params": [torch.ones(2), torch.ones(3)], "decay": 0.5, "optimization_step": 2}, tmp_path / "e")
    with pytest.raises(UsageError, match="--like"):
        checkpoints.read(tmp_path / "e")
    torch.save({"w": torch.ones(3), "v": torch.ones(2)}, tmp_path / "model")
    with pytest.raises(UsageError, match="shapes"):
        checkpoints.read(tmp_path / "e", like=tmp_path / "model")


def test_ema_pytorch(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """ema-pytorch's averaged model comes in, not its online one, with its step as counter."""
    package = pytest.importorskip(
        "ema_pytorch", reason="ema-pytorch is not installed: pip install -e '.[integrations]'"
    )
    model = nn.Linear(2, 2)
    kept = package.EMA(model, beta=0.9, update_after_step=0, update_every=1)
    train(model, lambda _: kept.update())
    torch.save({"step": 5, "model": model.state_dict(), "ema": kept.state_dict()}, tmp_path / "model-1.pt")
    code, out, _ = ema("import", tmp_path / "model-1.pt", run_name, "--decay", "0.9")
    assert (code, "ema-pytorch" in out) == (0, True)
    assert_same(client.pull(run_name), kept.ema_model.state_dict())
    assert client.run(run_name).num_updates == int(kept.step)


def test_timm(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """A checkpoint as timm's saver writes it: the EMA is taken, not the model. Without a counter no warm-up begins."""
    state = {"w": torch.randn(2)}
    content = {"epoch": 3, "arch": "x", "state_dict": {"w": torch.zeros(2)}, "state_dict_ema": state}
    torch.save(content, tmp_path / "last.pth.tar")
    code, out, _ = ema("import", tmp_path / "last.pth.tar", run_name)
    assert (code, "state_dict_ema" in out, "no counter, constant decay" in out) == (0, True, True)
    assert "decay 0.9999 (not in the file" in out
    assert_same(client.pull(run_name), state)
    assert client.push(run_name, state).effective_decay == pytest.approx(0.9999)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_timm_itself(tmp_path: Path) -> None:
    """ModelEmaV3's own state dict is known by its names."""
    model = nn.Linear(2, 2)
    torch.save(timm_model_ema().ModelEmaV3(model).state_dict(), tmp_path / "ema.pt")
    found = checkpoints.read(tmp_path / "ema.pt")
    assert found.format == "timm"
    assert_same(found.tensors, model.state_dict())


@pytest.mark.parametrize("entry", [None, "state_dict", "model", "module", "ema", "params_ema"])
def test_plain_state_dict(tmp_path: Path, entry: str | None) -> None:
    """Named tensors, bare or under the entry of many trainers, are a state dict; --num-updates brings a counter."""
    state = {"a.w": torch.randn(2), "a.steps": torch.tensor(3)}
    torch.save({entry: state, "step": 4} if entry else state, tmp_path / "m.pt")
    found = checkpoints.read(tmp_path / "m.pt")
    assert (found.format, found.dropped, found.going_on.num_updates) == ("state-dict", ("a.steps",), None)
    assert_same(found.tensors, {"a.w": state["a.w"]})


def test_counter_and_format_can_be_given(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """--num-updates is the run's counter; --format overrides what was found, or says that it cannot be."""
    save_file({"module.w": torch.ones(2)}, tmp_path / "m.safetensors")
    code, _, err = ema("import", tmp_path / "m.safetensors", run_name, "--format", "litema")
    assert (code, "LitEma" in err) == (1, True)
    assert ema("import", tmp_path / "m.safetensors", run_name, "--format", "nonsense")[0] == 1
    words = ("--format", "averaged-model", "--num-updates", "77")
    assert ema("import", tmp_path / "m.safetensors", run_name, *words)[0] == 0
    assert client.run(run_name).num_updates == 77
    assert set(client.pull(run_name)) == {"w"}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_file_that_would_run_code_is_not_read(ema: Ema, run_name: str, tmp_path: Path) -> None:
    """A pickle of other classes is refused with what to do, and nothing of it ran."""
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper": PurePosixPath("a")}, tmp_path / "x.ckpt")
    code, out, err = ema("import", tmp_path / "x.ckpt", run_name)
    assert (code, out) == (1, "")
    assert "run code" in err
    assert "weights_only=False" in err


@pytest.mark.parametrize(
    "raw", [b"", b"nonsense", b"\x10\x00\x00\x00\x00\x00\x00\x00{not json     }", b"\xff" * 8 + b"{}"]
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_damaged_files(tmp_path: Path, raw: bytes, name: str) -> None:
    """What is no checkpoint is said to be none, whatever it is called."""
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError, match=f"{name}"):
        checkpoints.read(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"step": 3}, {"a": "b"}, {"steps": torch.tensor(3)}])
def test_files_without_weights(tmp_path: Path, content: Any) -> None:
    """A file of torch.save that holds no named weights is refused."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UsageError):
        checkpoints.read(tmp_path / "x.pt")


def test_folders_without_weights(tmp_path: Path) -> None:
    """A folder is one of save_pretrained(), or refused."""
    with pytest.raises(UsageError, match="folder"):
        checkpoints.read(tmp_path)


def test_names_of_another_model(tmp_path: Path) -> None:
    """A shadow whose shape is not the parameter's, or that has no parameter, is named."""
    litema = LitEma(nn.Linear(2, 3)).state_dict()
    torch.save(litema, tmp_path / "e.pt")
    torch.save(nn.Linear(5, 3).state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match=r"'weight' has shape \(3, 2\), the parameter \(3, 5\)"):
        checkpoints.read(tmp_path / "e.pt", like=tmp_path / "m.pt")


def test_collisions_by_wrappers(tmp_path: Path) -> None:
    """Two names that are one without wrappers' prefixes are refused as everywhere."""
    torch.save({"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(NameCollision):
        checkpoints.read(tmp_path / "x.pt")


class Boxed(nn.Module):
    """A model with a part of its own called ``module``, and perhaps another part beside it."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        if beside:
            self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(("beside", "wrapped", "prefix"), [(1, 0, None), (1, 1, None), (0, 0, ""), (0, 1, "module.")])
def test_a_part_called_module(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, beside: bool, wrapped: bool, prefix: str | None
) -> None:
    """A model's own ``module`` keeps its name in an import and a push. What may be DataParallel's is told; --prefix
    decides."""
    model = Boxed(beside=beside)
    torch.save(nn.DataParallel(model).state_dict() if wrapped else model.state_dict(), tmp_path / "m.pt")
    words = ["import", tmp_path / "m.pt", run_name, "--format", "state-dict"]
    if prefix is not None:
        assert "in front of all names is taken for a wrapper's" in ema(*words[:2], f"{run_name}-other", *words[3:])[1]
        words += ["--prefix", prefix]
    code, out, _ = ema(*words)
    assert (code, "'module.' in front of all names" in out) == (0, bool(wrapped and beside))
    with RemoteEma(model, 0.9999, False, run=run_name, client=client, resume=True) as going_on:
        going_on(model)
    assert ema("push", tmp_path / "m.pt", run_name, "--take-over")[0] == 0
