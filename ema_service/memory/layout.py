"""The layout of a run: which tensors, in which order, at which byte, as parameters and as shadows.

Tensors lie in the canonical order of the wire (widest dtype first, then by name), so the data of a body whose header
equals ``Layout.header`` are, byte for byte, the arena's memory.

Knows names, dtypes and offsets. Does not know memory or devices.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt
import xxhash

from ema_client.errors import InvalidRequest, LayoutMismatch, listed
from ema_client.protocol import LAYOUT_DTYPES, MAX_RANK, MAX_STEP, MAX_TENSOR_NAME, MAX_TENSORS, TensorSpec
from ema_client.wire import Entry, build_header, place

__all__ = ["SHADOW_DTYPES", "Layout", "Section"]

#: dtype of a parameter -> dtype of its shadow. bf16 and fp16 lose updates of less than their spacing (at decay 0.9999
#: all of them), so their shadow is float32.
SHADOW_DTYPES = {"F64": "F64", "F32": "F32", "BF16": "F32", "F16": "F32"}

#: Bytes that a header may have for white space and metadata, beyond its tensors. A longer header would keep the server
#: busy with parsing.
_HEADER_SLACK = 1 << 20


@dataclass(frozen=True, slots=True)
class Section:
    """Adjacent tensors of one dtype and one policy: their byte ranges among the parameters and among the shadows.

    copied: the shadow is the newest value, not an average. tensors: their places in the layout's order.
    """

    param_dtype: str
    shadow_dtype: str
    param: slice
    shadow: slice
    copied: bool
    tensors: slice


class Layout:
    """The tensors of a run, fixed at creation.

    params, shadows: the tensors in canonical order, as they are pushed and as they are averaged. param_bytes,
    shadow_bytes: length of all parameters, of all shadows. header: the header of a canonical push, with its length
    prefix. max_header_bytes: most bytes of a header that names the same tensors in another order, with white space or
    metadata. copied: names of the tensors whose shadow is the newest value, in canonical order. sections: one for each
    dtype, more where averaged and copied tensors alternate. shadow_dtype: the shadows' dtype; where there are two,
    both, widest first: ``F64+F32``. elements: of all tensors. alignment: bytes of the parameters' widest dtype, by
    which their address has to be divisible wherever they are averaged.
    """

    def __init__(self, specs: Sequence[TensorSpec], copied: Collection[str] = ()) -> None:
        """Raises InvalidRequest naming a tensor that no run can hold, or a copied tensor that ``specs`` does not
        have."""
        _check(specs)
        self.params = place(specs)
        self.shadows = place(
            (TensorSpec(e.name, e.shape, SHADOW_DTYPES[e.dtype]) for e in self.params),
            sort=False,
        )
        self.param_bytes = self.params[-1].end
        self.shadow_bytes = self.shadows[-1].end
        self.header = build_header(self.params)
        self.max_header_bytes = 2 * len(self.header) + _HEADER_SLACK
        self.copied = _known(copied, self.params)
        self.sections = tuple(_sections(self.params, self.shadows, frozenset(self.copied)))
        self.shadow_dtype = "+".join(dict.fromkeys(section.shadow_dtype for section in self.sections))
        self.elements = sum((e.end - e.begin) // LAYOUT_DTYPES[e.dtype] for e in self.params)
        self.alignment = max((LAYOUT_DTYPES[e.dtype] for e in self.params), default=1)
        self._by_name = {entry.name: entry for entry in self.params}

    def __len__(self) -> int:
        return len(self.params)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (self.params, self.copied) == (other.params, other.copied)

    __hash__ = None  # type: ignore[assignment]  # layouts are compared at creation only and are never keys

    @cached_property
    def ends(self) -> tuple[npt.NDArray[np.int64], ...]:
        """For each section, the element behind the last of each of its tensors, counted from the section's first."""
        return tuple(
            np.array(
                [
                    (entry.end - section.param.start) // LAYOUT_DTYPES[section.param_dtype]
                    for entry in self.params[section.tensors]
                ],
                np.int64,
            )
            for section in self.sections
        )

    @cached_property
    def digest(self) -> str:
        """Names the layout: XXH3 (128 bits) of the header of a canonical push, in hexadecimal."""
        return xxhash.xxh3_128(self.header).hexdigest()

    @property
    def divisible(self) -> bool:
        """Whether stretches of the parameters can be averaged apart from each other, in the memory they came in.

        Not where float64 lies beside a dtype narrower than its shadow: parameters at the end of a stretch's shadows
        would lie at addresses that float64 may not have.
        """
        narrow = self.param_bytes < self.shadow_bytes
        return not (narrow and any(section.param_dtype == "F64" for section in self.sections))

    def shadow_at(self, position: int) -> int:
        """The byte of the shadows at which the shadow of the parameters from byte ``position`` on begins.

        position: between two elements, or behind the last.
        """
        section = self.sections[bisect_right(self.sections, position, key=lambda each: each.param.start) - 1]
        elements: int = (position - section.param.start) // LAYOUT_DTYPES[section.param_dtype]
        begin: int = section.shadow.start
        return begin + elements * LAYOUT_DTYPES[section.shadow_dtype]

    def find(self, name: str) -> Entry | None:
        """The tensor of this name as it is pushed; None where the run has none."""
        return self._by_name.get(name)

    def entry(self, name: str) -> Entry:
        """The tensor of this name as it is pushed. Raises KeyError where the run has none."""
        return self._by_name[name]

    def targets(self, entries: Sequence[Entry]) -> list[slice]:
        """Where the data of a body with these entries belong: slices of the parameters' memory, in the body's order.

        A canonical body is one slice. Raises LayoutMismatch naming the tensors that are missing, unknown or differ.
        """
        self._check_same(entries)
        stretches: list[slice] = []
        for entry in entries:
            mine = self._by_name[entry.name]
            if stretches and stretches[-1].stop == mine.begin:
                stretches[-1] = slice(stretches[-1].start, mine.end)
            else:
                stretches.append(slice(mine.begin, mine.end))
        return [stretch for stretch in stretches if stretch.stop > stretch.start]

    def _check_same(self, entries: Sequence[Entry]) -> None:
        """Raises LayoutMismatch unless a body's entries are the run's tensors, in any order."""
        given = {entry.name: entry for entry in entries}
        faults = [
            _named("missing", [name for name in self._by_name if name not in given]),
            _named("not in the layout", [name for name in given if name not in self._by_name]),
            _named(
                "different", [_difference(mine, given[name]) for name, mine in self._by_name.items() if name in given]
            ),
        ]
        if any(faults):
            cast_would_do = not any(faults[:2]) and all(
                given[n].shape == mine.shape for n, mine in self._by_name.items()
            )
            raise LayoutMismatch("; ".join(filter(None, faults)), hint=_CAST_HINT if cast_would_do else None)


#: The hint where dtypes alone differ: a run may have been made, or imported, with the dtypes of another trainer.
_CAST_HINT = "send the tensors as the run has them: RemoteEma(push_dtype=...) casts each; the shadow has its own dtype"


def _named(fault: str, names: Iterable[str]) -> str:
    """``missing: a, b and 3 more``; empty where no name is given."""
    found = [name for name in names if name]
    return f"{fault}: {listed(found)}" if found else ""


def _difference(mine: Entry, given: Entry) -> str:
    """How a tensor of a body differs from the layout's; empty where it does not."""
    if (mine.dtype, mine.shape) == (given.dtype, given.shape):
        return ""
    return f"{mine.name} is {given.dtype} {list(given.shape)}, expected {mine.dtype} {list(mine.shape)}"


def _known(copied: Collection[str], params: Sequence[Entry]) -> tuple[str, ...]:
    """The names of copied tensors in canonical order. Raises InvalidRequest naming those that the layout does not
    have."""
    wanted = set(copied)
    known = tuple(entry.name for entry in params if entry.name in wanted)
    if unknown := sorted(wanted.difference(known)):
        raise InvalidRequest(_named("copied: not in the layout", [name[:200] for name in unknown]))
    return known


def _sections(params: Sequence[Entry], shadows: Sequence[Entry], copied: Collection[str]) -> Iterable[Section]:
    """Adjacent tensors that share a dtype and a policy, as sections."""
    pairs_in_order, begin = zip(params, shadows, strict=True), 0
    for (dtype, copied_here), pairs in groupby(
        pairs_in_order, key=lambda pair: (pair[0].dtype, pair[0].name in copied)
    ):
        group = list(pairs)
        (first_param, first_shadow), (last_param, last_shadow) = group[0], group[-1]
        yield Section(
            dtype,
            first_shadow.dtype,
            slice(first_param.begin, last_param.end),
            slice(first_shadow.begin, last_shadow.end),
            copied_here,
            slice(begin, begin + len(group)),
        )
        begin += len(group)


def _check(specs: Sequence[TensorSpec]) -> None:
    """Raises InvalidRequest where the tensors are too many, too large together, or one of them cannot be held."""
    if not 1 <= len(specs) <= MAX_TENSORS:
        raise InvalidRequest(f"layout: {len(specs)} tensors; 1 to {MAX_TENSORS} are possible")
    seen: set[str] = set()
    for spec in specs:
        _check_one(spec)
        if spec.name in seen:
            raise InvalidRequest(f"layout: the tensor {spec.name!r} stands there twice")
        seen.add(spec.name)
    if sum(e.end - e.begin for e in place(specs)) > MAX_STEP:
        raise InvalidRequest("layout: the tensors together exceed 2**63 bytes")


def _check_one(spec: TensorSpec) -> None:
    """Raises InvalidRequest where a tensor has an impossible name, dtype or shape."""
    shown = repr(spec.name[:200])
    if not 0 < len(spec.name) <= MAX_TENSOR_NAME:
        raise InvalidRequest(f"layout: tensor name {shown}: 1 to {MAX_TENSOR_NAME} characters are possible")
    if spec.name == "__metadata__" or any("\ud800" <= char <= "\udfff" for char in spec.name):
        raise InvalidRequest(f"layout: {shown} cannot name a tensor in a safetensors file")
    if spec.dtype not in LAYOUT_DTYPES:
        raise InvalidRequest(
            f"layout: tensor {shown} has dtype {spec.dtype!r}; one of {', '.join(LAYOUT_DTYPES)} is possible"
        )
    if len(spec.shape) > MAX_RANK or any(not 0 <= size <= MAX_STEP for size in spec.shape):
        raise InvalidRequest(f"layout: tensor {shown} has no possible shape: {list(spec.shape)[:MAX_RANK]}")
