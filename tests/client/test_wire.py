"""The safetensors stream: golden bytes, the reference library as independent reader and writer, malformed headers.

Knows: the format, from its README. Does not know: sockets, runs, or what the tensors are of.
"""

from __future__ import annotations

import json
import struct
from math import prod
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ema_client import wire
from ema_client.errors import MalformedBody
from ema_client.protocol import MAX_RANK, MAX_TENSOR_NAME, TensorSpec

#: Of tensors that are cut into slices: none is empty.
BOX_SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)
NAMES = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SPECS = st.lists(
    st.builds(TensorSpec, name=NAMES, shape=SHAPES, dtype=st.sampled_from(list(wire.DTYPE_BYTES))),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


def header_of(table: Any) -> bytes:
    return json.dumps(table).encode()


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# --- writing --------------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    """One small layout, byte for byte: canonical order, no blanks, padded to 8."""
    specs = [TensorSpec("b", (2,), "F32"), TensorSpec("a", (), "BF16"), TensorSpec("a.c", (0, 3), "F32")]

    raw = wire.build_header(wire.place(specs))

    assert raw == (
        b"\xa8\x00\x00\x00\x00\x00\x00\x00"
        b'{"a.c":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}'
        b"   "
    )


def test_golden_bytes_with_metadata() -> None:
    """Metadata comes first, as it was given; names are UTF-8, not escapes."""
    raw = wire.build_header(wire.place([TensorSpec("ä", (1,), "F64")]), {"ema_run": "r"})

    assert raw[8:] == (
        b'{"__metadata__":{"ema_run":"r"},"\xc3\xa4":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}' + b" " * 2
    )
    assert raw[:8] == struct.pack("<Q", len(raw) - 8)


def test_example_of_the_specification() -> None:
    """The stream that PROTOCOL.md spells out is the one we write and read."""
    entries = wire.place([TensorSpec("b", (), "BF16"), TensorSpec("a", (2,), "F32")])
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}'
    )

    assert wire.build_header(entries) == bytes.fromhex("7000000000000000") + header.ljust(112)
    assert wire.parse_header(header.ljust(112)).entries == entries


def test_no_tensor_at_all() -> None:
    """An empty layout has a header too."""
    raw = wire.build_header(wire.place([]))

    assert raw == b"\x08" + b"\x00" * 7 + b"{}      "
    assert wire.parse_header(raw[8:]).data_bytes == 0


@given(SPECS)
def test_header_does_not_depend_on_the_order_given(specs: list[TensorSpec]) -> None:
    """One layout has one header: the server knows it again by its bytes."""
    assert wire.build_header(wire.place(specs)) == wire.build_header(wire.place(reversed(specs)))


@given(SPECS, st.dictionaries(NAMES, NAMES, max_size=3))
def test_written_header_is_read_back(specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    """Entries and metadata survive; the data section begins aligned and has no gap."""
    entries = wire.place(specs)

    raw = wire.build_header(entries, metadata)
    length = wire.parse_length(raw[:8])
    header = wire.parse_header(memoryview(raw)[8:])

    assert len(raw) == 8 + length
    assert len(raw) % 8 == 0
    assert set(header.entries) == set(entries)
    assert header.metadata == metadata
    assert header.data_bytes == sum(prod(spec.shape) * wire.DTYPE_BYTES[spec.dtype] for spec in specs)
    assert {found.spec for found in header.entries} == set(specs)


def test_place_as_given() -> None:
    """sort=False keeps the order: the server's layouts of a subset."""
    specs = [TensorSpec("b", (1,), "BF16"), TensorSpec("a", (1,), "F64")]

    assert [(e.name, e.begin, e.end) for e in wire.place(specs, sort=False)] == [("b", 0, 2), ("a", 2, 10)]


def test_place_refuses_an_unknown_dtype() -> None:
    """A dtype that safetensors does not have is no silent guess."""
    with pytest.raises(KeyError, match="F3"):
        wire.place([TensorSpec("a", (1,), "F3")])


# --- the reference library ------------------------------------------------------------------------------------------

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
TORCH_SPECS = st.lists(
    st.builds(TensorSpec, name=NAMES, shape=SHAPES, dtype=st.sampled_from(list(TORCH))),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


def tensors_of(specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.arange(prod(spec.shape)).add(seed).to(TORCH[spec.dtype]).reshape(spec.shape)
        for seed, spec in enumerate(specs)
    }


def data_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@given(TORCH_SPECS)
@settings(deadline=None)
def test_the_library_reads_what_we_write(specs: list[TensorSpec]) -> None:
    """safetensors.torch.load finds the same names, shapes, dtypes and values."""
    tensors = tensors_of(specs)
    entries = wire.place(specs)
    stream = wire.build_header(entries, {"k": "v"}) + b"".join(data_of(tensors[e.name]) for e in entries)

    read = safetensors.torch.load(stream)

    assert set(read) == set(tensors)
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())


@given(TORCH_SPECS)
@settings(deadline=None)
@example([TensorSpec("b", (2,), "BF16"), TensorSpec("a", (1,), "F32"), TensorSpec("ab", (), "F16")])
def test_we_read_what_the_library_writes(specs: list[TensorSpec]) -> None:
    """A file of safetensors.torch.save has the same tensors, and its header is our canonical one, byte for byte."""
    raw = safetensors.torch.save(tensors_of(specs))
    length = wire.parse_length(raw[:8])

    header = wire.parse_header(raw[8 : 8 + length])

    assert {found.spec for found in header.entries} == set(specs)
    assert 8 + length + header.data_bytes == len(raw)
    assert wire.build_header(wire.place(specs)) == raw[: 8 + length]


# --- reading what should not be -------------------------------------------------------------------------------------

MALFORMED: dict[str, tuple[bytes, str]] = {
    "not json": (b"{nonsense}", "not JSON"),
    "no object": (b"[1, 2]", "does not begin with"),
    "leading blank": (b' {"a": 1}', "does not begin with"),
    "empty": (b"", "does not begin with"),
    "trailing bytes": (b"{}x", "not JSON"),
    "nul padding": (b"{}\x00\x00", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', "not JSON"),
    "half a surrogate": (b'{"\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "not valid Unicode"),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON|expected exactly"),
    "endless digits": (b'{"a":' + b"9" * 10_000 + b"}", "not JSON"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        "'a' twice",
    ),
    "a member twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "'dtype' twice"),
    "empty name": (header_of({"": entry()}), "0 characters"),
    "long name": (header_of({"n" * (MAX_TENSOR_NAME + 1): entry()}), f"1 to {MAX_TENSOR_NAME}"),
    "entry no object": (header_of({"a": [1]}), "'a': expected exactly"),
    "entry null": (header_of({"a": None}), "'a': expected exactly"),
    "member missing": (header_of({"a": {"dtype": "F32", "shape": [1]}}), "'a': expected exactly"),
    "member too many": (header_of({"a": {**entry(), "extra": 1}}), "'a': expected exactly"),
    "unknown dtype": (header_of({"a": entry(dtype="F33")}), "'a': unknown dtype 'F33'"),
    "dtype no string": (header_of({"a": entry(dtype=["F32"])}), "'a': unknown dtype"),
    "shape no list": (header_of({"a": entry(shape="2")}), "'a': the shape"),
    "negative size": (header_of({"a": entry(shape=[-2])}), "'a': the shape"),
    "size a float": (header_of({"a": entry(shape=[2.0])}), "'a': the shape"),
    "size true": (header_of({"a": entry(shape=[True], offsets=[0, 4])}), "'a': the shape"),
    "size too large": (header_of({"a": entry(shape=[2**63])}), "'a': the shape"),
    "rank too large": (header_of({"a": entry(shape=[1] * (MAX_RANK + 1), offsets=[0, 4])}), "'a': the shape"),
    "product beyond 64 bits": (header_of({"a": entry(shape=[2**62, 2**62])}), "'a': F32"),
    "offsets three": (header_of({"a": entry(offsets=[0, 4, 8])}), "'a': data_offsets"),
    "offsets no list": (header_of({"a": entry(offsets=8)}), "'a': data_offsets"),
    "offsets negative": (header_of({"a": entry(offsets=[-8, 0])}), "'a': data_offsets"),
    "offsets reversed": (header_of({"a": entry(offsets=[8, 0])}), "'a': F32"),
    "too few bytes": (header_of({"a": entry(offsets=[0, 4])}), r"'a': F32 \[2\] takes 8 bytes, data_offsets give 4"),
    "too many bytes": (header_of({"a": entry(offsets=[0, 12])}), "data_offsets give 12"),
    "gap in front": (header_of({"a": entry(offsets=[8, 16])}), "'a' leaves a gap"),
    "gap between": (header_of({"a": entry(), "b": entry(offsets=[16, 24])}), "'b' leaves a gap"),
    "overlap": (header_of({"a": entry(), "b": entry(offsets=[4, 12])}), "'b' overlaps"),
    "same bytes": (header_of({"a": entry(), "b": entry()}), "'b' overlaps|'a' overlaps"),
    "metadata no object": (header_of({"__metadata__": "x"}), "__metadata__"),
    "metadata of numbers": (header_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata null": (header_of({"__metadata__": None}), "__metadata__"),
    "metadata half a surrogate": (b'{"__metadata__":{"a":"\\udfff"}}', "__metadata__"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_header_is_refused(case: str) -> None:
    """Each way to be malformed is one error that names the tensor and the fault."""
    raw, message = MALFORMED[case]

    with pytest.raises(MalformedBody, match=message):
        wire.parse_header(raw)


@pytest.mark.parametrize("case", ["overlap", "gap between", "too few bytes", "unknown dtype", "a name twice"])
def test_the_library_refuses_it_too(case: str) -> None:
    """The catalogue is not our invention: the reference reader refuses the same headers."""
    raw, _ = MALFORMED[case]

    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(struct.pack("<Q", len(raw)) + raw + bytes(64))


def test_order_in_the_header_need_not_be_order_of_bytes() -> None:
    """A well-formed header may list tensors in any order; they are read in the order of their bytes."""
    raw = header_of({"b": entry(offsets=[8, 16]), "a": entry()})

    assert [found.name for found in wire.parse_header(raw).entries] == ["a", "b"]


def test_empty_tensors_share_an_offset() -> None:
    """Tensors without elements take no bytes and overlap nothing."""
    raw = header_of({"a": entry(shape=[0], offsets=[0, 0]), "b": entry(), "c": entry(shape=[0, 5], offsets=[8, 8])})

    assert wire.parse_header(raw).data_bytes == 8


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (b"", "ends after 0 bytes"),
        (b"\x01\x00\x00", "ends after 3 bytes"),
        (struct.pack("<Q", 0), "claims 0 bytes"),
        (struct.pack("<Q", 1), "claims 1 bytes"),
        (struct.pack("<Q", 101), "claims 101 bytes"),
        (struct.pack("<Q", 2**64 - 1), "claims 18446744073709551615 bytes"),
    ],
)
def test_absurd_header_length_is_refused(prefix: bytes, message: str) -> None:
    """A length is checked before anything of that length is made."""
    with pytest.raises(MalformedBody, match=message):
        wire.parse_length(prefix, limit=100)


def test_header_length_at_its_limits() -> None:
    """The limit itself is allowed, and the smallest header is ``{}``."""
    assert wire.parse_length(struct.pack("<Q", 100), limit=100) == 100
    assert wire.parse_length(struct.pack("<Q", 2)) == 2


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    """Whatever comes, the outcome is a header or MalformedBody."""
    try:
        header = wire.parse_header(raw)
    except MalformedBody:
        return
    assert header.data_bytes >= 0


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        NAMES | st.just("__metadata__"),
        JSON_VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*wire.DTYPE_BYTES, "F33"]) | JSON_VALUES,
                "shape": SHAPES.map(list) | JSON_VALUES,
                "data_offsets": st.lists(st.integers(-1, 100), max_size=3) | JSON_VALUES,
            }
        ),
        max_size=4,
    )
)
def test_any_json_is_read_or_refused(table: dict[str, Any]) -> None:
    """Headers that are nearly right are read or refused with the one error, and what is read adds up."""
    try:
        header = wire.parse_header(json.dumps(table).encode())
    except MalformedBody:
        return
    assert header.data_bytes == sum(prod(e.shape) * wire.DTYPE_BYTES[e.dtype] for e in header.entries)


# --- slices --------------------------------------------------------------------------------------------------------


@given(BOX_SHAPES, st.data())
def test_flat_range_as_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    """A range of a flattened tensor is few slices, whose elements back to back are just that range."""
    flat = torch.arange(prod(shape))
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    boxes = wire.boxes_of_range(start, stop, shape)
    taken = [flat.view(shape)[tuple(slice(*bounds) for bounds in box)].reshape(-1) for box in boxes]

    assert torch.cat([flat[:0], *taken]).equal(flat[start:stop])
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(BOX_SHAPES, st.data())
def test_box_as_flat_range(shape: tuple[int, ...], data: st.DataObject) -> None:
    """A slice is one range of the flattened tensor exactly where its elements follow each other."""
    box = tuple(sorted(data.draw(st.tuples(st.integers(0, s - 1), st.integers(1, s)))) for s in shape)
    box = tuple((a, max(a + 1, b)) for a, b in box)
    elements = torch.arange(prod(shape)).view(shape)[tuple(slice(*bounds) for bounds in box)].reshape(-1)
    together = bool((elements.diff() == 1).all())
    first = int(elements[0])

    assert wire.range_of_box(box, shape) == ((first, first + prod(wire.box_shape(box))) if together else None)


@given(st.data())
def test_stretches_of_a_part(data: st.DataObject) -> None:
    """Stretches of a part are parts, which bring the part's very bytes, each element once, cut at any multiple of the
    widest dtype."""
    tensors, slices, taken = {}, {}, {}
    for name, dtype in {"a": torch.float64, "b": torch.float32, "c": torch.float16, "d": torch.float32}.items():
        shape = data.draw(BOX_SHAPES, label=name)
        tensors[name] = torch.arange(prod(shape)).view(shape).to(dtype)
        start = data.draw(st.integers(0, prod(shape) - 1))
        boxes = wire.boxes_of_range(start, data.draw(st.integers(start + 1, prod(shape))), shape)
        found = [tensors[name][tuple(slice(*bounds) for bounds in box)] for box in boxes]
        taken[name] = found[0].contiguous() if len(found) == 1 else torch.cat([each.reshape(-1) for each in found])
        if taken[name].shape != shape or data.draw(st.booleans()):
            slices[name] = boxes
    body = safetensors.torch.save(taken, wire.write_slices(slices))
    length = wire.parse_length(body[: wire.LENGTH_BYTES])
    whole, part = body[wire.LENGTH_BYTES + length :], wire.parse_header(body[wire.LENGTH_BYTES :][:length])
    size = 8 * data.draw(st.integers(1, 40))

    brought = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in tensors.items()}
    for number, each in enumerate(wire.stretches_of_part(part, size)):
        mine = whole[number * size : (number + 1) * size]
        assert (each.nbytes, each.spans, sum(each.sizes)) == (
            len(mine),
            ((number * size, number * size + len(mine)),),
            len(mine),
        )
        header = wire.parse_header(each.header[wire.LENGTH_BYTES :])
        given_slices = wire.read_slices(header)
        for entry in header.entries:
            tensor = tensors[entry.name]
            boxes = given_slices.get(entry.name, (tuple((0, s) for s in tensor.shape),))
            places = [tuple(slice(*bounds) for bounds in box) for box in boxes]
            elements = torch.cat([tensor[place].reshape(-1) for place in places])
            assert elements.numpy().tobytes() == mine[entry.begin : entry.end]
            for place in places:
                brought[entry.name][place] += 1
    assert {name: int(count.sum()) for name, count in brought.items()} == {n: t.numel() for n, t in taken.items()}
    assert all(int(count.max()) == 1 for count in brought.values())


def test_stretch_that_would_be_no_part() -> None:
    """Where a stretch would end inside an element, or have too many slices of a tensor, the part is not cut."""
    entries = wire.place([TensorSpec("a", (3,), "F64")])
    with pytest.raises(MalformedBody, match="inside an element"):
        wire.stretches_of_part(wire.Header(entries), 12)
    boxes = [((i, i + 1), (0, 2), (0, 4)) for i in range(wire.MAX_SLICES)]
    entries = wire.place([TensorSpec("a", (8 * len(boxes),), "F32")])
    with pytest.raises(MalformedBody, match="slices in one stretch"):
        # Of the last slice a row, and one element of the next.
        wire.stretches_of_part(wire.Header(entries, wire.write_slices({"a": boxes})), 4 * (8 * len(boxes) - 3))
