"""Runs a module so that it cannot outlive its parent: ``python -m ema_service.demo.tether MODULE ARG...``

The parent holds the only write end of the pipe that is this process's standard input. However the parent ends, by
SIGKILL too, the kernel closes the pipe, and this process reads the end of the file. Reading works on every POSIX
system; asking the kernel for a signal at the parent's death (prctl) works on Linux only.

Knows standard input and signals. Does not know the module it runs.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

#: Seconds from SIGTERM (a server finishes the update in hand) to the end by force.
GRACE = 5.0


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def main() -> None:
    """Start watching the parent, then become the module named by the first argument."""
    threading.Thread(target=_end_with_parent, name="tether", daemon=True).start()
    module, *args = sys.argv[1:]
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
