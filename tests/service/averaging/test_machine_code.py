"""Machine code is kept in files; whatever has become of them, the loops are there and right.

Knows the folder of files, and processes that load them. Does not know what the loops compute (test_fused.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ema_service.averaging import machine_code
from ema_service.averaging.machine_code import AVERAGING, MachineCode
from ema_service.averaging.signatures import SIGNATURES
from ema_service.values import address


@pytest.fixture(scope="module")
def code() -> Path:
    """The file of machine code that this process has loaded."""
    AVERAGING.load()
    return machine_code.folder() / "averaging.code"


@pytest.fixture
def kept(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the file, where the next process looks for it; whoever compiles anew is told of in ``built``."""
    path = tmp_path / "kept" / code.name
    path.parent.mkdir(mode=0o700)
    shutil.copy(code, path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(path.parent))
    return path


@pytest.fixture
def built(code: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The groups that were compiled: the real compiler took seconds for what it gives here."""
    asked: list[str] = []
    whole = code.read_bytes()[:-32]

    def build(group: str) -> bytes:
        asked.append(group)
        return whole

    monkeypatch.setattr(machine_code, "_built", build)
    return asked


def add() -> list[float]:
    """What a loop gives in a process that begins."""
    sums, values = np.ones(3), np.arange(3.0)
    MachineCode("averaging")["add_f64"](address(sums), address(values), 3, 0.5)
    return sums.tolist()


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)


def written_by_others(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize("damage", [cut_in_half, empty, zeros, flipped_bit, written_by_others, Path.unlink])
def test_file_that_is_not_as_it_was_written(damage: Callable[[Path], None], kept: Path, built: list[str]) -> None:
    """Is never loaded: the loops are compiled anew, and the next process finds a whole file."""
    assert (add(), built) == ([1.0, 1.5, 2.0], [])
    damage(kept)

    assert (add(), built) == ([1.0, 1.5, 2.0], ["averaging"])
    assert (add(), built) == ([1.0, 1.5, 2.0], ["averaging"])


@pytest.mark.parametrize("name", ["get_host_cpu_name", "get_default_triple", "version"])
def test_code_of_something_else(name: str, kept: Path, built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another processor, or of other compilers, is compiled anew."""
    place = machine_code if name == "version" else machine_code.llvm
    monkeypatch.setattr(place, name, lambda *_: "another")
    before = kept.read_bytes()
    add()

    assert built == ["averaging"]
    assert kept.read_bytes() != before


def test_folder_that_others_may_write(kept: Path, built: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Holds no code for us: each process compiles for itself, and says why."""
    kept.parent.chmod(0o777)
    before = kept.read_bytes()
    kept.write_bytes(b"")

    assert add() == add() == [1.0, 1.5, 2.0]
    assert built == ["averaging"] * 2
    assert kept.read_bytes() == b"" != before
    assert "others may write" in caplog.text


def test_folder_that_cannot_be_made(tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the folder's place: each process compiles for itself."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "kept"))

    assert add() == add() == [1.0, 1.5, 2.0]
    assert built == ["averaging"] * 2


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process compiles then. One loop, as all would take seconds."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setitem(SIGNATURES, "averaging", {"add_f64": SIGNATURES["averaging"]["add_f64"]})

    assert b"add_f64" in machine_code._built("averaging")


def test_where_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's own cache folder, unless another is named."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert machine_code.folder() == Path("/cache/ema-service")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert machine_code.folder() == Path("/home/ada/.cache/ema-service")


def test_loops_are_small(code: Path) -> None:
    """Loading the code that is kept imports neither numba nor torch."""
    source = (
        "import sys; from ema_service.averaging import fused, average_into; fused.prepare()\n"
        "import numpy as np; values = np.ones(8, np.float32); assert average_into(values, values.copy(), values, 0.5)\n"
        "print(*({'torch', 'numba', 'scipy'} & set(sys.modules)))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(code.parent)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


def test_loops_have_the_callers_arguments() -> None:
    """A loop that is asked for with too few arguments is no call of machine code."""
    with pytest.raises(TypeError):
        AVERAGING["take_last"](1)
