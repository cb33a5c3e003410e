"""Tensors and their bytes. Knows torch and the safetensors library as an independent judge; no socket is open here."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn

from ema_client import wire
from ema_client.errors import ProtocolError, UsageError
from ema_client.protocol import TensorSpec
from ema_client.tensors.body import encode, memory, receive
from ema_client.tensors.layout import state_of


def mixed() -> dict[str, Tensor]:
    """Every dtype, and shapes with and without elements, some of them not contiguous."""
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.channels_last": torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 7).t(),
        "strided": torch.randn(20)[::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3, 3).bfloat16(),
        "brain.transposed": torch.randn(3, 5).bfloat16().t(),
        "parameter": nn.Parameter(torch.randn(2)),
        "ä.ö": torch.randn(1),
    }


def raw(state: dict[str, Tensor]) -> bytes:
    return b"".join(bytes(piece) for piece in encode(state_of(state)).pieces())


def reader(data: bytes) -> Callable[[memoryview], None]:
    position = 0

    def readinto(view: memoryview) -> None:
        nonlocal position
        view[:] = data[position : position + len(view)]
        position += len(view)

    return readinto


def parts(stream: bytes) -> tuple[tuple[wire.Entry, ...], bytes]:
    length = wire.parse_length(stream[:8])
    return wire.parse_header(stream[8 : 8 + length]).entries, stream[8 + length :]


# --- sending --------------------------------------------------------------------------------------------------------


def test_body_is_the_librarys_file() -> None:
    """What is sent is byte for byte what safetensors.torch.save writes, whatever the strides and dtypes."""
    state = mixed()

    assert raw(state) == safetensors.torch.save({name: t.detach().contiguous() for name, t in state.items()})


def test_body_says_its_length_and_can_be_sent_again() -> None:
    """A retry sends the same bytes, and their number is known before the first one is made."""
    state = mixed()
    body = encode(state_of(state))
    first = b"".join(bytes(piece) for piece in body.pieces())

    assert body.length == len(first)
    assert b"".join(bytes(piece) for piece in body.pieces()) == first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_the_tensors_own(dtype: torch.dtype) -> None:
    """The bytes of a contiguous tensor are not copied: a write through either side is seen by the other."""
    tensor = torch.zeros(2, 3, dtype=dtype)
    view = memory(tensor)

    tensor[0, 0] = 1.0
    assert bytes(view[: dtype.itemsize]) != bytes(dtype.itemsize)
    view[:] = bytes(len(view))
    assert tensor[0, 0] == 0.0
    assert len(view) == 6 * dtype.itemsize


def test_memory_of_a_slice_begins_at_the_slice() -> None:
    """A contiguous part of a larger tensor is sent from where it lies."""
    whole = torch.arange(10, dtype=torch.float32)

    assert bytes(memory(whole[4:6])) == whole[4:6].clone().numpy().tobytes()


def test_memory_of_scalars_and_of_nothing() -> None:
    """A 0-d tensor has the bytes of its one element, an empty one none."""
    assert len(memory(torch.tensor(1.0))) == 4
    assert len(memory(torch.empty(0, 5))) == 0


def test_memory_keeps_its_tensor_alive() -> None:
    """A view outlives the name of its tensor, and not longer than needed."""
    tensor = torch.ones(4)
    watch = weakref.ref(tensor)
    view = memory(tensor)

    del tensor
    gc.collect()
    assert watch() is not None
    assert bytes(view) == torch.ones(4).numpy().tobytes()
    del view
    gc.collect()
    assert watch() is None


def test_contiguous_tensors_are_sent_from_their_own_memory() -> None:
    """The body of a contiguous model is its own memory: no copy is made for sending."""
    state = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    pieces = list(encode(state_of(state)).pieces())

    state["a"].fill_(1.0)
    state["b"].fill_(2.0)

    assert bytes(pieces[1]) == state["a"].numpy().tobytes()
    assert bytes(pieces[2]) == state["b"].numpy().tobytes()


def test_copies_for_sending_live_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors must be copied, one copy is gone before the next is made: never a second whole model."""
    state = {f"t{i}": torch.randn(8, 4).t() for i in range(5)}
    alive: list[Any] = []
    most = 0
    contiguous = Tensor.contiguous

    def watched(tensor: Tensor) -> Tensor:
        nonlocal most
        copy = contiguous(tensor)
        alive.append(weakref.ref(copy))
        most = max(most, sum(watch() is not None for watch in alive))
        return copy

    monkeypatch.setattr(Tensor, "contiguous", watched)
    for piece in encode(state_of(state)).pieces():
        del piece

    assert len(alive) == 5
    assert most <= 2


# --- receiving ------------------------------------------------------------------------------------------------------


def test_new_tensors_are_as_sent() -> None:
    """Without ``out`` each tensor comes back with its dtype, shape and bits."""
    state = mixed()
    entries, data = parts(raw(state))

    received = receive(entries, reader(data))

    assert set(received) == set(state)
    assert all(received[name].dtype == tensor.dtype for name, tensor in state.items())
    assert all(torch.equal(received[name], tensor) for name, tensor in state.items())
    assert all(tensor.is_contiguous() for tensor in received.values())


def test_out_is_filled_in_place() -> None:
    """The tensors given are the tensors filled: same objects, same memory."""
    state = mixed()
    entries, data = parts(raw(state))
    out = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in out.items()}

    received = receive(entries, reader(data), out)

    assert all(received[name] is out[name] for name in state)
    assert {name: tensor.data_ptr() for name, tensor in out.items()} == addresses
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())


def test_out_of_other_dtypes_and_strides_is_cast() -> None:
    """Values go into tensors of any floating dtype and any strides as copy_() puts them there."""
    state = {"a": torch.randn(3, 5), "b": torch.randn(4), "c": torch.randn(2)}
    entries, data = parts(raw(state))
    out = {
        "a": torch.zeros(5, 3).t(),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": nn.Parameter(torch.zeros(2, dtype=torch.float64)),
    }

    receive(entries, reader(data), out)

    assert torch.equal(out["a"], state["a"])
    assert torch.equal(out["b"], state["b"].bfloat16())
    assert torch.equal(out["c"], state["c"].double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out.pop("b"), "'b' is missing"),
        (lambda out: out.update(extra=torch.zeros(1)), "'extra' is not among the weights"),
        (lambda out: out.update(b=torch.zeros(5)), r"'b' has shape \(5,\), the weights \(4,\)"),
        (lambda out: out.update(b=torch.zeros(4, 1)), r"'b' has shape \(4, 1\)"),
        (lambda out: out.update(b=torch.zeros(4, dtype=torch.int32)), r"'b' is of torch\.int32"),
        (lambda out: out.update(b=torch.zeros(4, device="meta")), "'b' is on the meta device"),
    ],
)
def test_out_that_does_not_fit_is_left_alone(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """What is missing, extra or misshapen is named before a byte is read or written."""
    entries, _ = parts(raw({"a": torch.ones(3), "b": torch.ones(4)}))
    out = {"a": torch.zeros(3), "b": torch.zeros(4)}
    change(out)

    def readinto(_: memoryview) -> None:
        pytest.fail("read before the check")

    with pytest.raises(UsageError, match=message):
        receive(entries, readinto, out)
    assert torch.equal(out["a"], torch.zeros(3))


def test_many_faults_are_named_in_part() -> None:
    """A model of another kind is one message, not a page of names."""
    entries, _ = parts(raw({f"t{i}": torch.ones(1) for i in range(100)}))

    with pytest.raises(UsageError, match=r"'t0' is missing.*and 95 more"):
        receive(entries, lambda _: None, {})


def test_dtype_that_weights_never_have() -> None:
    """Integers in a weights answer are no weights of ours, and nothing is written."""
    entries = wire.place([TensorSpec("a", (2,), "I64")])

    with pytest.raises(ProtocolError, match="'a' came as I64"):
        receive(entries, lambda _: None, {"a": torch.zeros(2)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu() -> None:
    """Tensors on a GPU are sent by a copy of their own, and filled where they are."""
    state = mixed()
    on_gpu = {name: tensor.detach().cuda() for name, tensor in state.items()}
    stream = raw(on_gpu)
    entries, data = parts(stream)
    out = {name: torch.zeros_like(tensor) for name, tensor in on_gpu.items() if name != "expanded"}
    out["expanded"] = torch.zeros(4, 3, device="cuda")

    receive(entries, reader(data), out)

    assert stream == raw(state)
    assert all(tensor.is_cuda and torch.equal(tensor.cpu(), state[name].detach()) for name, tensor in out.items())


def test_a_part_with_a_tensor_without_bytes_is_digested() -> None:
    """As the service does: it has a hash of each tensor that brings bytes."""
    state = {"empty": torch.empty(0, 3), "w": torch.ones(4, 2)}
    body = encode(state, {})
    assert body.digest
    digest = body.digest()
    for piece in body.pieces():
        digest.update(piece)
    tensor = xxhash.xxh3_128(state["w"].numpy().tobytes()).digest()
    assert digest.digest() == xxhash.xxh3_128(tensor).digest()
