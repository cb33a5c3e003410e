"""timm's ModelEma without the rest of timm, which needs a torchvision that fits the torch at hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import ModuleType

import pytest

__all__ = ["timm_model_ema"]


def timm_model_ema() -> ModuleType:
    """timm's file of ModelEma, which needs torch alone. Skips the test where timm is not installed."""
    try:
        path = importlib.metadata.distribution("timm").locate_file("timm/utils/model_ema.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    spec = importlib.util.spec_from_file_location("timm_model_ema", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
