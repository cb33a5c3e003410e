"""Temporary folders for weights, and what is left of them when a program ends. Knows processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ema_client.scratch import scratch_folder

#: Makes a folder with a file, says so, and waits; with a signal handler of its own where it is told so.
PROGRAM = """
import signal, sys, time
from ema_client.scratch import scratch_folder
if "handles" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
with scratch_folder() as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(folder, flush=True)
    if "raises" in sys.argv:
        raise RuntimeError
    while "waits" in sys.argv:
        time.sleep(0.01)
"""

Begin = Callable[..., tuple[subprocess.Popen[str], Path]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start the program with words, and return it with its folder, once that is there."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[subprocess.Popen[str], Path]:
        env = os.environ | {"TMPDIR": str(tmp_path)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=env,
            # Under nohup, SIGHUP is ignored here, and so it would be there.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        begun.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "sent", "code"),
    [
        ([], None, 0),
        (["raises"], None, 1),
        (["waits"], signal.SIGTERM, 128 + signal.SIGTERM),
        (["waits"], signal.SIGHUP, 128 + signal.SIGHUP),
        (["waits", "handles"], signal.SIGTERM, 7),
    ],
)
def test_nothing_is_left(
    begin: Begin, tmp_path: Path, words: list[str], sent: signal.Signals | None, code: int
) -> None:
    """The folder goes with the block, also where the program is told to end; a program's own handler stays."""
    process, folder = begin(*words)
    assert folder.parent == tmp_path
    if sent:
        process.send_signal(sent)
    assert process.wait(30) == code
    assert not list(tmp_path.iterdir())


def test_next_program_removes_what_a_killed_one_left(begin: Begin, tmp_path: Path) -> None:
    """SIGKILL leaves the folder until the next program makes one; those of living programs, of other machines, and what
    is no folder of ours, stay."""
    killed, left = begin("waits")
    killed.kill()
    killed.wait()
    assert (left / "weights").exists()
    living, theirs = begin("waits")
    elsewhere = tmp_path / "ema-scratch-elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".held").write_text("another machine")
    (tmp_path / "ema-scratch-link").symlink_to(elsewhere)
    (tmp_path / "ema-scratch-new").mkdir()
    assert not left.exists()

    process, _ = begin()
    assert process.wait(30) == 0
    names = {theirs.name, "ema-scratch-elsewhere", "ema-scratch-link", "ema-scratch-new"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (theirs / "weights").exists()
    living.terminate()
    assert living.wait(30) == 128 + signal.SIGTERM


def test_in_a_thread() -> None:
    """In a thread, which signals do not come to, a folder is made and removed all the same."""
    seen: list[Path] = []
    before = signal.getsignal(signal.SIGTERM)

    def use() -> None:
        with scratch_folder() as folder:
            assert folder.is_dir()
            assert signal.getsignal(signal.SIGTERM) == before
            seen.append(folder)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(30)
    assert [folder.exists() for folder in seen] == [False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that begin at once, as the tasks of a batch job do, look at each other's folders, and are in nobody's
    way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use(_: int) -> None:
        for _ in range(100):
            with scratch_folder() as folder:
                assert (folder / ".held").exists()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert not list(tmp_path.iterdir())
