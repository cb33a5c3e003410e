"""Placeholders in commands and file names, with values that no service should send. Knows the real shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ema_client.cli.templates import environment, file_name, shell_line
from ema_client.errors import ProtocolError

HOSTILE = "$(touch pwned) `touch pwned`; touch pwned\n'\" *  x"


def said(template: str, value: str, folder: Path) -> str:
    env = {**os.environ, **environment({"path": value, "version": value})}
    command = shell_line(template)
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "template",
    [
        "printf %s {version}",
        'printf %s "{version}"',
        "printf %s '{version}'",
        'printf %s "$(printf %s {version})"',
        "printf %s \"$(printf %s '{version}')\"",
        'x="{version}"; printf %s "$x"',
        "(printf %s {version})",
        'printf %s "${EMA_VERSION}"',
        "printf %s \\{version} >/dev/null; printf %s '\\'{version}",
    ],
)
def test_value_is_one_word_in_any_quotes(template: str, tmp_path: Path) -> None:
    """A value reaches the command whole, wherever its placeholder stands, and is never read as shell."""
    expected = HOSTILE if "\\" not in template else "\\" + HOSTILE

    assert said(template, HOSTILE, tmp_path) == expected
    assert list(tmp_path.iterdir()) == []


def test_no_value_stands_in_the_shell_line() -> None:
    """What the shell is given is the user's text, and variables."""
    line = shell_line("""cp {path} "x {version}" '{run}' {unknown} ${step}""")

    assert line == """cp "$EMA_PATH" "x ${EMA_VERSION}" ''"$EMA_RUN"'' {unknown} ${step}"""


@pytest.mark.parametrize("value", ["../outside", "..", ".", "/etc/x", "a/b", "a\\b", "a\x00b", "~", "$(x)"])
def test_file_name_stays_in_its_folder(value: str) -> None:
    """A value that could name another folder is refused."""
    with pytest.raises(ProtocolError, match="no part of a file's name"):
        file_name("kept/{version}.safetensors", {"version": value})


def test_plain_values_make_a_file_name() -> None:
    """Names, versions, and numbers, of which a counter may be -1 and a step unknown."""
    words = {"run": "a.b-c_d", "version": "1.20", "num_updates": "-1", "step": ""}

    assert file_name("{run}/{step}-{version}{num_updates}", words) == "a.b-c_d/-1.20-1"
