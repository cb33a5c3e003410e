"""The demo as a user runs it: real processes, and none of them left behind.

Two tests play the real thing; the others give the parent small children, so that each way of ending takes a second.

Knows the demo's command, its output, and how to find a process by its environment. Does not know how it works inside.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ema_service.demo import run_demo
from tests.waiting import wait_until

PROC = Path("/proc")
MARK = "EMA_DEMO_TEST"
WAIT = 90.0
#: Runs the demo with the three modules named, and little patience.
PARENT = """
import sys
from pathlib import Path
from ema_service.demo import children, play
children.GRACE = 2.0
play.SERVER, play.TRAINER, play.EVALUATOR = sys.argv[2:5]
sys.exit(play.run_demo(Path(sys.argv[1]), steps=40, keep=sys.argv[5:] == ["--keep"]))
"""
SERVER = "print('listens on http://127.0.0.1:1', flush=True)\nimport time\ntime.sleep(300)\n"
IDLE = "import time\ntime.sleep(300)\n"
READY = """from ema_service.demo.plan import Note, report\nreport(Note('ready'))\n"""
STUBBORN = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}{IDLE}"
REAL_TRAINER, REAL_EVALUATOR = "ema_service.demo.trainer", "ema_service.demo.evaluator"

pytestmark = pytest.mark.skipif(not PROC.is_dir(), reason="processes are looked for in /proc, which this system lacks")
_numbers = itertools.count()


@dataclass
class Demo:
    """A demo's parent process and whatever it starts; all of them carry one mark in their environment."""

    parent: subprocess.Popen[bytes]
    folder: Path
    mark: str

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def processes(self) -> dict[int, str]:
        """Pid and command line of every process of this demo that is not a zombie."""
        found = {}
        for entry in PROC.iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended meanwhile, or is another user's
        return found

    def child(self, module: str) -> int:
        """Pid of the child that runs ``module``."""
        return next(pid for pid, command in self.processes().items() if f"tether {module}" in command)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.parent.poll() is not None, f"the demo to print {text!r}")
        assert text in self.output

    def ends(self) -> int:
        """Wait for the parent's end. Returns its exit status after checking that nothing of the demo is left."""
        status = self.parent.wait(WAIT)
        assert self.processes() == {}
        assert list((self.folder / "tmp").glob("ema-*")) == [], "a temporary folder was left behind"
        return status


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Start a demo: with no modules by its command, else with these as server, trainer and evaluator."""
    demos: list[Demo] = []
    (tmp_path / "tmp").mkdir()

    def start(*modules: str) -> Demo:
        command = ["-c", PARENT, "out.png", *modules] if modules else ["-m", "ema_service", "demo", "--out", "out.png"]
        mark = f"{os.getpid()}-{next(_numbers)}"
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, MARK: mark, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": path}
        with (tmp_path / "output").open("wb") as output:
            parent = subprocess.Popen(
                [sys.executable, *command], cwd=tmp_path, stdout=output, stderr=output, env=env, start_new_session=True
            )
        demos.append(Demo(parent, tmp_path, mark))
        return demos[-1]

    yield start
    for demo in demos:
        if demo.parent.poll() is None:
            demo.parent.kill()
            demo.parent.wait(WAIT)
        for pid in demo.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start_small(start: Callable[..., Demo], tmp_path: Path) -> Callable[..., Demo]:
    """Start a demo whose children are these sources."""

    def start_small(trainer: str = READY + IDLE, evaluator: str = IDLE, server: str = SERVER, *more: str) -> Demo:
        for name, source in {"small_server": server, "small_trainer": trainer, "small_evaluator": evaluator}.items():
            (tmp_path / f"{name}.py").write_text(source)
        return start("small_server", "small_trainer", "small_evaluator", *more)

    return start_small


# --- the real thing -------------------------------------------------------------------------------------------------


def test_demo_proves_and_draws(start: Callable[..., Demo]) -> None:
    """Three processes train, average and evaluate; the table, both proofs and the picture come out."""
    from matplotlib import image

    demo = start("ema_service", REAL_TRAINER, REAL_EVALUATOR)

    assert demo.ends() == 0, demo.output
    assert "raw loss" in demo.output
    assert "EMA loss" in demo.output
    losses_of, lengths_of = demo.output.split("EMAs whose length is chosen")
    last = [line.split("│") for line in losses_of.splitlines() if line.startswith("│")][-1]
    step, num_updates, decay, raw, ema = (cell.strip() for cell in last[1:6])
    assert (step, num_updates, decay) == ("40", "40", "0.820000")
    assert 0 < float(ema) < 1
    assert 0 < float(raw) < 1
    assert "pulled EMA = in-process EMA, bit for bit, at step 40: 57 tensors, 256,097 elements" in demo.output
    assert "snapshot 'final' = live EMA, bit for bit, at step 40: 57 tensors, 256,097 elements" in demo.output
    cells = [line.split("│")[1:5] for line in lengths_of.splitlines() if line.startswith("│")]
    lengths = [[cell.strip() for cell in row] for row in cells]
    assert [row[0] for row in lengths if row[2]] == ["0.05", "0.15"]
    assert len([row for row in lengths if row[1]]) == 8
    # Those that were tracked lie on the curve: between the losses of their neighbours, as near as the table tells.
    losses = [float(row[1] or row[2]) for row in lengths]
    for k, row in enumerate(lengths):
        if row[2]:
            low, high = sorted((losses[k - 1], losses[k + 1]))
            assert low - 2e-3 <= losses[k] <= high + 2e-3
    height, width, _ = image.imread(demo.folder / "out.png").shape
    assert (width, height) == (1320, 990)


@pytest.mark.soak
def test_demo_fails_when_the_proof_does(start: Callable[..., Demo], tmp_path: Path) -> None:
    """A trainer whose own EMA has another decay than the service's makes the demo fail and name the tensors."""
    source = (
        f"from {REAL_TRAINER} import InProcessEma\n"
        f"from {REAL_TRAINER.rpartition('.')[0]} import trainer\n"
        "trainer.InProcessEma = lambda model, decay: InProcessEma(model, 0.5)\n"
        "trainer.main()\n"
    )
    (tmp_path / "forger.py").write_text(source)
    (tmp_path / "bystander.py").write_text(IDLE)
    demo = start("ema_service", "forger", "bystander")

    assert demo.ends() == 1
    assert "pulled EMA = in-process EMA does not hold at step 40: 57 tensors differ" in demo.output
    assert not (demo.folder / "out.png").exists()


@pytest.mark.soak
def test_ctrl_c_in_the_middle(start: Callable[..., Demo]) -> None:
    """SIGINT to the running command ends server, trainer and evaluator, and it says so."""
    demo = start()
    demo.wait_for("\nstep ")
    assert len(demo.processes()) == 4

    os.killpg(demo.parent.pid, signal.SIGINT)

    assert demo.ends() == 130
    assert "stopped by SIGINT" in demo.output


# --- every way of ending, with small children ----------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_parent(start_small: Callable[..., Demo], signum: signal.Signals) -> None:
    """Asked to end, once or twice, the parent ends its children, also one that ignores SIGTERM."""
    demo = start_small(trainer=STUBBORN)
    demo.wait_for("ready")

    demo.parent.send_signal(signum)
    demo.parent.send_signal(signum)

    assert demo.ends() == 128 + signum


def test_signal_before_the_server_is_up(start_small: Callable[..., Demo]) -> None:
    """SIGINT while the server is still starting ends it."""
    demo = start_small(server=IDLE)
    wait_until(lambda: len(demo.processes()) == 2, "the server to be started")

    demo.parent.send_signal(signal.SIGINT)

    assert demo.ends() == 130


def test_killed_parent(start_small: Callable[..., Demo]) -> None:
    """Children of a parent that died by SIGKILL end by themselves, also one that ignores SIGTERM."""
    demo = start_small(trainer=STUBBORN)
    demo.wait_for("ready")
    wait_until(lambda: len(demo.processes()) == 4, "all children")

    demo.parent.kill()
    demo.parent.wait(WAIT)

    wait_until(lambda: demo.processes() == {}, "the children to end")


@pytest.mark.parametrize("victim", ["server", "trainer", "evaluator"])
def test_killed_child(start_small: Callable[..., Demo], victim: str) -> None:
    """A child that dies ends the demo: it names the child and the signal, and ends the others."""
    demo = start_small()
    demo.wait_for("ready")

    os.kill(demo.child(f"small_{victim}"), signal.SIGKILL)

    assert demo.ends() == 1
    assert f"the {victim} ended early (SIGKILL)" in demo.output


def test_failing_child(start_small: Callable[..., Demo]) -> None:
    """What a failing child wrote to stderr is shown."""
    demo = start_small(trainer="raise SystemExit('the disk is full')")

    assert demo.ends() == 1
    assert "the trainer ended early (exit status 1)\nthe disk is full" in demo.output


def test_silent_end_is_no_success(start_small: Callable[..., Demo]) -> None:
    """Children that end without proofs and picture make the demo fail."""
    demo = start_small(trainer="", evaluator="")

    assert demo.ends() == 1
    assert "without the proofs or the picture" in demo.output


def test_server_that_is_kept(start_small: Callable[..., Demo]) -> None:
    """With --keep the server stays after the training, the demo names its page, and Ctrl-C ends both."""
    demo = start_small("", "", SERVER, "--keep")
    demo.wait_for("the training is over: http://127.0.0.1:1/runs/digits")
    assert demo.child("small_server")
    assert "stopping the server" not in demo.output

    demo.parent.send_signal(signal.SIGINT)

    assert demo.ends() == 1  # these children prove nothing, and draw nothing
    assert "stopping the server" in demo.output


def test_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without matplotlib the demo names the extra to install, and starts nothing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert run_demo(Path("unused.png")) == 2
    assert "pip install scikit-learn matplotlib" in capsys.readouterr().out


def test_no_folder_for_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture that cannot be written is refused before a minute of training, naming the folder."""
    assert run_demo(tmp_path / "nowhere" / "out.png") == 1
    assert "there is no folder" in capsys.readouterr().out
