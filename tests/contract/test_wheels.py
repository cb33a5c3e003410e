"""Both distributions as a user gets them: built, installed into fresh environments, and used from there.

Knows pip and virtual environments. Does not know what the packages do beyond starting up.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "client/ema_client/__init__.py").read_text(), re.MULTILINE)[0]

# Building and installing wait for subprocesses, and the client's one dependency comes over the network.
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own."""

    home: Path

    @property
    def bin(self) -> Path:
        return self.home / "bin"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.home)}))

    def install(self, *words: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-q", "-c", CONSTRAINTS, *words)

    def python(self, code: str) -> str:
        return run(self.bin / "python", "-W", "error", "-c", code).stdout


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run outside the checkout's import path; the failure shows what the command said."""
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, env=env, check=False, cwd="/"
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done


def build(project: Path, into: Path) -> Built:
    """The sdist, and the wheel made from that sdist: so the sdist is complete."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", into, project)
    return Built(next(into.glob("*.whl")), next(into.glob("*.tar.gz")))


def environment(home: Path) -> Environment:
    venv.create(home, symlinks=True, with_pip=False)
    return Environment(home)


@pytest.fixture(scope="module")
def client_built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(ROOT / "client", tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def service_built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(ROOT, tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make wheels` fills, with the tools of this environment: none are downloaded."""
    folder = tmp_path_factory.mktemp("dist")
    words = f"BIN={Path(sys.executable).parent}", f"DIST={folder}"
    run("env", "PIP_NO_BUILD_ISOLATION=0", "make", "-C", ROOT, "wheels", *words)
    return folder


@pytest.fixture(scope="module")
def client_alone(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The client's wheel, without extras, on an empty environment."""
    made = environment(tmp_path_factory.mktemp("client-alone"))
    made.install(next(dist.glob("ema_client-*.whl")))
    return made


@pytest.fixture(scope="module")
def service(service_built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The server's wheel on an environment that borrows its dependencies from this one, to spare downloading torch."""
    made = environment(tmp_path_factory.mktemp("service"))
    made.install("--no-deps", service_built.wheel)
    # A path file inside a borrowed folder is not followed, so the editable install of this checkout stays out of it.
    (made.site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def test_client_alone_brings_httpx2_only(client_alone: Environment) -> None:
    """The client installs and imports where there is no server code, no fastapi, no pydantic and no torch."""
    absent = ["ema_service", "fastapi", "starlette", "pydantic", "torch", "numpy", "typer"]

    out = client_alone.python(
        "import importlib.util, sys\n"
        "import ema_client\n"
        "print(ema_client.__version__, ema_client.EmaClient.__name__)\n"
        f"print([name for name in {absent!r} if importlib.util.find_spec(name) or name in sys.modules])\n"
    )

    assert out.splitlines() == [f"{VERSION} EmaClient", "[]"]


def test_client_alone_answers_without_torch(client_alone: Environment) -> None:
    """A caller without torch can ask for a run; that no server listens is told by the client's own error."""
    out = client_alone.python(
        "from ema_client import EmaClient\n"
        "from ema_client.errors import ServiceUnreachable\n"
        "try:\n"
        "    EmaClient('http://127.0.0.1:9').runs()\n"
        "except ServiceUnreachable as error:\n"
        "    print(error)\n"
    )

    assert "127.0.0.1:9" in out


def test_ema_without_its_extra_says_what_to_install(client_alone: Environment) -> None:
    """`ema` without typer and rich ends with one sentence that names both, not with a traceback."""
    done = run(client_alone.bin / "ema", "runs", check=False)

    assert done.returncode != 0
    assert "pip install typer rich" in done.stderr
    assert "Traceback" not in done.stderr


def test_make_wheels_builds_what_the_readmes_install(dist: Path) -> None:
    """`make wheels` builds both, and nothing else, under the names that the READMEs install."""
    built = {path.name for path in dist.iterdir()}
    named = {
        name
        for page in ("README.md", "client/README.md")
        for name in re.findall(r"\bdist/([\w.-]+\.whl)", (ROOT / page).read_text())
    }
    assert built == named == {f"ema_{part}-{VERSION}-py3-none-any.whl" for part in ("client", "service")}


def test_service_wheel_starts(service: Environment) -> None:
    """The server's wheel carries both packages and both commands, all of one version."""
    out = service.python(
        "import ema_service, ema_client, ema_service.api.app\n"
        "for package in (ema_service, ema_client):\n"
        "    print(package.__file__)\n"
    )

    home = str(service.site_packages)
    assert [line.startswith(home) for line in out.splitlines()] == [True, True]
    assert VERSION in run(service.bin / "ema-service", "--version").stdout
    assert VERSION in run(service.bin / "ema", "--version").stdout
    assert VERSION in run(service.bin / "python", "-m", "ema_service", "--version").stdout


@pytest.mark.parametrize(
    ("built", "folders"),
    [("client_built", ["client/ema_client"]), ("service_built", ["ema_service", "client/ema_client"])],
)
def test_wheel_holds_every_file(built: str, folders: list[str], request: pytest.FixtureRequest) -> None:
    """Each file of the packages is in the wheel, pages and py.typed too, and nothing else but the metadata."""
    with zipfile.ZipFile(request.getfixturevalue(built).wheel) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]

    assert packed == {name for folder in folders for name in _files(ROOT / folder)}
    assert any(name.endswith("/py.typed") for name in packed)
    assert len(licences) == 1


def _files(package: Path) -> set[str]:
    paths = (path.relative_to(package.parent) for path in package.rglob("*") if path.is_file())
    # What Python and the linters leave behind is no part of the project.
    return {str(path) for path in paths if not any(p == "__pycache__" or p.startswith(".") for p in path.parts)}


def test_service_sdist_can_be_tested(service_built: Built) -> None:
    """The sdist carries what `make test` needs, so a packager can check what was built."""
    with tarfile.open(service_built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}

    assert {"Makefile", "constraints.txt", "LICENSE", "README.md", "client/pyproject.toml"} <= names
    assert "tests/contract/test_wheels.py" in names


def _requirements(project: Path) -> list[Requirement]:
    tables = tomllib.loads((project / "pyproject.toml").read_text())
    extras = tables["project"]["optional-dependencies"].values()
    listed = [*tables["build-system"]["requires"], *tables["project"]["dependencies"], *(r for e in extras for r in e)]
    return [Requirement(text) for text in listed]


def test_constraints_pin_every_direct_dependency() -> None:
    """Each package named in a pyproject.toml has one exact version in constraints.txt, inside its declared range."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}

    named = [*_requirements(ROOT), *_requirements(ROOT / "client")]
    outside = [str(r) for r in named if pins.get(canonicalize_name(r.name), "") not in r.specifier]

    assert named
    assert outside == []


def test_both_licences_are_one() -> None:
    """The client's wheel carries the text of the repository's licence."""
    assert (ROOT / "client/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
