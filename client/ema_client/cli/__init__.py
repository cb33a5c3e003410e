"""The command ``ema``: look at runs, pull and watch weights, take snapshots, from a shell.

Knows: exit codes (0 done, 1 refused or failed, 2 wrong use), signals, and what to say where the extra
``ema-client[cli]`` (typer and rich) is missing; the package imports without the extra. Does not know: any command.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

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
        with _orderly_end():
            app()()
    except EmaError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        sys.stderr.write(f"ema: {error.detail}{hint}\n")
        raise SystemExit(1) from None
    except OSError as error:
        sys.stderr.write(f"ema: {printable(str(error))}\n")
        raise SystemExit(1) from None


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an exception does, so that files on their way are removed.

    The exit code is 128 and the signal's number, as a shell has it. A signal that the parent has had ignored, as nohup
    does, stays ignored.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
