"""Whatever a command meets, a line says what was wrong, with exit code 1 or 2: no traceback, for any file or answer.

Knows: files that are none, services that are none. Does not know: what a command does when all is well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ema_client import errors
from ema_client.cli.app import COMMANDS
from ema_client.cli.refusals import HINTS, hint_of
from ema_client.errors import EmaError
from ema_client.http.retry import RetryPolicy
from tests.client.cli.test_terminal import WORDS, filled

Ema = Callable[..., tuple[int, str, str]]
#: Asks no service.
ALONE = {"plan"}


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tries again: what the last try brings is what counts."""
    monkeypatch.setattr(RetryPolicy, "delay", lambda *_, **__: None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def fails(ema: Ema, *words: Any) -> str:
    """The message of a command that fails: one line, perhaps a hint."""
    code, out, err = ema(*words)
    told = err[err.rindex("ema: ") :] if "ema: " in err else err
    assert code in (1, 2), (words, code, out, err)
    assert "Traceback" not in out + err
    assert told if words[0] != "doctor" else "failed" in out, words
    if code == 1 and words[0] != "doctor":
        assert len(told.strip().splitlines()) <= 2, told
    return told + out


ANSWERS: dict[str, tuple[bytes, str]] = {
    "a page": (b"<html>please log in</html>", "text/html"),
    "another object": (b'{"runs": 5, "name": [], "snapshots": {}}', "application/json"),
    "half an object": (b'{"runs": [', "application/json"),
    "a deep object": (b'{"runs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json"),
    "a large number": (b'{"runs": [{"step": 1e999, "run": "\xff"}]}', "application/json"),
    "no weights": (b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": 1}', "application/octet-stream"),
    "a lie about its length": (b"\xff" * 7 + b"\x7f" + b"{}", "application/octet-stream"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_server_that_is_none_of_ours(
    ema: Ema, scripted: Callable[..., Any], weights: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Every command tells of an answer that no service of ours gives."""
    raw, kind = ANSWERS[answer]

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.body(request.length)
            peer.answer(200, raw, kind)

    monkeypatch.setenv("EMA_SERVICE_URL", scripted(script).url)
    # The answer to a removal is nothing but its status.
    for name in sorted(COMMANDS.keys() - ALONE - {"remove-average"}):
        fails(ema, name, *filled(WORDS[name], weights))
    assert sorted(path.name for path in weights.parent.iterdir()) == ["weights.safetensors"]


def garbage(peer: Any) -> None:
    peer.send(b"\x00\xff not HTTP\r\n\r\n")


def nothing(_: Any) -> None:
    """Hang up."""


def stranger(peer: Any) -> None:
    while request := peer.request():
        peer.body(request.length)
        peer.answer(401, errors.Unauthorized("no token").to_problem(), "application/problem+json")


@pytest.mark.parametrize("script", [None, garbage, nothing, stranger])
def test_no_server_and_no_token(
    ema: Ema,
    scripted: Callable[..., Any],
    free_url: str,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[Any], None] | None,
) -> None:
    """Every command tells that nobody is there, that what is there speaks no HTTP or hangs up, or wants a token."""
    monkeypatch.setenv("EMA_SERVICE_URL", scripted(script).url if script else free_url)
    for name in sorted(COMMANDS.keys() - ALONE):
        told = fails(ema, name, *filled(WORDS[name], weights))
        if script is stranger:
            assert "--token" in told, name


@pytest.mark.parametrize("run", ["no-such-run", "../etc", "ü\x1b[2J", ""])
def test_runs_that_are_none(ema: Ema, weights: Path, run: str) -> None:
    """Every command on a run tells that there is none of that name, or can be none, on a line of plain text."""
    for name, words in WORDS.items():
        if name in ("runs", "top", "du", "doctor", "plan", "import", "delete", "diff"):
            continue
        given = [run if word in (WORDS["show"][0], "imported") else word for word in filled(words, weights)]
        told = fails(ema, name, *given)
        assert "\x1b" not in told
    assert fails(ema, "delete", run, "--yes")
    assert fails(ema, "diff", run, weights)


def cut_off(path: Path) -> None:
    save_file({"w": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:-7])


def impossible_shape(path: Path) -> None:
    body = json.dumps({"w": {"dtype": "F32", "shape": [-1, 2**70], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + bytes(8))


#: Files of kinds that no command takes.
MAKES: dict[str, Callable[[Path], Any]] = {
    "none": lambda _: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a loop of links": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no weights"),
    "cut off": cut_off,
    "a long header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f" + b'{"w": {}}'),
    "an impossible shape": impossible_shape,
    "a deep pickle": lambda path: path.write_bytes(b"\x80\x02" + b"(" * 10_000 + b"."),
    "no tensors": lambda path: torch.save({"epoch": 3, "names": ["a"]}, path),
}


@pytest.mark.parametrize("kind", MAKES)
def test_files_that_are_none(ema: Ema, client: Any, run_name: str, tmp_path: Path, kind: str) -> None:
    """Every command that reads a file tells what is wrong with it."""
    client.create_run(run_name, {"w": torch.ones(3)})
    path = tmp_path / ("file.pt" if kind in ("text", "a deep pickle", "no tensors") else "file.safetensors")
    MAKES[kind](path)
    fails(ema, "import", path, "imported")
    fails(ema, "push", path, run_name)
    fails(ema, "diff", path, run_name)
    fails(ema, "import", path, "imported", "--format", "timm", "--like", path)
    client.delete_run(run_name)


def test_files_that_cannot_be_written(ema: Ema, client: Any, run_name: str, tmp_path: Path) -> None:
    """Every command that writes a file tells of a folder that is not there, or of a place that is no file's."""
    client.create_run(run_name, {"w": torch.ones(3)})
    os.mkfifo(pipe := tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none" / "w", tmp_path / ("x" * 300), pipe, "/dev/full"):
        for words in (("pull", run_name, "-o", path), ("export", run_name, path, "--format", "litema")):
            fails(ema, *words)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pipe"]
    client.delete_run(run_name)


# --- hints ----------------------------------------------------------------------------------------------------------


def classes(root: type[EmaError] = EmaError) -> Iterator[type[EmaError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


@pytest.mark.parametrize("error", sorted(classes(), key=lambda each: each.code), ids=lambda each: each.code)
def test_hints_are_the_commands(error: type[EmaError]) -> None:
    """What to do about an error is told in commands and options: no route, no argument of Python."""
    hint = hint_of(error("something"), "my-run")

    assert not re.search(r"\b(GET|POST|PUT|PATCH|DELETE) /|/v1/|\w=(?:\W|$)|min_step|\{run\}", hint), hint
    for name in re.findall(r"`ema ([a-z-]+)", hint):
        assert name in COMMANDS


def test_hints_name_the_run_and_the_options(ema: Ema, client: Any, run_name: str, tmp_path: Path) -> None:
    """A hint can be typed as it stands; a mistake of Python's caller is told in the option's words."""
    client.create_run(run_name, {"w": torch.ones(3)})
    assert f"`ema snapshots {run_name}`" in fails(ema, "delete-snapshot", run_name, "none", "--yes")
    assert f"`ema show {run_name}`" in fails(ema, "pull", run_name, "--average", "x", "-o", tmp_path / "w")
    assert "exactly one of --sigma-rel, --decay, --half-life, --window" in fails(
        ema, "profiles", run_name, "--sigma-rel", "0.1", "--decay", "0.9"
    )
    assert "--sigma-rel 0.5 is not" in fails(ema, "profiles", run_name, "--sigma-rel", "0.5")
    assert "`ema rewind my-run SNAPSHOT`" in hint_of(errors.RunDegraded("x"), "my-run")
    assert set(HINTS) <= set(classes())
    client.delete_run(run_name)
