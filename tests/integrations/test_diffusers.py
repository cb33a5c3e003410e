"""A diffusers pipeline draws with the EMA of a run, as it would with the weights loaded by hand, and gives them back.

Knows small pipelines of diffusers, peft's adapters, and what diffusers and accelerate do to a component. Does not know
how weights are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import RunNotFound, UsageError

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[integrations]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import accelerate
    import diffusers
    import peft
    from diffusers.hooks import apply_group_offloading

from ema_client.integrations.diffusers import ema_scope, load_ema

# diffusers builds its samplers with calls that its own dependencies have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

_LORA = {"r": 2, "target_modules": ["to_q", "to_v"]}


def _unet() -> nn.Module:
    unet: nn.Module = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return unet


def _unet_for_lora() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def _dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        norm_num_groups=4,
    )


def _ddpm(unet: nn.Module) -> Any:
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _dit_pipeline(transformer: nn.Module) -> Any:
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4)
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _drawn(pipeline: Any, **wanted: Any) -> np.ndarray:
    """The images of a pipeline for one seed."""
    seed = torch.Generator().manual_seed(0)
    images: np.ndarray = pipeline(num_inference_steps=2, output_type="np", generator=seed, **wanted).images
    return images


def _train(run: str, model: nn.Module, decay: float = 0.5, **options: Any) -> dict[str, Tensor]:
    """An EMA of three updates; what a pull gives of it."""
    with RemoteEma(model, decay, run=run, **options) as ema:
        for _ in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
            ema(model)
    with EmaClient() as client:
        return {name: tensor.clone() for name, tensor in client.pull(run).items()}


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def _repeatable() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(17)
        yield


@pytest.fixture
def same_state(same: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], bool]) -> Callable[..., bool]:
    return lambda module, state: same(module.state_dict(), state)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_images_are_those_of_weights_loaded_by_hand(
    kind: str, client: EmaClient, run_name: str, same_state: Any
) -> None:
    """Of a pipeline with a unet or a transformer; a scope gives its own weights back, whatever the block raises."""
    model, build, wanted = (_unet(), _ddpm, {}) if kind == "unet" else (_dit(), _dit_pipeline, {"class_labels": [1]})
    pipeline = build(type(model).from_config(model.config).eval())
    by_hand = build(type(model).from_config(model.config).eval())
    if kind == "transformer":
        by_hand.vae.load_state_dict(pipeline.vae.state_dict())
    pulled = _train(run_name, model)
    getattr(by_hand, kind).load_state_dict(pulled)
    expected, own, before = _drawn(by_hand, **wanted), _drawn(pipeline, **wanted), _state(getattr(pipeline, kind))

    def draw_and_break_off() -> None:
        with ema_scope(pipeline, run_name, client=client) as info:
            assert info == client.pull(run_name).info
            assert np.array_equal(_drawn(pipeline, **wanted), expected)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_and_break_off()
    assert same_state(getattr(pipeline, kind), before)
    assert np.array_equal(_drawn(pipeline, **wanted), own)
    assert not np.array_equal(own, expected)

    client.snapshot(run_name, "then")
    info = load_ema(pipeline, run_name, snapshot="then")
    assert (info.run, info.step, info.num_updates, info.snapshot) == (run_name, 3, 3, "then")
    assert np.array_equal(_drawn(pipeline, **wanted), expected)


def test_dtype_of_the_pipeline_stays_and_so_does_its_compiled_module(client: EmaClient, run_name: str) -> None:
    """A half-precision, compiled unet takes what copy_() would make of the EMA; the wrapper's names do not matter."""
    unet = _unet()
    pulled = _train(run_name, unet)
    pipeline = _ddpm(_unet().to(torch.bfloat16))
    pipeline.unet = torch.compile(pipeline.unet)
    load_ema(pipeline, run_name, client=client)

    for name, parameter in pipeline.unet._orig_mod.named_parameters():
        assert parameter.equal(pulled[name].to(torch.bfloat16)), name


@pytest.mark.usefixtures("client")
def test_names_that_trainings_put_in_front(run_name: str, same_state: Any) -> None:
    """``model.unet.…`` is found; of a run that averages several parts the part has to be named."""
    unet, encoder = _unet(), nn.Linear(2, 2)
    pulled = _train(run_name, nn.ModuleDict({"model": nn.ModuleDict({"unet": unet})}))
    pipeline = _ddpm(_unet())
    load_ema(pipeline, run_name)
    assert same_state(pipeline.unet, {name.removeprefix("model.unet."): tensor for name, tensor in pulled.items()})

    several = f"{run_name}-several"
    pulled = _train(several, nn.ModuleDict({"text_encoder": encoder, "unet": unet}))
    before = _state(pipeline.unet)
    with pytest.raises(UsageError, match=r"'text_encoder\.bias' is of another part.*nothing was written") as refusal:
        load_ema(pipeline, several)
    assert "component=" in refusal.value.hint
    assert same_state(pipeline.unet, before)
    load_ema(pipeline, several, component="unet")
    own = {name.removeprefix("unet."): tensor for name, tensor in pulled.items() if name.startswith("unet.")}
    assert same_state(pipeline.unet, own)


@pytest.mark.usefixtures("client")
def test_a_lora_of_peft_in_an_adapter_of_diffusers(run_name: str) -> None:
    """The adapter's weights alone change, though peft and diffusers name the adapter otherwise, and fill in fronts."""
    trained = peft.get_peft_model(_unet_for_lora(), peft.LoraConfig(**_LORA, init_lora_weights=False))
    pulled = _train(run_name, trained)
    pipeline = _ddpm(_unet_for_lora())
    with pytest.raises(UsageError, match="is not in unet") as refusal:
        load_ema(pipeline, run_name)
    assert "add_adapter()" in refusal.value.hint

    pipeline.unet.add_adapter(peft.LoraConfig(**_LORA), adapter_name="style")
    before = _state(pipeline.unet)
    load_ema(pipeline, run_name)
    for name, tensor in pipeline.unet.state_dict().items():
        theirs = f"base_model.model.{name.replace('.style.', '.default.')}"
        assert tensor.equal(pulled[theirs] if "lora" in name else before[name]), name

    pipeline.unet.fuse_lora()
    with pytest.raises(UsageError, match="LoRA fused"):
        load_ema(pipeline, run_name)
    pipeline.unet.unfuse_lora()
    pipeline.unet.add_adapter(peft.LoraConfig(**_LORA), adapter_name="other")
    with pytest.raises(UsageError, match="has adapters other, style, and the run averages default"):
        load_ema(pipeline, run_name)


def _fused(pipeline: Any) -> None:
    pipeline.transformer.transformer_blocks[0].attn1.fuse_projections()


def _group_offloaded(pipeline: Any) -> None:
    apply_group_offloading(pipeline.transformer, onload_device=torch.device("cpu"), offload_type="leaf_level")


def _cast_by_layers(pipeline: Any) -> None:
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _offloaded(pipeline: Any) -> None:
    accelerate.cpu_offload(pipeline.transformer, execution_device="cpu")


def _quantized(pipeline: Any) -> None:
    projection = pipeline.transformer.proj_out_2
    projection.weight = nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_fused, "fused projections"),
        (_group_offloaded, r"enable_group_offload\(\)"),
        (_cast_by_layers, r"enable_layerwise_casting\(\)"),
        (_offloaded, "on the meta device"),
        (_quantized, r"proj_out_2\.weight.*is quantized"),
    ],
)
def test_components_without_parameters_of_their_own_are_refused(
    change: Callable[[Any], None], said: str, client: EmaClient, run_name: str
) -> None:
    """What would be written to is not what the component computes with: refused, with what to do."""
    transformer = _dit()
    client.create_run(run_name, transformer)
    pipeline = _dit_pipeline(transformer)
    change(pipeline)
    before = [tensor.clone() for tensor in transformer.parameters() if not tensor.is_meta]
    with pytest.raises(UsageError, match=said) as refusal:
        load_ema(pipeline, run_name)
    assert refusal.value.hint
    after = [tensor for tensor in transformer.parameters() if not tensor.is_meta]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


@pytest.mark.usefixtures("client")
def test_offloading_of_whole_models_is_no_hindrance(run_name: str) -> None:
    """enable_model_cpu_offload() moves a component's own parameters, which can be written to."""
    pulled = _train(run_name, _unet())
    pipeline = _ddpm(_unet())
    accelerate.cpu_offload_with_hook(pipeline.unet, execution_device="cpu")
    load_ema(pipeline, run_name)
    assert all(tensor.equal(pulled[name]) for name, tensor in pipeline.unet.named_parameters())


def test_refusals_name_the_pipeline_and_what_there_is(client: EmaClient, run_name: str) -> None:
    """No pipeline, no such component, two components, another model, no such run, a client and a url."""
    pipeline, model = _dit_pipeline(_dit()), nn.Linear(2, 2)
    client.create_run(run_name, model)
    with pytest.raises(UsageError, match="not a Linear"):
        load_ema(model, run_name)
    with pytest.raises(UsageError, match="no component 'unet'") as refusal:
        load_ema(pipeline, run_name, component="unet")
    assert "'transformer'" in refusal.value.hint
    with pytest.raises(UsageError, match="no component 'scheduler'"):
        load_ema(pipeline, run_name, component="scheduler")
    two = SimpleNamespace(components={**pipeline.components, "transformer_2": _dit()})
    with pytest.raises(UsageError, match="2 components that may be meant"):
        load_ema(two, run_name)
    with pytest.raises(UsageError, match=r"'bias' is not in transformer \(DiTTransformer2DModel\)"):
        load_ema(pipeline, run_name, component="transformer")
    with pytest.raises(RunNotFound):
        load_ema(pipeline, f"{run_name}-none", component="transformer")
    with pytest.raises(UsageError, match="both a client and a url"):
        load_ema(pipeline, run_name, url="http://127.0.0.1:1", client=client)
