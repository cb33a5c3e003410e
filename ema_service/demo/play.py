"""The demo's parent process: starts server, trainer and evaluator, follows them, and says whether the demo succeeded.

Knows the order of events and what counts as success. Does not know torch; learns of the weights from reports only.
"""

from __future__ import annotations

import importlib.util
import queue
import re
import signal
import time
from pathlib import Path

from ema_client.scratch import scratch_folder
from ema_service.demo import plan
from ema_service.demo.children import Children, Ended, Events, Said, Signalled, caught_signals
from ema_service.demo.screen import Screen

#: The modules that the three processes run.
SERVER = "ema_service"
TRAINER = "ema_service.demo.trainer"
EVALUATOR = "ema_service.demo.evaluator"
#: Packages that trainer and evaluator need beyond the server's own dependencies.
NEEDS = ("sklearn", "matplotlib")
#: Seconds for everything but training: three imports of torch on a busy machine, the last measurements, the picture.
OVERHEAD = 75.0
#: Proofs of a successful demo: the trainer's (the pulled EMA against its own) and the evaluator's (the snapshot against
#: the live EMA).
PROOFS = 2
_URL = re.compile(r"http://[^\s/]+:\d+")


class DemoFailed(Exception):
    """The demo cannot go on; the text says why and what to do."""


class Stopped(Exception):
    """The user, or the system, asked the demo to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run_demo(
    out: Path = plan.OUT, *, steps: int = plan.STEPS, seconds: float = plan.SECONDS, keep: bool = False
) -> int:
    """Run the demo and write its picture to ``out``. No process is left behind, however the demo ends.

    steps, seconds: training ends with whichever is reached first. keep: the server stays after the training, for its
    pages to be looked at, until a signal comes. Returns an exit status: 0; 1 where something failed or a proof did not
    hold; 2 where a package is missing; 128 + the signal where the demo was stopped before the training's end.
    """
    screen = Screen()
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        screen.note(f"the demo also needs {' and '.join(missing)}: pip install scikit-learn matplotlib")
        return 2
    try:
        with screen:
            took = _Play(screen, out.absolute(), steps, seconds, keep=keep).run()
    except Stopped as stop:
        screen.note(f"stopped by {stop}; server, trainer and evaluator are ended")
        return 128 + stop.signum
    except DemoFailed as failure:
        screen.note(f"the demo failed: {failure}")
        return 1
    return _verdict(screen, out, took)


class _Play:
    """One performance: three children and their reports."""

    def __init__(self, screen: Screen, out: Path, steps: int, seconds: float, *, keep: bool) -> None:
        self.screen = screen
        self.out = out
        self.steps = steps
        self.seconds = seconds
        self.keep = keep
        self.events: Events = queue.SimpleQueue()
        self.began = time.monotonic()
        self.deadline = self.began + seconds + OVERHEAD
        self.running: set[str] = set()

    def run(self) -> float:
        """Play the demo to its end, and return how many seconds the training took. Raises DemoFailed or Stopped.

        Signals stay events until the children are ended and the folder is removed.
        """
        if not self.out.parent.is_dir():
            raise DemoFailed(f"there is no folder {self.out.parent} to write {self.out.name} to")
        self.out.unlink(missing_ok=True)
        with (
            caught_signals(self.events),
            scratch_folder() as folder,
            Children(self.events, folder) as children,
        ):
            url = self._follow(children, folder / "data")
            took = time.monotonic() - self.began
            if self.keep:
                self._stay(children, url)
            self.screen.stage("stopping the server")
            return took

    def _follow(self, children: Children, data: Path) -> str:
        """Start the children, follow trainer and evaluator to their ends, and return the server's address."""
        self.screen.stage("starting the server")
        serve = ["serve", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(data)]
        self._start(children, "server", SERVER, serve)
        url = self._url(children)
        self.screen.note(f"server: {url} (open it in a browser to watch)")
        self.screen.stage("starting trainer and evaluator")
        training = ["--url", url, "--steps", str(self.steps), "--seconds", str(self.seconds)]
        self._start(children, "trainer", TRAINER, training, threads=1)
        evaluation = ["--url", url, "--out", str(self.out)]
        self._start(children, "evaluator", EVALUATOR, evaluation, threads=1)
        while self.running != {"server"}:
            self._show(self._next(children))
        return url

    def _stay(self, children: Children, url: str) -> None:
        """Keep the server until a signal comes. Raises DemoFailed where the server ends."""
        self.screen.note(f"the training is over: {url}/runs/{plan.RUN} shows how it went, until Ctrl-C ends the demo")
        self.screen.stage("the server stays for you to look at")
        while not isinstance(event := self.events.get(), Signalled):
            if isinstance(event, Ended):
                self._ended(children, event.child)

    def _start(self, to: Children, name: str, module: str, arguments: list[str], *, threads: int | None = None) -> None:
        to.start(name, module, arguments, threads=threads)
        self.running.add(name)

    def _url(self, children: Children) -> str:
        while True:
            said = self._next(children)
            found = _URL.search(said.line) if said else None
            if found:
                return found.group()

    def _next(self, children: Children) -> Said | None:
        """The next line of a child, or None where a child has ended as it should."""
        try:
            event = self.events.get(timeout=max(0.0, self.deadline - time.monotonic()))
        except queue.Empty:
            late = ", ".join(sorted(self.running))
            allowed = self.seconds + OVERHEAD
            raise DemoFailed(f"{late} not done after {allowed:.0f} s; is the machine very busy?") from None
        if isinstance(event, Signalled):
            raise Stopped(event.signum)
        if isinstance(event, Ended):
            self._ended(children, event.child)
            return None
        return event

    def _ended(self, children: Children, name: str) -> None:
        status = children.status(name)
        if status or name == "server":
            how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            raise DemoFailed(f"the {name} ended early ({how})\n{children.tail(name)}".rstrip())
        self.running.remove(name)

    def _show(self, said: Said | None) -> None:
        report = plan.parse_report(said.line) if said else None
        if isinstance(report, plan.Progress):
            self.screen.progress(report)
        elif isinstance(report, plan.Row):
            self.screen.row(report)
        elif isinstance(report, plan.Length):
            self.screen.length(report)
        elif isinstance(report, plan.Note):
            (self.screen.note if report.lasting else self.screen.stage)(report.text)
        elif isinstance(report, plan.Proof):
            self._judge(report)

    def _judge(self, proof: plan.Proof) -> None:
        if proof.differing:
            names = f"{len(proof.differing)} tensors differ, such as {', '.join(proof.differing[:5])}"
            raise DemoFailed(f"{proof.claim} does not hold at step {proof.step}: {names}")
        self.screen.proof(proof)


def _verdict(screen: Screen, out: Path, took: float) -> int:
    screen.table()
    for proof in screen.proofs:
        size = f"{proof.tensors} tensors, {proof.elements:,} elements"
        screen.note(f"{proof.claim}, bit for bit, at step {proof.step}: {size}")
    if len(screen.proofs) < PROOFS or not out.is_file():
        screen.note("the demo failed: trainer and evaluator ended without the proofs or the picture")
        return 1
    screen.note(f"samples and loss curves, over steps and over the EMA's length: {out}")
    screen.note(f"all of it took {took:.0f} s")
    return 0
