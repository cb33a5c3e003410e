"""Values as torch's tensors, for what torch alone does. Imports torch: to be imported where a call needs tensors.

Knows torch's dtypes, and how many of its threads a thread may use. Does not know layouts or what is computed.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from ema_service.threads import cores
from ema_service.values import Array, Values

__all__ = ["TORCH_DTYPES", "array_of", "tensor_of"]

#: The dtype of a tensor, by the name of the wire.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: What torch was told on a thread.
_told = threading.local()


def tensor_of(values: Values) -> Tensor:
    """An array's memory as a tensor, uint16 as bf16; a tensor itself. The tensor keeps the memory alive.

    torch divides work on the tensor among as many threads as the calling thread may use (threads.cores()).
    """
    if not isinstance(values, np.ndarray):
        return values
    if getattr(_told, "cores", None) != cores():
        torch.set_num_threads(cores())
        _told.cores = cores()
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def array_of(tensor: Tensor) -> Array:
    """The memory of a tensor of the host as an array, bf16 as uint16. The array keeps the memory alive."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
