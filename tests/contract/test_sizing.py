"""The page of sizes is true: each figure is worked out anew by the code that takes the memory and the disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ema_client.protocol import LAYOUT_DTYPES, TensorSpec
from ema_service.memory import Layout
from ema_service.persistence import versions
from ema_service.runs.measurements import MOST_BYTES
from ema_service.runs.room import _BYTES_PER_TENSOR, Needs

PAGE = (Path(__file__).resolve().parents[2] / "ema_service" / "SIZING.md").read_text()
PARAMETERS = {"100 M": 10**8, "1 B": 10**9, "10 B": 10**10, "70 B": 7 * 10**10}


def rows(section: str) -> dict[str, list[str]]:
    """The table of a section: by its first column, the others."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells[2:]}


def layout(parameters: int, dtype: str) -> Layout:
    return Layout([TensorSpec("w", (parameters,), dtype)])


def in_memory(of: Layout, *, in_files: bool, averages: int = 1) -> int:
    """What a run takes with one push, without what is said of its tensors."""
    needs = Needs.of(of, averages, on_host=True, in_files=in_files)
    return needs.resident + needs.push - _BYTES_PER_TENSOR


@pytest.mark.parametrize("named", PARAMETERS)
def test_memory_and_disk(named: str) -> None:
    """Update, memory, disk, snapshot and what a checkpoint writes, for each size of model."""
    bf16, float32 = (layout(PARAMETERS[named], dtype) for dtype in ("BF16", "F32"))
    expected = [
        bf16.param_bytes,
        float32.param_bytes,
        in_memory(bf16, in_files=True),
        in_memory(bf16, in_files=False),
        versions._CHECKPOINT_SLOTS["process"] * bf16.shadow_bytes,
        bf16.shadow_bytes,
        bf16.shadow_bytes,
    ]
    assert [float(cell) * 1e9 for cell in rows("Memory and disk")[named]] == pytest.approx(expected)
    assert in_memory(float32, in_files=True) == in_memory(bf16, in_files=True)
    assert versions._SLOTS["disk"] == versions._CHECKPOINT_SLOTS["process"] == 2


@pytest.mark.parametrize("averages", [1, 3])
@pytest.mark.parametrize("in_files", [True, False])
def test_formula(averages: int, in_files: bool) -> None:
    """2 n S of memory, whatever the durability; a float64 parameter's shadow is twice as large."""
    shadow = 4 * 10**9
    assert layout(10**9, "F16").shadow_bytes == shadow
    assert in_memory(layout(10**9, "BF16"), in_files=in_files, averages=averages) == 2 * averages * shadow
    assert layout(10**9, "F64").shadow_bytes == 2 * shadow


def test_gpu() -> None:
    """The host of a GPU has one update, and the memory files all the same."""
    of = layout(10**9, "BF16")
    assert Needs.of(of, 1, on_host=False, in_files=False).push == of.param_bytes
    files = Needs.of(of, 1, on_host=False, in_files=True)
    assert files.resident == Needs.of(of, 1, on_host=True, in_files=True).resident
    assert files.push == of.param_bytes


@pytest.mark.parametrize("named", PARAMETERS)
def test_network(named: str) -> None:
    """Bits of an update in bf16 over bits of the link."""
    bits = 8 * LAYOUT_DTYPES["BF16"] * PARAMETERS[named]
    expected = [bits / (gigabits * 1e9) for gigabits in (10, 25, 100, 400)]
    assert [float(cell) for cell in rows("Network")[named]] == pytest.approx(expected)


def test_one_line() -> None:
    """The table at the top is that of a billion parameters."""
    top = rows("In one line")
    figures = [float(found) for row in top.values() for found in re.findall(r"([\d.]+) GB", row[1])]
    of = layout(10**9, "BF16")
    memory, shadow = in_memory(of, in_files=True), of.shadow_bytes
    assert [each * 1e9 for each in figures] == [memory, memory, shadow, of.param_bytes, shadow, shadow / 2]


def test_on_top() -> None:
    """What a run takes besides its weights."""
    assert f"{MOST_BYTES / 1e6:.1f} MB of its history" in PAGE
    assert f"{_BYTES_PER_TENSOR // 1024} KiB for each tensor" in PAGE
