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

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from ema_client import EmaClient
from tests.waiting import wait_until

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
    wait_until(lambda: not _is_watched(client), "the watchers of earlier tests to be gone")
    process = watch("--snapshots", "--once", "--out", "{snapshot}.safetensors", "--exec", "echo {snapshot} {step}")
    # Started is not yet watching: the snapshots of the time before it looked are old.
    wait_until(lambda: _is_watched(client), "the watcher")
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


def _is_watched(client: EmaClient) -> bool:
    """Whether anybody waits for events, at a server or at the gateway of several."""
    told = httpx.get(f"{client.url}/metrics").text
    return not any(f"{gauge} 0.0" in told for gauge in ("ema_watchers", "ema_gateway_waiting"))


def test_path_is_no_part_of_a_files_name(watch: Watch) -> None:
    """--out is what {path} tells: the two cannot refer to each other."""
    code, _, err = ended(watch("--once", "--out", "{path}.safetensors"))
    assert code == 2
    assert "{path}" in err


# --- a service that is hostile ----------------------------------------------------------------------------------------


@pytest.fixture
def hostile(scripted: Callable[..., Any]) -> Callable[..., str]:
    """The URL of a service that answers about a run with values of one's choice."""

    def make(**values: Any) -> str:
        info = {
            "run": "digits", "status": "ready", "decay": 0.9, "num_updates": 5, "effective_decay": 0.5,
            "use_num_updates": True, "decay_per": "update", "step": 5, "version": "1.5", "durable_step": 5,
            "durability": "process", "non_finite": "refuse", "tensors": 1, "parameters": 3, "bytes": 12,
            "averages": [{"name": "ema", "schedule": "litema", "decay": 0.9, "effective_decay": 0.5}],
            "device": "cpu", "shadow_dtype": "F32", "created_at": 0, "updated_at": 0,
        } | values  # fmt: skip
        event = {"kind": "version", "average": "ema", "snapshot": None}
        event |= {name: info[name] for name in ("run", "version", "step", "num_updates", "decay", "effective_decay")}
        metadata = {"ema_run": "digits", "ema_average": "ema", "ema_version": info["version"], "ema_step": "5"}
        metadata |= {"ema_num_updates": "5", "ema_decay": "0.9"}
        weights = save(STATE, metadata=metadata)

        def script(peer: Any) -> None:
            while asked := peer.request():
                if asked.target.endswith("/events"):
                    # The event is honest: the lie is in the weights.
                    honest = json.dumps({**event, "run": "digits", "version": "1.5"})
                    peer.answer(200, f": hi\n\ndata: {honest}\n\n".encode(), "text/event-stream")
                elif asked.target.endswith("/weights"):
                    peer.answer(200, weights, "application/octet-stream", ETag='"x"')
                elif asked.target == "/v1/runs":
                    peer.answer(200, {"runs": [info]})
                elif asked.target.endswith("/layout"):
                    peer.answer(200, {"run": "digits", "layout": []})
                else:
                    peer.answer(200, {**info, "run": "digits", "version": "1.5"})

        return str(scripted(script).url)

    return make


def _ema(folder: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ema_client", *words, "--url", url]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize(
    "version",
    ["1.5$(touch pwned)", "`touch pwned`", "1.5; touch pwned", "'$(touch pwned)'", "../../pwned", "\x1b[31m1.5"],
)
@pytest.mark.parametrize("command", [None, 'echo "version {version} is there"'])
def test_hostile_version_runs_and_writes_nothing(
    hostile: Callable[..., str], tmp_path: Path, version: str, command: str | None
) -> None:
    """A version that is none is an error, before a file has its name or a command its value."""
    folder = tmp_path / "in" / "ner"
    folder.mkdir(parents=True)
    wanted = ["--exec", command] if command else ["--out", "{version}.safetensors"]
    done = _ema(folder, hostile(version=version), "watch", "digits", "--once", *wanted)

    assert done.returncode == 1
    assert "version" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"run": "digits\x1b[31m"}, "RunInfo.run"),
        ({"status": "\x1b]0;pwned\x07"}, "RunInfo.status"),
        ({"updated_at": 1e300}, "RunInfo.updated_at"),
    ],
)
def test_hostile_list_of_runs(hostile: Callable[..., str], tmp_path: Path, values: dict[str, Any], shown: str) -> None:
    """What no run can be called, or be, is an error that names the field, without a word to the terminal."""
    done = _ema(tmp_path, hostile(**values), "runs")

    assert done.returncode == 1
    assert shown in done.stderr
    assert not set(done.stdout + done.stderr) & set("\x1b\x07")


def test_texts_of_a_service_are_shown_and_not_obeyed(hostile: Callable[..., str], tmp_path: Path) -> None:
    """A reason may quote anything; the terminal is told of it in visible characters."""
    done = _ema(tmp_path, hostile(reason="\x1b[2Jdisk full\nall is well"), "show", "digits")

    assert (done.returncode, done.stderr) == (0, "")
    assert r"\x1b[2Jdisk full\nall is well" in done.stdout
