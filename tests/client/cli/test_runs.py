"""The command ``ema`` against the real service. Knows its words and exit codes; does not know how requests travel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ema_client import EmaClient
from ema_client.cli.show import shown
from ema_client.protocol import ReplicaInfo

STATE = {"w": torch.arange(3.0)}
Ema = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    client.push(run_name, {"w": STATE["w"] + 1}, step=7)
    return run_name


def test_runs_is_a_table(ema: Ema, run: str) -> None:
    """Each run is one line, with its step and decay, not cut where the output is no terminal."""
    code, out, err = ema("runs")

    line = next(line for line in out.splitlines() if run in line)
    assert (code, err) == (0, "")
    assert line.split()[:5] == [run, "ready", "7", "-1", "0.5"]
    assert "num_updates" in out


def test_runs_as_json(ema: Ema, run: str, client: EmaClient) -> None:
    """--json gives machines the whole RunInfo of each run."""
    code, out, _ = ema("runs", "--json")

    found = {info["run"]: info for info in json.loads(out)}
    assert code == 0
    assert found[run]["version"] == client.run(run).version
    assert found[run]["averages"][0]["name"] == "ema"


@pytest.mark.one_server("how many lanes there are, which each host tells")
def test_show(ema: Ema, run: str) -> None:
    """One run, a line for each thing known of it; with --json as an object."""
    code, out, _ = ema("show", run)
    assert code == 0
    assert re.search(r"^effective_decay\t0\.5", out, re.MULTILINE)
    assert re.search(r"^averages\tema: litema, decay 0\.5", out, re.MULTILINE)
    assert re.search(r"^created_at\t\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", out, re.MULTILINE)

    assert re.search(r"^lanes\t8, at most, of a push$", out, re.MULTILINE)

    found = json.loads(ema("show", run, "--json")[1])
    assert (found["step"], found["lanes"]) == (7, 8)


def test_pull_writes_a_file(ema: Ema, run: str, tmp_path: Path) -> None:
    """The file is what load_file opens; what was pulled is said, and no bar is drawn where there is no terminal."""
    code, out, err = ema("pull", run, "-o", tmp_path / "w.safetensors")

    assert (code, err) == (0, "")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w.safetensors")["w"], STATE["w"] + 0.5)
    assert f"{run}/ema" in out
    assert "step 7" in out
    assert out.splitlines()[1] == "link: TCP"
    again = ema("pull", run, "-o", tmp_path / "w.safetensors", "--lanes", 3, "--json")[1]
    assert json.loads(again)["link"] == "TCP; lanes: 3, as was asked for"


def test_snapshots(ema: Ema, run: str, client: EmaClient, tmp_path: Path) -> None:
    """A snapshot is taken, listed, and pulled by its name after the run has moved on."""
    assert "no snapshots yet" in ema("snapshots", run)[1]
    code, out, _ = ema("snapshot", run, "best")
    assert (code, out.split(":")[0]) == (0, f"{run}/best")
    client.push(run, {"w": STATE["w"] + 9})

    assert "best" in ema("snapshots", run)[1]
    assert ema("pull", run, "--snapshot", "best", "--average", "ema", "-o", tmp_path / "w.safetensors")[0] == 0
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w.safetensors")["w"], STATE["w"] + 0.5)


def test_rewind(ema: Ema, run: str, client: EmaClient) -> None:
    """A run goes back to a snapshot where that is agreed to; without a snapshot or --accept nothing happens."""
    ema("snapshot", run, "best")
    at = client.run(run)
    client.push(run, {"w": STATE["w"] + 9})
    assert ema("rewind", run)[0] == 2
    assert ema("rewind", run, "best", "--accept")[0] == 2
    code, out, err = ema("rewind", run, "best")
    assert (code, out, client.run(run).version) == (1, "", "1.2")
    assert "This discards 1 update: step 8 becomes step 7." in err
    assert "--yes does not ask" in err
    assert "has no snapshot 'none'; it has best\n  `ema snapshots" in ema("rewind", run, "none")[2]
    assert ema("rewind", run, "best", typed="n\n")[2].endswith("ema: nothing was changed\n")
    code, out, _ = ema("rewind", run, "best", typed="y\n")

    assert (code, out) == (0, f"{run}: version 2.0, step {at.step}, num_updates {at.num_updates}\n")
    assert torch.equal(client.pull(run)["w"], STATE["w"] + 0.5)


def test_steering(ema: Ema, run: str, client: EmaClient) -> None:
    """Decay and counter can be changed."""
    assert ema("set-decay", run, "0.25")[:2] == (0, f"{run}: ema 0.25\n")
    assert client.run(run).decay == 0.25
    assert ema("reset-num-updates", run)[:2] == (0, f"{run}: num_updates -1\n")


def test_averages(ema: Ema, run: str, client: EmaClient) -> None:
    """An average is added with the fields of its schedule, and removed where that is confirmed."""
    code, out, _ = ema("add-average", run, "long", "--schedule", "power", "--sigma-rel", "0.1", "--start", "5")
    assert (code, out) == (0, f"{run}: ema, long\n")
    [_, told] = client.run(run).averages
    assert (told.schedule, told.start, told.num_updates) == ("power", 5, 0)
    assert told.sigma_rel == pytest.approx(0.1)
    assert "long: power, start 5, sigma_rel 0.1" in ema("show", run)[1]
    assert ema("add-average", run, "fast", "--decay", "0.5")[0] == 0
    assert client.run(run).averages[2].decay == 0.5

    assert ema("remove-average", run, "long")[0] == 1
    assert len(client.run(run).averages) == 3
    assert ema("remove-average", run, "long", "--yes")[:2] == (0, f"{run}: long removed\n")
    assert [each.name for each in client.run(run).averages] == ["ema", "fast"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--schedule", "none"), "--schedule: there is no 'none'; there are litema,"),
        (("--schedule", "power"), "--sigma-rel, --gamma: one of the two"),
        (("--half-life", "3"), "--half-life: has no meaning for schedule 'litema'"),
        (("--decay", "2"), "--decay: '2.0' is not possible"),
        (("--schedule", "half_life", "--half-life", "0"), "--half-life: '0.0' is not possible"),
    ],
)
def test_average_that_is_none(words: tuple[str, ...], says: str, ema: Ema, run: str, client: EmaClient) -> None:
    """A field that does not go with the schedule is told by its option; nothing was added."""
    code, out, err = ema("add-average", run, "x", *words)
    plain = " ".join(re.sub(r"[│╭╰─╮╯]", " ", err).split())

    assert (code, out) == (2, "")
    assert says in plain
    assert len(client.run(run).averages) == 1


def test_delete_asks(ema: Ema, run: str, client: EmaClient) -> None:
    """Without --yes and without an answer nothing is deleted."""
    assert ema("delete", run)[0] == 1
    assert client.run(run).run == run

    assert ema("delete", run, "--yes")[:2] == (0, f"{run}: deleted\n")
    assert run not in {info.run for info in client.runs()}


def test_errors_are_one_message(ema: Ema, run: str, tmp_path: Path) -> None:
    """A refusal is its detail and its hint on stderr and exit code 1; no traceback, nothing on stdout."""
    for words, named in [
        (("show", "no-such-run"), "no-such-run"),
        (("set-decay", run, "1.5"), "between 0 and 1"),
        (("pull", run, "-o", tmp_path / "none" / "w.safetensors"), "none"),
        (("pull", run, "--snapshot", "none", "-o", tmp_path / "w.safetensors"), "none"),
    ]:
        code, out, err = ema(*words)
        last = err[err.rindex("ema: ") :]
        assert (code, out) == (1, "")
        assert named in last
        assert "Traceback" not in err
        assert len(last.strip().splitlines()) <= 2


def test_wrong_use_is_exit_code_two(ema: Ema) -> None:
    """What is no command, or lacks an argument, is told apart from a refusal."""
    assert ema("nonsense")[0] == 2
    assert ema("show")[0] == 2


@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_url_option(ema: Ema, server: Any, free_url: str, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """--url counts before and after the command, the latter more, and both more than the environment."""
    monkeypatch.setenv("EMA_SERVICE_URL", free_url)
    before = ["--url", free_url if place == "both" else server.url] if place != "after" else []
    after = ["--url", server.url] if place != "before" else []

    assert ema(*before, "runs", *after)[0] == 0


def test_no_runs_yet(scripted: Callable[..., Any], ema: Ema) -> None:
    """An empty service is said to be empty."""

    def script(peer: Any) -> None:
        peer.request()
        peer.answer(200, {"runs": []})

    assert ema("runs", "--url", scripted(script).url)[:2] == (0, "no runs yet\n")


def test_module_is_the_command(server: Any, run: str) -> None:
    """``python -m ema_client`` is ``ema``."""
    command = [sys.executable, "-m", "ema_client", "runs", "--url", server.url]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert run in done.stdout


def test_missing_extra() -> None:
    """Without typer the command says what to install, and exits with 2."""
    code = "import sys; sys.modules['typer'] = None; from ema_client.cli import main; main()"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert "pip install typer rich" in done.stderr
    assert "Traceback" not in done.stderr


def test_token_option(scripted: Callable[..., Any], ema: Ema) -> None:
    """--token goes out as bearer token."""
    seen = []

    def script(peer: Any) -> None:
        seen.append(peer.request().headers["authorization"])
        peer.answer(200, {"runs": []})

    assert ema("runs", "--token", "sesame", "--url", scripted(script).url)[0] == 0
    assert seen == ["Bearer sesame"]


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (ReplicaInfo("http://h", True, 0.0), "of http://h; has the newest version it knows of"),
        (ReplicaInfo("http://h", False, 4.2, "gone"), "of http://h, which does not answer; behind for 4 s: gone"),
        (ReplicaInfo("", True, 1.0), "of a host that is not known yet; behind for 1 s"),
    ],
)
def test_a_replica_says_how_far_behind_it_is(info: ReplicaInfo, text: str) -> None:
    """In words, with why."""
    assert shown("replica", info) == text
