"""The pass over a push: the same result however the push arrives.

Knows staged memory and arenas. Does not know runs, threads or sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import NonFinite
from ema_client.protocol import TensorSpec
from ema_service.averaging import BlockDigest, Digest
from ema_service.memory import Layout, Memory, Staged
from ema_service.memory.arena import Arena
from ema_service.memory.staging import Shared
from ema_service.shadows.passes import Feed, Grain, pass_over
from ema_service.tensors import TORCH_DTYPES, tensor_of

WEIGHTS = (0.25, 0.8)

Model = Callable[[int], dict[str, Tensor]]


@pytest.fixture
def memory() -> Memory:
    return Memory("cpu", keep_bytes=1 << 20)


def data_of(tensors: dict[str, Tensor]) -> bytes:
    body = save(tensors)
    return body[8 + int.from_bytes(body[:8], "little") :]


class Push:
    """A push to two averages, arriving in parts: only what has arrived is in memory, the rest is rubbish.

    ahead: how many bytes the receiving is ahead of the pass.
    """

    def __init__(
        self,
        layout: Layout,
        memory: Memory,
        tensors: dict[str, Tensor],
        shadow: Arena,
        *,
        ahead: int = 0,
        grain: Grain | None = None,
    ) -> None:
        self._ahead = ahead
        self._data = data_of(tensors)
        self._staged = Staged(layout, memory)
        self._staged.data[:] = b"\xff" * len(self._data)
        self._arrived = 0
        self.outs = [memory.new_arena(layout), self._staged.arena]
        feeds = [Feed(out, shadow, weight) for out, weight in zip(self.outs, WEIGHTS, strict=True)]
        self._pass = pass_over(self._staged, feeds, check=True, grain=grain)

    def arrive(self, count: int) -> None:
        arrived = min(count + self._ahead, len(self._data))
        self._staged.data[self._arrived : arrived] = self._data[self._arrived : arrived]
        self._arrived = arrived
        self._pass.advance(count)

    def finish(self) -> tuple[bytes, list[bytes]]:
        """The digest, and the bytes of each average."""
        self._staged.data[self._arrived :] = self._data[self._arrived :]
        return self._pass.finish(), [out.tensor.numpy().tobytes() for out in self.outs]


@given(
    parts=st.lists(st.integers(0, 500), max_size=12),
    piece=st.sampled_from([8, 24, 1 << 18]),
    ahead=st.sampled_from([0, 1, 50, 500]),
)
@example(parts=[166], piece=1 << 18, ahead=500)  # in the middle of the last float32 but one, before bf16
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_result_does_not_depend_on_how_it_arrives(
    parts: list[int], piece: int, ahead: int, model: Model, layout_of: Callable[..., Layout], memory: Memory
) -> None:
    """Worked through in any parts, cut anywhere, digest and averages are those of the whole, bit for bit."""
    layout = layout_of(model(0))
    shadow = memory.new_arena(layout)
    shadow.tensor.zero_()
    whole = Push(layout, memory, model(1), shadow).finish()

    push = Push(layout, memory, model(1), shadow, ahead=ahead, grain=Grain(piece=piece))
    for count in sorted(min(part, layout.param_bytes) for part in parts):
        push.arrive(count)

    assert push.finish() == whole


def test_every_byte_may_be_the_last_of_a_part(model: Model, layout_of: Callable[..., Layout], memory: Memory) -> None:
    """Arriving byte by byte, through all dtypes, gives the same as the whole at once."""
    layout = layout_of(model(0))
    shadow = memory.new_arena(layout)
    shadow.tensor.zero_()
    push = Push(layout, memory, model(1), shadow)
    for count in range(layout.param_bytes):
        push.arrive(count)

    assert push.finish() == Push(layout, memory, model(1), shadow).finish()


@pytest.mark.parametrize(("piece", "block"), [(1024, 2048), (1024, 1 << 20)])
def test_copied_tensors_are_the_parameters(
    piece: int, block: int, layout_of: Callable[..., Layout], memory: Memory
) -> None:
    """In every average, however they arrive, they are the pushed bits, widened; averages of the others, and the digest,
    are as ever, with blocks of it that are averaged, copied, or both."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    tensors = {f"{n}.{dtype}": torch.linspace(-n, 3.0, 1501).to(dtype) for n in range(1, 5) for dtype in dtypes}
    averaged = layout_of(tensors)
    mixed = Layout([entry.spec for entry in averaged.params], [entry.name for entry in averaged.params[::2]])
    shadow = memory.new_arena(averaged)
    shadow.tensor.zero_()
    grain = Grain(piece=piece, block=block)
    whole, push = (
        Push(layout, memory, tensors, Arena(layout, shadow.tensor), grain=grain) for layout in (averaged, mixed)
    )
    for count in range(0, mixed.param_bytes, 777):
        push.arrive(count)
    (digest, plain), (same, found) = whole.finish(), push.finish()

    assert digest == same
    for result, without in zip(found, plain, strict=True):
        for entry in mixed.shadows:
            param = tensors[entry.name].to(TORCH_DTYPES[entry.dtype]).numpy().tobytes()
            expected = param if entry.name in mixed.copied else without[entry.begin : entry.end]
            assert result[entry.begin : entry.end] == expected, entry.name


def test_what_is_made_ends_at_whole_pieces(layout_of: Callable[..., Layout], memory: Memory) -> None:
    """However a push arrives, its results are told of by whole pieces: the disk takes whole pages, and only those."""
    layout = layout_of({"w": torch.zeros(100)})
    shadow = memory.new_arena(layout)
    shadow.tensor.zero_()
    staged, told = Staged(layout, memory), []
    staged.data[:] = bytes(layout.param_bytes)
    feed = Feed(staged.arena, shadow, 0.5, lambda _, upto, _start: told.append(upto))
    work = pass_over(staged, [feed], check=True, grain=Grain(piece=64))
    for received in range(7, layout.param_bytes, 7):
        work.advance(received)
    work.finish()

    assert told == [*range(64, layout.param_bytes, 64), layout.param_bytes]


class Stretches:
    """What follows a result that is averaged in stretches: puts together what it was told, as a slot does."""

    def __init__(self, nbytes: int) -> None:
        self.kept = bytearray(nbytes)
        self._told: dict[int, int] = {}

    def __call__(self, data: memoryview, upto: int, start: int) -> None:
        begun = self._told.get(start, start)
        begin = begun if begun <= upto else start  # the stretch begins again
        self.kept[begin:upto], self._told[start] = data[begin:upto], upto


BLOCK = 2048
OF_DTYPES = {
    "float32": {torch.float32: 5000},
    "bf16": {torch.bfloat16: 9001},
    "fp16": {torch.float16: 9001},
    "float64 and float32": {torch.float64: 1500, torch.float32: 3001},
    "narrow and not": {torch.float32: 2901, torch.bfloat16: 3001, torch.float16: 2111},
}


class Apart:
    """A pass over parameters of several dtypes that are averaged apart, and what follows its results."""

    def __init__(self, sizes: dict[torch.dtype, int], copied: bool, memory: Memory) -> None:
        source = torch.Generator().manual_seed(0)
        tensors = {
            f"{dtype}.{name}": torch.randn(size, generator=source).to(dtype)
            for dtype, size in sizes.items()
            for name in "ab"
        }
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        specs = [TensorSpec(name, tuple(tensor.shape), names[tensor.dtype]) for name, tensor in tensors.items()]
        layout = Layout(specs)
        self.layout = Layout(specs, [entry.name for entry in layout.params[::2]] * copied)
        self.data = data_of(tensors)
        shadow = memory.new_arena(self.layout)
        for index in range(len(self.layout.sections)):
            tensor_of(shadow.section(index)).copy_(torch.linspace(-2, 2, len(shadow.section(index))))
        self.staged = Staged(self.layout, memory)
        self.staged.region().data[:] = b"\xff" * len(self.data)
        self._follow = [Stretches(self.layout.shadow_bytes) for _ in WEIGHTS]
        outs = memory.new_arena(self.layout), self.staged.arena
        feeds = [Feed(*each) for each in zip(outs, (shadow, shadow), WEIGHTS, self._follow, strict=True)]
        grain = Grain(piece=BLOCK // 2, block=BLOCK)
        self.work = pass_over(self.staged, feeds, check=True, measure=True, grain=grain)

    def found(self) -> list[bytes]:
        """Digests, averages, and what was kept of these."""
        outs = [feed.out for feed in self.work.feeds]
        digests = [self.work.finish(), *(out.digest or b"" for out in outs)]
        return [*digests, *(out.host.tobytes() for out in outs), *(bytes(each.kept) for each in self._follow)]

    def stretch(self, bounds: tuple[int, int], share: float = 1.0) -> None:
        stretch, data = self.work.stretch(*bounds), self.data[slice(*bounds)]
        count = int(len(data) * share)
        stretch.data[:count] = data[:count]
        stretch.advance(bounds[0] + count)
        if share == 1.0:
            stretch.finish()
            assert stretch.digest() == digest_of(data, BLOCK)

    def part(self, blocks: range, data: bytes, *, average: bool = True) -> None:
        latest = None
        for start in blocks:
            self.staged.region(start, min(start + BLOCK, len(data))).data[:] = data[start : start + BLOCK]
            if average:
                latest = self.work.block(start, latest)
                latest.finish()


def in_stretches(push: Apart) -> list[bytes]:
    """At once, some of them twice."""
    bounds = [(start, min(start + 3 * BLOCK, len(push.data))) for start in range(0, len(push.data), 3 * BLOCK)]
    for each in bounds[::2]:
        push.stretch(each, 0.7)
    with ThreadPoolExecutor(4) as lanes:
        list(lanes.map(push.stretch, reversed(bounds)))
    return push.found()


def in_blocks(push: Apart) -> list[bytes]:
    """By three parts: of one all blocks are forgotten and come again, of another all are averaged in the end."""
    parts = [range(number * BLOCK, len(push.data), 3 * BLOCK) for number in range(3)]
    push.part(parts[0], bytes(len(push.data)))
    for start in parts[0]:
        push.work.forget(start)
    with ThreadPoolExecutor(4) as lanes:
        list(lanes.map(push.part, parts[:2], [push.data] * 2))
        push.part(parts[2], push.data, average=False)
        push.staged.divide(lanes)
        return push.found()


@pytest.mark.parametrize("sizes", OF_DTYPES.values(), ids=OF_DTYPES)
@pytest.mark.parametrize("copied", [False, True], ids=["averaged", "copied"])
@pytest.mark.parametrize("apart", [in_stretches, in_blocks])
def test_stretches_are_the_whole(
    apart: Callable[[Apart], list[bytes]], sizes: dict[torch.dtype, int], copied: bool, memory: Memory
) -> None:
    """Averaged apart, in any order: digests, averages, what is kept of them and their distances are those of the
    parameters as one stretch, bit for bit."""
    one, push = (Apart(sizes, copied, memory) for _ in range(2))
    one.staged.data[:] = one.data
    whole = one.found()

    assert apart(push) == whole
    assert whole[5:] == whole[3:5]
    torch.testing.assert_close(push.work.squares(), one.work.squares(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_layouts_whose_stretches_do_not_fit(layout_of: Callable[..., Layout]) -> None:
    """float64 beside a dtype that widens: parameters of a stretch would lie at addresses that float64 cannot have."""
    for sizes in OF_DTYPES.values():
        assert layout_of({str(dtype): torch.zeros(4).to(dtype) for dtype in sizes}).divisible
    for narrow in (torch.bfloat16, torch.float16):
        assert not layout_of({"a": torch.zeros(3).double(), "b": torch.zeros(3).to(narrow)}).divisible


def test_averages_are_litemas(model: Model, layout_of: Callable[..., Layout], memory: Memory) -> None:
    """Each average is shadow - weight * (shadow - param) in the shadow's dtype; the shadow stays as it was."""
    layout = layout_of(model(0))
    shadow = memory.new_arena(layout)
    for index in range(len(layout.sections)):
        tensor_of(shadow.section(index)).copy_(torch.linspace(-2, 2, len(shadow.section(index))))
    before = shadow.tensor.clone()
    push = Push(layout, memory, model(1), shadow)
    push.finish()

    params = data_of(model(1))
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    for index, (section, dtype) in enumerate(zip(layout.sections, dtypes, strict=True)):
        param = torch.frombuffer(bytearray(params[section.param]), dtype=dtype)
        old = tensor_of(shadow.section(index))
        for out, weight in zip(push.outs, WEIGHTS, strict=True):
            assert torch.equal(
                tensor_of(out.section(index)), old - torch.tensor(weight, dtype=old.dtype) * (old - param.to(old.dtype))
            )
    assert torch.equal(shadow.tensor, before)


@pytest.mark.parametrize("shared", [False, True], ids=["received", "in shared memory"])
@pytest.mark.parametrize("averages", [0, 1, 2])
def test_digest_is_xxh3_of_blocks(
    averages: int, shared: bool, layout_of: Callable[..., Layout], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever works it out. Blocks that are whole and of one dtype are left to the averaging, others to the library. So
    are those of all results that are followed, where they are of the same bytes as the parameters.
    """
    block, given, followed = 4096, [], []
    to_library = BlockDigest.update
    monkeypatch.setattr(BlockDigest, "update", lambda it, data: (given.append(len(data)), to_library(it, data)))
    to_stream = Digest.update
    monkeypatch.setattr(Digest, "update", lambda it, data: (followed.append(len(data)), to_stream(it, data)))
    random = torch.Generator().manual_seed(0)
    sizes = {torch.float64: 700, torch.float32: 6000, torch.bfloat16: 9001, torch.float16: 5}
    tensors = {str(dtype): torch.randn(size, generator=random).to(dtype) for dtype, size in sizes.items()}
    layout, data = layout_of(tensors), data_of(tensors)
    shadow = memory.new_arena(layout)
    shadow.tensor.zero_()
    staged = Staged(layout, memory)
    staged.data[:] = data
    outs = [memory.new_arena(layout), staged.arena][2 - averages :]
    feeds = [Feed(out, shadow, 0.5, lambda *_: None) for out in outs]

    with ThreadPoolExecutor(2) as helpers:
        if shared:
            apart = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone().numpy().data
            assert staged.adopt(Shared(apart, lambda: None, helpers), 0)
            feeds = [Feed(memory.new_arena(layout), shadow, 0.5, feed.sink) for feed in feeds]
        made = pass_over(staged, feeds, check=False, grain=Grain(piece=block // 2, block=block)).finish()

    assert made == digest_of(data, block)
    assert [feed.out.digest for feed in feeds] == [
        digest_of(feed.out.tensor.numpy().tobytes(), block) for feed in feeds
    ]
    averaged = [s.param for s in layout.sections if s.param_dtype in ("F32", "BF16")]
    whole = [b for b in range(0, len(data), block) if any(s.start <= b and b + block <= s.stop for s in averaged)]
    assert len(whole) > 6
    assert sum(given) == len(data) - (len(whole) * block if averages else 0)
    [same] = [s.param for s in layout.sections if s.param_dtype == "F32" and s.param == s.shadow]
    whole = [start for start in whole if same.start <= start and start + block <= same.stop]
    assert len(whole) > 4
    assert sum(followed) == averages * (layout.shadow_bytes - len(whole) * block)
    for feed in feeds:
        for index, dtype in enumerate(sizes):
            assert torch.equal(
                tensor_of(feed.out.section(index)), tensors[str(dtype)].to(tensor_of(feed.out.section(index)).dtype) / 2
            )


@pytest.mark.parametrize("piece", [1024, 1536, 5000])
def test_digest_of_results_that_arrive(piece: int, layout_of: Callable[..., Layout], memory: Memory) -> None:
    """In any pieces; and of nobody's results, unless someone follows them."""
    tensors = {"a": torch.linspace(-1, 1, 3001), "b": torch.linspace(5, 6, 777).bfloat16()}
    layout = layout_of(tensors)
    shadow = memory.new_arena(layout)
    shadow.tensor.zero_()
    staged = Staged(layout, memory)
    staged.data[:] = data_of(tensors)
    alone, out = memory.new_arena(layout), staged.arena
    feeds = [Feed(alone, shadow, 0.5), Feed(out, shadow, 0.25, lambda *_: None)]
    work = pass_over(staged, feeds, check=True, grain=Grain(piece=1024, block=2048))
    for received in range(0, layout.param_bytes, piece):
        work.advance(received)
    work.finish()

    assert alone.digest is None
    assert out.digest == digest_of(out.tensor.numpy().tobytes(), 2048)


def digest_of(data: bytes, block: int) -> bytes:
    blocks = [data[start : start + block] for start in range(0, len(data), block)]
    return xxhash.xxh3_128_digest(b"".join(map(xxhash.xxh3_128_digest, blocks)))


def test_digest_is_of_the_parameters(model: Model, layout_of: Callable[..., Layout], memory: Memory) -> None:
    """One bit changed anywhere gives another digest; the averages it feeds do not matter."""
    layout = layout_of(model(0))

    def digest(data: bytes, *feeds: Feed) -> bytes:
        staged = Staged(layout, memory)
        staged.data[:] = data
        return pass_over(staged, feeds, check=False).finish()

    data = data_of(model(0))
    flipped = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(0, len(data), 7)]
    assert len({digest(each) for each in [data, *flipped]}) == len(flipped) + 1
    assert digest(data) == digest(data, Feed(memory.new_arena(layout), None, 0.0))


def test_non_finite_names_a_few_tensors(memory: Memory) -> None:
    """The refusal names the first five tensors that hold NaN or Inf and counts the rest."""
    tensors = {f"t{i}": torch.full((2,), float("nan") if i else 1.0) for i in range(9)}
    staged = Staged(_layout(tensors), memory)
    staged.data[:] = data_of(tensors)

    with pytest.raises(NonFinite, match="NaN or Inf in t1, t2, t3, t4, t5 and 3 more"):
        pass_over(staged, [Feed(staged.arena, None, 0.0)], check=True).finish()


def _layout(tensors: dict[str, Tensor]) -> Layout:
    return Layout([TensorSpec(name, tuple(tensor.shape), "F32") for name, tensor in tensors.items()])
