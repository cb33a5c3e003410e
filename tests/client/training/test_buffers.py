"""The buffers that updates are sent from: filled anew, in the wire's bytes, and guarded until the copies are there.

Knows tensors and bytes. Does not know threads or the service.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from ema_client.http.body import Body
from ema_client.tensors.body import encode
from ema_client.tensors.layout import specs_of
from ema_client.training import buffers as module
from ema_client.training.buffers import UpdateBuffers
from ema_client.training.device_copies import DeviceCopies
from ema_client.training.updates import Update

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tensors() -> dict[str, Tensor]:
    """In canonical order: every dtype, a 0-d, an empty, a transposed one."""
    shapes = {"wide": (3,), "a": (), "b": (0, 4), "c": (5, 7), "half": (2, 2), "small": (3,)}
    dtypes = {"wide": torch.float64, "half": torch.bfloat16, "small": torch.float16}
    made = {name: torch.randn(shape).to(dtypes.get(name, torch.float32)) for name, shape in shapes.items()}
    return made | {"c": torch.randn(7, 5).t()}


def buffers(state: dict[str, Tensor]) -> UpdateBuffers:
    return UpdateBuffers(specs_of(state), pinned=False)


def sent(update: Update) -> bytes:
    update.ready()
    raw = b"".join(update.body.pieces())
    assert len(raw) == update.body.length
    return raw


def values(state: dict[str, Tensor]) -> Sequence[Tensor]:
    return list(state.values())


def reference(state: dict[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in state.items()})


@pytest.mark.parametrize("borrow", [False, True])
def test_the_bytes_are_those_of_safetensors(borrow: bool) -> None:
    """Copied or borrowed, the body is what the reference implementation writes, as often as it is asked for."""
    state = tensors()
    maker = buffers(state)
    update = maker.borrowed(7, values(state)) if borrow else maker.copied(7, values(state), hooked=False)

    assert sent(update) == sent(update) == reference(state)
    assert (update.step, update.borrowed) == (7, borrow)


@pytest.mark.parametrize("slices", [None, {}, {"c": (((0, 7), (0, 5)),)}], ids=["whole", "part", "slices"])
@pytest.mark.parametrize("how", ["borrowed", "copied", "shared"])
def test_a_digest_goes_with_an_update(how: str, slices: Any) -> None:
    """As with a push of EmaClient's: a trainer's bytes cross the same wires."""
    small = tensors()
    state = {name: small[name] for name in ("wide", "a", "b", "c")} | {"large": torch.randn(400_000)} | small
    maker = UpdateBuffers(specs_of(state), pinned=False, slices=slices, shared=lambda: how == "shared")
    update = maker.borrowed(1, values(state)) if how == "borrowed" else maker.copied(1, values(state), hooked=False)
    expected = encode(state, slices)

    def digest_of(body: Body) -> bytes:
        assert body.digest is not None
        digest = body.digest()
        for piece in body.pieces():
            digest.update(piece)
        return digest.digest()

    assert sent(update) == b"".join(expected.pieces())
    assert digest_of(update.body) == digest_of(expected)
    assert (update.body.shared is not None) == (how == "shared")


def test_a_copy_keeps_its_values() -> None:
    """What the optimizer does afterwards is not sent."""
    state = tensors()
    update = buffers(state).copied(1, values(state), hooked=False)
    expected = reference(state)
    for tensor in state.values():
        tensor.add_(1)

    assert sent(update) == expected


def test_memory_is_used_again_only_when_it_is_given_back() -> None:
    """Two updates on their way have memory each; the third has that of the one that is done with."""
    state = tensors()
    maker = buffers(state)
    first, second = (maker.copied(step, values(state), hooked=False) for step in (1, 2))
    places = [memory_of(update) for update in (first, second)]
    first.done()
    third = maker.copied(3, values(state), hooked=False)

    assert places[0] != places[1]
    assert memory_of(third) == places[0]
    assert third.body.key != first.body.key, "hosts would take another update for the one before"


def memory_of(update: Update) -> int:
    import ctypes

    *_, data = update.body.pieces()
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def test_cast_initial_weights_warm_the_first_updates_memory() -> None:
    """Initial weights that are sent in another dtype lie where the first update will be copied to, and are right."""
    state = tensors()
    maker = buffers(state)
    narrow = [tensor.half() if tensor.dtype == torch.float32 else tensor for tensor in values(state)]
    warmed = maker.initial(narrow)
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(warmed, narrow, strict=True))
    update = maker.copied(1, values(state), hooked=False)
    assert warmed[3].data_ptr() >= memory_of(update) > 0
    assert warmed[3].data_ptr() < memory_of(update) + update.body.length


def test_new_memory_is_used_before_the_trainer_needs_it() -> None:
    """The copy of a first update finds its pages there: the system clears pages for another thread."""
    state = {"w": torch.ones(16 << 20)}
    maker = UpdateBuffers(specs_of(state), pinned=False, shared=lambda: True)
    maker.prepare()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    maker.copied(1, values(state), hooked=False)

    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 1000


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")
def test_memory_is_shared_once_somebody_is_near() -> None:
    """Hosts are found with the first update: the memory that came before them is given up, and none after that."""
    state, near = {"w": torch.ones(1 << 20)}, list[bool]()
    maker = UpdateBuffers(specs_of(state), pinned=False, shared=lambda: bool(near))
    first = maker.copied(1, values(state), hooked=False)
    near.append(True)
    first.done()
    second = maker.copied(2, values(state), hooked=False)
    second.done()
    third = maker.copied(3, values(state), hooked=False)

    assert first.body.shared is None
    assert second.body.shared is third.body.shared is not None


def test_whichever_memory_is_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another buffer is being made, an update takes the one that is given back meanwhile."""
    state = tensors()
    maker = buffers(state)
    first = maker.copied(1, values(state), hooked=False)
    place, may_go_on = memory_of(first), threading.Event()
    monkeypatch.setattr(module, "use_pages", lambda _: may_go_on.wait(30))
    threading.Timer(0.1, first.done).start()
    second = maker.copied(2, values(state), hooked=False)
    may_go_on.set()
    third = maker.copied(3, values(state), hooked=False)

    assert memory_of(second) == place != memory_of(third)


def test_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer is told, and the next update tries again."""
    state = tensors()
    maker = buffers(state)

    def none(_: Tensor) -> None:
        raise MemoryError("no memory for a buffer")

    with monkeypatch.context() as patch:
        patch.setattr(module, "use_pages", none)
        for _ in range(2):
            with pytest.raises(MemoryError, match="no memory for a buffer"):
                maker.copied(1, values(state), hooked=False)

    assert sent(maker.copied(1, values(state), hooked=False)) == reference(state)


def test_sent_as_another_dtype() -> None:
    """Values are cast as torch casts them, half the bytes."""
    state = {"w": torch.randn(50)}
    specs = specs_of({"w": state["w"].bfloat16()})
    update = UpdateBuffers(specs, pinned=False).copied(1, values(state), hooked=False)

    assert torch.equal(load(sent(update))["w"], state["w"].bfloat16())


def test_what_can_be_borrowed() -> None:
    """Memory on the CPU that holds the very bytes to be sent."""
    state = {"w": torch.randn(3)}
    assert buffers(state).can_borrow(values(state))
    assert not buffers(state).can_borrow([torch.randn(3, dtype=torch.float64)])
    assert not buffers(state).can_borrow([torch.randn(3, device="meta")])


@pytest.mark.parametrize(
    ("hooked", "borrow", "dtype", "borrowed"),
    [
        (True, True, torch.float32, True),
        (False, True, torch.float32, False),
        (True, False, torch.float32, False),
        (True, True, torch.float64, False),
    ],
    ids=["guarded", "without a guard", "not asked for", "cast"],
)
def test_when_an_update_is_borrowed(hooked: bool, borrow: bool, dtype: torch.dtype, borrowed: bool) -> None:
    """Where it is wanted, a hook guards the parameters, and they hold what is sent; else a copy is sent."""
    state = {"w": torch.randn(3)}
    update = buffers(state).update(1, [state["w"].to(dtype)], hooked=hooked, borrow=borrow)

    assert update.borrowed == borrowed
    assert sent(update) == reference(state)


def test_initial_weights_are_sent_from_where_they_lie() -> None:
    """Nothing changes them before the constructor returns, so they are not copied."""
    state = tensors()
    sent_as_they_lie = buffers(state).initial(values(state))

    assert all(one is other for one, other in zip(sent_as_they_lie, values(state), strict=True))


class FakeCopies(DeviceCopies):
    """Copies as a device would, of tensors on the CPU: the bytes are there when synchronize() says so."""

    def takes(self, _device: torch.device) -> bool:
        return True

    def start(self, _device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> FakeCopy:
        return FakeCopy(targets, [source.clone() for source in sources])


class FakeCopy:
    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        self.pairs = list(zip(targets, sources, strict=True))

    def synchronize(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_copy_under_way_is_waited_for(hooked: bool) -> None:
    """By the caller where nobody guards the parameters; else by the sender only, who finds the right bytes."""
    state = {"w": torch.randn(5)}
    maker = UpdateBuffers(specs_of(state), pinned=False, devices=FakeCopies())
    update = maker.copied(1, values(state), hooked=hooked)

    assert (b"".join(update.body.pieces()) == reference(state)) != hooked
    assert sent(update) == reference(state)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_copies_from_a_device(hooked: bool, shared: bool) -> None:
    """The bytes are those of before the step, though the step follows at once on the device's stream, and the device's
    memory is as before."""
    state = {"w": torch.randn(64 << 20, device="cuda"), "x": torch.randn(3, 5, device="cuda")}
    maker = UpdateBuffers(specs_of(state), pinned=True, shared=lambda: shared)
    maker.copied(1, values(state), hooked=False).done()
    expected = reference({name: tensor.cpu() for name, tensor in state.items()})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update = maker.copied(2, values(state), hooked=hooked)
    if hooked:
        maker.devices.before_step()
    for tensor in state.values():
        tensor.zero_()

    assert sent(update) == expected
    assert (update.body.shared is not None) == shared
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.gpu
@needs_cuda
def test_copies_to_pages_that_are_locked() -> None:
    """The device is asked and nobody waits for it; the pages are free again with the last that held them."""
    state = {"w": torch.randn(256 << 20, device="cuda")}
    maker = UpdateBuffers(specs_of(state), pinned=True)
    maker.copied(1, values(state), hooked=False).done()
    torch.cuda.synchronize()
    update = maker.copied(2, values(state), hooked=True)
    [copy] = maker.devices.latest.values()
    still_under_way = not copy.end().query()
    *_, data = update.body.pieces()
    flat = torch.frombuffer(data, dtype=torch.uint8)

    assert still_under_way
    assert flat.is_pinned()
    # Given up with the copy under way: the memory goes only once it is there.
    del update, maker, copy
    gc.collect()
    assert not flat.is_pinned()
    assert torch.equal(flat.view(torch.float32), state["w"].cpu())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("hooked", [False, True])
def test_parameters_on_several_devices(hooked: bool) -> None:
    """Those of each device are copied in its own way, into one update."""
    state = {"a": torch.randn(1 << 20), "b": torch.randn(1 << 20, device="cuda"), "c": torch.randn(3)}
    update = UpdateBuffers(specs_of(state), pinned=True).copied(1, values(state), hooked=hooked)

    assert sent(update) == reference({name: tensor.cpu() for name, tensor in state.items()})


@pytest.mark.gpu
@needs_cuda
def test_a_fork_while_copying() -> None:
    """A loader's worker that is forked off between copies takes nothing of them: the next one arrives here."""
    state = {"w": torch.zeros(1 << 20, device="cuda")}
    maker = UpdateBuffers(specs_of(state), pinned=True)
    for value in (1, 2, 3):
        state["w"].fill_(value)
        update = maker.copied(value, values(state), hooked=False)
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert load(sent(update))["w"].eq(value).all()
        os.waitpid(child, 0)
        update.done()
