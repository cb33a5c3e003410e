"""A program of a cluster on a machine of a network, which is a network namespace: ``ema-service`` there.

    python placed.py NAMESPACE [unlocked] WORD...

unlocked: on a file system whose locks keep nobody out, as unlocked.py has it. Ends with whoever forked it.

Knows namespaces and ``ema-service``. Does not know who is on which machine.
"""

from __future__ import annotations

import ctypes
import signal
import sys

from ema_service.__main__ import main
from tests.benchmarks.namespaces import enter
from tests.service.cluster.processes.unlocked import without_locks

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    enter(sys.argv.pop(1))
    if sys.argv[1] == "unlocked":
        sys.argv.pop(1)
        without_locks()
    main()
