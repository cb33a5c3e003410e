"""Lines of the shell, run for the user: ended where this command is ended, their output shown or taken.

Knows processes. Does not know what a line is about, or where it came from.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ema_client.ending import held_back

__all__ = ["Done", "how_it_ended", "run_line", "take_output"]


@dataclass(frozen=True, slots=True)
class Done:
    """A line that has ended: its return code, and what it wrote."""

    code: int
    out: str
    err: str


def run_line(line: str, environ: Mapping[str, str]) -> int:
    """The return code of a line of the shell; its output goes where this command's goes."""
    with _started(line, environ) as process:
        return process.wait()


def take_output(line: str, environ: Mapping[str, str]) -> Done:
    """Run a line of the shell, and take what it writes."""
    with _started(line, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    return Done(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def how_it_ended(code: int) -> str:
    """A return code in words."""
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


@contextmanager
def _started(line: str, environ: Mapping[str, str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process: subprocess.Popen[bytes] | None = None
    try:
        # Told to end in the middle of Popen(), the command would stay without anyone who knows of it.
        with held_back():
            process = subprocess.Popen(line, shell=True, env=environ, **options)
        yield process
    finally:
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
