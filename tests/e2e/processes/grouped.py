"""``ema-service`` in a control group: ``grouped.py GROUP_FOLDER serve ...``.

Knows how a process joins a group. Does not know what the group allows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ema_service.cli import main

if __name__ == "__main__":
    (Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
    del sys.argv[1]
    main()
