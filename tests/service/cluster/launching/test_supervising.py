"""Programs that are kept running, as small processes of their own.

Knows what a supervisor promises. Does not know clusters.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from ema_service.cluster.launching.supervising import Ended, Event, Program, Supervisor
from tests.waiting import wait_until

#: Says its number and what it was told first, and runs until standard input ends.
_TALKER = """
import os, sys, time
print("pid", os.getpid(), flush=True)
print("told", sys.stdin.readline().strip(), flush=True)
sys.stdin.read()
print("ends in order", flush=True)
"""


def _python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


class Heard:
    """What programs have said, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, name: str, line: str) -> None:
        self.lines.append(f"{name} | {line}")

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[-1]) for line in self.lines if line.startswith(f"{name} | pid")]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def events() -> SimpleQueue[Event]:
    return SimpleQueue()


@pytest.fixture
def supervisor(events: SimpleQueue[Event], heard: Heard) -> Iterator[Supervisor]:
    with Supervisor(events, heard) as found:
        yield found


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_is_killed_is_started_again(supervisor: Supervisor, heard: Heard) -> None:
    """Told the same first, and its output told apart by its name."""
    supervisor.keep(Program("a", _python(_TALKER), b"secret\n"))
    wait_until(lambda: "a | told secret" in heard.lines)
    os.kill(heard.pids("a")[0], signal.SIGKILL)
    assert supervisor.next(10) == Ended("a", -signal.SIGKILL)
    assert supervisor.next(1) is None
    wait_until(lambda: heard.lines.count("a | told secret") == 2)


def test_pauses_grow(supervisor: Supervisor, heard: Heard) -> None:
    """What ends at once is not started as often as the machine can."""
    supervisor.keep(Program("a", _python("print('pid 1')")))
    until = time.monotonic() + 3
    while time.monotonic() < until:
        supervisor.next(0.1)
    assert 2 <= len(heard.pids("a")) <= 4  # after 0.2, 0.4, 0.8 and 1.6 seconds, and the starts themselves


def test_what_has_lived_is_started_again_at_once(
    supervisor: Supervisor, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is killed: only what cannot start has to wait."""
    monkeypatch.setattr("ema_service.cluster.launching.supervising._LIVED", 0.0)
    monkeypatch.setattr("ema_service.cluster.launching.supervising._LONGEST_PAUSE", 3600.0)
    supervisor.keep(Program("a", _python(_TALKER), b"\n"))
    for times in range(1, 11):  # the pauses of what cannot start come to three minutes by then
        wait_until(lambda times=times: supervisor.next(0.01) or len(heard.pids("a")) == times)
        os.kill(heard.pids("a")[-1], signal.SIGKILL)
        assert supervisor.next(10) == Ended("a", -signal.SIGKILL)


def test_what_ends_for_good_stays_ended(supervisor: Supervisor, heard: Heard) -> None:
    """A coordinator that was deposed would depose its successor."""
    supervisor.keep(Program("a", _python("print('pid 1')"), for_good=0))
    assert supervisor.next(10) == Ended("a", 0)
    assert supervisor.next(1) is None
    assert len(heard.pids("a")) == 1


def test_the_end_is_in_order(supervisor: Supervisor, heard: Heard) -> None:
    """A program is let end by itself, with nothing left behind, and not started again."""
    for name in ("a", "b"):
        supervisor.keep(Program(name, _python(_TALKER), b"\n"))
    wait_until(lambda: len(heard.pids("a") + heard.pids("b")) == 2 and "b | told " in heard.lines)
    pids = heard.pids("a") + heard.pids("b")
    supervisor.end("a")
    assert heard.lines[-1] == "a | ends in order"
    assert _gone(pids[0])
    assert not _gone(pids[1])
    supervisor.end("b")
    assert _gone(pids[1])


def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """Its programs see the end of their standard input."""
    log = tmp_path / "log"
    text = f"""
import sys
from queue import SimpleQueue
from ema_service.cluster.launching.supervising import Program, Supervisor
def say(name, line):
    with open({str(log)!r}, "a") as file:
        print(line, file=file)
supervisor = Supervisor(SimpleQueue(), say)
supervisor.keep(Program("a", [sys.executable, "-m", "ema_service.tether", "http.server", "0"]))
supervisor.keep(Program("b", [sys.executable, "-c", {_TALKER!r}], b"x\\n"))
supervisor.next(60)
"""
    pids: list[int] = []
    with subprocess.Popen(_python(text)) as process:
        try:
            wait_until(lambda: log.exists() and "Serving" in log.read_text() and "told x" in log.read_text())
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            pids = [int(each) for each in children]
            assert len(pids) == 2
        finally:
            process.kill()
    try:
        wait_until(lambda: all(_gone(pid) for pid in pids), "both to end")
    finally:
        for pid in pids:
            if not _gone(pid):
                os.kill(pid, signal.SIGKILL)
