"""Parts cut for the hosts of a run: any sharding of any layout over any number of ranks and hosts is the whole body,
each byte once; and a gateway that cuts while the part comes in sends the same.

Knows the safetensors library as the independent writer. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ema_client.errors import EmaError, LayoutMismatch
from ema_client.protocol import DIGEST_FOLLOWS, LAYOUT_DTYPES, TensorSpec
from ema_client.wire import LENGTH_BYTES, Box, cut_part, parse_header
from ema_service.bodies.slices import slices_of
from ema_service.cluster import LayoutMap
from ema_service.cluster.gateway.pushes import PartSplitting, Slice
from ema_service.memory import Layout
from ema_service.tensors import TORCH_DTYPES
from tests.service.cluster.ranks import bodies_of, digest_of
from tests.service.runs.gatherer import part_body, rows

SHAPES = st.lists(st.one_of(st.integers(0, 4), st.sampled_from([1, 7, 30])), max_size=3).map(tuple)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout, and a number of hosts that it can be cut for."""
    dtypes = st.sampled_from(list(LAYOUT_DTYPES))
    specs = [TensorSpec(f"t{i}", shape, draw(dtypes)) for i, shape in enumerate(draw(st.lists(SHAPES, min_size=1)))]
    count = sum((spec.shape[0] if spec.shape else 1) for spec in specs if prod(spec.shape))
    return Layout(specs), draw(st.integers(1, max(1, min(count, 6))))


def deal(draw: st.DrawFn, box: Box) -> list[Box]:
    """A box as it is, or cut in two somewhere along any dimension, each again."""
    axes = [axis for axis, (start, stop) in enumerate(box) if stop - start > 1]
    if not axes or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    start, stop = box[axis]
    middle = draw(st.integers(start + 1, stop - 1))
    halves = [(*box[:axis], bounds, *box[axis + 1 :]) for bounds in ((start, middle), (middle, stop))]
    return deal(draw, halves[0]) + deal(draw, halves[1])


@st.composite
def shardings(draw: st.DrawFn, layout: Layout) -> list[dict[str, list[Box]]]:
    """What each rank has: any slices, some ranks nothing."""
    ranks: list[dict[str, list[Box]]] = [{} for _ in range(draw(st.integers(1, 5)))]
    for entry in layout.params:
        if entry.end > entry.begin:
            for box in deal(draw, tuple((0, size) for size in entry.shape)):
                ranks[draw(st.integers(0, len(ranks) - 1))].setdefault(entry.name, []).append(box)
    return ranks


def values(layout: Layout) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {e.name: torch.randn(e.shape, generator=random).to(TORCH_DTYPES[e.dtype]) for e in layout.params}


def taken(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(*bounds) for bounds in box)]


def count(body: bytes, found: dict[str, Tensor], times: dict[str, Tensor], layout: Layout) -> None:
    """Put what a body for one host brings where it belongs, and count how often each element comes."""
    length = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
    header = parse_header(body[LENGTH_BYTES:length])
    for name, boxes in slices_of(header, layout).items():
        entry = next(each for each in header.entries if each.name == name)
        data = torch.frombuffer(bytearray(body[length + entry.begin : length + entry.end]), dtype=found[name].dtype)
        for box in boxes:
            size = prod(stop - start for start, stop in box)
            target = taken(found[name], box) if box else found[name]
            target.copy_(data[:size].view(target.shape))
            times[name][tuple(slice(*bounds) for bounds in box)] += 1
            data = data[size:]
        assert not len(data)


@given(st.data())
def test_the_parts_of_all_ranks_are_the_whole(data: st.DataObject) -> None:
    """Every host gets each element of its rows once, bit for bit, however ranks and hosts share the tensors."""
    layout, hosts = data.draw(runs())
    shards, tensors = LayoutMap(layout, hosts), values(layout)
    bodies = [bodies_of(part_body(tensors, each), shards) for each in data.draw(shardings(layout))]
    for shard in shards.shards:
        found = {e.name: torch.zeros(e.shape, dtype=TORCH_DTYPES[e.dtype]) for e in shard.layout.params}
        times = {name: torch.zeros(each.shape, dtype=torch.int) for name, each in found.items()}
        for body in bodies:
            count(body[shard.place], found, times, shard.layout)
        for name, box in shard.boxes.items():
            assert times[name].eq(1).all()
            assert torch.equal(found[name], taken(tensors[name], box) if box else tensors[name])


@given(st.data())
def test_a_gateway_sends_the_same(data: st.DataObject) -> None:
    """Cut while it comes in, in pieces of any size, with the digest of each host's body behind it."""
    layout, hosts = data.draw(runs())
    shards, tensors = LayoutMap(layout, hosts), values(layout)
    body = part_body(tensors, data.draw(shardings(layout))[0])
    size = data.draw(st.integers(1, 400))
    digest = digest_of(body)
    sent = split(shards, body + digest, size, DIGEST_FOLLOWS)
    for place, expected in enumerate(bodies_of(body, shards)):
        assert sent[place] == expected + digest_of(expected)
    assert split(shards, body, size, None) == dict(enumerate(bodies_of(body, shards)))


def split(shards: LayoutMap, body: bytes, size: int, digest: str | None) -> dict[int, bytes]:
    """What a gateway sends each host of a part that comes in pieces of ``size`` bytes."""
    sent: dict[int, bytes] = {}

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def send(part: Slice) -> None:
        sent[part.place] = b"".join([chunk async for chunk in part.body()])
        assert len(sent[part.place]) == part.length

    asyncio.run(PartSplitting(shards, send, len(body), digest).run(pieces()))
    return sent


WIDE = {"w": torch.arange(400.0).view(40, 10), "v": torch.ones(3)}
CUT = LayoutMap(Layout([TensorSpec("w", (40, 10), "F32"), TensorSpec("v", (3,), "F32")]), 3)


def test_a_rank_that_has_nothing_for_a_host() -> None:
    """That host is sent a part without tensors, for parts are counted at each host."""
    bodies = bodies_of(part_body(WIDE, {"w": [((0, 2), (0, 10))]}), CUT)
    assert [parse_header(body[LENGTH_BYTES:]).entries for body in bodies[1:]] == [(), ()]


@pytest.mark.parametrize(
    "body",
    [
        part_body({"x": torch.ones(3)}, {"x": [((0, 3),)]}),
        part_body({"w": torch.ones(50, 10)}, {"w": [((0, 50), (0, 10))]}),
        part_body({"w": torch.ones(50, 10)}, {"w": [((41, 50), (0, 10))]}),
    ],
)
def test_elements_that_the_run_does_not_have(body: bytes) -> None:
    """A tensor, or rows, that are no host's are refused before anything is sent."""
    with pytest.raises(LayoutMismatch):
        bodies_of(body, CUT)
    with pytest.raises(EmaError):
        split(CUT, body, 100, None)


def test_elements_that_two_hosts_have() -> None:
    """Hosts of two runs are taken for none."""
    body = part_body(WIDE, rows(WIDE, 0, 1))
    header = parse_header(body[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")])
    with pytest.raises(LayoutMismatch):
        cut_part(header, [{"w": (0, 30), "v": (0, 3)}, {"w": (20, 40)}])
