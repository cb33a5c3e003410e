"""The memory that updates lie in: filled anew, as the wire wants it, and what a step of an optimizer waits for.

Knows tensors and bytes. Does not know threads or the service.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from ema_client.tensors.layout import specs_of
from ema_client.training.buffers import DeviceCopies, Sending, StepHook, _Asked
from ema_client.training.publisher import Update

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tensors() -> dict[str, Tensor]:
    """In canonical order: every dtype, a 0-d, an empty, a transposed one."""
    shapes = {"wide": (3,), "a": (), "b": (0, 4), "c": (5, 7), "half": (2, 2), "small": (3,)}
    dtypes = {"wide": torch.float64, "half": torch.bfloat16, "small": torch.float16}
    made = {name: torch.randn(shape).to(dtypes.get(name, torch.float32)) for name, shape in shapes.items()}
    return made | {"c": torch.randn(7, 5).t()}


def sending(state: dict[str, Tensor]) -> Sending:
    return Sending(specs_of(state), pinned=False)


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
    maker = sending(state)
    update = maker.borrowed(7, values(state)) if borrow else maker.copied(7, values(state), hooked=False)

    assert sent(update) == sent(update) == reference(state)
    assert (update.step, update.borrowed) == (7, borrow)


def test_a_copy_keeps_its_values() -> None:
    """What the optimizer does afterwards is not sent."""
    state = tensors()
    update = sending(state).copied(1, values(state), hooked=False)
    expected = reference(state)
    for tensor in state.values():
        tensor.add_(1)

    assert sent(update) == expected


def test_memory_is_used_again_only_when_it_is_given_back() -> None:
    """Two updates on their way have memory each; the third has that of the one that is done with."""
    state = tensors()
    maker = sending(state)
    first, second = (maker.copied(step, values(state), hooked=False) for step in (1, 2))
    places = [memory_of(update) for update in (first, second)]
    first.done()
    third = maker.copied(3, values(state), hooked=False)

    assert places[0] != places[1]
    assert memory_of(third) == places[0]


def memory_of(update: Update) -> int:
    import ctypes

    *_, data = update.body.pieces()
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def test_the_initial_weights_warm_the_first_updates_memory() -> None:
    """What the run is made of lies where the first update will be copied to, and is right."""
    state = tensors()
    maker = sending(state)
    warmed = maker.warmed(values(state))
    assert all(torch.equal(one, other) for one, other in zip(warmed, values(state), strict=True))
    update = maker.copied(1, values(state), hooked=False)
    assert warmed[3].data_ptr() >= memory_of(update) > 0
    assert warmed[3].data_ptr() < memory_of(update) + update.body.length


def test_sent_as_another_dtype() -> None:
    """Values are cast as torch casts them, half the bytes."""
    state = {"w": torch.randn(50)}
    specs = specs_of({"w": state["w"].bfloat16()})
    update = Sending(specs, pinned=False).copied(1, values(state), hooked=False)

    assert torch.equal(load(sent(update))["w"], state["w"].bfloat16())


def test_what_can_be_borrowed() -> None:
    """Memory on the CPU that holds the very bytes to be sent."""
    state = {"w": torch.randn(3)}
    assert sending(state).can_borrow(values(state))
    assert not sending(state).can_borrow([torch.randn(3, dtype=torch.float64)])
    assert not sending(state).can_borrow([torch.randn(3, device="meta")])


def test_hook_comes_before_the_step() -> None:
    """``before`` sees the parameters as they were; fired() tells of steps since it was last asked, until removed."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    seen: list[float] = []
    hook = StepHook(lambda: seen.append(parameter.item()))
    try:
        assert not hook.fired()
        optimizer.step()
        optimizer.step()
        assert seen == [0.0, -1.0]
        assert hook.fired()
        assert not hook.fired()
    finally:
        hook.remove()
    optimizer.step()

    assert not hook.fired()


class FakeCopies(DeviceCopies):
    """Copies as a device would: the bytes are there when the event says so."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[FakeEvent] = []

    def start(self, _device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> FakeEvent:  # type: ignore[override]
        self.events.append(FakeEvent(targets, [source.clone() for source in sources]))
        return self.events[-1]


class FakeEvent:
    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        self.pairs = list(zip(targets, sources, strict=True))

    def synchronize(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_copy_under_way_is_waited_for(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caller where nobody guards the parameters; else by the sender only, who finds the right bytes."""
    from ema_client.training import buffers as module

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(module, "_by_device", lambda targets, sources: {cuda: (list(targets), list(sources))})
    state = {"w": torch.randn(5)}
    maker = sending(state)
    maker.devices = FakeCopies()
    update = maker.copied(1, values(state), hooked=hooked)

    assert (b"".join(update.body.pieces()) == reference(state)) != hooked
    assert sent(update) == reference(state)


def test_a_copy_that_could_not_be_asked_for() -> None:
    """It is the sender who is told: an optimizer's step goes on."""
    asking: Future[torch.cuda.Event] = Future()
    asking.set_exception(RuntimeError("CUDA out of memory"))
    copies, asked = DeviceCopies(), _Asked(asking)
    copies._latest[torch.device("cuda", 0)] = asked
    copies.before_step()

    with pytest.raises(RuntimeError, match="out of memory"):
        asked.synchronize()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_copies_from_a_device(hooked: bool, shared: bool) -> None:
    """The bytes are those of before the step, though the step follows at once on the device's stream, and the device's
    memory is as before."""
    state = {"w": torch.randn(64 << 20, device="cuda"), "x": torch.randn(3, 5, device="cuda")}
    maker = Sending(specs_of(state), pinned=True, shared=shared)
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
    maker = Sending(specs_of(state), pinned=True)
    maker.copied(1, values(state), hooked=False).done()
    torch.cuda.synchronize()
    update = maker.copied(2, values(state), hooked=True)
    [copy] = maker.devices._latest.values()
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
    update = Sending(specs_of(state), pinned=True).copied(1, values(state), hooked=hooked)

    assert sent(update) == reference({name: tensor.cpu() for name, tensor in state.items()})


@pytest.mark.gpu
@needs_cuda
def test_a_fork_while_copying() -> None:
    """A loader's worker that is forked off between copies takes nothing of them: the next one arrives here."""
    state = {"w": torch.zeros(1 << 20, device="cuda")}
    maker = Sending(specs_of(state), pinned=True)
    for value in (1, 2, 3):
        state["w"].fill_(value)
        update = maker.copied(value, values(state), hooked=False)
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert load(sent(update))["w"].eq(value).all()
        os.waitpid(child, 0)
        update.done()
