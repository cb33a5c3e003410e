"""Files of tensors: safetensors and torch.save, read without running code in a file, written whole or not at all.

Knows: file formats, memory maps. Does not know: what the tensors are, or which program wrote a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_client import wire
from ema_client.atomic import open_whole
from ema_client.errors import MalformedBody, UsageError
from ema_client.protocol import TensorSpec
from ema_client.tensors.body import memory

__all__ = ["Content", "read", "write_safetensors", "write_torch"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: A Namespace, in which timm's train.py saves its arguments, is values by name and nothing else. From torch 2.5 on.
_NAMESPACES = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)

#: Names of the weights in a folder that diffusers or transformers saved, without suffix.
_WEIGHTS = ("diffusion_pytorch_model", "model", "adapter_model")

#: The content of a file: nested mappings and lists with tensors at their ends; and the metadata that describes it.
Content = tuple[Any, Mapping[str, Any]]


def read(path: Path) -> Content:
    """The content of a ``.safetensors`` file, a folder of save_pretrained(), or else a file of torch.save.

    Tensors are on the CPU, mapped from the file where that is possible; a change of a tensor does not change the file.
    Raises UsageError for a file that cannot be read or would run code; OSError.
    """
    if path.is_dir():
        return _read_folder(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _read_safetensors(path)
    return _read_torch(path), {}


def _read_folder(path: Path) -> Content:
    config = json.loads((path / "config.json").read_text()) if (path / "config.json").exists() else {}
    for stem in _WEIGHTS:
        if (single := path / f"{stem}.safetensors").exists():
            return _read_safetensors(single)[0], config
        if (index := path / f"{stem}.safetensors.index.json").exists():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {k: v for part in parts for k, v in _read_safetensors(path / part)[0].items()}, config
    names = ", ".join(f"{stem}.safetensors" for stem in _WEIGHTS)
    raise UsageError(f"the folder {path} has none of {names}", hint="give the file of weights itself")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with path.open("rb") as file:
        if path.stat().st_size < wire.LENGTH_BYTES:
            raise UsageError(f"{path} is no safetensors file: it has {path.stat().st_size} bytes")
        # Copy on write: torch wants memory that may be written, and the file must not change.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        length = wire.parse_length(data[: wire.LENGTH_BYTES], limit=len(data) - wire.LENGTH_BYTES)
        header = wire.parse_header(data[wire.LENGTH_BYTES : wire.LENGTH_BYTES + length])
    except MalformedBody as fault:
        raise UsageError(f"{path} is no safetensors file: {fault.detail}") from None
    begin = wire.LENGTH_BYTES + length
    if begin + header.data_bytes != len(data):
        raise UsageError(f"{path} has {len(data)} bytes; its header describes {begin + header.data_bytes}")
    return {entry.name: _tensor(path, data, begin, entry) for entry in header.entries}, header.metadata


def _tensor(path: Path, data: mmap.mmap, begin: int, entry: wire.Entry) -> Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise UsageError(f"{path}: {entry.name!r} is {entry.dtype}, which torch does not have")
    if entry.end == entry.begin:
        return torch.empty(entry.shape, dtype=dtype, device="cpu")
    window = memoryview(data)[begin + entry.begin : begin + entry.end]
    return torch.frombuffer(window, dtype=torch.uint8).view(dtype).view(entry.shape)


def _read_torch(path: Path) -> Any:
    try:
        with _NAMESPACES([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as fault:
        reason = str(fault).strip().splitlines()[0]
        raise UsageError(
            f"{path} holds more than tensors and plain values, and reading that could run code: {reason}",
            hint="where the file is trusted: torch.save(torch.load(path, weights_only=False)['state_dict'], ...)",
        ) from None
    except (EOFError, RuntimeError, TypeError, ValueError) as fault:
        raise UsageError(f"{path} is neither safetensors nor a file of torch.save: {fault}") from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as a safetensors file, in the order of the safetensors library."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = wire.place(TensorSpec(name, tuple(t.shape), _NAMES[t.dtype]) for name, t in tensors.items())

    with open_whole(path) as file:
        file.write(wire.build_header(entries, metadata))
        for entry in entries:
            file.write(memory(tensors[entry.name]))


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` by torch.save()."""
    with open_whole(path) as file:
        torch.save(dict(content), file)
