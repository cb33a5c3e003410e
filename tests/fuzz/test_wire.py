"""Whatever bytes come, the wire format's readers raise their documented errors or read what was written.

Knows hypothesis and ``ema_client.wire``. Does not know sockets or runs. Malformed headers one by one, and the reference
library as an independent reader, are in tests/client/test_wire.py.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from ema_client import wire
from ema_client.errors import MalformedBody
from ema_client.protocol import TensorSpec

TEXT = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
SMALL = st.integers(-2, 40)
#: Nearly an entry: the right members most often, with values that are right now and then.
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*wire.DTYPE_BYTES, "F4", ""]) | SCALARS,
        "shape": st.lists(SMALL, max_size=3) | JSON,
        "data_offsets": st.tuples(SMALL, SMALL).map(list) | JSON,
    },
    optional={"more": JSON},
)
TABLE = st.dictionaries(TEXT | st.just("__metadata__"), ENTRY | JSON, max_size=4)
SPECS = st.lists(
    st.builds(
        TensorSpec,
        name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(
            lambda name: name != "__metadata__"
        ),
        shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
        dtype=st.sampled_from(list(wire.DTYPE_BYTES)),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda spec: spec.name,
)


def parse(raw: bytes) -> wire.Header | None:
    """The header, None where it is refused. Anything but MalformedBody is a defect and goes through."""
    try:
        return wire.parse_header(raw)
    except MalformedBody:
        return None


def assert_sound(header: wire.Header) -> None:
    """What is accepted covers its data without gap or overlap, with sizes that fit the shapes."""
    end = 0
    for entry in header.entries:
        size = wire.DTYPE_BYTES[entry.dtype]
        for length in entry.shape:
            assert length >= 0
            size *= length
        assert (entry.begin, entry.end) == (end, end + size)
        end = entry.end
    assert len({entry.name for entry in header.entries}) == len(header.entries)


@settings(max_examples=600)
@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: b"{" + tail))
@example(b'{"a":' + b"[" * 2000)
@example(b'{"":{}}')
def test_any_bytes(raw: bytes) -> None:
    """Bytes of any kind are a header or MalformedBody."""
    if header := parse(raw):
        assert_sound(header)


@settings(max_examples=200)
@given(TABLE)
def test_any_json(table: dict[str, Any]) -> None:
    """JSON of any kind is a header or MalformedBody; what is accepted is sound."""
    if header := parse(json.dumps(table).encode()):
        assert_sound(header)


@settings(max_examples=400)
@given(SPECS, st.data())
def test_a_true_header_with_one_change(specs: list[TensorSpec], data: st.DataObject) -> None:
    """One byte changed, left out or put in: refused, or sound, and then no laxer than the reference library."""
    raw = bytearray(wire.build_header(wire.place(specs))[wire.LENGTH_BYTES :])
    at = data.draw(st.integers(0, len(raw) - 1))
    change = data.draw(st.sampled_from(["change", "cut", "add"]))
    raw[at : at + (change != "add")] = b"" if change == "cut" else data.draw(st.binary(min_size=1, max_size=1))
    header = parse(bytes(raw))
    if header is None:
        return
    assert_sound(header)
    size = header.entries[-1].end if header.entries else 0
    try:
        theirs = deserialize(struct.pack("<Q", len(raw)) + bytes(raw) + bytes(size))
    except SafetensorError as fault:
        raise AssertionError(f"the reference library refuses what we took: {fault}") from fault
    assert {name for name, _ in theirs} == {entry.name for entry in header.entries}


@given(SPECS, st.dictionaries(TEXT.filter(lambda text: text.isprintable()), TEXT, max_size=3) | st.none())
def test_there_and_back(specs: list[TensorSpec], metadata: dict[str, str] | None) -> None:
    """What is written is read as it was: entries and metadata, at the same bytes."""
    entries = wire.place(specs)
    raw = wire.build_header(entries, metadata)
    length = wire.parse_length(raw[: wire.LENGTH_BYTES])

    assert length == len(raw) - wire.LENGTH_BYTES
    header = wire.parse_header(raw[wire.LENGTH_BYTES :])
    assert list(header.entries) == list(entries)
    assert (header.metadata or {}) == (metadata or {})
    assert {entry.spec for entry in header.entries} == set(specs)


@given(st.binary(max_size=12), st.integers(0, 2**64))
def test_any_length(prefix: bytes, limit: int) -> None:
    """A length prefix is a number within the limit, or MalformedBody; nothing is allocated for it."""
    try:
        length = wire.parse_length(prefix, limit=limit)
    except MalformedBody:
        return
    assert len(prefix) == wire.LENGTH_BYTES
    assert 0 < length <= limit
