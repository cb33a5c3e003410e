"""Which device shadows lie on. torch is asked only where there may be another than the CPU.

Knows names of devices, and where drivers of GPUs show. Does not know what lies on a device.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["pick_device"]


def pick_device(name: str) -> str:
    """The device of this name, as torch writes it; ``auto`` is a CUDA device if there is one, else the CPU.

    Raises RuntimeError for a device that is missing.
    """
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return "cpu"
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:  # raised by torch for a device that it was built without
        raise RuntimeError(f"the device {name!r} cannot be used: {str(fault).splitlines()[0]}") from None
    return str(device)


def _has_driver() -> bool:
    """Whether the driver of a GPU is installed, without which torch finds none: NVIDIA's library, or AMD's device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True
