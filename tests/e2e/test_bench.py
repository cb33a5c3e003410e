"""The two benchmarks run to their end, print every row, and leave nothing behind. No figure is judged here.

Knows the commands, their output, and how to find a process by its environment. Does not know what is fast.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from ema_service.cli import app
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PROC = Path("/proc")
MARK = "EMA_BENCH_TEST"
#: A slow machine may take its time; whoever hangs is found all the same.
WAIT = 560.0
pytestmark = pytest.mark.timeout(600)
RAW = ("raw TCP loopback", "raw Unix socket")
ACTIONS = ("push", "pull into tensors", "pull, new tensors")


@dataclass
class Bench:
    """A benchmark as a process; it and whatever it starts carry one mark in their environment."""

    command: list[str]
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        env = {**os.environ, MARK: str(self.folder), "TMPDIR": str(self.folder), "COLUMNS": "140"}
        with (self.folder / "output").open("wb") as output:
            self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=output, stderr=output, env=env)

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def ends(self) -> int:
        """Its exit status, after a look at what it left behind."""
        status = self.process.wait(WAIT)
        assert self.others() == []
        assert list(self.folder.glob("ema-bench-*")) == [], "a temporary file was left behind"
        return status

    def others(self) -> list[int]:
        """Pids of living processes that it started."""
        found = []
        for entry in PROC.iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    if f"{MARK}={self.folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue  # it ended meanwhile, or is another user's
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Start a benchmark with these words; whatever it leaves behind is ended after the test."""
    if not PROC.is_dir():
        pytest.skip("processes are looked for in /proc, which this system lacks")
    started: list[Bench] = []

    def start(*command: str) -> Bench:
        started.append(Bench([sys.executable, *command], tmp_path))
        return started[-1]

    yield start
    for bench in started:
        if bench.process.poll() is None:
            bench.process.kill()
            bench.process.wait(WAIT)
        for pid in bench.others():
            os.kill(pid, signal.SIGKILL)


def rows_of(output: str) -> list[str]:
    """The names in the first column of every table: a name that is too wide goes on below, beside no figure."""
    names: list[str] = []
    for line in output.splitlines():
        if line.startswith("│"):
            name, figure = (cell.strip() for cell in line.split("│")[1:3])
            if figure:
                names.append(name)
            elif name:
                names[-1] += f" {name}"
    return names


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_bench_of_a_user(start: Callable[..., Bench]) -> None:
    """`ema-service bench` starts its own server, prints a row for each operation, link and size, and writes JSON."""
    bench = start("-m", "ema_service", "bench", "--size", "300KB", "--rounds", "2", "--json", "found.json")

    assert bench.ends() == 0, bench.output
    expected = [
        f"{what}, {link}, {size}" for link in ("TCP", "Unix") for what in ACTIONS for size in ("100 KB", "300 KB")
    ]
    assert rows_of(bench.output) == [*RAW, *expected]
    fits = re.findall(r"^  (\S.*?)  +a = .* ms   b = .* GB/s$", bench.output, re.MULTILINE)
    assert fits == [f"{what}, {link}" for link in ("TCP", "Unix") for what in ACTIONS]
    found = json.loads((bench.folder / "found.json").read_text())
    assert {"cpu", "cores", "python", "torch", "torch_threads", "date"} <= found["machine"].keys()
    assert [row["name"] for row in found["groups"][0]["rows"]] == rows_of(bench.output)
    assert all(len(row["values"]) == 2 for row in found["groups"][0]["rows"])
    assert [fit["name"] for fit in found["fits"]] == fits


@pytest.mark.soak
def test_bench_of_a_given_server(start: Callable[..., Bench], server: Any) -> None:
    """With --url that server is measured, beside the ceiling of its own kind, and its runs are gone afterwards."""
    bench = start("-m", "ema_service", "bench", "--url", server.uds, "--size", "200KB", "--rounds", "1")

    assert bench.ends() == 0, bench.output
    assert rows_of(bench.output) == [*RAW, *(f"{a}, Unix, {size}" for a in ACTIONS for size in ("100 KB", "200 KB"))]
    assert re.search(r"push, Unix, 200 KB.* x raw Unix socket", bench.output)
    assert bench_runs(server) == []


@pytest.mark.soak
def test_ctrl_c_deletes_the_runs(start: Callable[..., Bench], server: Any) -> None:
    """SIGINT in the middle of the rounds deletes the runs on the given server, ends all processes, and says so."""
    bench = start("-m", "ema_service", "bench", "--url", server.url, "--size", "4MB", "--rounds", "100000")
    wait_until(lambda: any((run["step"] or 0) > 5 for run in bench_runs(server)), "the first pushes")
    assert bench.process.poll() is None

    bench.process.send_signal(signal.SIGINT)

    assert bench.ends() == 130, bench.output
    assert "stopped by SIGINT" in bench.output
    assert bench_runs(server) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "much"), "'much' is no size"),
        (("--size", "1B"), "nothing to measure"),
        (("--json", "nowhere/found.json"), "there is no folder"),
        (("--size", "1MB", "--url", "http://127.0.0.1:1"), "nothing answers at http://127.0.0.1:1"),
    ],
)
def test_bench_says_what_is_wrong(words: tuple[str, ...], said: str) -> None:
    """A size, file or service that cannot be is named, without a traceback."""
    ended = CliRunner().invoke(app, ["bench", *words])

    assert isinstance(ended.exception, SystemExit), f"not foreseen: {ended.exception!r}"
    assert ended.exit_code in (1, 2)
    assert said in ended.output


#: Groups of the full comparison that are done within seconds; and the others.
SOON = ("kernel", "gpu", "gpu-trainer")
LATER = (
    "wire",
    "lanes",
    "hosts",
    "links",
    "replicas",
    "latency",
    "gpt2",
    "trainer",
    "connections",
    "tls",
    "sizes",
    "start",
    "readers",
    "memory",
    "durability",
    "large",
    "loop",
    "posthoc",
    "gap",
    "history",
)
BENCHMARKS = ROOT / "tests" / "benchmarks"


def test_every_group_is_tried() -> None:
    """Each group that the full comparison offers is run below, and its rows are known."""
    offers = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import run; print(*run.GROUPS)"
    offered = subprocess.check_output([sys.executable, "-c", offers], text=True, timeout=WAIT).split()
    assert sorted((*SOON, *LATER)) == sorted(EXPECTED) == sorted(offered)


# Each by itself: all of them take longer than a test may.
_LATER = [pytest.param((name,), marks=pytest.mark.soak, id=name) for name in LATER]


@pytest.mark.parametrize("groups", [pytest.param(SOON, id="soon"), *_LATER])
def test_full_comparison(groups: tuple[str, ...], start: Callable[..., Bench]) -> None:
    """Every group of tests/benchmarks runs, and every row is there: measured, or with the reason why it is not."""
    only = [word for name in groups for word in ("--only", name)]
    bench = start(str(BENCHMARKS / "run.py"), "--quick", *only, "--json", "found.json")

    assert bench.ends() == 0, bench.output
    found = json.loads((bench.folder / "found.json").read_text())
    assert found["failed"] == []
    rows = {group["name"]: [row["name"] for row in group["rows"]] for group in found["groups"]}
    assert rows == {name: EXPECTED[name] for name in groups}
    assert rows_of(bench.output) == [name for names in rows.values() for name in names]
    unmeasured = [row for group in found["groups"] for row in group["rows"] if not row["values"]]
    assert [row["name"] for row in unmeasured if not row["note"].startswith(REASONS)] == []
    named = {name for names in rows.values() for name in names}
    expected = {demand for demand in DEMANDED if demand[0] in named}
    # A row of the same name in another group may be the one that is meant.
    elsewhere = {name for group, names in EXPECTED.items() if group not in groups for name in names}
    assert demands(found) <= expected
    assert [demand for demand in expected - demands(found) if demand[0] not in elsewhere] == []


#: Why a row may have no figures.
REASONS = ("not installed", "does not run here: ", "skipped: ")
#: Rows of the full comparison at its quick sizes.
EXPECTED = {
    "wire": [
        *RAW,
        "copy_ of every tensor",
        "push, TCP",
        "push, Unix",
        "push, state in shared memory",
        "push, copied to shared memory first",
        "pull into tensors, TCP",
        "pull into tensors, Unix",
        "pull, new tensors, TCP",
        "pull, new tensors, Unix",
        "FastAPI, await request.body()",
        "stock uvicorn, request.stream()",
        "torchft pull, 1 chunk",
        "torchft pull, 4 chunks",
    ],
    "lanes": [
        "one raw flow of 100 MB/s",
        "push, flows of 100 MB/s",
        "pull, flows of 100 MB/s",
        "push in parts, 2 ranks, one flow of 100 MB/s each",
        "push in parts, 2 ranks, lanes found",
        "raw flows of 100 + 100 + 60 + 20 MB/s",
        "push, uneven flows",
        "pull, uneven flows",
        "one raw flow, not paced",
        "one raw flow, averaged on arrival",
        "push, one lane",
        "push, lanes found",
        "pull, one lane",
        "pull, two lanes",
        "pull, lanes found",
        "push over TLS, one lane",
        "push over TLS, lanes found",
        "pull over TLS, one lane",
        "pull over TLS, two lanes",
        "pull over TLS, lanes found",
    ],
    "hosts": [
        "push, one server",
        "pull, one server",
        "push, 2 hosts",
        "pull, 2 hosts",
        "push, 2 hosts, shared memory",
        "push, 3 hosts",
        "pull, 3 hosts",
        "push, twins of 2 shards",
        "pull, twins of 2 shards",
        "push, twins, by the gateway",
        "pull, twins, by the gateway",
        "push, 2 hosts, a flow of 100 MB/s each",
        "push, 2 hosts, lanes found",
    ],
    "links": [
        "raw flow to 1 machine",
        "push, 1 linked host",
        "pull, 1 linked host",
        "raw flows to 2 machines",
        "push, 2 linked hosts",
        "pull, 2 linked hosts",
        "raw flows to 3 machines",
        "push, 3 linked hosts",
        "pull, 3 linked hosts",
    ],
    "replicas": [
        *(
            f"pull, {count}, {where}"
            for count in ("1 evaluator", "4 evaluators", "8 evaluators")
            for where in ("one server", "with 1 replica", "with 2 replicas", "with 4 replicas")
        ),
        "push, nobody reads",
        "push, 8 read at one server",
        "push, 8 read at 4 replicas",
    ],
    "connections": [
        "raw TCP loopback",
        "push, whole",
        "last of 4 parts, every fourth tensor",
        "last of 4 parts, tensors in a row",
        *(f"push in {k} part{'s' if k > 1 else ''}, as many connections" for k in (1, 2, 4)),
    ],
    "tls": [
        "push, without TLS",
        "push, TLS",
        "two pushes at once, TLS",
        "pull into tensors, without TLS",
        "pull into tensors, TLS",
        *(
            f"{what}, {way}, TLS"
            for way in ("push", "two pushes at once", "pull into tensors")
            for what in ("server's CPU time", "of that the event loop's")
        ),
    ],
    "sizes": [
        *RAW,
        *(f"{a}, {link}, {size}" for link in ("TCP", "Unix") for a in ACTIONS for size in ("100 KB", "8 MiB")),
    ],
    "latency": [
        "empty PUT, the same server",
        "empty PUT, bare FastAPI",
        "push of 100 KB, TCP",
        "push of 100 KB, Unix",
    ],
    "start": ["import torch", "server, ready", "server, no run yet", "server, a run of 100 MiB left out"],
    "readers": ["raw TCP loopback", "all readers together", "frozen copies at most", "growth of the server's peak"],
    "memory": [
        "server at rest",
        "server's peak, push and pull of 8 MiB",
        "server's growth, pushes 10..20 of 1 MiB",
        "client's peak beyond the model of 8 MiB, steps longer than sending",
        "the same, nothing but updates",
    ],
    "durability": [
        "raw TCP loopback",
        "write a file again and fdatasync",
        "push, durability memory",
        "push, memory, during a checkpoint",
        "push, durability process",
        "push, process, during a checkpoint",
        "push from shared memory, memory",
        "push from shared memory, process",
        "written to disk by a push, durability process",
        "push, durability process, no memory files",
        "push, durability disk",
        "read the run's file",
        "a run of durability disk, back in memory",
        "start of a server without runs",
        "start after kill -9 of 4 runs",
        "the same, beyond a server without runs",
    ],
    "large": [
        "memory of three shadows, used for the first time",
        "constructor, memory",
        "update, median, memory",
        "longest update, memory",
        "scope, in and out, memory",
        "server's memory, memory",
        "written to disk by updates, memory",
        "restart, memory",
        "constructor, process",
        "update, median, process",
        "longest update, process",
        "scope, in and out, process",
        "server's memory, process",
        "written to disk by updates, process",
        "restart, process",
        "constructor, process in slots",
        "update, median, process in slots",
        "longest update, process in slots",
        "scope, in and out, process in slots",
        "server's memory, process in slots",
        "written to disk by updates, process in slots",
        "restart, process in slots",
    ],
    "kernel": ["lerp_", "kernel, float32", "kernel, bf16 into float32", "LitEma as written"],
    "gpt2": [
        "kernel on the flat arena",
        "lerp_ on one flat tensor",
        "LitEma as written",
        "torch-ema",
        "AveragedModel, foreach",
        "timm ModelEmaV3",
        "ema-pytorch, foreach",
    ],
    "trainer": [
        "copy_ of every parameter",
        "RemoteEma.update",
        "RemoteEma.update, the last one still on its way",
        "RemoteEma.update, borrow=True",
        "RemoteEma.update, update_every=10, amortised",
        "LitEma as written",
        "torch-ema",
        "AveragedModel, foreach",
        "timm ModelEmaV3",
        "ema-pytorch, foreach",
    ],
    "loop": [
        "no EMA",
        "copy_ of every parameter",
        "RemoteEma",
        "RemoteEma, borrow=True",
        "LitEma as written",
        "AveragedModel, foreach",
    ],
    "posthoc": [
        "read the ring's files once",
        "pull of an average worked out of them",
        "sweep of eight of them",
        *(f"{what}, {k} average{'s' if k > 1 else ''}" for what in ("pass", "push") for k in (1, 2, 4, 8)),
    ],
    "gap": [
        row
        for decay in ("0.999", "0.9999")
        for row in (
            f"decay {decay}, k = 1",
            *(f"decay {decay}, k = {k}, {how}" for k in (10, 100) for how in ("compensated", "not compensated")),
        )
    ],
    "history": [
        "averaging a push, nothing measured",
        "the same, measured",
        "the same, measured as the server does: one of five",
        "push, Unix socket, --no-measurements",
        "push, Unix socket",
        "noting one update",
        "history of a year, 500 points, packed",
        "metrics of 1,000 runs",
    ],
    "gpu": [
        "raw TCP loopback",
        "pinned host to device",
        "device to pinned host",
        "push, TCP, --device cuda",
        "push, TCP, --device cuda, durability process",
        "push, state in shared memory, --device cuda",
        "pull into tensors, TCP, --device cuda",
        "lerp_ on the device",
        "kernel on the device, float32",
    ],
    "gpu-trainer": [
        "no EMA",
        "RemoteEma",
        "RemoteEma, on_busy='skip', the sender never idle",
        "LitEma on the device",
        "AveragedModel on the device, foreach",
        "inside RemoteEma.update",
        "copy of the parameters to the host",
        "RemoteEma: memory of the device",
        "LitEma: memory of the device",
    ],
}
#: What is demanded of rows that any machine can measure: (row, against, bound).
DEMANDED = {
    ("push, TCP", "raw TCP loopback", 0.9),
    ("push, TCP", "stock uvicorn, request.stream()", 3),
    ("push, TCP", "FastAPI, await request.body()", 10),
    ("push, Unix", "raw Unix socket", 0.85),
    ("push, state in shared memory", "raw TCP loopback", 2.5),
    ("pull into tensors, TCP", "raw TCP loopback", 0.95),
    ("pull into tensors, Unix", "raw Unix socket", 0.85),
    ("pull, new tensors, TCP", "raw TCP loopback", 0.7),
    *((f"of that the event loop's, {what}, TLS", None, 0.25) for what in ("push", "two pushes at once")),
    ("push of 100 KB, TCP", "empty PUT, the same server", 2.2),
    ("kernel, float32", "lerp_", 0.65),
    ("kernel, float32", "LitEma as written", 3),
    ("kernel, bf16 into float32", "lerp_", 0.6),
    ("frozen copies at most", None, 1),
    ("push, memory, during a checkpoint", "push, durability memory", 1 / 1.5),
    ("push, durability process", "raw TCP loopback", 0.75),
    ("push, durability process", "push, durability memory", 0.95),
    ("push, process, during a checkpoint", "push, durability memory", 0.8),
    ("push from shared memory, process", "push from shared memory, memory", 0.95),
    ("push, durability disk", "write a file again and fdatasync", 0.8),
    ("a run of durability disk, back in memory", "read the run's file", 0.5),
    ("the same, beyond a server without runs", None, 0.3),
    ("constructor, process", "memory of three shadows, used for the first time", 0.7),
    ("longest update, process", "update, median, process", 2.0),
    ("restart, process", None, 1.0),
    ("server, ready", "import torch", 1.2 / 0.9),
    ("RemoteEma.update", "copy_ of every parameter", 1.3),
    ("RemoteEma.update, update_every=10, amortised", "copy_ of every parameter", 0.13),
    ("LitEma as written", "RemoteEma.update", 4),
    ("RemoteEma", "copy_ of every parameter", 1.05),
    ("pull of an average worked out of them", "read the ring's files once", 2),
    *((f"pass, {k} averages", "pass, 1 average", 1.25 * k) for k in (2, 4, 8)),
    ("decay 0.999, k = 1", None, 0.1),
    ("decay 0.9999, k = 1", None, 0.1),
    *((f"{way}, flows of 100 MB/s", "one raw flow of 100 MB/s", 0.9 * 8) for way in ("push", "pull")),
    *((f"{way}, uneven flows", "raw flows of 100 + 100 + 60 + 20 MB/s", 0.8) for way in ("push", "pull")),
    ("push in parts, 2 ranks, lanes found", "push in parts, 2 ranks, one flow of 100 MB/s each", 0.8 * 4),
    ("push, one lane", "one raw flow, not paced", 0.9),
    ("push, one lane", "one raw flow, averaged on arrival", 0.95),
    ("push, lanes found", "push, one lane", 0.97),
    ("pull, lanes found", "one raw flow, not paced", 0.95),
    *(
        (f"{pull}, lanes found", f"{pull}, {lanes}", 0.97)
        for pull in ("pull", "pull over TLS")
        for lanes in ("one lane", "two lanes")
    ),
    *((f"push, {k} hosts", "push, one server", 0.95 * k) for k in (2, 3)),
    *((f"pull, {k} hosts", "pull, one server", 0.9 * k) for k in (2, 3)),
    ("push, twins of 2 shards", "push, one server", 0.95 * 2),
    ("pull, twins of 2 shards", "pull, one server", 0.9 * 2),
    ("push, 2 hosts, shared memory", "push, 2 hosts", 2.5),
    ("push, 2 hosts, lanes found", "push, 2 hosts, a flow of 100 MB/s each", 2.0),
    *((f"push, {k} linked hosts", "push, 1 linked host", 0.95 * k) for k in (2, 3)),
    *((f"pull, {k} linked hosts", "pull, 1 linked host", 0.9 * k) for k in (2, 3)),
    *(
        (f"pull, {count} evaluators, {where}", f"pull, {count} evaluators, one server", 0.8 * count / busiest)
        for count, busiest, where in (
            *((4, 2, "with 1 replica"), (4, 2, "with 2 replicas"), (4, 1, "with 4 replicas")),
            *((8, 4, "with 1 replica"), (8, 3, "with 2 replicas")),
        )
    ),
    ("pull, 8 evaluators, with 4 replicas", "pull, 8 evaluators, one server", 3.5),
    *((f"push, 8 read at {where}", "push, nobody reads", 0.5) for where in ("one server", "4 replicas")),
    ("push over TLS, lanes found", "push over TLS, one lane", 0.97),
    ("the same, measured as the server does: one of five", "averaging a push, nothing measured", 0.9),
    ("push, Unix socket", "push, Unix socket, --no-measurements", 0.97),
    ("history of a year, 500 points, packed", None, 50),
    ("metrics of 1,000 runs", None, 100),
}


def demands(found: Mapping[str, Any]) -> set[tuple[str, str | None, float]]:
    """The demands of a result file, but for those in bytes and those that need torchft or a GPU."""
    optional = ("torchft",)
    return {
        (row["name"], demand["against"], demand["bound"])
        for group in found["groups"]
        for row in group["rows"]
        for demand in row["comparisons"]
        if demand["bound"] is not None
        and row["unit"] not in ("MB", "MiB", "GiB")
        and not (demand["against"] or "").startswith(optional)
    }


def bench_runs(server: Any) -> list[dict[str, Any]]:
    """The runs of a benchmark that the server holds."""
    runs = httpx.get(f"{server.url}/v1/runs", timeout=30).json()["runs"]
    return [run for run in runs if run["run"].startswith("bench-")]
