"""An orderly end of a program that is told to end: files on their way are removed, commands at work are ended.

Knows signals and exit codes. Does not know commands, files or the service.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["held_back", "orderly_end"]

#: How deep in held_back() the program is, and the signal that came meanwhile. Signals come to the main thread alone.
_depth = 0
_came: int | None = None


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an exception does, so that files on their way are removed.

    The exit code is 128 and the signal's number, as a shell has it. A signal that the parent has had ignored, as nohup
    does, stays ignored, and one that the program handles stays the program's. In a thread other than the main one
    nothing changes: signals come to the main thread.
    """
    signals = (signal.SIGTERM, signal.SIGHUP) if _in_main_thread() else ()
    ours = [each for each in signals if signal.getsignal(each) == signal.SIG_DFL]
    for each in ours:
        signal.signal(each, _end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let a signal to end wait for the end of the block: for what must not be left half done, as starting a process."""
    global _depth, _came
    if not _in_main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if not _depth and _came is not None:
        came, _came = _came, None
        raise SystemExit(128 + came)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number: int, _: object) -> None:
    global _came
    if not _depth:
        raise SystemExit(128 + number)
    _came = number
