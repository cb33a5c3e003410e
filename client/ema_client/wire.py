"""The safetensors byte stream: 8 bytes of header length, a JSON header, then the tensors back to back.

Format: https://github.com/huggingface/safetensors#format. Streams are read strictly (every length is checked before it
is used; nothing is allocated here) and written canonically (a layout has one header, byte for byte). The header of a
part of an update says in its metadata which slices of which tensors the part carries.

Knows: names, dtypes, shapes, offsets. Does not know: sockets, clocks, torch, or what a run is. Standard library only.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ema_client.errors import LayoutMismatch, MalformedBody, listed
from ema_client.protocol import MAX_HEADER_BYTES, MAX_RANK, MAX_TENSOR_NAME, TensorSpec

__all__ = [
    "DTYPE_BYTES",
    "LENGTH_BYTES",
    "SLICES",
    "Box",
    "Entry",
    "Header",
    "PartCut",
    "Rows",
    "box_shape",
    "boxes_of_range",
    "build_header",
    "cut_part",
    "parse_header",
    "parse_length",
    "place",
    "range_of_box",
    "read_slices",
    "stretches_of_part",
    "write_slices",
]

#: A stream begins with the header's length: unsigned, 64 bits, little-endian.
LENGTH_BYTES = 8
#: A header is padded with spaces to a multiple of so many bytes, as by the reference implementation: tensor data then
#: starts aligned for every dtype.
ALIGNMENT = 8

#: dtype -> bytes per element, widest dtype first: the order in which the reference implementation lays tensors out.
DTYPE_BYTES: dict[str, int] = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4,
    "BF16": 2, "F16": 2, "U16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BYTES)}

_METADATA = "__metadata__"

#: The member of the metadata that names the slices in a part of an update.
SLICES = "ema.slices"
#: A slice of a tensor: start and stop in each dimension.
Box = tuple[tuple[int, int], ...]
#: The indices [start, stop) of a tensor's first dimension; None: a tensor without dimensions.
Rows = tuple[int, int] | None
#: The most slices of a tensor in a part: a range of a flattened tensor of rank r is at most 2r - 1 slices.
MAX_SLICES = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a stream; ``begin`` and ``end`` are byte offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: entries in the order of their bytes, which cover the data section without a gap."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        return self.entries[-1].end if self.entries else 0


def place(specs: Iterable[TensorSpec], *, sort: bool = True) -> tuple[Entry, ...]:
    """The entries of a stream of these tensors: each with its place in the data section.

    sort: in canonical order (widest dtype first, then by name, as safetensors.torch.save_file does); else as given.
    Raises KeyError for a dtype that safetensors does not have.
    """
    ordered = sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name.encode())) if sort else specs
    entries, offset = [], 0
    for spec in ordered:
        end = offset + prod(spec.shape) * DTYPE_BYTES[spec.dtype]
        entries.append(Entry(spec.name, spec.dtype, tuple(spec.shape), offset, end))
        offset = end
    return tuple(entries)


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and the header of a stream, padded so that the data starts aligned. Equal input gives equal bytes."""
    table: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def parse_length(prefix: bytes | memoryview, *, limit: int = MAX_HEADER_BYTES) -> int:
    """The header's length, from the first 8 bytes of a stream. Raises MalformedBody beyond ``limit`` bytes."""
    if len(prefix) != LENGTH_BYTES:
        raise MalformedBody(f"the body ends after {len(prefix)} bytes; 8 bytes of header length come first")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= limit:
        raise MalformedBody(f"the header claims {length} bytes; between 2 and {limit} are possible")
    return length


def parse_header(raw: bytes | memoryview) -> Header:
    """The header in ``raw``, which is JSON without the length. Raises MalformedBody naming the tensor and the fault."""
    table = _load(bytes(raw))
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and _encodable(key + value) for key, value in metadata.items()
    ):
        raise MalformedBody("__metadata__ is not an object of strings")
    entries = sorted((_entry(name, value) for name, value in table.items()), key=lambda e: (e.begin, e.end))
    _check_contiguous(entries)
    return Header(tuple(entries), metadata)


def _load(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise MalformedBody("the header does not begin with '{'")
    try:
        table: dict[str, Any] = json.loads(raw, object_pairs_hook=_unique)
    except (UnicodeDecodeError, RecursionError, ValueError) as fault:
        # ValueError covers JSONDecodeError and integers of thousands of digits.
        raise MalformedBody(f"the header is not JSON: {type(fault).__name__}: {str(fault)[:120]}") from None
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedBody(f"the header names {twice[:200]!r} twice")
    return table


def _entry(name: str, value: Any) -> Entry:
    shown = repr(name[:200])
    if not 0 < len(name) <= MAX_TENSOR_NAME:
        raise MalformedBody(f"tensor name {shown} has {len(name)} characters; 1 to {MAX_TENSOR_NAME} are possible")
    if not _encodable(name):
        raise MalformedBody(f"tensor name {shown} is not valid Unicode")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedBody(f"tensor {shown}: expected exactly the members dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise MalformedBody(f"tensor {shown}: unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise MalformedBody(f"tensor {shown}: the shape is not a list of at most {MAX_RANK} sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise MalformedBody(f"tensor {shown}: data_offsets is not [begin, end]")
    begin, end = offsets
    needed = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise MalformedBody(f"tensor {shown}: {dtype} {shape} takes {needed} bytes, data_offsets give {end - begin}")
    return Entry(name, dtype, tuple(shape), begin, end)


def _encodable(text: str) -> bool:
    # JSON can spell half of a surrogate pair; UTF-8 cannot.
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _sizes(value: Any) -> bool:
    # bool is an int in Python; true is no size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_contiguous(entries: list[Entry]) -> None:
    offset = 0
    for entry in entries:
        if entry.begin != offset:
            fault = "overlaps the tensor before it" if entry.begin < offset else "leaves a gap before it"
            raise MalformedBody(f"tensor {entry.name[:200]!r} {fault}: it begins at {entry.begin}, expected {offset}")
        offset = entry.end


# --- slices: what a part of an update carries -----------------------------------------------------------------------


def write_slices(slices: Mapping[str, Sequence[Box]]) -> dict[str, str]:
    """The metadata of a part. slices: of each tensor that the part does not carry whole."""
    table = {name: [[list(bounds) for bounds in box] for box in boxes] for name, boxes in slices.items()}
    return {SLICES: json.dumps(table, separators=(",", ":"), ensure_ascii=False)} if table else {}


def read_slices(header: Header) -> dict[str, tuple[Box, ...]]:
    """name -> the slices that a tensor of a part holds; a tensor that is not named is whole.

    A tensor's bytes are the slices, back to back, and its shape is the slice's, or flat where there are several slices.
    Raises MalformedBody where bytes or shape do not fit.
    """
    raw = header.metadata.get(SLICES)
    if raw is None:
        return {}
    try:
        table = json.loads(raw, object_pairs_hook=_unique)
    except (RecursionError, ValueError) as fault:
        raise MalformedBody(f"{SLICES} is not JSON: {str(fault)[:120]}") from None
    if not isinstance(table, dict):
        raise MalformedBody(f"{SLICES} is not a JSON object")
    shapes = {entry.name: entry.shape for entry in header.entries}
    slices = {name: _boxes(name, value) for name, value in table.items()}
    for name, boxes in slices.items():
        if name not in shapes:
            raise MalformedBody(f"{SLICES} names {name[:200]!r}, which is no tensor of this body")
        expected = box_shape(boxes[0]) if len(boxes) == 1 else (sum(prod(box_shape(box)) for box in boxes),)
        if shapes[name] != expected:
            shown = f"{list(shapes[name])}, its slices in {SLICES} make {list(expected)}"
            raise MalformedBody(f"tensor {name[:200]!r} has shape {shown}")
    return slices


def _boxes(name: str, value: Any) -> tuple[Box, ...]:
    fits = isinstance(value, list) and 0 < len(value) <= MAX_SLICES and all(_is_box(item) for item in value)
    if not fits:
        raise MalformedBody(
            f"{SLICES} of tensor {name[:200]!r}: expected 1 to {MAX_SLICES} slices, each with [start, stop], "
            "start < stop, for every dimension"
        )
    return tuple(tuple((start, stop) for start, stop in box) for box in value)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return False
    return all(_sizes(bounds) and len(bounds) == 2 and bounds[0] < bounds[1] for bounds in value)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of a slice."""
    return tuple(stop - start for start, stop in box)


def range_of_box(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """The elements [start, stop) of the flattened tensor that a slice is; None where a slice is no single range."""
    start, below, whole = 0, 1, True
    for (first, last), size in zip(reversed(box), reversed(shape), strict=True):
        if last - first > 1 and not whole:
            return None
        start += first * below
        below *= size
        whole = whole and (first, last) == (0, size)
    return start, start + prod(box_shape(box))


def boxes_of_range(start: int, stop: int, shape: Sequence[int]) -> tuple[Box, ...]:
    """The elements [start, stop) of a flattened tensor as slices, in order: at most 2 * rank - 1 slices."""
    if start >= stop:
        return ()
    if not shape:
        return ((),)
    below = prod(shape[1:])
    first, last = -(-start // below), stop // below
    if first > last:  # within one index of the outermost dimension
        return _under(start // below, start % below, stop - start // below * below, shape)
    head = _under(first - 1, start - (first - 1) * below, below, shape) if start < first * below else ()
    rest = ((first, last), *((0, size) for size in shape[1:]))
    tail = _under(last, 0, stop - last * below, shape) if last * below < stop else ()
    return (*head, *((rest,) if first < last else ()), *tail)


def _under(index: int, start: int, stop: int, shape: Sequence[int]) -> tuple[Box, ...]:
    return tuple(((index, index + 1), *box) for box in boxes_of_range(start, stop, shape[1:]))


# --- a part that is cut: for several hosts, each of which has some rows, or into stretches ----------------------------


@dataclass(frozen=True, slots=True)
class PartCut:
    """Some of a part, as a part by itself: what lies in some rows of the run's tensors, or a stretch of its bytes.

    header: of the body, with its length; for a host, slices are counted from the first of its rows. spans: where the
    bytes [start, stop) behind it lie in the data of the whole part, in their order. sizes: bytes of each tensor.
    """

    header: bytes
    spans: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes behind the header."""
        return sum(stop - start for start, stop in self.spans)


def cut_part(header: Header, hosts: Sequence[Mapping[str, Rows]]) -> tuple[PartCut, ...]:
    """A part, cut for hosts that have these rows of the run's tensors; for each host, perhaps of no tensor at all.

    header: of the whole part. Raises MalformedBody; LayoutMismatch where elements are in no host's rows, or in those of
    several.
    """
    slices = read_slices(header)
    strange = [entry.name[:200] for entry in header.entries if not any(entry.name in rows for rows in hosts)]
    if strange:
        raise LayoutMismatch(f"not in the layout: {listed(strange)}")
    found = tuple(_cut_for(header, slices, rows) for rows in hosts)
    if sum(part.nbytes for part in found) != header.data_bytes:
        raise LayoutMismatch("the part has elements that the run's tensors do not have")
    return found


def stretches_of_part(header: Header, size: int) -> tuple[PartCut, ...]:
    """A part, cut into stretches of ``size`` bytes of its data, the last one perhaps of fewer: each a part by itself.

    Raises MalformedBody where the part is not one, where a stretch would end inside an element, or where it would have
    too many slices of one tensor.
    """
    slices = read_slices(header)
    begins = [entry.begin for entry in header.entries]
    return tuple(
        _stretch(header.entries[max(0, bisect_right(begins, start) - 1) :], slices, start, start + size)
        for start in range(0, header.data_bytes, size)
    )


def _stretch(entries: Sequence[Entry], slices: Mapping[str, tuple[Box, ...]], start: int, stop: int) -> PartCut:
    specs, here = [], {}
    for entry in entries:
        if entry.begin >= stop:
            break
        if entry.end <= max(start, entry.begin):
            continue
        whole = tuple((0, size) for size in entry.shape)
        boxes = tuple(_within(slices.get(entry.name, (whole,)), entry, start, stop))
        shape = box_shape(boxes[0]) if len(boxes) == 1 else (sum(prod(box_shape(box)) for box in boxes),)
        specs.append(TensorSpec(entry.name, shape, entry.dtype))
        if entry.name in slices or boxes != (whole,):
            here[entry.name] = boxes
        if len(boxes) > MAX_SLICES:
            raise MalformedBody(f"tensor {entry.name[:200]!r} has {len(boxes)} slices in one stretch")
    placed = place(specs, sort=False)
    nbytes, sizes = placed[-1].end, tuple(entry.end - entry.begin for entry in placed)
    return PartCut(build_header(placed, write_slices(here)), ((start, start + nbytes),), sizes)


def _within(boxes: Iterable[Box], entry: Entry, start: int, stop: int) -> Iterator[Box]:
    """What of slices that lie back to back from the entry's first byte on lies in bytes [start, stop) of the data."""
    begin, width = entry.begin, DTYPE_BYTES[entry.dtype]
    for box in boxes:
        end = begin + prod(box_shape(box)) * width
        first, last = max(start, begin) - begin, min(stop, end) - begin
        if first % width or last % width:
            raise MalformedBody(f"tensor {entry.name[:200]!r}: a stretch ends inside an element")
        for inner in boxes_of_range(first // width, last // width, box_shape(box)):
            yield tuple((low + base, high + base) for (low, high), (base, _) in zip(inner, box, strict=True))
        begin = end


def _cut_for(header: Header, slices: Mapping[str, tuple[Box, ...]], rows: Mapping[str, Rows]) -> PartCut:
    specs, here, spans = [], {}, list[tuple[int, int]]()
    for entry in header.entries:
        if entry.name not in rows or entry.begin == entry.end:
            continue
        whole = tuple((0, size) for size in entry.shape)
        boxes, begin = [], entry.begin
        for box in slices.get(entry.name, (whole,)):
            row = prod(box_shape(box)[1:]) * DTYPE_BYTES[entry.dtype]
            if (inside := _in_rows(box, rows[entry.name])) is not None:
                boxes.append(inside.box)
                spans.append((begin + inside.skipped * row, begin + (inside.skipped + inside.count) * row))
            begin += row * (box_shape(box)[0] if box else 1)
        if boxes:
            shape = box_shape(boxes[0]) if len(boxes) == 1 else (sum(prod(box_shape(box)) for box in boxes),)
            specs.append(TensorSpec(entry.name, shape, entry.dtype))
            if entry.name in slices:
                here[entry.name] = boxes
    entries = place(specs, sort=False)
    sizes = tuple(entry.end - entry.begin for entry in entries)
    return PartCut(build_header(entries, write_slices(here)), _joined(spans), sizes)


@dataclass(frozen=True, slots=True)
class _Inside:
    """What of a slice lies in some rows, as a slice of these rows. skipped, count: the slice's rows before it, and in
    it."""

    box: Box
    skipped: int
    count: int


def _in_rows(box: Box, rows: Rows) -> _Inside | None:
    """None where nothing of the slice lies in the rows."""
    if rows is None or not box:
        return _Inside(box, 0, 1) if rows is None and not box else None
    (first, last), *others = box
    start, stop = max(first, rows[0]), min(last, rows[1])
    if start >= stop:
        return None
    return _Inside(((start - rows[0], stop - rows[0]), *others), start - first, stop - start)


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same bytes in as few spans as can be."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return tuple(found)
