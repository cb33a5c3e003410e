"""The command ``ema``: look at runs, move weights, take snapshots, find out what is wrong, from a shell.

Knows: exit codes (0 done, 1 refused or failed, 2 wrong use, 128 and a signal's number), and what to say where typer or
rich, the extra ``cli``, is missing; the package imports without them. Does not know: any command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ema_client.ending import orderly_end

__all__ = ["main"]


def main() -> None:
    """Entry point of the command."""
    try:
        from ema_client.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("rich", "typer"):
            raise
        sys.stderr.write(f"ema needs {missing.name}, which is not installed: pip install typer rich\n")
        raise SystemExit(2) from None
    _write_anything()
    with orderly_end():
        app()(prog_name="ema")


def _write_anything() -> None:
    """Make standard output and error take whatever is written: characters they lack are spelt out; closed, nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open for as long as the program
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
