"""Flat values: numpy arrays in host memory, torch tensors on a device.

torch takes 0.9 s and 200 MiB to import, so a server imports torch only where something is done that torch alone does:
on a device, or with float64 and fp16. Whoever may be given either kind of values asks here.

numpy has no bf16: in an array, the bits of bf16 are uint16, and nothing else is.

Knows dtypes and both kinds of flat values. Does not know layouts, arenas or what is computed. tensors.py knows torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPES", "Array", "Values", "address", "all_finite", "array_over", "typed", "widened"]

#: Values in host memory, one-dimensional.
Array: TypeAlias = npt.NDArray[Any]
#: Values in host memory, or on a device.
Values: TypeAlias = "Array | Tensor"

#: The dtype of an array, by the name of the wire.
DTYPES: dict[str, npt.DTypeLike] = {"F64": np.float64, "F32": np.float32, "BF16": np.uint16, "F16": np.float16}

#: The exponent of a bf16: all ones in an Inf and in a NaN.
_BF16_EXPONENT = np.uint16(0x7F80)


def typed(data: Values, dtype: str) -> Values:
    """The same memory as values of a dtype (DTYPES). data: bytes, uint8."""
    if isinstance(data, np.ndarray):
        return data.view(DTYPES[dtype])
    from ema_service.tensors import TORCH_DTYPES

    return data.view(TORCH_DTYPES[dtype])


def array_over(data: memoryview) -> Array:
    """The bytes of a memoryview as an array over the same memory, which lives as long as the array."""
    return np.frombuffer(data, np.uint8)


def address(values: Values) -> int:
    """The address of the first value."""
    return int(values.__array_interface__["data"][0] if isinstance(values, np.ndarray) else values.data_ptr())


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bf16 as float32, exactly: the bits of a bf16 are the upper half of the same float32's."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def all_finite(values: Values) -> bool:
    """Whether no value is NaN or Inf. Takes as much memory again as bools."""
    if not isinstance(values, np.ndarray):
        return bool(values.isfinite().all())
    if values.dtype == np.uint16:
        return bool(((values & _BF16_EXPONENT) != _BF16_EXPONENT).all())
    return bool(np.isfinite(values).all())
