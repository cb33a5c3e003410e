"""The core of the tests under each Python that the project names, and with the oldest dependencies that it names.

    python tests/matrix.py FOLDER [3.11 3.12 3.13 3.14 lowest]

A row is an environment of its own in FOLDER, made by uv, which finds an interpreter or downloads one. A row whose
interpreter cannot be had is told and fails nothing; where no row could be run, the command fails.

Knows uv and pytest. Does not know what the tests are about.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[1]
#: What depends on the Python and on the versions of others: the arithmetic, torch's memory, sockets, processes, typing.
CORE = [
    "tests/service/averaging",
    "tests/service/bodies",
    "tests/client/tensors",
    "tests/client/http",
    "tests/client/test_remote_ema.py",
    "tests/e2e/test_restart.py",
    "tests/contract/test_public_surface.py",
]
LOWEST = "lowest"


def pythons() -> list[str]:
    """The versions of Python that pyproject.toml names, as 3.11."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = (classifier.rpartition(" :: ")[2] for classifier in named if "Python :: 3." in classifier)
    return list(versions)


def uv(*words: str | Path) -> bool:
    """Whether uv did it; what it says is on the screen."""
    return subprocess.run([find_uv_bin(), *map(str, words)], cwd=ROOT, check=False).returncode == 0


def run(row: str, folder: Path) -> str:
    """What became of a row: ``passed``, ``failed``, or why there is none."""
    home = folder / row
    python = pythons()[0] if row == LOWEST else row
    if not uv("venv", "-q", "--clear", "--python", python, home):
        return f"not run: no Python {python} is here, and none could be downloaded"
    versions = ["--resolution", "lowest-direct"] if row == LOWEST else ["-c", "constraints.txt"]
    if not uv("pip", "install", "-q", "--python", home / "bin/python", *versions, "-e", ".[test]"):
        return "failed: its dependencies could not be installed"
    # The package is the checkout's, and its command that of the row.
    env = os.environ | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    # Beside the newest of what they depend on themselves, the oldest may warn of each other.
    lenient = ["-W", "default"] if row == LOWEST else []
    command = [home / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *lenient, *CORE]
    return "failed" if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode else "passed"


def main() -> int:
    folder, *rows = sys.argv[1:]
    became = {}
    for row in rows or [*pythons(), LOWEST]:
        sys.stdout.write(f"== {row}\n")
        sys.stdout.flush()
        became[row] = run(row, Path(folder).absolute())
    sys.stdout.write("".join(f"{row:8}{what}\n" for row, what in became.items()))
    ran = [what for what in became.values() if not what.startswith("not run")]
    return 0 if ran and all(what == "passed" for what in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
