"""Files of tensors: safetensors and torch.save, read without running code in a file, written whole or not at all.

A file may be a stranger's: what a file says of itself is compared with the file before memory is taken, and a folder's
files lie in the folder.

Knows: safetensors, folders of save_pretrained(), memory maps. Does not know: the containers of torch.save()
(torch_files), what the tensors are, or which program wrote a file.
"""

from __future__ import annotations

import json
import mmap
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_client import wire
from ema_client.atomic import open_whole
from ema_client.checkpoints import torch_files
from ema_client.errors import MalformedBody, UsageError
from ema_client.protocol import MAX_HEADER_BYTES, TensorSpec
from ema_client.tensors.body import memory

__all__ = ["Content", "read", "read_json", "write_safetensors", "write_torch"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: Names of the weights in a folder that diffusers or transformers saved, without suffix.
_WEIGHTS = ("diffusion_pytorch_model", "model", "adapter_model")

#: The content of a file: nested mappings and lists with tensors at their ends; and the metadata that describes it.
Content = tuple[Any, Mapping[str, Any]]


def read(path: Path) -> Content:
    """The content of a ``.safetensors`` file, a folder of save_pretrained(), or else a file of torch.save.

    Tensors are on the CPU, mapped from the file where that is possible; a change of a tensor does not change the file.
    Raises UsageError for a file that is damaged, holds more than tensors and plain values, or says of itself what is
    not so; for a folder with an index or links that lead out of the folder; OSError.
    """
    if path.is_dir():
        return _read_folder(path)
    _check_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _read_safetensors(path)
    return torch_files.read(path), {}


def _read_folder(path: Path) -> Content:
    config = read_json(_member(path, "config.json")) if (path / "config.json").exists() else {}
    for stem in _WEIGHTS:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if (path / single).exists():
            return _read_safetensors(_member(path, single))[0], config
        if (path / index).exists():
            return _read_parts(path, _member(path, index)), config
    names = ", ".join(f"{stem}.safetensors" for stem in _WEIGHTS)
    raise UsageError(f"the folder {path} has none of {names}", hint="give the file of weights itself")


def _read_parts(folder: Path, index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names, each from the file that the index has for the tensor."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(part, str) for part in table.values()):
        raise UsageError(f"{index} has no `weight_map` from names of tensors to names of files")
    tensors: dict[str, Tensor] = {}
    for part in sorted(set(table.values())):
        held = _read_safetensors(_member(folder, part))[0]
        if unlisted := next((name for name in held if table.get(name) != part), None):
            raise UsageError(f"{index} does not say that {unlisted[:200]!r} is in {part[:200]!r}, which has it")
        tensors |= held
    if missing := next((name for name in table if name not in tensors), None):
        raise UsageError(f"{index} says that {missing[:200]!r} is in {table[missing][:200]!r}, which does not have it")
    return tensors


def _member(folder: Path, name: str) -> Path:
    """A file of a folder. Raises UsageError for a name or a link that leads out of the folder.

    In the cache of the Hugging Face hub files are links from a model's ``snapshots/REVISION`` to the model's ``blobs``.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    path = folder / name
    if "\0" in name or not any(path.resolve().is_relative_to(root) for root in inside):
        raise UsageError(
            f"{name[:200]!r} leads out of the folder {folder}, where a file of weights may not lie",
            hint="where the folder is trusted: put the file itself in its place",
        )
    return _check_file(path)


def _check_file(path: Path) -> Path:
    """The path of a file of bytes. Raises UsageError for a pipe, socket or device; OSError where there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} is no regular file", hint="give a file, or a folder of save_pretrained()")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON. Raises UsageError for anything else; OSError."""
    if (size := path.stat().st_size) > MAX_HEADER_BYTES:
        raise UsageError(f"{path} has {size} bytes; {MAX_HEADER_BYTES} are the most that is read of JSON")
    try:
        said = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as fault:
        raise UsageError(
            f"{path} is not JSON: {str(fault)[:120]}", hint="copy it again from where it was made"
        ) from None
    if not isinstance(said, dict):
        raise UsageError(f"{path} is no JSON object, but a {type(said).__name__}")
    return said


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with path.open("rb") as file:
        if path.stat().st_size < wire.LENGTH_BYTES:
            raise UsageError(f"{path} is no safetensors file: it has {path.stat().st_size} bytes")
        # Copy on write: torch wants memory that may be written, and the file must not change.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        limit = min(len(data) - wire.LENGTH_BYTES, MAX_HEADER_BYTES)
        length = wire.parse_length(data[: wire.LENGTH_BYTES], limit=limit)
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
    if not torch_files.dense(entry.shape):
        raise UsageError(f"{path}: {entry.name!r} has the shape {list(entry.shape)}, which torch cannot have")
    if entry.end == entry.begin:
        return torch.empty(entry.shape, dtype=dtype, device="cpu")
    window = memoryview(data)[begin + entry.begin : begin + entry.end]
    return torch.frombuffer(window, dtype=torch.uint8).view(dtype).view(entry.shape)


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
