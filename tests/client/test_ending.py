"""Signals that tell a command to end. Knows processes; what a command clears up is in test_watch.py and test_cli.py."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal
from ema_client.ending import held_back, orderly_end

with orderly_end():
    try:
        with held_back():
            with held_back():
                os.kill(os.getpid(), signal.SIGTERM)
            print("begun", flush=True)
        print("never", flush=True)
    finally:
        print("ended", flush=True)
"""


def test_signal_waits_for_what_must_not_be_left_half_done() -> None:
    """SIGTERM in a block that is held back ends the program at the end of the block, as an exception does."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout.split(), done.stderr) == (128 + 15, ["begun", "ended"], "")
