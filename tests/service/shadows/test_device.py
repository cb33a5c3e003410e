"""Shadows that do not lie in the host's memory: the same results, and kept as those of the host are.

Most of it runs twice: on a GPU, where there is one, and on a device that is none, whose memory is the host's but whose
work is done once someone waits for it.

Knows runs, arenas and the pass. Does not know sockets.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import NonFinite, Overloaded
from ema_client.protocol import AverageConfig, TensorSpec
from ema_service.averaging import Digest, averaging
from ema_service.memory import Layout, Memory, Staged
from ema_service.memory.staging import Region, Shared
from ema_service.persistence import Versions
from ema_service.shadows import passes
from ema_service.shadows.passes import Feed, Grain, pass_over
from ema_service.tensors import tensor_of
from tests.service.elsewhere import Elsewhere, Mark
from tests.waiting import wait_until

Model = Callable[[int], dict[str, Tensor]]

#: Parameters of every dtype; the float32 ones come in many pieces.
SIZES = {"F64": 700, "F32": 60_000, "BF16": 9001, "F16": 5}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(
    params=[
        Elsewhere,
        pytest.param(
            lambda: Memory("cuda", keep_bytes=1 << 24),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
            id="cuda",
        ),
    ]
)
def new_memory(request: pytest.FixtureRequest) -> Callable[[], Memory]:
    return request.param  # type: ignore[no-any-return]


GRAIN = Grain(piece=1024, device_piece=4096)


def tensors_of(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=random).to(DTYPES[name]) for name, size in SIZES.items()}


LAYOUT = Layout(tuple(TensorSpec(name, (size,), name) for name, size in SIZES.items()))


def staged_in(memory: Memory, tensors: dict[str, Tensor]) -> Staged:
    staged = Staged(LAYOUT, memory)
    body = save(tensors)
    staged.data[:] = body[8 + int.from_bytes(body[:8], "little") :]
    return staged


class Follower:
    """Keeps the bytes it is told of, at the time it is told."""

    def __init__(self) -> None:
        self.data = bytearray()

    def __call__(self, data: memoryview, upto: int, _start: int) -> None:
        self.data += data[len(self.data) : upto]


def averaged(
    memory: Memory, follow: Callable[[memoryview, int, int], None] | None
) -> tuple[bytes, bytes, bytes | None]:
    """The result, the digest of the parameters and of the result: of a push that arrives piece by piece."""
    first = Staged(LAYOUT, memory)
    first.data[:] = staged_in(memory, tensors_of(1)).data
    pass_over(first, [Feed(first.arena, None, 0.0)], check=True, grain=GRAIN).finish()
    staged = staged_in(memory, tensors_of(2))
    work = pass_over(staged, [Feed(staged.arena, first.arena, 0.25, follow)], check=True, grain=GRAIN)
    for received in range(0, LAYOUT.param_bytes, 10_007):
        work.advance(received)
    digest = work.finish()
    return staged.arena.tensor.cpu().numpy().tobytes(), digest, staged.arena.digest


def test_equals_the_host(new_memory: Callable[[], Memory]) -> None:
    """Bit for bit, with the same digests; who follows a result is told of every byte of it, as it is."""
    host, on_host = Follower(), Memory("cpu")
    device = Follower()

    assert averaged(new_memory(), device) == averaged(on_host, host)
    assert device.data == host.data
    assert averaged(new_memory(), None)[2] is None


def test_measured(new_memory: Callable[[], Memory]) -> None:
    """On a device, too, the squares of each tensor are those of float64, and the results the same bits."""
    memory, shadow, params = new_memory(), tensors_of(1), tensors_of(2)
    first, staged = staged_in(memory, shadow), staged_in(memory, params)
    pass_over(first, [Feed(first.arena, None, 0.0)], check=True, grain=GRAIN).finish()
    work = pass_over(staged, [Feed(staged.arena, first.arena, 0.25)], check=True, measure=True, grain=GRAIN)
    work.finish()
    found = work.squares()

    assert staged.arena.tensor.cpu().numpy().tobytes() == averaged(memory, None)[0]
    assert found is not None
    for index, (entry, sums) in enumerate(zip(LAYOUT.params, found, strict=True)):
        # Each tensor of this layout is a section of its own.
        made, given = tensor_of(staged.arena.section(index)).cpu().double(), params[entry.name].double()
        wanted = [float(each.square().sum()) for each in (made - given, given, made)]
        assert sums.tolist() == pytest.approx(wanted, rel=1e-6), entry.name


def test_shared_memory(new_memory: Callable[[], Memory]) -> None:
    """Taken from where it lies, by many threads, where no result overwrites what others still read; else copied."""
    memory, tensors = new_memory(), {"F32": tensors_of(2)["F32"]}
    layout = Layout((TensorSpec("F32", (SIZES["F32"],), "F32"),))
    apart = memoryview(bytearray(tensors["F32"].numpy().tobytes()))
    oracle = three_roundings(torch.zeros(SIZES["F32"]), tensors["F32"], 0.25)

    with ThreadPoolExecutor(3) as helpers:
        shared = Shared(apart, lambda: None, helpers)
        assert not Staged(LAYOUT, memory).adopt(shared, 0)
        staged, shadow, follower = Staged(layout, memory), memory.new_arena(layout), Follower()
        shadow.tensor.zero_()
        assert staged.adopt(shared, 0)
        pass_over(staged, [Feed(staged.arena, shadow, 0.25, follower)], check=True, grain=GRAIN).finish()

    assert torch.equal(tensor_of(staged.arena.section(0)).cpu(), oracle)
    assert follower.data == oracle.numpy().tobytes()


def three_roundings(shadow: Tensor, param: Tensor, weight: float) -> Tensor:
    return shadow - weight * (shadow - param)


def test_told_once_it_is_there() -> None:
    """Not of a byte whose copy is still under way; and of what has arrived while the push goes on."""
    memory, told = Elsewhere(), []

    def follow(_: memoryview, upto: int, _start: int) -> None:
        told.append((upto, sum(mark.passed for mark in memory.marks)))

    staged, shadow = staged_in(memory, tensors_of(1)), memory.new_arena(LAYOUT)
    work = pass_over(staged, [Feed(staged.arena, shadow, 0.25, follow)], check=False, grain=GRAIN)
    work.advance(100_000)
    wait_until(lambda: told and all(mark.passed for mark in memory.marks))
    before_the_end = len(told)
    work.finish()

    assert before_the_end > 20
    assert told[-1][0] == LAYOUT.shadow_bytes
    assert all(passed >= number for number, (_, passed) in enumerate(told, 1))


def test_given_up_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a result that nobody wants any more is lent to others only once no copy to it is under way."""
    memory = Elsewhere()
    staged, shadow = staged_in(memory, tensors_of(1)), memory.new_arena(LAYOUT)
    lent, take_back = [], memory.pool._take_back
    monkeypatch.setattr(memory.pool, "_take_back", lambda raw: (lent.append(memory.marks[-1].passed), take_back(raw)))
    memory.may_go_on.clear()
    work = pass_over(staged, [Feed(staged.arena, shadow, 0.25, Follower())], check=False, grain=GRAIN)
    work.advance(100_000)
    del work, staged
    gc.collect()
    lent_too_early = list(lent)
    memory.may_go_on.set()
    wait_until(lambda: lent)

    assert lent_too_early == []
    assert lent == [True]


@pytest.mark.parametrize("at", [0, 30_000, 59_999])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_finds_one_bad_value(at: int, value: float, new_memory: Callable[[], Memory]) -> None:
    """Wherever it is: the update is refused with the tensor's name. Without the check it is not."""
    memory, tensors = new_memory(), tensors_of(1)
    tensors["F32"][at] = value

    staged = staged_in(memory, tensors)
    with pytest.raises(NonFinite, match="F32"):
        pass_over(staged, [Feed(staged.arena, None, 0.0)], check=True, grain=GRAIN).finish()
    staged = staged_in(memory, tensors)
    pass_over(staged, [Feed(staged.arena, None, 0.0)], check=False, grain=GRAIN).finish()


@pytest.mark.parametrize("durability", ["process", "disk", "memory"])
def test_kept(
    durability: str,
    new_memory: Callable[[], Memory],
    local_server: Callable[..., Any],
    litema: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Versions are written behind the averaging, and come back to the device; snapshots too, and what they rewind."""
    server = local_server(new_memory=new_memory)
    run = server.create("r", tensors_of(0), durability=durability)
    run.begin(tensors_of(0))
    oracle = litema({"F32": tensors_of(0)["F32"]})
    if durability != "memory":
        monkeypatch.delattr(Versions, "_write_whole")
    for step in range(1, 6):
        run.push(step, tensors_of(step))
        oracle.update({"F32": tensors_of(step)["F32"]})
        if step == 3:
            server.snapshot("third")
    before = {name: value.cpu().clone() for name, value in run.shadows().items()}
    digest = run.state.arenas[0].digest
    if durability == "memory":
        server.stop()
    else:
        server.crash()
    server.start()
    again = server.run("r")

    assert torch.equal(before["F32"], oracle.shadow["F32"])
    assert same({name: value.cpu() for name, value in again.shadows().items()}, before)
    assert again.state.arenas[0].digest == (digest or again.state.arenas[0].digest)
    whole = Digest()
    whole.update(again.state.arenas[0].tensor.cpu().numpy().data)
    assert again.state.arenas[0].digest == whole.digest()
    monkeypatch.undo()
    server.registry.rewind("r", "third")
    assert not same({name: value.cpu() for name, value in again.shadows().items()}, before)
    again.push(100, tensors_of(100))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- a device without memory ------------------------------------------------------------------------------------------

FAULTS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call"),
]


class Full(Elsewhere):
    """A device that refuses work of one kind, once it is told of a fault."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fault: Exception | None = None

    def check(self, kind: str) -> None:
        if self.fault is not None and kind == self.kind:
            raise self.fault

    def empty(self, nbytes: int) -> Tensor:
        self.check("allocate")
        return super().empty(nbytes)

    def mark(self) -> Mark:
        self.check("mark")
        return super().mark()


@pytest.mark.parametrize("fault", FAULTS, ids=["of tensors", "of anything else"])
@pytest.mark.parametrize("kind", ["allocate", "mark", "averaging", "finite"])
def test_update_without_memory(
    kind: str,
    fault: Exception,
    local_server: Callable[..., Any],
    litema: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told to come again, wherever memory is missing; nothing has changed, and another try is like the first."""
    memory = Full(kind)
    server = local_server(new_memory=lambda: memory)
    run = server.create("r", tensors_of(0), durability="process", averages=(AverageConfig(), AverageConfig("slow")))
    run.begin(tensors_of(0))
    oracle = litema({"F32": tensors_of(0)["F32"]})

    def refusing(*arguments: Any, **options: Any) -> Callable[[int, int], bool]:
        kernel = averaging(*arguments, **options)

        def refuse(start: int, stop: int) -> bool:
            memory.check("averaging")
            return kernel(start, stop)

        return refuse

    def looked_at(values: Tensor) -> bool:
        memory.check("finite")
        return bool(values.isfinite().all())

    monkeypatch.setattr(passes, "averaging", refusing)
    monkeypatch.setattr(passes, "finite", looked_at)
    for step in (1, 2):
        before = run.version
        memory.fault = fault
        for _ in range(2):
            with pytest.raises(Overloaded, match="out of memory"):
                run.push(step, tensors_of(step))
        memory.fault = None
        assert run.version == before
        assert run.push(step, tensors_of(step)).applied
        oracle.update({"F32": tensors_of(step)["F32"]})

    assert torch.equal(run.shadows()["F32"], oracle.shadow["F32"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_full_gpu(local_server: Callable[..., Any]) -> None:
    """The same on a real GPU: without room for an update, and with room for no more than the update's own memory."""
    server = local_server(new_memory=lambda: Memory("cuda", keep_bytes=1 << 24))
    before = {"F32": torch.randn(64 << 20)}
    run = server.create("r", before, durability="memory", averages=(AverageConfig(), AverageConfig("slow")))
    run.begin(before)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        # 256 MiB each: a push takes its own memory and a new arena for the second average.
        for room in (64 << 20, 300 << 20):
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
            with pytest.raises(Overloaded, match="out of memory"):
                run.push(1, before)
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert run.push(1, before).applied


def test_push_that_broke_off_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that was averaged by half is not averaged again, though memory came free before the last byte."""
    memory = Elsewhere()
    staged, shadow = staged_in(memory, tensors_of(1)), memory.new_arena(LAYOUT)
    work = pass_over(staged, [Feed(staged.arena, shadow, 0.25)], check=False, grain=GRAIN)
    with monkeypatch.context() as full:

        def none(*_: Any) -> None:
            raise FAULTS[0]

        full.setattr(Region, "upload", none)
        with pytest.raises(Overloaded, match="CUDA out of memory"):
            work.advance(100_000)

    for _ in range(2):
        with pytest.raises(Overloaded, match="broke off"):
            work.finish()


def test_defects_are_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else a device says is not told to come again."""
    memory = Elsewhere()
    staged = staged_in(memory, tensors_of(1))

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Region, "upload", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pass_over(staged, [Feed(staged.arena, None, 0.0)], check=False, grain=GRAIN).finish()


def test_nothing_to_copy_a_version_to(local_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is tried again, and the run tells; a reader is told to come again, and holds nothing."""
    memory = Elsewhere()
    server = local_server(new_memory=lambda: memory)
    run = server.create("r", tensors_of(0), durability="memory")
    run.begin(tensors_of(0))
    frozen = server.registry.frozen
    arena = run.state.arenas[0]

    def none(_: int) -> Tensor:
        raise MemoryError("no memory")

    with monkeypatch.context() as full:
        full.setattr(memory.pool, "lend", none)
        server.registry.checkpoint()
        assert run.info.status == "degraded"
        assert "no memory" in str(run.info.reason)
        with pytest.raises(Overloaded, match="no memory"):
            frozen.acquire(arena)
        assert frozen.bytes_in_use == 0
    server.registry.checkpoint()

    assert run.info.status == "ready"
