"""The picture of AVERAGES.md is what its script draws. Knows where both lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[2] / "client" / "pictures"


def test_picture_is_as_drawn(tmp_path: Path) -> None:
    """Running the script gives the file of the repository."""
    subprocess.run([sys.executable, str(PICTURES / "profiles.py"), str(tmp_path / "drawn.svg")], check=True, timeout=60)

    assert (tmp_path / "drawn.svg").read_text() == (PICTURES / "profiles.svg").read_text()
