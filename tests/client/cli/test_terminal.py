"""The commands as people and scripts meet them: on terminals of 40 and 80 characters, in pipes, as JSON, in a shell.

Knows: every command's words. Does not know: how requests travel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ema_client import EmaClient
from ema_client.cli.app import COMMANDS
from tests.client.cli.terminals import on_terminal

RUN = "a-run-with-a-long-name.of-2026-11-28"
STATE = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3)}
Ema = Callable[..., tuple[int, str, str]]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def run(server: Any) -> Iterator[str]:
    """A run with two updates and a snapshot between them."""
    with EmaClient(server.url) as client:
        client.create_run(RUN, STATE, decay=0.5, use_num_updates=False)
        client.push(RUN, {name: tensor + 1 for name, tensor in STATE.items()}, step=7)
        client.snapshot(RUN, "best")
        client.push(RUN, {name: tensor + 9 for name, tensor in STATE.items()}, step=8)
        yield RUN
        client.delete_run(RUN)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of parameters."""
    save_file(STATE, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("width", [40, 80])
def test_everything_fits_a_terminal(server: Any, run: str, weights: Path, width: int) -> None:
    """No line is longer than the screen and nothing is left out, neither of a table nor of a long name.

    What moves weights draws a bar in MiB, or smaller units of the same kind.
    """
    folder = weights.parent
    url = ("--url", server.url)
    shown = on_terminal(
        folder,
        [
            ("runs", *url),
            ("show", run, *url),
            ("snapshots", run, *url),
            ("history", run, *url),
            ("timeline", run, *url),
            ("du", *url),
            ("top", "--count", 2, "--interval", 0.1, *url),
            ("doctor", *url),
            ("plan", "--parameters", "860M", "--steps", "400K"),
            ("pull", run, "-o", folder / "out", *url),
            ("push", weights, run, *url),
            ("export", run, folder / "out.ckpt", "--format", "litema", *url),
            ("import", folder / "out.ckpt", f"again-{width}", *url),
            ("diff", run, f"{run}@best", *url),
            ("watch", run, "--once", "--exec", "true", *url),
            ("delete", f"again-{width}", "--yes", *url),
        ],
        width=width,
    )

    for name, text in shown.items():
        lines = [ESCAPE.sub("", part) for line in text.split("\n") for part in line.split("\r")]
        assert [line for line in lines if len(line.rstrip()) > width] == [], name
        assert "exit 0" in lines, text
    plain = {name: ESCAPE.sub("", text) for name, text in shown.items()}
    for name in ("runs", "du", "top"):
        # A long name is folded: in its column of a table, or in its line of a block.
        column = "".join(line.split(" ")[0] for line in plain[name].splitlines())
        assert run in column or run in re.sub(r"\s+", "", plain[name])
    for head in ("status", "step", "num_updates", "effective", "bytes", "updated"):
        assert head in plain["runs"]
    for head in ("distance", "updates/s", "lag"):
        assert head in plain["top"]
        assert head in plain["history"]
    assert "snapshot best" in re.sub(r"\s+", " ", plain["timeline"])
    assert re.search(r"whole: 0\.\d+ over 2 tensors", plain["diff"])
    for name in ("pull", "push", "export", "import", "diff", "watch"):
        assert re.search(r"[\d.]+ [KM]?i?B/[\d.]+ [KM]?i?B", plain[name]), name


#: The words of each command that changes nothing, or something that nobody misses.
WORDS: dict[str, tuple[str, ...]] = {
    "runs": (),
    "show": (RUN,),
    "top": ("--count", "1"),
    "history": (RUN,),
    "timeline": (RUN,),
    "du": (),
    "doctor": (),
    "pull": (RUN, "-o", "{folder}/pulled"),
    "push": ("{weights}", RUN),
    "watch": (RUN, "--once"),
    "diff": (RUN, "{weights}"),
    "snapshot": (RUN, "another"),
    "snapshots": (RUN,),
    "delete-snapshot": (RUN, "another", "--yes"),
    "plan": ("--parameters", "860M", "--steps", "400K"),
    "profiles": (RUN, "--sigma-rel", "0.1"),
    "sweep": (RUN, "--sigma-rel", "0.1", "--exec", "echo 1"),
    "set-decay": (RUN, "0.6"),
    "add-average": (RUN, "long"),
    "remove-average": (RUN, "long", "--yes"),
    "reset-num-updates": (RUN,),
    "rewind": (RUN, "best", "--yes"),
    "export": (RUN, "{folder}/exported"),
    "publish": (RUN, "--to", "file://{folder}/published"),
    "import": ("{weights}", "imported"),
    "delete": ("imported", "--yes"),
}
#: These need a run with posthoc; tests/client/cli/test_sweep.py has one.
WITH_RING = {"profiles", "sweep"}


def filled(words: tuple[str, ...], weights: Path) -> list[str]:
    return [word.format(folder=weights.parent, weights=weights) for word in words]


def test_json_of_every_command(ema: Ema, run: str, weights: Path) -> None:
    """--json is one JSON value, of what the command found or did; nothing else is on standard output."""
    assert set(WORDS) == set(COMMANDS)
    assert run == RUN
    for name in WORDS:
        if name in WITH_RING:
            continue
        code, out, err = ema(name, *filled(WORDS[name], weights), "--json")
        assert (name, code, err) == (name, 0, "")
        assert json.loads(out), name
    assert set(load_file(weights.parent / "pulled")) == set(load_file(weights.parent / "exported")) == set(STATE)


def test_piped_tables_are_plain(ema: Ema, run: str) -> None:
    """A row is one line, its cells parted by tabs; no colour, no frame, and sizes have units of 1024."""
    head, *rows = ema("runs")[1].splitlines()
    assert head.split("\t")[:4] == ["run", "status", "step", "num_updates"]
    [row] = [line for line in rows if line.startswith(f"{run}\t")]
    assert len(row.split("\t")) == len(head.split("\t"))
    assert "36 B" in row.split("\t")
    assert "\x1b" not in head + row


def test_pipes(server: Any, run: str, tmp_path: Path) -> None:
    """`-o -` writes the very bytes of a file; a reader that leaves, or a full disk, ends a command with a word."""
    ema = f"{sys.executable} -m ema_client --url {server.url}"
    line = (
        f"{ema} pull {run} -o file.safetensors >said && {ema} pull {run} -o - >piped.safetensors 2>told && "
        f"cmp file.safetensors piped.safetensors && {ema} pull {run} -o - | head -c 8 | wc -c; {ema} runs >/dev/full"
    )
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout.split()) == (1, ["8"])
    # Weights as short as these may fit into the pipe before its reader leaves.
    told = [line for line in done.stderr.splitlines() if not line.startswith(("standard output: ", "link: "))]
    assert told == ["ema: [Errno 28] No space left on device"]
    assert (tmp_path / "told").read_text().startswith(f"standard output: {run}/ema, version ")


def test_shell_completes_runs_and_snapshots(ema: Ema, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that completes a word is given the service's runs, of a run its snapshots; nobody there, nothing."""
    monkeypatch.setenv("_EMA_COMPLETE", "complete_bash")

    def completed(line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        return ema()[1].split()

    assert run in completed(f"ema show {run[:5]}")
    assert completed(f"ema delete-snapshot {run} be") == ["best"]
    assert "delete-snapshot" in completed("ema delete")
    monkeypatch.setenv("EMA_SERVICE_URL", "http://127.0.0.1:9")
    assert completed("ema show a") == []
