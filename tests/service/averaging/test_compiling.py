"""Compiled code is kept in files; whatever has become of them, the function is compiled and right.

Knows numba's folder of files. Does not know what they hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.caching import CompileResultCacheImpl

from ema_service.averaging.compiling import compiled


def total(values):  # type: ignore[no-untyped-def]
    found = 0.0
    for value in values:
        found += value
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where compiled code is kept, by one process before: an index, and the code."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    assert sum_up() == (6.0, 0)
    assert sum_up() == (6.0, 1)
    assert {file.suffix for file in files(tmp_path)} == {".nbi", ".nbc"}
    yield tmp_path
    for path in tmp_path.rglob("*"):
        path.chmod(0o700)


def sum_up() -> tuple[float, int]:
    """What the function gives in a process that begins, and how many times its code came from a file."""
    function = compiled(total)
    result = function(np.arange(4, dtype=np.float32))
    return result, sum(function.stats.cache_hits.values())


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc")]


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zeros_at_the_end(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))


def flipped_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)


def of_an_earlier_version(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-32])


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize(
    "damage", [cut_in_half, empty, zeros, zeros_at_the_end, flipped_bit, of_an_earlier_version, Path.unlink]
)
def test_damaged_file_is_written_anew(damage: Callable[[Path], None], suffix: str, folder: Path) -> None:
    """A file that a crash cut short or left empty is as good as none; the next process has a whole one."""
    [path] = [path for path in files(folder) if path.suffix == suffix]
    damage(path)

    assert sum_up() == (6.0, 0)
    assert sum_up() == (6.0, 1)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_file_that_cannot_be_read_or_written(suffix: str, folder: Path) -> None:
    """A folder in a file's place can be neither read nor replaced: each process compiles for itself."""
    [path] = [path for path in files(folder) if path.suffix == suffix]
    path.unlink()
    path.mkdir()

    assert sum_up() == (6.0, 0)
    assert sum_up() == (6.0, 0)


def test_folder_that_is_gone(folder: Path) -> None:
    """A cache that was cleared while a process runs is made again."""
    function = compiled(total)
    shutil.rmtree(folder / "cache")

    assert function(np.arange(4, dtype=np.float32)) == 6.0
    assert sum_up() == (6.0, 1)


def test_no_place_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be made, neither the one that was named nor one beside the source, nothing is kept."""
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])

    assert sum_up() == (6.0, 0)
