"""Nobody is told to install this project by its name from an index, where anyone could offer packages under it.

Also: what an error message tells to install is what an extra has. Knows how package managers are called. Does not
install anything; tests/contract/test_wheels.py does.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
#: What users read, run or build from. Tests and what was built or installed are left out.
_READ = ["*.md", "*.toml", "Makefile", ".ci/*", ".github/**/*", "client/**/*", "docker/**/*", "ema_service/**/*"]
_NOT_TEXT = {".pyc", ".png", ".so", ".nbi", ".nbc"}

_MANAGER = (
    r"\b(?:pip3?|uv|pipx|poetry|pdm|rye|hatch|conda|mamba|apt|apt-get|npm)\b[^\n;|&#]*?\b(?:install|add|inject|run)\b"
)
#: An install command with the bare name: a path or the name of a wheel file has other characters beside it.
_BY_NAME = re.compile(rf"(?:{_MANAGER}|\buvx\b)[^\n;|&#]*?[\s'\"=]ema[-_](?:client|service)(?![\w./-])")
#: The name as a requirement, which is what an index is asked for: with an extra, or with a version.
_REQUIREMENT = re.compile(r"\bema[-_](?:client|service)(?:\[|\s*(?:==|>=|<=|~=))")
#: An image of a registry that is nobody's: the engine would ask a public one for the bare name.
_PULLED = re.compile(r"\b(?:docker|podman|nerdctl|buildah) pull +ema-service")


def from_an_index(text: str) -> list[str]:
    """The commands and requirements of the text that ask an index for one of our names."""
    joined = text.replace("\\\n", " ")
    return [match[0] for pattern in (_BY_NAME, _REQUIREMENT, _PULLED) for match in pattern.finditer(joined)]


def texts() -> Iterator[tuple[str, str]]:
    """Path and text of each file."""
    for path in sorted({path for pattern in _READ for path in ROOT.glob(pattern)}):
        if path.is_file() and path.suffix not in _NOT_TEXT and "__pycache__" not in path.parts:
            yield str(path.relative_to(ROOT)), path.read_text()


@pytest.mark.parametrize(
    "bad",
    [
        "pip install ema-client",
        "pip install 'ema-client[torch]'",
        "python -m pip install -U \\\n  ema_service",
        "uv add --dev ema-client",
        "uv tool install ema-client",
        "uvx ema-client",
        "pipx run ema_client",
        "install ema-service[otel], or unset it",
        "dependencies = ['ema-client>=0.1']",
        "docker pull ema-service",
    ],
)
def test_installing_by_name_is_found(bad: str) -> None:
    """The search below finds the ways there are to say it."""
    assert from_an_index(bad)


@pytest.mark.parametrize(
    "good",
    [
        "pip install ./client",
        "pip install './client[torch,cli]'",
        "pip install dist/ema_service-0.1.0-py3-none-any.whl",
        "pip install 'dist/ema_client-0.1.0-py3-none-any.whl[torch]'",
        "docker run -p 127.0.0.1:8470:8470 ema-service --insecure-no-auth",
        "pip install torch; ema-service serve",
    ],
)
def test_installing_from_a_path_is_not(good: str) -> None:
    """What works without an index is let through."""
    assert from_an_index(good) == []


def test_nothing_says_to_install_by_name_from_an_index() -> None:
    """No document, message, example, image or manifest asks an index for ema-service or ema-client."""
    found = {name: asked for name, text in texts() if (asked := from_an_index(text))}
    assert found == {}


def _extras() -> dict[str, set[str]]:
    """The packages of each extra of either distribution."""
    found: dict[str, set[str]] = {}
    for project in (ROOT, ROOT / "client"):
        tables = tomllib.loads((project / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        found |= {extra: {Requirement(text).name for text in listed} for extra, listed in tables.items()}
    return found


def test_messages_name_the_packages_of_an_extra() -> None:
    """A message that tells what to install names packages that an index has, and all those of one extra."""
    sources = [*(ROOT / "client" / "ema_client").rglob("*.py"), *(ROOT / "ema_service").rglob("*.py")]
    told = {
        frozenset(re.findall(r"[\w-]+", names))
        for source in sources
        for names in re.findall(r"pip install ((?:[a-z][\w-]* ?)+)", source.read_text())
    }
    assert told
    assert [names for names in told if names not in _extras().values()] == []
