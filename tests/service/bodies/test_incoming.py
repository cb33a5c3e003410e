"""Bodies that come in: every byte goes where it belongs, wherever the body is cut, and faults are found at once.

Knows bodies in memory. Does not know sockets or runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save

from ema_client.errors import BodyTooLarge, EmaError, LayoutMismatch, MalformedBody
from ema_client.protocol import MAX_HEADER_BYTES, TensorSpec
from ema_client.wire import Entry, build_header, place
from ema_service.bodies import UpdateBody
from ema_service.memory import Layout, Memory, Staged

TENSORS = {
    "b": torch.tensor([1.5, -2.0, 3.25]),
    "a": torch.tensor([[0.5], [4.0]], dtype=torch.bfloat16),
    "z": torch.zeros(0, 3),
    "s": torch.tensor(7.0, dtype=torch.float64),
}
SPECS = {
    "b": TensorSpec("b", (3,), "F32"),
    "a": TensorSpec("a", (2, 1), "BF16"),
    "z": TensorSpec("z", (0, 3), "F32"),
    "s": TensorSpec("s", (), "F64"),
}
LAYOUT = Layout(list(SPECS.values()))
CANONICAL = save(TENSORS)
DATA = CANONICAL[len(LAYOUT.header) :]


def body_in_order(*names: str) -> bytes:
    """A well-formed body whose tensors lie in this order."""
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in TENSORS.items()}
    return build_header(place([SPECS[name] for name in names], sort=False)) + b"".join(raw[name] for name in names)


BODIES = {
    "canonical": CANONICAL,
    "with metadata": save(TENSORS, {"format": "pt"}),
    "reversed": body_in_order("z", "a", "b", "s"),
    "permuted": body_in_order("a", "z", "s", "b"),
}


def feed(update: UpdateBody, body: bytes, size: int) -> None:
    for piece in pieces(body, size):
        update.feed(piece)


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


@pytest.fixture
def staged(memory: Memory) -> Staged:
    staged = Staged(LAYOUT, memory)
    staged.data[:] = b"\xee" * len(staged.data)
    return staged


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("announced", [True, False], ids=["known length", "unknown length"])
def test_fed_in_pieces_of_every_size(name: str, announced: bool, memory: Memory) -> None:
    """A body in any order, fed in pieces of every size from 1 byte to the whole, lands in canonical order."""
    body = BODIES[name]
    for size in range(1, len(body) + 1):
        staged = Staged(LAYOUT, memory)
        update = UpdateBody(staged, len(body) if announced else None)
        feed(update, body, size)
        update.finish()

        assert bytes(staged.data) == DATA, f"in pieces of {size}"
        assert update.complete


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("most", [1, 3, 8, 1000])
def test_written_into_windows(name: str, most: int, staged: Staged) -> None:
    """Who writes into window() and tells advance() how much, in any portions, fills the same memory."""
    body, at = BODIES[name], 0
    update = UpdateBody(staged, len(body))
    while not update.complete:
        window = update.window()
        assert len(window) > 0
        count = min(len(window), most)
        window[:count] = body[at : at + count]
        update.advance(count)
        at += count

    assert (at, len(update.window())) == (len(body), 0)
    assert bytes(staged.data) == DATA


@pytest.mark.parametrize("cut", range(0, len(CANONICAL), 5))
def test_cut_body_is_incomplete(cut: int, staged: Staged) -> None:
    """A body that ends anywhere before its end is refused when the sender is done."""
    update = UpdateBody(staged)
    update.feed(CANONICAL[:cut])

    assert not update.complete
    with pytest.raises(MalformedBody, match="ends before"):
        update.finish()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_bytes_beyond_the_data_are_refused(size: int, staged: Staged) -> None:
    """One byte more than the header says is an error, however it comes."""
    update = UpdateBody(staged)

    with pytest.raises(MalformedBody, match="longer than its header says"):
        feed(update, CANONICAL + b"\0", size)


def test_progress_is_told_in_order(staged: Staged) -> None:
    """``arrived`` says, growing, how much of the parameters is there, and nothing of the header."""
    arrived: list[int] = []
    update = UpdateBody(staged)
    for piece in pieces(CANONICAL, 3):
        update.feed(piece)
        arrived.append(update.arrived)
        assert bytes(staged.data[: update.arrived]) == DATA[: update.arrived]

    assert arrived == sorted(arrived)
    assert len(set(arrived)) > len(DATA) // 3
    assert arrived[-1] == len(DATA)


def test_progress_of_a_permuted_body_is_not_told_early(staged: Staged) -> None:
    """Of a body in another order nothing counts as there before all of it is: what came first may belong last."""
    update = UpdateBody(staged)
    for piece in pieces(BODIES["reversed"], 1):
        update.feed(piece)
        assert not update.arrived
    update.finish()


def test_body_of_empty_tensors(memory: Memory) -> None:
    """A run of empty tensors takes a body without data, and not a byte more."""
    layout = Layout([SPECS["z"]])
    update = UpdateBody(Staged(layout, memory))
    update.feed(layout.header)
    update.finish()

    with pytest.raises(MalformedBody, match="longer"):
        update.feed(b"\0")


# --- what is wrong is found at once ---------------------------------------------------------------------------------


def after_header(entries: tuple[Entry, ...]) -> bytes:
    return build_header(entries)


WRONG: dict[str, tuple[bytes, int | None, type[EmaError], str]] = {
    "absurd length": (struct.pack("<Q", 2**63), None, MalformedBody, "claims 9223372036854775808"),
    "length over the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1), None, MalformedBody, "claims 100000001"),
    "length of nothing": (struct.pack("<Q", 0), None, MalformedBody, "claims 0"),
    "header beyond the body": (
        struct.pack("<Q", 5000),
        100,
        MalformedBody,
        "claims 5000 bytes, the whole body has 100",
    ),
    "announced too long": (CANONICAL, len(CANONICAL) + 1, MalformedBody, "longer than its header says"),
    "announced too short": (CANONICAL, len(CANONICAL) - 1, MalformedBody, "shorter than its header says"),
    "other header announced too long": (BODIES["reversed"], len(CANONICAL) + 99, MalformedBody, "longer"),
    "a tensor missing": (after_header(place([SPECS["a"]])), None, LayoutMismatch, "missing: s, b, z"),
    "not JSON": (struct.pack("<Q", 8) + b"{{{{{{{{", None, MalformedBody, "not JSON"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_wrong_body_is_refused_before_its_data(what: str, size: int, staged: Staged) -> None:
    """A wrong length or header is refused with its words as soon as it is there, and no data byte is taken."""
    body, announced, error, words = WRONG[what]
    untouched = bytes(staged.data)

    with pytest.raises(error, match=words):
        feed(UpdateBody(staged, announced), body, size)

    assert bytes(staged.data) == untouched


def test_impossible_length_is_refused_unread(staged: Staged) -> None:
    """An announced length that no body of the run can have is refused before a byte is read."""
    with pytest.raises(BodyTooLarge, match="announces 1099511627776 bytes"):
        UpdateBody(staged, 1 << 40)
