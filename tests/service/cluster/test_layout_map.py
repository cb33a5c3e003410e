"""A layout cut into shards: what each has, how even they are, and bodies put together again, bit for bit.

Knows the safetensors library as the independent reader. Does not know hosts.
"""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from ema_client.errors import InvalidRequest
from ema_client.protocol import LAYOUT_DTYPES, TensorSpec
from ema_client.wire import box_shape, build_header, parse_header, place, write_slices
from ema_service.bodies.slices import Cover, slices_of
from ema_service.cluster import LayoutMap, Span
from ema_service.memory import Layout
from ema_service.tensors import TORCH_DTYPES

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.one_of(st.integers(0, 4), st.sampled_from([1, 30])), max_size=3).map(tuple)
specs = st.lists(
    st.builds(TensorSpec, names, shapes, st.sampled_from(list(LAYOUT_DTYPES))),
    min_size=1,
    max_size=8,
    unique_by=lambda spec: spec.name,
)


def rows_of(spec: TensorSpec) -> int:
    return (spec.shape[0] if spec.shape else 1) if prod(spec.shape) else 0


@st.composite
def cut_layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout, with a number of shards that it can be cut into."""
    given_specs = draw(specs)
    rows = sum(map(rows_of, given_specs))
    copied = draw(st.sets(st.sampled_from([spec.name for spec in given_specs])))
    most = 9 if any(spec.shape and rows_of(spec) for spec in given_specs) else max(1, min(rows, 9))
    return Layout(given_specs, copied), draw(st.integers(1, most))


def tensors_of(layout: Layout) -> dict[str, Tensor]:
    """Random tensors of this layout, as they are pushed."""
    return {e.name: torch.randn(e.shape).to(TORCH_DTYPES[e.dtype]) for e in layout.params}


def rows_in(whole: Tensor, box: tuple[tuple[int, int], ...]) -> Tensor:
    return whole[tuple(slice(*bounds) for bounds in box)] if box else whole


@given(cut_layouts())
def test_shards_make_the_whole(cut: tuple[Layout, int]) -> None:
    """A shard's canonical body holds its rows, bit for bit; all shards' data under one header are the whole body."""
    layout, shards = cut
    tensors, chart = tensors_of(layout), LayoutMap(layout, shards)
    data = bytearray()
    for shard in chart.shards:
        body = save({name: rows_in(tensors[name], box).contiguous() for name, box in shard.boxes.items()})
        assert body.startswith(shard.layout.header)
        assert len(data) == shard.params.start
        data += body[len(shard.layout.header) :]
        assert len(data) == shard.params.stop

    merged = chart.merged(layout.params)
    assert merged.header == layout.header
    assert merged.header + data == save(tensors)


@given(cut_layouts())
def test_merged_weights_are_those_of_the_whole(cut: tuple[Layout, int]) -> None:
    """A merged body of shadows, which lie otherwise than parameters do, is read by safetensors as the run's tensors."""
    layout, shards = cut
    tensors = {e.name: torch.randn(e.shape).to(TORCH_DTYPES[e.dtype]) for e in layout.shadows}
    chart, data = LayoutMap(layout, shards), b""
    for shard in chart.shards:
        assert [(e.name, e.dtype) for e in shard.layout.shadows] == [
            (name, str(next(e.dtype for e in layout.shadows if e.name == name))) for name in shard.boxes
        ]
        assert shard.shadows.stop - shard.shadows.start == shard.layout.shadow_bytes
        for name, box in shard.boxes.items():
            data += rows_in(tensors[name], box).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    merged = chart.merged(layout.shadows, {"format": "pt"})

    found = load(merged.header + data)

    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@given(cut_layouts())
def test_shards_are_even(cut: tuple[Layout, int]) -> None:
    """Each shard has as many bytes of the shadows as the others, give or take the largest row, and none has nothing
    where there is a row for each."""
    layout, shards = cut
    sizes = [shard.layout.shadow_bytes for shard in LayoutMap(layout, shards).shards]
    largest = max((e.end - e.begin) // max(1, rows_of(e.spec)) for e in layout.shadows)

    assert sum(sizes) == layout.shadow_bytes
    assert all(abs(size - layout.shadow_bytes / shards) <= largest for size in sizes)
    assert sum(map(bool, sizes)) == min(shards, sum(rows_of(e.spec) for e in layout.params))


@given(cut_layouts(), st.data())
def test_ranges_are_found_by_subtraction(cut: tuple[Layout, int], data: st.DataObject) -> None:
    """Any range of a merged body is some bytes of its header and of shards' data, in order; also of one that is
    cast."""
    layout, shards = cut
    dtype = data.draw(st.sampled_from([None, *LAYOUT_DTYPES]))
    entries = place((TensorSpec(e.name, e.shape, dtype or e.dtype) for e in layout.shadows), sort=False)
    merged = LayoutMap(layout, shards).merged(entries)
    body = merged.header + torch.randint(256, (entries[-1].end,), dtype=torch.uint8).numpy().tobytes()
    sources = {None: merged.header}
    for shard in range(shards):
        begin, end = merged.bounds[shard : shard + 2]
        sources[shard] = body[len(merged.header) + begin : len(merged.header) + end]
    start = data.draw(st.integers(0, merged.length))
    stop = data.draw(st.integers(start, merged.length))

    assert merged.length == len(body)
    assert body == b"".join(sources[span.shard][span.start : span.stop] for span in merged.spans())
    assert body[start:stop] == b"".join(sources[s.shard][s.start : s.stop] for s in merged.spans(start, stop))


@given(cut_layouts())
def test_shards_are_parts_of_the_whole(cut: tuple[Layout, int]) -> None:
    """What a shard has, where it has something, can be said as slices of the run's tensors, and the shards' claims
    cover each element once."""
    layout, shards = cut
    covers = {entry.name: Cover(entry.shape) for entry in layout.params}
    for shard in LayoutMap(layout, shards).shards:
        if any(not prod(box_shape(box)) and prod(layout.entry(n).shape) for n, box in shard.boxes.items()):
            continue
        sliced = {n: [box] for n, box in shard.boxes.items() if box_shape(box) != layout.entry(n).shape}
        header = parse_header(build_header(shard.layout.params, write_slices(sliced))[8:])
        for name, boxes in slices_of(header, layout).items():
            assert covers[name].claim(shard.place, boxes) is None

    assert all(covers[entry.name].whole for entry in layout.params)


@given(cut_layouts(), st.randoms())
def test_order_of_tensors_does_not_matter(cut: tuple[Layout, int], random: object) -> None:
    """The cuts follow from the layout, not from how it was given."""
    layout, shards = cut
    given_specs = [entry.spec for entry in layout.params]
    random.shuffle(given_specs)  # type: ignore[attr-defined]  # hypothesis has a random.Random of its own

    again = LayoutMap(Layout(given_specs, layout.copied), shards).shards

    assert [shard.boxes for shard in again] == [shard.boxes for shard in LayoutMap(layout, shards).shards]
    assert [shard.layout.copied for shard in again] == [
        tuple(name for name in layout.copied if name in shard.boxes) for shard in again
    ]


# --- examples ---------------------------------------------------------------------------------------------------------


def shards_of(shards: int, *given_specs: tuple[str, tuple[int, ...], str]) -> list[dict[str, tuple[int, ...]]]:
    chart = LayoutMap(Layout([TensorSpec(*spec) for spec in given_specs]), shards)
    return [{name: shard.layout.entry(name).shape for name in shard.boxes} for shard in chart.shards]


def test_tensor_larger_than_a_stretch_is_on_several_shards() -> None:
    """An embedding is cut by its rows, and what follows it shares the last of them."""
    assert shards_of(3, ("embedding", (80, 2), "F32"), ("head", (10,), "F32")) == [
        {"embedding": (28, 2)},
        {"embedding": (29, 2)},
        {"embedding": (23, 2), "head": (10,)},
    ]


def test_tensor_without_dimensions_is_one_row() -> None:
    """Scalars are counted, and not cut."""
    assert shards_of(2, ("a", (), "F32"), ("b", (), "F32")) == [{"a": ()}, {"b": ()}]


def test_empty_tensor_goes_with_what_is_before_it() -> None:
    """A tensor without elements has no row to cut at, and one place."""
    assert shards_of(2, ("a", (2,), "F32"), ("b", (0, 3), "F32"), ("c", (2,), "F32"), ("d", (7, 0), "F32")) == [
        {"a": (2,), "b": (0, 3)},
        {"c": (2,), "d": (7, 0)},
    ]


def test_bytes_are_those_of_shadows() -> None:
    """A bfloat16 parameter has a float32 shadow: hosts hold and average the same, not receive the same."""
    assert shards_of(2, ("a", (4,), "F32"), ("b", (4,), "BF16")) == [{"a": (4,)}, {"b": (4,)}]


def test_large_row_leaves_others_a_row() -> None:
    """Where one row has most of the bytes, each shard still has one."""
    assert shards_of(3, ("a", (1, 1000), "F32"), ("b", (2,), "F32")) == [{"a": (1, 1000)}, {"b": (1,)}, {"b": (1,)}]


def test_spans_of_an_example() -> None:
    """A range over the header's end and a cut has three sources."""
    layout = Layout([TensorSpec("a", (4,), "F32")])
    merged = LayoutMap(layout, 2).merged(layout.shadows)
    head = len(merged.header)

    assert list(merged.spans(head - 2, head + 9)) == [Span(None, head - 2, head), Span(0, 0, 8), Span(1, 0, 1)]


def test_fewer_rows_than_shards() -> None:
    """Each row is a shard's, and the shards that have none say of which tensor; what has no elements has its one place
    all the same."""
    assert shards_of(4, ("a", (), "F32"), ("b", (2, 5), "F32")) == [
        {"a": ()},
        {"b": (0, 5)},
        {"b": (1, 5)},
        {"b": (1, 5)},
    ]
    assert shards_of(3, ("a", (0, 2), "F32"), ("b", (1,), "F32")) == [{"a": (0, 2)}, {"b": (0,)}, {"b": (1,)}]


@pytest.mark.parametrize("shards", [0, -1, 4])
def test_more_shards_than_scalars(shards: int) -> None:
    """Of scalars alone no shard can have nothing, and the error says how many there are."""
    layout = Layout([TensorSpec(name, (), "F32") for name in "abc"] + [TensorSpec("d", (9, 0), "F32")])

    with pytest.raises(InvalidRequest, match=re.escape(f"shards: {shards}; the layout has 3 scalars")):
        LayoutMap(layout, shards)


def test_large_layout_is_cut_exactly() -> None:
    """Offsets beyond what float64 tells apart are cut at the right byte."""
    rows = (1 << 58) + 3
    chart = LayoutMap(Layout([TensorSpec("a", (rows,), "F32")]), 3)

    assert [shard.boxes["a"][0] for shard in chart.shards] == [
        (0, rows // 3),
        (rows // 3, (2 * rows + 1) // 3),
        ((2 * rows + 1) // 3, rows),
    ]
