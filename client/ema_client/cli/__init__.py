"""The command ``ema``: look at runs, pull and watch weights, take snapshots, from a shell.

Knows: exit codes (0 done, 1 refused or failed, 2 wrong use), and what to say where the extra
``ema-client[cli]`` (typer and rich) is missing; the package imports without the extra. Does not know: any command.
"""

from __future__ import annotations

import sys

from ema_client.cli.ending import orderly_end
from ema_client.errors import EmaError, printable

__all__ = ["main"]


def main() -> None:
    """Entry point of the command."""
    try:
        from ema_client.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("rich", "typer"):
            raise
        sys.stderr.write(f"ema needs {missing.name}, which is not installed: pip install 'ema-client[cli]'\n")
        raise SystemExit(2) from None
    try:
        with orderly_end():
            app()()
    except EmaError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        sys.stderr.write(f"ema: {error.detail}{hint}\n")
        raise SystemExit(1) from None
    except OSError as error:
        sys.stderr.write(f"ema: {printable(str(error))}\n")
        raise SystemExit(1) from None
