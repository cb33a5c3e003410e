"""``ema sweep``, and the options for averages of any length, against the real service.

Knows the command's words, what it shows and its exit codes. Does not know how averages come.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

from ema_client import EmaClient
from ema_client.cli.plots import text_plot
from ema_client.cli.sweep import last_number, lengths_of
from ema_client.errors import UsageError
from ema_client.protocol import SweepPoint
from tests.waiting import settled

RUN = "posthoc-cli"
Ema = Callable[..., tuple[int, str, str]]
#: Prints a curve with its lowest point at sigma_rel 0.06, and a number and colours before and after it.
EVALUATE = """
import math, os, sys
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as file:
    assert file.metadata()["ema_target"] == "sigma_rel " + format(float(sys.argv[2]), ".4g")
    assert os.environ["EMA_SIGMA_REL"] == sys.argv[2] and os.environ["EMA_RUN"] == "posthoc-cli"
print("evaluated 500 images")
print("\\x1b[1mloss: %.6f\\x1b[0m" % abs(math.log(float(sys.argv[2]) / 0.06)))
print("a warning", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def trained(server: Any) -> Iterator[EmaClient]:
    """A run with a ring that has 100 updates, and a client of its service."""
    with EmaClient(server.url) as client:
        client.create_run(RUN, {"w": torch.zeros(300)}, posthoc=True)
        for step in range(1, 101):
            client.push(RUN, {"w": torch.full((300,), math.log(step)) + torch.arange(300) / 100}, step=step)
        settled(client, RUN)
        yield client


@pytest.fixture
def ema(ema: Ema, trained: EmaClient) -> Ema:
    """The command, for a service with a trained run."""
    assert trained.runs()
    return ema


@pytest.fixture
def evaluate(tmp_path: Path) -> str:
    script = tmp_path / "evaluate the model.py"
    script.write_text(EVALUATE)
    return f"{sys.executable} {shlex.quote(str(script))} {{path}} {{sigma_rel}}"


def test_sweep(ema: Ema, evaluate: str, tmp_path: Path, trained: EmaClient) -> None:
    """A table with the best marked, a plot, a picture, the best as a snapshot; the command's words are passed on."""
    words = ("--exec", evaluate, "--plot", tmp_path / "curve.png", "--keep", "best", "--name", "loss")
    code, out, err = ema("sweep", RUN, "--sigma-rel", "0.04,0.06,0.1", *words)

    assert code == 0, err
    marked = [line.split() for line in out.splitlines() if line.strip().startswith("*")]
    assert [line[:3] for line in marked] == [["*", "0.06", "0"]]
    assert re.search(r"^best: sigma_rel 0\.06, 0, of run posthoc-cli at 100$", out, re.MULTILINE)
    assert "a warning" in err
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    kept, again = trained.pull(RUN, snapshot="best"), trained.pull(RUN, sigma_rel=0.06)
    assert torch.equal(kept["w"], again["w"])
    told = trained.sweeps(RUN)[-1]
    assert [(point.value, point.result) for point in told.points] == [(0.04, 0.405465), (0.06, 0.0), (0.1, 0.510826)]
    assert (told.kind, told.at, told.highest, told.name, told.version) == ("sigma_rel", 100, False, "loss", "1.100")
    assert told.best == told.points[1]
    assert "sweep of 3 lengths, best sigma_rel 0.06: loss 0" in [line.text for line in trained.timeline(RUN).entries]
    assert ema("sweep", RUN, "--sigma-rel", "0.1", "--exec", evaluate, "--keep", "best")[0] == 1


def test_refine_and_json(ema: Ema, evaluate: str) -> None:
    """Further lengths come nearer to the best; --json has every point, and no table stands beside it."""
    code, out, _ = ema("sweep", RUN, "--sigma-rel", "0.015:0.25:3", "--exec", evaluate, "--refine", "3", "--json")
    found = json.loads(out)

    assert code == 0
    assert len(found["points"]) == 6
    assert found["best"]["result"] < 0.1
    assert (found["kind"], found["at"]) == ("sigma_rel", 100)


def test_what_fails_is_told_and_the_others_go_on(ema: Ema, trained: EmaClient) -> None:
    """A command that fails is told by its own words, a length that is refused by the service's; the exit code is 1. The
    service is told the same."""
    command = "case {sigma_rel} in 0.05) echo half; echo no GPU here >&2; exit 3;; 0.1) echo done;; *) echo 7;; esac"
    code, out, err = ema("sweep", RUN, "--sigma-rel", "0.05,0.1,0.15,0.2885", "--exec", command)

    assert code == 1
    assert "ema: sigma_rel 0.05: the command failed with exit code 3: no GPU here" in err
    assert "ema: sigma_rel 0.1: the command printed no number: done" in err
    assert "0.2885 refused: run 'posthoc-cli'" in out
    assert "nearest that can be had" in out
    assert "best: sigma_rel 0.15, 7" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("0.") and "refused:" not in line]
    assert [row[1] for row in rows] == ["failed", "failed", "refused"]
    kept = trained.sweeps(RUN)[-1].points
    assert [(point.value, point.result) for point in kept] == [(0.05, None), (0.1, None), (0.15, 7.0), (0.2885, None)]
    assert [point.refused is not None for point in kept] == [False, False, False, True]


@pytest.mark.parametrize("highest", [False, True])
def test_highest(ema: Ema, highest: bool, trained: EmaClient) -> None:
    """The lowest result is the best, unless told otherwise; at an edge that is said. --no-report tells no service."""
    words = ("--highest",) if highest else ("--no-report",)
    before = trained.sweeps(RUN)
    _, out, _ = ema("sweep", RUN, "--sigma-rel", "0.05,0.1", "--exec", "echo {sigma_rel}", *words)

    assert f"best: sigma_rel {0.1 if highest else 0.05}" in out
    assert "at the edge" in out
    assert (trained.sweeps(RUN) == before) is not highest
    assert not highest or trained.sweeps(RUN)[-1].best == SweepPoint(0.1, 0.1)


def test_nothing_to_be_had(ema: Ema, trained: EmaClient) -> None:
    """Where all are refused nothing is drawn, kept or reported, and the exit code is 1."""
    before = trained.sweeps(RUN)
    code, out, err = ema("sweep", RUN, "--sigma-rel", "0.2884,0.2885", "--exec", "echo 1", "--keep", "none")

    assert code == 1
    assert "best" not in out
    assert "Traceback" not in err
    assert trained.sweeps(RUN) == before


def test_results_of_many_lengths_and_of_no_number(trained: EmaClient) -> None:
    """A report has as many points as it may, the best of them, and no result that JSON has no word for."""
    lengths = [k / 1000 for k in range(30, 100)]
    evaluate = itertools.chain([math.nan, math.inf], itertools.count(70, -1)).__next__
    found = trained.sweep(RUN, lambda _path, _info: evaluate(), sigma_rel=lengths, max_error=0.5)

    kept = trained.sweeps(RUN)[-1]
    assert (len(found.points), len(kept.points)) == (70, 64)
    assert kept.best == SweepPoint(0.099, 3.0)
    assert [point.value for point in kept.points] == lengths[-64:]
    evaluate = iter([math.nan, math.inf, 1e305, 2.0]).__next__
    trained.sweep(RUN, lambda _path, _info: evaluate(), sigma_rel=lengths[:4], max_error=0.5)
    assert [point.result for point in trained.sweeps(RUN)[-1].points] == [None, None, None, 2.0]
    with pytest.raises(UsageError, match="301 characters"):
        trained.sweep(RUN, lambda _path, _info: 1.0, sigma_rel=[0.1], name="x" * 301)


def test_sweep_that_breaks_off_is_reported(trained: EmaClient) -> None:
    """What was found before Ctrl-C, or before an evaluation's own error, is not lost; of nothing, nothing is told."""
    for error in (KeyboardInterrupt, ZeroDivisionError):
        for points in (0, 2):
            results = iter([2.0, 1.0][:points])

            def evaluate(_path: Path, _info: Any, results: Any = results, error: Any = error) -> float:
                if (result := next(results, None)) is None:
                    raise error
                return float(result)

            before = trained.sweeps(RUN)[-1:]
            with pytest.raises(error):
                trained.sweep(RUN, evaluate, sigma_rel=[0.05, 0.1, 0.15])
            after = trained.sweeps(RUN)[-1:]
            assert (after == before) is (points == 0)
    assert [(point.value, point.result) for point in after[0].points] == [(0.05, 2.0), (0.1, 1.0)]


def test_service_that_takes_no_results(
    ema: Ema, trained: EmaClient, run_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the service does not take the results, such as of a run that was deleted meanwhile: one line says so, the
    results are shown, and the exit code is what it would be. In Python it is logged."""

    def begin() -> None:
        trained.create_run(run_name, {"w": torch.zeros(3)}, posthoc={"snapshots": 2, "sigma_rel": [0.1]})
        trained.push(run_name, {"w": torch.ones(3)}, step=1)

    def delete_meanwhile(_path: Path, _info: Any) -> float:
        trained.delete_run(run_name)
        return 0.5

    begin()
    assert trained.sweep(run_name, delete_meanwhile, sigma_rel=[0.1]).points[0].result == 0.5
    assert len(caplog.messages) == 1
    assert f"{run_name!r}: the service did not keep what the sweep found: there is no run" in caplog.text
    begin()
    delete = f"{sys.executable} -m ema_client delete {run_name} --yes >&2 && echo 0.5"
    code, out, err = ema("sweep", run_name, "--sigma-rel", "0.1", "--exec", delete)
    assert (code, "best: sigma_rel 0.1, 0.5" in out) == (0, True), err
    told = f"ema: the results are here alone, the service did not take them: there is no run {run_name!r}"
    assert [line for line in err.splitlines() if "service" in line] == [told]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--exec", "true"), "give one of"),
        (("--exec", "true", "--sigma-rel", "0.1", "--decay", "0.9"), "give one of"),
        (("--exec", "true", "--sigma-rel", "0.1:0.2"), "is not A:B:N"),
        (("--exec", "true", "--sigma-rel", "0.1:0.2:1"), "no sweep"),
        (("--exec", "true", "--sigma-rel", "a,b"), "is not A:B:N"),
        (("--exec", "true", "--sigma-rel", "0.1,0.3"), "is not above 0"),
        (("--exec", "true", "--sigma-rel", "0.1", "--keep", "../x"), "cannot name a snapshot"),
        (("--sigma-rel", "0.1"), "exec"),
    ],
)
def test_wrong_use(ema: Ema, words: tuple[str, ...], says: str) -> None:
    """A mistake is told before anything is asked, with exit code 2."""
    code, out, err = ema("sweep", RUN, *words)

    assert (code, out) == (2, "")
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


def test_pictures_that_cannot_be(ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that could not be drawn is told of before the first evaluation."""
    words = ("sweep", RUN, "--sigma-rel", "0.1", "--exec", f"touch {tmp_path / 'ran'}", "--plot")
    assert "a picture is a .png" in ema(*words, tmp_path / "curve.txt")[2]
    assert "no folder" in ema(*words, tmp_path / "none" / "curve.png")[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = ema(*words, tmp_path / "curve.png")

    assert code == 1
    assert "pip install matplotlib" in err
    assert not (tmp_path / "ran").exists()


IN_PYTHON = """
import os, pathlib, sys, time
from ema_client import EmaClient
def evaluate(path, info):
    pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()}\\n")
    time.sleep(60)
EmaClient().sweep("posthoc-cli", evaluate, sigma_rel=[0.1])
"""


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "ema_client", "sweep", RUN, "--sigma-rel", "0.1", "--exec", "echo $$ > {pid}; exec sleep 60"),
        ("-c", IN_PYTHON, "{pid}"),
    ],
    ids=["command", "call"],
)
def test_told_to_end(words: tuple[str, ...], trained: EmaClient, tmp_path: Path) -> None:
    """SIGTERM in the middle of an evaluation ends the command, or the program, and leaves no file behind."""
    environ = {**os.environ, "EMA_SERVICE_URL": trained.url, "TMPDIR": str(tmp_path)}
    command = [sys.executable, *(word.replace("{pid}", f"{tmp_path}/pid") for word in words)]
    started = subprocess.Popen(command, env=environ)
    try:
        pid = tmp_path / "pid"
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 128 + signal.SIGTERM
    finally:
        started.kill()
        started.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        ("0.5", 0.5), ("loss 1 of 3: -2.5e-3\n", -0.0025), ("12%", 12.0), ("FID=.5;", 0.5), ("\x1b[32m7\x1b[0m", 7.0),
        ("none", None), ("", None), ("step 3 inf", math.inf), ("3.", 3.0), ("+4E2", 400.0),
    ],
)  # fmt: skip
def test_last_number(printed: str, number: float | None) -> None:
    """The last number of what was printed, and not the digits of a colour."""
    assert last_number(printed) == number


def test_nan_is_the_last_number() -> None:
    """A loss that is no number does not make another number the result."""
    assert math.isnan(last_number("step 3: loss nan") or 0.0)


def test_lengths() -> None:
    """Spread, listed, or one; decays are spread on the scale on which they differ."""
    assert lengths_of("sigma_rel", "0.02:0.2:3") == [0.02, 0.06325, 0.2]
    assert lengths_of("decay", "0.99:0.9999:3") == [0.99, 0.999, 0.9999]
    assert lengths_of("half_life", "10,100,30") == [10.0, 100.0, 30.0]
    with pytest.raises(typer.BadParameter, match="--half-life"):
        lengths_of("half_life", "0,1")


def test_plot() -> None:
    """Points lie where they belong, the best is marked, and a flat curve is drawn as well."""
    lines = text_plot([(0.01, 3.0), (0.1, 1.0), (1.0, 2.0)], (0.1, 1.0))
    columns = {line.index(mark): k for k, line in enumerate(lines[:12]) for mark in "o*" if mark in line}

    assert len(columns) == 3
    left, middle, right = sorted(columns)
    assert columns[left] < columns[right] < columns[middle]
    assert abs((right + left) / 2 - middle) <= 1
    assert lines[-1].split() == ["0.01", "1"]
    assert sum(line.count("o") for line in text_plot([(0.1, 1.0), (0.2, 1.0)], (0.1, 1.0))) == 1


# --- averages of any length by the other commands -------------------------------------------------------------------


def test_pull_snapshot_show_profiles(ema: Ema, trained: EmaClient, tmp_path: Path) -> None:
    """The same average by every command; what it is, and how exact, is said."""
    path = tmp_path / "w.safetensors"
    code, out, _ = ema("pull", RUN, "--sigma-rel", "0.1", "-o", path)
    whole = trained.pull(RUN, sigma_rel=0.1)
    assert code == 0
    assert re.search(r"posthoc, version 1\.100, step 100, num_updates 100, sigma_rel 0\.1, error 0\.00", out)
    assert torch.equal(load_file(path)["w"], whole["w"])

    assert ema("snapshot", RUN, "of-0.1", "--sigma-rel", "0.1")[0] == 0
    assert torch.equal(trained.pull(RUN, snapshot="of-0.1")["w"], whole["w"])
    assert ema("pull", RUN, "--window", "50:100", "--max-error", "0.5", "-o", path)[0] == 0
    assert ema("pull", RUN, "--half-life", "20", "-o", path)[0] == 0
    assert ema("pull", RUN, "--decay", "0.95", "-o", path)[0] == 0

    code, out, _ = ema("profiles", RUN, "--sigma-rel", "0.1")
    assert (code, out.split("\n")[0].split(", amplification")[0]) == (
        0, f"{RUN}: sigma_rel 0.1 at num_updates 100, error {whole.info.profile_error:.2g}",
    )  # fmt: skip
    assert "posthoc-0.03" in out
    assert "refused: " in ema("profiles", RUN, "--sigma-rel", "0.2885")[1]
    assert json.loads(ema("profiles", RUN, "--sigma-rel", "0.1", "--json")[1])["refused"] is None
    shown = ema("show", RUN)[1]
    assert re.search(r"^ring\t16 of 16 snapshots of sigma_rel 0\.015, 0\.03, 0\.25 in F32, ", shown, re.MULTILINE)
    assert len(json.loads(ema("show", RUN, "--json")[1])["ring"]["times"]) == 16


def test_averages_that_cannot_be_pulled(ema: Ema, tmp_path: Path) -> None:
    """A refusal is its detail and its hint, exit code 1; wrong use is exit code 2; no file is left."""
    out = ("-o", str(tmp_path / "w.safetensors"))
    for words, expected, says in (
        (("--sigma-rel", "0.285"), 1, "nearest that can be had is sigma_rel"),
        (("--sigma-rel", "0.3"), 1, "below 0.288675"),
        (("--sigma-rel", "0.1", "--decay", "0.9"), 1, "exactly one of"),
        (("--sigma-rel", "0.1", "--average", "ema"), 1, "wished for"),
        (("--sigma-rel", "0.1", "--at", "77"), 1, "neither a snapshot"),
        (("--window", "5"), 2, "is not A:B"),
    ):
        code, printed, err = ema("pull", RUN, *words, *out)
        assert (code, printed) == (expected, ""), err
        assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
