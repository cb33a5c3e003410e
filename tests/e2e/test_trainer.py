"""Trainers as processes of their own, beside servers that die, come back or hang: training goes on, and what was
promised of its updates holds.

Knows processes, signals and plain HTTP. Does not know how updates are sent.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

Start = Callable[..., "ServerProcess"]
WAIT_SECONDS = 60.0

#: What every trainer begins with. ``train(n)`` makes n steps; each parameter is the number of the step.
HEAD = """
import os, sys, time, torch
from torch import nn
from ema_client import EmaClient, RemoteEma, RetryPolicy
torch.set_num_threads(1)
model = nn.Linear(200, 200)
client = EmaClient(sys.argv[2], retry=RetryPolicy(attempts=4))
ema = RemoteEma(model, 0.5, run=sys.argv[1], client=client, **OPTIONS)
steps = 0
def train(count):
    global steps
    for _ in range(count):
        steps += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(steps))
        ema(model)
def say(*words):
    print(*words, flush=True)
"""


class Trainer:
    """A trainer process; its lines are what it says."""

    def __init__(self, folder: Path, run: str, url: str, body: str, options: str) -> None:
        self.log = folder / "trainer.log"
        program = HEAD.replace("**OPTIONS", options) + textwrap.dedent(body)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, run, url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, f"the trainer ended:\n{self.log.read_text()}"
        return line

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()

    def end(self) -> int:
        return self.process.wait(WAIT_SECONDS)


@pytest.fixture
def trainer(tmp_path: Path, run_name: str) -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def make(url: str, body: str, options: str = "") -> Trainer:
        made.append(Trainer(tmp_path, run_name, url, body, options))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.communicate()


# --- the end of a trainer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        pytest.param("sys.exit(3)", 3, marks=pytest.mark.soak),
        pytest.param("raise RuntimeError('the training failed')", 1, marks=pytest.mark.soak),
        ("os.kill(os.getpid(), __import__('signal').SIGINT); time.sleep(30)", -signal.SIGINT),
        ("del ema, client", 0),
    ],
)
def test_the_end_loses_nothing(
    server: ServerProcess, trainer: Callable[..., Trainer], run_name: str, ending: str, status: int
) -> None:
    """However a program ends, by itself, by an exception or by Ctrl-C: without close(), its last update is applied and
    the service knows that the training is over."""
    process = trainer(server.url, "train(50)\n" + ending)

    assert process.end() == status, process.log.read_text()
    with server.http() as http:
        info = http.get(f"/v1/runs/{run_name}").json()
    assert info["step"] == 50
    assert info["ended_at"] is not None  # nobody need wait for more
    assert ("RuntimeError" in process.log.read_text()) == (status == 1)


def test_the_end_does_not_wait_for_a_service_that_is_gone(start_server: Start, trainer: Callable[..., Trainer]) -> None:
    """Where nobody answers, the program ends after one round of tries, and says what is lost."""
    server = start_server(memory=True)
    process = trainer(server.url, "say('made'); sys.stdin.readline(); train(20); say('trained')")
    assert process.line() == "made"
    server.kill()
    process.tell()
    assert process.line() == "trained"

    assert process.end() == 0
    assert "the program ends with 2 updates not applied" in process.log.read_text()


def test_the_end_waits_for_a_bounded_time(trainer: Callable[..., Trainer], server: ServerProcess) -> None:
    """A service that takes the connection and then hangs is waited for so long and no longer."""
    with Hanging(server.url) as hanging:
        body = (
            "from ema_client.training import publisher; publisher.EXIT_SECONDS = 1.0; say('made'); sys.stdin.readline()"
        )
        process = trainer(hanging.url, body + "\ntrain(1); say('trained')")
        assert process.line() == "made"
        hanging.hang()
        process.tell()
        assert process.line() == "trained"
        began = time.monotonic()
        assert process.end() == 0

        assert time.monotonic() - began < 20
    assert "the program ends with 1 updates not applied" in process.log.read_text()


def test_a_killed_trainer_leaves_a_run_that_goes_on(
    server: ServerProcess, trainer: Callable[..., Trainer], run_name: str
) -> None:
    """After SIGKILL in the middle of its pushes the run stands at one of its steps, whole, and a new one resumes it."""
    process = trainer(server.url, "train(20)\nsay('well under way')\ntrain(1_000_000)")
    process.line()
    process.process.kill()
    process.end()
    with EmaClient(server.url) as client:
        info, pulled = client.run(run_name), client.pull(run_name)
        assert info.step is not None
        assert info.step == info.num_updates >= 18
        assert all(len(tensor.unique()) == 1 for tensor in pulled.values()), "parts of two steps"
        model = nn.Linear(200, 200)
        with RemoteEma(model, 0.5, run=run_name, client=client, resume=True, step=info.step) as ema:
            ema(model)
            assert ema.num_updates == info.num_updates + 1


# --- the end of a server --------------------------------------------------------------------------------------------


def test_a_server_killed_in_the_middle(start_server: Start, trainer: Callable[..., Trainer], run_name: str) -> None:
    """SIGKILL, a while away, and back on the same socket: the training goes on meanwhile, what was left out is
    counted, and the last update is in the EMA."""
    server = start_server("--checkpoint-interval", "0.2")
    body = """
        train(5); ema.flush(); say("applied"); sys.stdin.readline()
        train(2000); say("trained on", ema.stats.skipped > 1900); sys.stdin.readline()
        ema.flush(); train(1); ema.flush()
        say(ema.stats.sent + ema.stats.skipped + ema.stats.failed, ema.stats.failed, steps)
        ema.close()
    """
    process = trainer(server.uds, body, 'decay_per="step"')
    assert process.line() == "applied"
    with server.http() as http:
        deadline = time.monotonic() + WAIT_SECONDS
        while http.get(f"/v1/runs/{run_name}").json()["durable_step"] != 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    server.kill()
    process.tell()
    assert process.line() == "trained on True"
    server.start()
    process.tell()

    assert process.line() == "2006 0 2006"
    assert process.end() == 0, process.log.read_text()
    assert "cannot be sent, and is tried again" in process.log.read_text()
    assert "updates are applied again" in process.log.read_text()
    with server.http() as http:
        info = http.get(f"/v1/runs/{run_name}").json()
    assert (info["step"], info["num_updates"]) == (2006, 2006)


class Hanging:
    """A way to a server that, once told so, takes bytes and brings no answer."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._hangs = threading.Event()
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def hang(self) -> None:
        self._hangs.set()

    def go_on(self) -> None:
        self._hangs.clear()

    def __enter__(self) -> Hanging:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            self._sockets += [near, far]
            self._start(self._carry, near, far, False)
            self._start(self._carry, far, near, True)

    def _carry(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while chunk := source.recv(1 << 16):
                while answers and self._hangs.is_set() and not self._closed.wait(0.01):
                    pass
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other side hung up


@pytest.mark.parametrize("options", [{"on_busy": "skip"}, {"on_busy": "skip", "decay_per": "step"}])
def test_a_slow_server_stalls_nobody(server: ServerProcess, run_name: str, options: dict[str, Any]) -> None:
    """With on_busy="skip" update() returns at once while nothing is answered. With decay_per="step" what was left out
    is made good: the EMA of a constant model is that of a push at every step."""
    model = nn.Linear(50, 50)
    with Hanging(server.url) as hanging, RemoteEma(model, 0.9, run=run_name, url=hanging.url, **options) as ema:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        hanging.hang()
        began = time.monotonic()
        for _ in range(100):
            ema(model)
        assert time.monotonic() - began < 5
        assert (ema.pending, ema.stats.skipped) == (2, 98)
        hanging.go_on()
        ema.flush()
        ema(model)
        ema.flush()
        counted = ema.num_updates
        ema.copy_to(model)
    shadow = torch.tensor(0.0, dtype=torch.float64)
    for step in range(1, counted + 1):
        shadow += (1 - min(0.9, (1 + step) / (10 + step))) * (1 - shadow)

    assert counted == (101 if "decay_per" in options else 3)
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - before[name]
        torch.testing.assert_close(moved, torch.full_like(moved, shadow.item()), atol=1e-6, rtol=0)


def test_block_waits_and_leaves_nothing_out(server: ServerProcess, run_name: str) -> None:
    """By default update() waits for a server that is slow, and the EMA is LitEma's."""
    model = nn.Linear(5, 5)
    with Hanging(server.url) as hanging, RemoteEma(model, 0.9, run=run_name, url=hanging.url) as ema:
        hanging.hang()
        ema(model)
        ema(model)
        threading.Timer(0.3, hanging.go_on).start()
        began = time.monotonic()
        ema(model)
        assert time.monotonic() - began > 0.1
        assert ema.num_updates == 3
        assert ema.stats.skipped == 0


# --- processes beside a trainer -------------------------------------------------------------------------------------


def test_a_dataloaders_workers(server: ServerProcess, trainer: Callable[..., Trainer]) -> None:
    """Workers forked in the middle of pushes send nothing, hang nobody and end nothing of the trainer's."""
    body = """
        from ema_client.errors import UsageError
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, index):
                try:
                    ema(model)
                except UsageError as fault:
                    return "is a fork of it" in str(fault)
                return False
        refused = []
        for _ in range(3):
            train(5)
            loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork")
            refused += list(loader)
        train(5)
        ema.flush()
        say(all(refused), len(refused), ema.num_updates, ema.stats.sent)
        ema.close()
    """
    process = trainer(server.url, body)

    assert process.line() == "True 24 20 20"
    assert process.end() == 0, process.log.read_text()


def test_the_end_of_a_fork(server: ServerProcess, trainer: Callable[..., Trainer]) -> None:
    """A fork that ends as a program does, exit handlers included, neither waits for the parent's updates nor ends
    them, and says nothing."""
    body = """
        train(20)
        pid = os.fork()
        if pid == 0:
            sys.exit(7)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ema.num_updates, ema.stats.sent)
        train(1)
        ema.close()
    """
    process = trainer(server.url, body)

    assert process.line() == "7 20 20"
    assert process.end() == 0
    assert process.log.read_text() == ""
