"""Small models of real libraries, their weights as runs, and what the libraries load of a folder.

Knows transformers and diffusers. Does not know places, or how weights are published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["diffusers_model", "loaded", "save_config", "transformers_model", "weights_of"]


def diffusers_model() -> nn.Module:
    """A UNet of some 50,000 parameters, with its configuration."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[integrations]'")
    torch.manual_seed(0)
    model: nn.Module = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return model


def transformers_model() -> nn.Module:
    """A GPT-2 of some 30,000 parameters, two of its tensors tied, of which a run holds one."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[integrations]'"
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=128)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def save_config(model: Any, folder: Path) -> Path:
    """The model's config.json, as save_pretrained() writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    return folder / "config.json"


def loaded(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The parameters of what from_pretrained() of the library makes of a folder; fails where tensors are missing."""
    config = json.loads((folder / "config.json").read_text())
    library = "diffusers" if "_class_name" in config else "transformers"
    name = config["_class_name"] if library == "diffusers" else config["architectures"][0]
    made = getattr(pytest.importorskip(library), name)
    model, told = made.from_pretrained(folder, variant=variant, use_safetensors=True, output_loading_info=True)
    assert not any(told[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return weights_of(model)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
