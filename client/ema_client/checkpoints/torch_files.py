"""Files of torch.save(): a zip archive of records, or before torch 1.6 pickles with storages behind them.

What a file says of itself is compared with the file before memory is taken: each storage is a range of the mapped file,
of the size that the pickle declares, and each tensor lies within its storage.

Knows: both containers, storages, views. Does not know: pickle's opcodes (pickled), safetensors and folders (files),
what the tensors are.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from torch import Tensor

from ema_client.checkpoints import pickled
from ema_client.errors import UsageError
from ema_client.protocol import MAX_RANK

__all__ = ["dense", "read"]

#: The largest pickle that is read: Python's objects take up to sixty times the bytes of a pickle.
MAX_PICKLE_BYTES = 100_000_000
#: Elements that torch can count: strides of a tensor of more overflow, be the tensor empty or not.
_MAX_ELEMENTS = 2**60
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1
#: What torch.save() wrote before torch 1.6 begins with.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Storage:
    """A range of the file. memory: the bytes; None while they have not been found."""

    dtype: torch.dtype
    memory: Tensor | None


def read(path: Path) -> Any:
    """The content of a file of torch.save(): nested dicts, lists and tuples with tensors, mapped copy-on-write.

    Raises UsageError for a file that is damaged, compressed, or holds more than tensors and plain values; OSError.
    """
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
        if not start:
            raise UsageError(f"{path} is empty", hint="copy it again from where it was made")
        # Copy on write: torch wants memory that may be written, and the file must not change.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return _read_zip(path, data) if start == _ZIP else _read_legacy(data)
    except UnpicklingError as fault:
        raise UsageError(
            f"{path} holds more than tensors and plain values, and reading that could run code: {fault}",
            hint="where the file is trusted: torch.save(torch.load(path, weights_only=False)['state_dict'], ...)",
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as fault:
        raise UsageError(
            f"{path} is neither safetensors nor a whole file of torch.save: {str(fault)[:200]}",
            hint="copy it again from where it was made",
        ) from None


# --- zip archives ---------------------------------------------------------------------------------------------------


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    records = _records(path, data)
    names = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise ValueError(f"the zip archive has {len(names)} records data.pkl")
    folder = names[0].removesuffix("data.pkl")
    if (order := records.get(f"{folder}byteorder")) and data[slice(*order)] != b"little":
        _big_endian()

    found: dict[str, Tensor] = {}

    def storage(key: str, size: int, _: int) -> Tensor:
        begin, end = records.get(f"{folder}data/{key}", (0, -1))
        if end - begin != size:
            raise ValueError(f"storage {key[:40]!r} has {max(end - begin, 0)} bytes, its tensors expect {size}")
        if key not in found:
            found[key] = _memory(data, begin, end)
        return found[key]

    begin, end = records[names[0]]
    if end - begin > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {end - begin} bytes; {MAX_PICKLE_BYTES} are the most that is read")
    return pickled.load(io.BytesIO(data[begin:end]), _by_id(storage), _TENSORS)


def _records(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Of each record of a zip archive its range in the file; no two ranges overlap."""
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UsageError(
            f"{path} is a zip archive with compressed records, and a few bytes may be gigabytes",
            hint="where the file is trusted: torch.save(torch.load(path, weights_only=True), 'again.pt')",
        )
    records: dict[str, tuple[int, int]] = {}
    free = 0
    for member in sorted(members, key=lambda each: each.header_offset):
        begin, end = _range(data, member)
        if member.header_offset < free or not begin <= end <= directory or member.filename in records:
            raise ValueError(f"the record {member.filename[:80]!r} reaches beyond its place in the archive")
        records[member.filename] = begin, end
        free = end
    return records


def _range(data: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    if not 0 <= member.header_offset <= len(data) - _LOCAL_HEADER.size:
        raise ValueError(f"the record {member.filename[:80]!r} begins beyond the file")
    signature, name, extra = _LOCAL_HEADER.unpack_from(data, member.header_offset)
    if signature != _ZIP or member.flag_bits & _ENCRYPTED or member.compress_size != member.file_size:
        raise ValueError(f"the record {member.filename[:80]!r} is damaged")
    begin = member.header_offset + _LOCAL_HEADER.size + name + extra
    return begin, begin + member.file_size


# --- before torch 1.6 -----------------------------------------------------------------------------------------------


def _read_legacy(data: mmap.mmap) -> Any:
    """Pickles of a magic number, a version, the machine, the content, the storages' keys; then the storages.

    The content is read twice: how long a storage is in the file, is said by the content before it.
    """
    file = io.BytesIO(data[:MAX_PICKLE_BYTES])
    magic, version, machine = (pickled.load(file, _no_storage, {}) for _ in range(3))
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or type(machine) is not dict:
        raise ValueError("it does not begin as such a file does")
    if machine.get("little_endian") is False:
        _big_endian()
    content, sizes = file.tell(), dict[str, tuple[int, int]]()

    def declared(key: str, size: int, width: int) -> None:
        if sizes.setdefault(key, (size, width)) != (size, width):
            raise ValueError(f"storage {key[:40]!r} has two sizes")

    pickled.load(file, _by_id(declared), dict.fromkeys(_TENSORS, lambda *_: None))
    keys = pickled.load(file, _no_storage, {})
    found = _legacy_storages(data, file.tell(), keys, sizes)

    file.seek(content)
    return pickled.load(file, _by_id(lambda key, *_: found[key]), _TENSORS)


def _legacy_storages(
    data: mmap.mmap, place: int, keys: Any, sizes: Mapping[str, tuple[int, int]]
) -> Mapping[str, Tensor]:
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(sizes):
        raise ValueError("its storages are not those of its tensors")
    found = {}
    for key in keys:
        size, width = sizes[key]
        begin, end = place + 8, place + 8 + size
        if end > len(data) or int.from_bytes(data[place:begin], "little") * width != size:
            raise ValueError(f"storage {key[:40]!r} is cut off or of another size than its tensors expect")
        memory = _memory(data, begin, end)
        # Storages follow each other unaligned.
        found[key] = memory.clone() if memory.data_ptr() % width else memory
        place = end
    return found


# --- storages and tensors -------------------------------------------------------------------------------------------


def _by_id(find: Callable[[str, int, int], Tensor | None]) -> Callable[[Any], _Storage]:
    """Persistent id -> storage, where ``find`` gives the bytes of a key, for their number and an element's."""

    def storage(identity: Any) -> _Storage:
        kind, name, key, _, count, *view = identity
        if kind != "storage" or type(name) is not pickled.Name or type(key) is not str or not _is_size(count):
            raise ValueError("a persistent id is none of a storage")
        dtype = _STORAGES.get(name.path.rpartition(".")[2])
        if dtype is None or any(part is not None for part in view):
            raise ValueError(f"it holds a storage of a special kind ({name.path[:80]})")
        return _Storage(dtype, find(key, count * dtype.itemsize, dtype.itemsize))

    return storage


def _no_storage(_: Any) -> NoReturn:
    raise ValueError("a storage stands where none is expected")


def _memory(data: mmap.mmap, begin: int, end: int) -> Tensor:
    if begin == end:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(memoryview(data)[begin:end], dtype=torch.uint8)


def dense(shape: tuple[int, ...]) -> bool:
    """Whether torch can have a tensor of ``shape``, which may have no elements."""
    return len(shape) <= MAX_RANK and prod(max(size, 1) for size in shape) <= _MAX_ELEMENTS


def _view(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype, metadata: Any) -> Tensor:
    """A tensor in a storage. Raises ValueError where it does not lie in the storage, or repeats elements of it."""
    if type(storage) is not _Storage or storage.memory is None or not _are_sizes((offset,), shape, stride):
        raise ValueError("a tensor is not described by sizes and a storage")
    if len(shape) != len(stride) or not dense(shape):
        raise ValueError(f"a tensor has the shape {shape!r:.80} and the strides {stride!r:.80}")
    if prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    there = storage.memory.numel() // dtype.itemsize
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= there or prod(shape) > there:
        raise ValueError(f"a tensor of shape {shape!r:.80} has more elements than the {there} of its storage")
    tensor = storage.memory[: there * dtype.itemsize].view(dtype).as_strided(shape, stride, offset)
    flags = metadata if type(metadata) is dict else {}
    # Of complex numbers none are averaged: their flag of conjugation is left out.
    return tensor.neg() if flags.get("neg") is True and dtype.is_floating_point else tensor


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _: Any = False, __: Any = None, flags: Any = None
) -> Any:
    dtype = storage.dtype if type(storage) is _Storage else torch.uint8
    return _view(storage, offset, shape, stride, dtype, flags)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, flags: Any = None
) -> Tensor:
    name = dtype.path.removeprefix("torch.") if type(dtype) is pickled.Name else ""
    found = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"it holds a tensor of a dtype that torch {torch.__version__} does not have ({name[:40]})")
    return _view(storage, offset, shape, stride, found, flags)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter has no tensor")
    return tensor


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(*groups: Any) -> bool:
    return all(type(group) is tuple and all(map(_is_size, group)) for group in groups)


def _big_endian() -> NoReturn:
    raise ValueError("it was written on a big-endian machine")


_TENSORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
