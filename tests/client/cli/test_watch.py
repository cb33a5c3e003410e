"""``ema watch`` as scripts use it: a process of its own, its output, its files, its commands, its exit code.

Knows the command's words. Does not know how events travel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ema_client import EmaClient

STATE = {"w": torch.arange(3.0)}
PATIENCE = 60.0
Watch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    return run_name


@pytest.fixture
def watch(server: Any, run: str, tmp_path: Path) -> Iterator[Watch]:
    """Start ``ema watch`` on the test's run, in the test's folder."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ema_client", "watch", run, *words]
        env = {**os.environ, "EMA_SERVICE_URL": server.url}
        started.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_each_version_is_a_line(client: EmaClient, run: str, watch: Watch) -> None:
    """Without options each new version is a line, as soon as it is there, beginning with the present one."""
    process = watch("--count", "2")
    assert process.stdout
    assert "version 1.0, step None" in process.stdout.readline()
    client.push(run, STATE, step=4)
    assert "version 1.1, step 4, num_updates -1, decay 0.5" in process.stdout.readline()
    assert ended(process) == (0, "", "")


def test_json(run: str, watch: Watch) -> None:
    """--json gives machines one object a line."""
    code, out, _ = ended(watch("--once", "--json"))
    assert (code, json.loads(out)["version"], json.loads(out)["run"]) == (0, "1.0", run)


def test_command_is_given_a_file(client: EmaClient, run: str, watch: Watch, tmp_path: Path) -> None:
    """--exec is told path, step and version by placeholders and by the environment; its file is gone after it."""
    client.push(run, {"w": STATE["w"] + 2}, step=7)
    script = 'cp {path} copy.safetensors; echo "$EMA_PATH" {step} "$EMA_VERSION" {num_updates} "${EMA_RUN}" {snapshot}.'
    code, out, err = ended(watch("--once", "--exec", script))
    path, *words = out.splitlines()[-1].split()
    assert (code, words, err) == (0, ["7", "1.1", "-1", run, "."], "")
    assert torch.equal(load_file(tmp_path / "copy.safetensors")["w"], STATE["w"] + 1)
    assert not Path(path).exists()


def test_files_are_kept_under_names_of_their_own(client: EmaClient, run: str, watch: Watch, tmp_path: Path) -> None:
    """--out with placeholders keeps each version, in folders that it makes; the name is that of what came."""
    process = watch("--count", "2", "--out", "kept/{run}/{step}-{version}.safetensors")
    assert process.stdout
    assert f"kept/{run}/-1.0.safetensors" in process.stdout.readline()
    client.push(run, STATE, step=1)
    assert ended(process)[0] == 0
    names = sorted(path.name for path in (tmp_path / "kept" / run).iterdir())
    assert names == ["-1.0.safetensors", "1-1.1.safetensors"]
    assert list((tmp_path / "kept").iterdir()) == [tmp_path / "kept" / run]


def test_a_failing_command_is_reported(client: EmaClient, run: str, watch: Watch) -> None:
    """The failure is told on stderr with its code and version, watching goes on, and the exit code remembers it."""
    process = watch("--count", "2", "--exec", 'test "{step}" = 3 || exit 7')
    assert process.stdout
    process.stdout.readline()
    assert process.stderr
    assert process.stderr.readline() == "ema: the command failed with exit code 7 on version 1.0; watching goes on\n"
    client.push(run, STATE, step=3)
    code, out, err = ended(process)
    assert (code, err) == (1, "")
    assert "version 1.1" in out


def test_snapshots(client: EmaClient, run: str, watch: Watch, tmp_path: Path) -> None:
    """--snapshots tells of new snapshots and not of versions; what is downloaded is the snapshot."""
    client.snapshot(run, "old")
    process = watch("--snapshots", "--once", "--out", "{snapshot}.safetensors", "--exec", "echo {snapshot} {step}")
    # Started is not yet watching: the snapshots of the time before it looked are old.
    _until_watched(client)
    client.push(run, {"w": STATE["w"] + 2}, step=1)
    client.snapshot(run, "new")
    client.push(run, {"w": STATE["w"] * 100}, step=2)
    code, out, _ = ended(process)
    assert (code, out.splitlines()[-1]) == (0, "new 1")
    assert torch.equal(load_file(tmp_path / "new.safetensors")["w"], STATE["w"] + 1)


def test_what_is_told_of_is_quoted(watch: Watch, tmp_path: Path) -> None:
    """A path with blanks and quotes is one word of the command."""
    code, _, err = ended(watch("--once", "--out", "it's {step} here.safetensors", "--exec", "test -f {path}"))
    assert (code, err) == (0, "")
    assert (tmp_path / "it's  here.safetensors").exists()


@pytest.mark.parametrize("out", ["{run}.safetensors", "link.safetensors"])
def test_what_is_no_plain_file_stays(run: str, watch: Watch, tmp_path: Path, out: str) -> None:
    """Under --out a link goes on naming its file, which is replaced; a pipe is refused, and nobody waits for it."""
    place = tmp_path / out.format(run=run)
    place.symlink_to("target")
    assert ended(watch("--once", "--out", out))[0] == 0
    assert place.is_symlink()
    assert torch.equal(load_file(tmp_path / "target")["w"], STATE["w"])
    place.unlink()
    os.mkfifo(place)
    code, _, err = ended(watch("--once", "--out", out))
    assert (code, "is a pipe" in err, place.is_fifo()) == (1, True, True)
    assert {path.name for path in tmp_path.iterdir()} == {place.name, "target"}


def test_told_to_end_it_clears_up(watch: Watch) -> None:
    """SIGTERM while a command is at work ends both, and removes the command's file with its folder."""
    process = watch("--exec", "echo {path} $$; exec sleep 60")
    assert process.stdout
    process.stdout.readline()
    path, number = process.stdout.readline().split()
    assert Path(path).exists()
    process.terminate()
    assert ended(process) == (128 + 15, "", "")
    assert not Path(path).parent.exists()
    assert not Path(f"/proc/{number}").exists()


def test_ends_with_the_run(client: EmaClient, run: str, watch: Watch) -> None:
    """A deleted run ends the command, successfully; so does a timeout."""
    process = watch()
    assert process.stdout
    process.stdout.readline()
    client.delete_run(run)
    assert ended(process) == (0, "", "")


def test_timeout(watch: Watch) -> None:
    """--timeout ends it where nothing new comes."""
    code, out, err = ended(watch("--timeout", "0.5"))
    assert (code, len(out.splitlines()), err) == (0, 1, "")


def _until_watched(client: EmaClient) -> None:
    import time

    import httpx

    deadline = time.monotonic() + PATIENCE
    while "ema_watchers 0.0" in httpx.get(f"{client.url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
