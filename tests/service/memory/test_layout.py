"""The layout: canonical order and bytes, where a body's tensors go, what no run can hold.

Knows the safetensors library as the independent writer. Does not know memory or runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import InvalidRequest, LayoutMismatch
from ema_client.protocol import LAYOUT_DTYPES, MAX_STEP, MAX_TENSORS, TensorSpec
from ema_client.wire import Entry, parse_header, place
from ema_service.memory import Layout
from ema_service.tensors import TORCH_DTYPES

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.lists(
    st.builds(TensorSpec, names, shapes, st.sampled_from(list(LAYOUT_DTYPES))),
    min_size=1,
    max_size=8,
    unique_by=lambda spec: spec.name,
)


def tensors_of(layout: list[TensorSpec]) -> dict[str, Tensor]:
    """Tensors of this layout; each element of all of them has another value."""
    sizes = [prod(spec.shape) for spec in layout]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        s.name: torch.arange(at, at + n).to(TORCH_DTYPES[s.dtype]).reshape(s.shape)
        for s, at, n in zip(layout, starts, sizes, strict=True)
    }


def split(body: bytes) -> tuple[bytes, bytes]:
    """Header with its length prefix, and data."""
    begin = 8 + struct.unpack("<Q", body[:8])[0]
    return body[:begin], body[begin:]


@given(specs)
def test_header_is_that_of_safetensors(given_specs: list[TensorSpec]) -> None:
    """The canonical header equals, byte for byte, what the safetensors library writes for the same tensors."""
    header, data = split(save(tensors_of(given_specs)))
    layout = Layout(given_specs)

    assert layout.header == header
    assert layout.param_bytes == len(data)


@given(specs, st.randoms(use_true_random=False))
def test_layout_is_a_set(given_specs: list[TensorSpec], random: object) -> None:
    """The order in which a run's tensors are given does not matter."""
    shuffled = list(given_specs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert Layout(shuffled) == Layout(given_specs)
    assert Layout(shuffled).header == Layout(given_specs).header


@given(specs, st.randoms(use_true_random=False))
def test_targets_put_every_byte_where_it_belongs(given_specs: list[TensorSpec], random: object) -> None:
    """The stretches of a body in any order, laid where targets() says, are the canonical body's data."""
    tensors = tensors_of(given_specs)
    shuffled = list(given_specs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    body = b"".join(tensors[spec.name].view(-1).view(torch.uint8).numpy().tobytes() for spec in shuffled)
    layout = Layout(given_specs)

    memory, at = bytearray(layout.param_bytes), 0
    for target in layout.targets(place(shuffled, sort=False)):
        size = target.stop - target.start
        memory[target] = body[at : at + size]
        at += size

    assert at == len(body)
    assert bytes(memory) == split(save(tensors))[1]


def test_canonical_body_is_one_stretch(
    layout_of: Callable[..., Layout], model: Callable[[int], dict[str, Tensor]]
) -> None:
    """A body in canonical order is taken in one piece, with empty tensors anywhere in it."""
    layout = layout_of(model(0))
    header, _ = split(save(model(0)))

    assert layout.targets(parse_header(header[8:]).entries) == [slice(0, layout.param_bytes)]


def test_sections_are_the_dtypes(layout_of: Callable[..., Layout], model: Callable[[int], dict[str, Tensor]]) -> None:
    """One section for each dtype, covering parameters and shadows without a gap; bf16 and fp16 have F32 shadows."""
    layout = layout_of(model(0))

    assert [(s.param_dtype, s.shadow_dtype) for s in layout.sections] == [
        ("F64", "F64"),
        ("F32", "F32"),
        ("BF16", "F32"),
        ("F16", "F32"),
    ]
    for kind, size in (("param", layout.param_bytes), ("shadow", layout.shadow_bytes)):
        slices = [getattr(section, kind) for section in layout.sections]
        assert [0, *(s.stop for s in slices)] == [*(s.start for s in slices), size]
    assert layout.shadow_dtype == "F64+F32"
    assert layout.elements == sum(tensor.numel() for tensor in model(0).values())
    assert len(layout) == len(model(0))


def test_copied_tensors_have_sections_of_their_own() -> None:
    """Sections end where averaged and copied tensors take turns, and still cover everything in order."""
    specs = [TensorSpec(name, (2,), dtype) for name, dtype in zip("abcde", ["F32"] * 4 + ["BF16"], strict=True)]
    layout = Layout(specs, ["e", "c", "b", "c"])

    assert layout.copied == ("b", "c", "e")
    assert [(s.param, s.shadow, s.copied) for s in layout.sections] == [
        (slice(0, 8), slice(0, 8), False),
        (slice(8, 24), slice(8, 24), True),
        (slice(24, 32), slice(24, 32), False),
        (slice(32, 36), slice(32, 40), True),
    ]
    assert layout != Layout(specs)


def test_copied_tensors_have_to_be_there() -> None:
    """A name that is no tensor's is refused: a misspelt one would be averaged unnoticed."""
    with pytest.raises(InvalidRequest, match="copied: not in the layout: statistics, zeal"):
        Layout([TensorSpec("w", (1,), "F32")], ["zeal", "w", "statistics"])


@given(specs)
def test_bytes_of_parameters_and_shadows(given_specs: list[TensorSpec]) -> None:
    """Parameters take their dtype's width, shadows 8 bytes for F64 and else 4; both lie in one order."""
    layout = Layout(given_specs)

    elements = {spec.name: prod(spec.shape) for spec in given_specs}
    assert layout.param_bytes == sum(elements[s.name] * LAYOUT_DTYPES[s.dtype] for s in given_specs)
    assert layout.shadow_bytes == sum(elements[s.name] * (8 if s.dtype == "F64" else 4) for s in given_specs)
    assert [entry.name for entry in layout.params] == [entry.name for entry in layout.shadows]


# --- what differs is named ------------------------------------------------------------------------------------------

LAYOUT = Layout([TensorSpec("a.weight", (4, 3), "F32"), TensorSpec("b", (3,), "F32"), TensorSpec("c", (), "BF16")])


def changed(name: str, spec: TensorSpec | None, *more: TensorSpec) -> tuple[Entry, ...]:
    """The layout's entries with one replaced or left out."""
    kept = [spec if entry.name == name else entry.spec for entry in LAYOUT.params]
    return place([*(each for each in kept if each), *more])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (changed("b", None), ["missing: b"]),
        (place([]), ["missing: a.weight, b, c"]),
        (changed("", None, TensorSpec("d", (), "F32")), ["not in the layout: d"]),
        (changed("b", TensorSpec("B", (3,), "F32")), ["missing: b", "not in the layout: B"]),
        (changed("b", TensorSpec("b", (3, 1), "F32")), ["different: b is F32 [3, 1], expected F32 [3]"]),
        (changed("c", TensorSpec("c", (), "F16")), ["c is F16 [], expected BF16 []"]),
        (changed("c", TensorSpec("c", (), "I16")), ["c is I16 [], expected BF16 []"]),
    ],
)
def test_mismatch_names_the_tensors(entries: tuple[Entry, ...], words: list[str]) -> None:
    """A body with other tensors is refused with the names of those missing, unknown or different."""
    with pytest.raises(LayoutMismatch) as refusal:
        LAYOUT.targets(entries)

    for word in words:
        assert word in refusal.value.detail


@pytest.mark.parametrize(
    ("entries", "says_cast"),
    [
        (changed("c", TensorSpec("c", (), "F32")), True),
        (changed("c", TensorSpec("c", (1,), "F32")), False),
        (changed("c", TensorSpec("d", (), "BF16")), False),
    ],
)
def test_mismatch_of_dtypes_alone_says_how_to_cast(entries: tuple[Entry, ...], says_cast: bool) -> None:
    """The way out of it is another than for a changed model."""
    with pytest.raises(LayoutMismatch) as refusal:
        LAYOUT.targets(entries)

    assert ("push_dtype" in refusal.value.hint) == says_cast


def test_mismatch_names_a_few_and_counts_the_rest() -> None:
    """An error about a thousand tensors stays short: five names and how many more."""
    layout = Layout([TensorSpec(f"t{i:04}", (1,), "F32") for i in range(1000)])

    with pytest.raises(LayoutMismatch) as refusal:
        layout.targets(place([]))

    assert refusal.value.detail == "missing: t0000, t0001, t0002, t0003, t0004 and 995 more"


# --- what no run can hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_specs", "word"),
    [
        ([], "0 tensors"),
        ([TensorSpec("w", (), "F32")] * (MAX_TENSORS + 1), str(MAX_TENSORS)),
        ([TensorSpec("w", (1,), "F32"), TensorSpec("w", (2,), "F64")], "'w' stands there twice"),
        ([TensorSpec("", (), "F32")], "''"),
        ([TensorSpec("n" * 1025, (), "F32")], "1 to 1024"),
        ([TensorSpec("__metadata__", (), "F32")], "__metadata__"),
        ([TensorSpec("\ud800", (), "F32")], "\\ud800"),
        ([TensorSpec("w", (), "I64")], "'I64'"),
        ([TensorSpec("w", (), "float32")], "'float32'"),
        ([TensorSpec("w", (-1,), "F32")], "[-1]"),
        ([TensorSpec("w", (2**63,), "F32")], "'w'"),
        ([TensorSpec("w", (1,) * 33, "F32")], "'w'"),
        ([TensorSpec("w", (2**32, 2**31), "F32")], "2**63 bytes"),
        ([TensorSpec("v", (2**60,), "F32"), TensorSpec("w", (2**60,), "F32")], "2**63 bytes"),
    ],
)
def test_impossible_layout_is_refused(given_specs: list[TensorSpec], word: str) -> None:
    """A layout that no run can hold is refused with the tensor and the limit."""
    with pytest.raises(InvalidRequest) as refusal:
        Layout(given_specs)

    assert word in refusal.value.detail


def test_limits_themselves_are_possible() -> None:
    """The largest rank, name and size are accepted, and a layout of empty tensors only."""
    Layout([TensorSpec("n" * 1024, (1,) * 32, "F32"), TensorSpec("z", (MAX_STEP, 0), "F64")])

    assert Layout([TensorSpec("z", (0,), "F16")]).shadow_bytes == 0


def test_layouts_compare_by_their_tensors(
    model: Callable[[int], dict[str, Tensor]], layout_of: Callable[[Mapping[str, Tensor]], Layout]
) -> None:
    """Two layouts are equal when their tensors are; one with another shape or dtype is another."""
    tensors = model(0)

    assert layout_of(tensors) == layout_of(model(1))
    assert layout_of(tensors) != layout_of({**tensors, "half": tensors["half"].float()})
    assert layout_of(tensors) != layout_of({**tensors, "half": tensors["half"][:-1]})
