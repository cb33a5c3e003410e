"""What `make bench` installs is enough for what it runs.

The benchmark has an environment of its own, so nothing else in the tests would notice that a package is missing there.

Knows the Makefile's line and what distributions ask for. Does not know what is measured.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

#: Run with the folder of the benchmarks and the names of the packages that are not there.
IMPORT_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2:]:
            raise ModuleNotFoundError(f"{name} is not installed by make bench", name=name)

sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
import run
"""


def installed_by_bench() -> set[str]:
    """Distributions, as far as this environment has them."""
    [extras] = re.findall(r"bench/bin/python -m pip install .*-e '\.\[([a-z,]+)\]'", (ROOT / "Makefile").read_text())
    found, wanted = set[str](), [Requirement(f"ema-service[{extras}]")]
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        fresh = name not in found
        found.add(name)
        for need in map(Requirement, needs):
            chosen = (
                any(need.marker.evaluate({"extra": extra}) for extra in requirement.extras) if need.marker else False
            )
            plain = need.marker is None or need.marker.evaluate({"extra": ""})
            if chosen or (plain and fresh):
                wanted.append(need)
    return found


def test_every_import_of_the_benchmark_is_installed() -> None:
    """In a process that has no package but those that its own environment would have."""
    there = installed_by_bench()
    others = [
        package
        for package, owners in metadata.packages_distributions().items()
        if package.isidentifier() and not {canonicalize_name(owner) for owner in owners} & there
    ]
    assert "pytest" in others

    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, str(ROOT / "tests" / "benchmarks"), *others],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
