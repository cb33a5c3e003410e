"""Ends this process with its parent; ``python -m ema_service.tether MODULE ARG...`` runs a module so.

The parent holds the only write end of the pipe that is this process's standard input. However the parent ends, by
SIGKILL too, the kernel closes the pipe, and this process reads the end of the file; where the parent is on another
machine, whatever carries standard input closes it. Reading works on every POSIX system; asking the kernel for a signal
at the parent's death (prctl) works on Linux only.

Whatever the parent writes is a sign of life of the engine that the parent works for: what is read is not looked at, and
when it came is remembered (ema_service/cluster/hosting/lease.py).

Knows standard input and signals. Does not know the module that is run.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

__all__ = ["GRACE", "end_with_parent", "heard", "main"]

#: Seconds from SIGTERM to the end by force: a server finishes the writes in hand, keeps every run, lets readers end.
GRACE = 30.0

#: When the parent's latest word came. Of the process, as its standard input is.
_heard = float("-inf")


def heard() -> float:
    """When the parent's latest word came, by time.monotonic(); minus infinity before the first."""
    return _heard


def end_with_parent() -> None:
    """End this process once standard input ends: by SIGTERM, and by force after GRACE seconds."""

    def watch() -> None:
        global _heard
        while os.read(0, 4096):
            _heard = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, name="tether", daemon=True).start()


def main() -> None:
    """Start watching the parent, then become the module named by the first argument."""
    end_with_parent()
    module, *args = sys.argv[1:]
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Others import this module to ask heard(): without this line they would load it a second time, and hear nothing.
    sys.modules["ema_service.tether"] = sys.modules["__main__"]
    main()
