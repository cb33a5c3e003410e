"""Weights as a stream: any part of it is that part of the whole, and the safetensors library reads it.

Knows the safetensors library as the independent reader. Does not know arenas, files or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from ema_client.errors import InvalidRequest
from ema_client.protocol import WeightsInfo
from ema_client.wire import Entry, parse_header
from ema_service.bodies import WeightsStream
from ema_service.bodies.outgoing import SENT_AT_ONCE
from ema_service.tensors import TORCH_DTYPES

INFO = WeightsInfo("r", "ema", "1.7", 70, 7, 0.9999)
#: As shadows lie: F64 first, then float32 in the order of the parameters, which is not that of the names.
NAMES = ["wide", "layer.b", "layer.w", "none", "layer.c", "a", "tail"]
TENSORS = {
    "wide": torch.randn(5, 3, dtype=torch.float64),
    "layer.b": torch.randn(7),
    "layer.w": torch.randn(4, 3, 3),
    "none": torch.randn(0, 9),
    "layer.c": torch.randn(()),
    "a": torch.randn(11),
    "tail": torch.randn(2, 2),
}


def lay_out(tensors: dict[str, Tensor]) -> tuple[tuple[Entry, ...], memoryview]:
    """Entries and data of these tensors in the order given."""
    entries, data = [], b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = next(n for n, t in TORCH_DTYPES.items() if t == tensor.dtype)
        entries.append(Entry(name, dtype, tuple(tensor.shape), len(data), len(data) + len(raw)))
        data += raw
    return tuple(entries), memoryview(bytearray(data))


ENTRIES, SOURCE = lay_out(TENSORS)
CASTS = [None, *TORCH_DTYPES]
PREFIXES = [None, "", "layer.", "layer.w", "none", "a", "wide", "tail"]


def read(start: int, stop: int) -> memoryview:
    assert 0 <= start <= stop <= len(SOURCE), "read beyond the source"
    return SOURCE[start:stop]


def whole(stream: WeightsStream, start: int = 0, stop: int | None = None, at_once: int = SENT_AT_ONCE) -> bytes:
    return b"".join(stream.chunks(read, start, stop, at_once=at_once))


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_safetensors_reads_it(dtype: str | None, prefix: str | None) -> None:
    """The stream, with any cast and selection, is a file that loads: those tensors, cast as torch casts."""
    stream = WeightsStream(ENTRIES, INFO, dtype=dtype, prefix=prefix)
    body = whole(stream)
    loaded = load(body)

    expected = {n: t.to(TORCH_DTYPES[dtype]) if dtype else t for n, t in TENSORS.items() if n.startswith(prefix or "")}
    assert len(body) == stream.length
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@given(
    dtype=st.sampled_from(CASTS),
    prefix=st.sampled_from(PREFIXES),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    chunk=st.sampled_from([1 << 20, 64, 7]),
)
def test_any_part_is_that_part_of_the_whole(
    dtype: str | None, prefix: str | None, cut: tuple[float, float], chunk: int
) -> None:
    """chunks(start, stop) gives bytes [start, stop) of the whole, also in the middle of an element that is cast."""
    stream = WeightsStream(ENTRIES, INFO, dtype=dtype, prefix=prefix)
    start, stop = sorted(round(fraction * stream.length) for fraction in cut)
    expected = whole(stream)[start:stop]

    assert whole(stream, start, stop, chunk) == expected


@pytest.mark.parametrize("dtype", [None, "BF16", "F64"])
def test_every_cut_in_two(dtype: str | None) -> None:
    """Cut at every byte, the two parts make the whole."""
    stream = WeightsStream(ENTRIES, INFO, dtype=dtype)
    body = whole(stream)
    for at in range(stream.length + 1):
        assert whole(stream, 0, at) + whole(stream, at) == body


def test_large_tensor_comes_in_pieces() -> None:
    """A tensor larger than a piece comes in pieces of at most 1 MiB, and uncast they are the source's own memory."""
    entries, data = lay_out({"big": torch.arange(700_000.0)})
    stream = WeightsStream(entries, INFO)
    header, *pieces = stream.chunks(lambda start, stop: data[start:stop])

    assert [len(piece) for piece in pieces] == [1 << 20, 1 << 20, 2_800_000 - (2 << 20)]
    assert all(piece.obj is data.obj for piece in pieces)
    assert load(bytes(header) + b"".join(pieces))["big"][-1] == 699_999


@pytest.mark.parametrize("dtype", CASTS)
def test_header_describes_the_data(dtype: str | None) -> None:
    """The header carries the Ema metadata, and `format: pt` for loaders that look for it."""
    body = whole(WeightsStream(ENTRIES, INFO, dtype=dtype))
    header = parse_header(body[8 : 8 + int.from_bytes(body[:8], "little")])

    assert header.metadata["format"] == "pt"
    assert WeightsInfo.from_metadata(dict(header.metadata)) == INFO
    assert [entry.name for entry in header.entries] == NAMES


def test_data_begins_aligned() -> None:
    """Data begins at a multiple of 8 bytes, so a reader may map the file."""
    body = whole(WeightsStream(ENTRIES, INFO))

    assert (8 + int.from_bytes(body[:8], "little")) % 8 == 0


OTHERS: dict[str, Callable[[], WeightsStream]] = {
    "the same again": lambda: WeightsStream(ENTRIES, INFO),
    "float32 asked for": lambda: WeightsStream(ENTRIES, INFO, dtype="F32"),
    "half": lambda: WeightsStream(ENTRIES, INFO, dtype="F16"),
    "a selection": lambda: WeightsStream(ENTRIES, INFO, prefix="layer."),
    "a smaller selection": lambda: WeightsStream(ENTRIES, INFO, prefix="layer.w"),
    "another version": lambda: WeightsStream(ENTRIES, replace(INFO, version="1.8")),
    "another epoch": lambda: WeightsStream(ENTRIES, replace(INFO, version="2.7")),
    "another average": lambda: WeightsStream(ENTRIES, replace(INFO, average="fast")),
    "another run": lambda: WeightsStream(ENTRIES, replace(INFO, run="s")),
    "another counter": lambda: WeightsStream(ENTRIES, replace(INFO, num_updates=0)),
    "another decay": lambda: WeightsStream(ENTRIES, replace(INFO, decay=0.5)),
    "a snapshot": lambda: WeightsStream(ENTRIES, replace(INFO, snapshot="s")),
}


def test_etag_names_the_bytes() -> None:
    """Two streams have one ETag exactly when their bytes are the same."""
    streams = {name: make() for name, make in OTHERS.items()}
    first = WeightsStream(ENTRIES, INFO)
    for name, stream in streams.items():
        assert (stream.etag == first.etag) == (whole(stream) == whole(first)), name
    assert len({stream.etag for stream in streams.values()}) == len(streams)


def test_etag_is_a_strong_tag() -> None:
    """The ETag is quoted, without blanks, commas or W/: it may stand in If-Range."""
    etag = WeightsStream(ENTRIES, INFO).etag

    assert etag[0] == etag[-1] == '"'
    assert not set(etag[1:-1]) & set('", \\')


@pytest.mark.parametrize("dtype", ["I32", "float32", "", "f32"])
def test_unknown_dtype_is_refused(dtype: str) -> None:
    """A dtype weights cannot be had in is refused with those they can."""
    with pytest.raises(InvalidRequest, match="F64, F32, BF16, F16"):
        WeightsStream(ENTRIES, INFO, dtype=dtype)


def test_prefix_of_nothing_is_refused() -> None:
    """A prefix that no tensor has is an error, not an empty body."""
    with pytest.raises(InvalidRequest, match=r"'layers\.'"):
        WeightsStream(ENTRIES, INFO, prefix="layers.")


def test_source_may_be_a_written_file() -> None:
    """The entries of a file the safetensors library wrote serve as a source as well."""
    body = save(TENSORS)
    begin = 8 + int.from_bytes(body[:8], "little")
    data = memoryview(bytearray(body[begin:]))
    stream = WeightsStream(parse_header(body[8:begin]).entries, INFO, dtype="F16", prefix="layer.")
    loaded = load(b"".join(stream.chunks(lambda start, stop: data[start:stop])))

    assert torch.equal(loaded["layer.w"], TENSORS["layer.w"].half())
