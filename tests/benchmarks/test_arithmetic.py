"""What stands behind the tables, tested on numbers made up for it: the line through sizes, ratios, turns, the check.

Knows the parts of the benchmark that measure nothing. Does not know servers or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_service.bench.children import BenchFailed
from ema_service.bench.fit import fit_line
from ema_service.bench.rounds import interleave
from ema_service.bench.rows import Group, Need, Row
from ema_service.bench.traffic import Traffic, make_state, nbytes_of
from ema_service.sizes import parse_size, show_size


def test_fit_finds_the_line() -> None:
    """Times that lie on a + bytes / b give a and b back."""
    sizes = [100_000, 10_000_000, 1 << 30]
    line = fit_line(sizes, [0.001 + size / 3e9 for size in sizes])

    assert line is not None
    assert line.overhead == pytest.approx(0.001)
    assert line.rate == pytest.approx(3e9)


def test_fit_gives_each_size_its_say() -> None:
    """A tenth more time for the largest size changes the overhead by next to nothing."""
    sizes = [100_000, 10_000_000, 1 << 30]
    times = [0.001 + size / 3e9 for size in sizes]
    line = fit_line(sizes, [*times[:2], 1.1 * times[2]])

    assert line is not None
    assert line.overhead == pytest.approx(0.001, rel=0.02)


def test_fit_needs_two_sizes() -> None:
    """One size gives no line."""
    assert fit_line([5, 5], [1.0, 2.0]) is None


def test_comparison_is_made_round_by_round() -> None:
    """Ratios are of one round each: a machine that was slow in one round was slow for both rows."""
    base = Row("base", "GB/s", (1.0, 4.0, 2.0))
    row = Row("row", "GB/s", (0.9, 3.6, 2.2), (Need(0.9, "base"), Need(0.5, "base", most=True), Need(against="base")))
    group = Group("g", "g", (base, row))
    least, most, neither = group.comparisons(row)

    assert least.ratios == pytest.approx((0.9, 0.9, 1.1))
    assert [least.met, most.met, neither.met] == [True, False, None]
    assert group.missed == 1


def test_comparison_with_what_was_not_measured() -> None:
    """A demand against a row that is not there, or has no figures, is neither met nor missed."""
    row = Row("row", "GB/s", (1.0,), (Need(2, "absent"), Need(2, "empty")))
    group = Group("g", "g", (row, Row("empty", "GB/s", note="not installed")))

    assert group.comparisons(row) == ()
    assert group.missed == 0


def test_operations_take_turns() -> None:
    """Each round does every operation once, in order, and the first round is not counted."""
    done: list[str] = []

    def operation(name: str) -> float:
        done.append(name)
        return float(len(done))

    found = interleave({"a": partial(operation, "a"), "b": partial(operation, "b")}, rounds=2)

    assert done == ["a", "b"] * 3
    assert found == {"a": (3.0, 5.0), "b": (4.0, 6.0)}


@pytest.mark.parametrize(("rounds", "rests"), [(1, 0), (2, 4)])
def test_rest_before_what_is_counted(monkeypatch: pytest.MonkeyPatch, rounds: int, rests: int) -> None:
    """What one operation leaves behind is not charged to the next; warming up and a quick look wait for nothing."""
    rested: list[float] = []
    monkeypatch.setattr("ema_service.bench.rounds.sleep", rested.append)

    interleave({"a": lambda: 1.0, "b": lambda: 1.0}, rounds)

    assert rested == [0.5] * rests


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1GiB", 1 << 30), ("1.5 MB", 1_500_000), ("64kib", 65536), ("4096", 4096), ("2G", 0), ("", 0)]
)
def test_parse_size(text: str, nbytes: int) -> None:
    """Sizes as people write them; anything else is refused with an example."""
    if nbytes:
        assert parse_size(text) == nbytes
    else:
        with pytest.raises(ValueError, match="write 1GiB"):
            parse_size(text)


@pytest.mark.parametrize("text", ["1 GiB", "100 KB", "10 MB", "8 MiB", "7 B"])
def test_show_size(text: str) -> None:
    """A size is shown as it would be written."""
    assert show_size(parse_size(text)) == text


@pytest.mark.parametrize(("nbytes", "tensors"), [(100_000, 25), (10_000_000, 256), (7, 1)])
def test_state_has_the_size_asked_for(nbytes: int, tensors: int) -> None:
    """The tensors of a benchmark hold the bytes it speaks of, to the last four, in at most 256 tensors."""
    state = make_state(nbytes)

    assert nbytes_of(state) == nbytes // 4 * 4
    assert len(state) == tensors


class Forger:
    """A client whose pulls bring the right weights, but for one bit of one tensor."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def pull(self, _run: str, *, out: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state.items():
            out[name].copy_(tensor)
        last = list(out)[-1]
        out[last].view(torch.int32)[-1] ^= 1


def test_garbage_is_no_figure() -> None:
    """A pull that brings one wrong bit makes the benchmark fail, naming the tensor."""
    traffic = Traffic("run", 100_000)
    client: Any = Forger(traffic.state)

    with pytest.raises(BenchFailed, match=r"1 tensors came back changed, such as layer\.024"):
        traffic.check(client)
