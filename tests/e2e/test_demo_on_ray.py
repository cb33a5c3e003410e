"""``make cluster-demo``, played whole: its verdict, and that it leaves no process. Needs Ray.

Knows what the demo prints. Does not know how it comes about.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray>=2.50'")


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_the_demo() -> None:
    """A host is killed, and the EMA is bit for bit that of LitEma."""
    words = [sys.executable, "-m", "ema_service.demo.on_ray"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical" in done.stdout
    assert "killed     host 1" in done.stdout
    left = subprocess.run(["pgrep", "-f", "ema_service.demo.on_ray"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
