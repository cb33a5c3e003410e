"""docker/ is true, checked without a container engine: its paths, commands and numbers against the tree and the server.

Knows the few Dockerfile instructions in use. Does not build an image.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_client import __version__

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def _instructions() -> list[tuple[str, str]]:
    """(instruction, its words), with comments out and continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, rest in pairs]


INSTRUCTIONS = _instructions()


def _all(word: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == word]


def _exec_form(words: str) -> list[str]:
    """["program", "word"]: run without a shell, so that signals reach the program."""
    return [str(word) for word in json.loads(words[words.index("[") :])]


def _flag(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


ENTRYPOINT = _exec_form(_all("ENTRYPOINT")[0])
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The server of compose.yaml."""
    return dict(SERVICES["ema-service"])


def test_stages_are_known() -> None:
    """Each FROM and COPY --from names a stage above it, and the image is the last stage, which is not the builder."""
    stages: list[str] = []
    for word, rest in INSTRUCTIONS:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            assert base == "${BASE}" or base in stages
            stages.append(name)
        if word == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in stages[:-1]

    assert stages[-1] == "runtime"


def test_copied_files_exist() -> None:
    """Each COPY from the repository names something that is there and that .dockerignore lets through."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sources = [source for rest in _all("COPY") if not rest.startswith("--from") for source in rest.split()[:-1]]

    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if _ignored(source, rules)] == []


def _ignored(path: str, rules: list[str]) -> bool:
    ignored = False
    for rule in rules:
        if fnmatch(path, rule.removeprefix("!")):
            ignored = not rule.startswith("!")
    return ignored


def test_build_copies_what_the_wheel_needs() -> None:
    """Whatever pyproject.toml reads when it is built (packages, readme, licence, version) is copied before."""
    sources = {source for rest in _all("COPY") if not rest.startswith("--from") for source in rest.split()[:-1]}

    assert {"pyproject.toml", "README.md", "LICENSE", "client", "ema_service"} <= sources


def test_entrypoint_exists(service: dict[str, Any]) -> None:
    """The image starts a command that this project installs, with flags which that command has."""
    program, *words = ENTRYPOINT + service["command"]
    assert program in {script.name for script in entry_points(group="console_scripts")}

    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "ema_service", words[0], "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout
    known = set(re.findall(r"--[a-z][a-z-]*", help_text))

    assert {word for word in words if word.startswith("--")} <= known


def test_image_is_not_root() -> None:
    """The server runs as a numbered user that is not root, who owns the data folder."""
    (user,) = _all("USER")

    assert int(user) > 0
    assert any(f"--uid {user}" in step and f"-o ema -g ema {_all('VOLUME')[0]}" in step for step in _all("RUN"))


def test_numbers_agree(service: dict[str, Any]) -> None:
    """Port and data folder are the same in the entrypoint, EXPOSE, VOLUME, the health check and compose.yaml."""
    port, data = _flag(ENTRYPOINT, "--port"), _flag(ENTRYPOINT, "--data-dir")
    (published,), (mounted, _) = service["ports"], service["volumes"]
    volumes = yaml.safe_load((DOCKER / "compose.yaml").read_text())["volumes"]

    assert _all("EXPOSE") == [port]
    assert _all("VOLUME") == [data]
    assert f":{port}/healthz" in _all("HEALTHCHECK")[0]
    assert published.rpartition(":")[2] == port
    assert mounted.partition(":") == (next(iter(volumes)), ":", data)


def test_memory_outlives_the_container(service: dict[str, Any]) -> None:
    """The folder of memory files is the host's, made before the server starts, for the server's user alone."""
    ram = SERVICES["ram"]
    (host, mounted) = ram["volumes"][0].split(":")
    _, bound = service["volumes"]
    (user,) = _all("USER")
    made = dict(zip(ram["entrypoint"][2::2], ram["entrypoint"][3::2], strict=False))

    assert list(SERVICES) == ["ema-service", "ram"]
    assert service["depends_on"] == {"ram": {"condition": "service_completed_successfully"}}
    assert (host, bound["type"], service["environment"]) == (
        "/dev/shm",
        "bind",
        {"EMA_SERVICE_RAM_DIR": bound["target"]},
    )
    assert ram["entrypoint"][-1] == bound["source"].replace(host, mounted)
    assert (ram["image"], made) == (service["image"], {"-m": "0700", "-o": user, "-g": user})


def test_compose_publishes_on_loopback_only(service: dict[str, Any]) -> None:
    """A server that asks nobody for a token is reached from this machine alone."""
    assert "--insecure-no-auth" in service["command"]
    assert all(published.startswith("127.0.0.1:") for published in service["ports"])


def test_compose_builds_this_dockerfile(service: dict[str, Any]) -> None:
    """compose.yaml builds from the repository's root, and sets build arguments that the Dockerfile declares."""
    build = service["build"]

    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert set(build["args"]) <= {argument.partition("=")[0] for argument in _all("ARG")}


def test_image_takes_what_a_snapshot_store_needs() -> None:
    """The build argument that the page names is declared, and installed with the server, within the constraints."""
    (install,) = (run for run in _all("RUN") if "/wheels/*.whl" in run)

    assert 'PACKAGES=""' in _all("ARG")
    assert "-c constraints.txt" in install
    assert install.endswith("/wheels/*.whl ${PACKAGES}")
    assert "--build-arg PACKAGES=s3fs" in " ".join((DOCKER / "README.md").read_text().split())


def _health(url: str) -> subprocess.CompletedProcess[str]:
    program, *words = _exec_form(_all("HEALTHCHECK")[0].partition("CMD")[2])
    assert program == "python3"
    words = [word.replace("http://127.0.0.1:8470", url) for word in words]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=30, check=False)


def test_health_check_sees_a_living_server(server: Any) -> None:
    """The image's health check succeeds against a live server."""
    done = _health(server.url)

    assert (done.returncode, done.stderr) == (0, "")


def test_health_check_sees_a_dead_server() -> None:
    """The image's health check fails where nothing listens."""
    assert _health("http://127.0.0.1:9").returncode != 0


def test_labels_agree() -> None:
    """The image's labels have the version and the licence of the package, and its name."""
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', _all("LABEL")[0]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert labels["version"] == __version__
    assert (labels["title"], labels["licenses"]) == (project["name"], project["license"])


def test_torch_alone_comes_from_its_own_index() -> None:
    """One step names torch's index; every other package comes from where pip is set up to look."""
    installs = [command for step in _all("RUN") for command in step.split("&&") if "${TORCH_INDEX}" in command]

    assert len(installs) == 1
    assert installs[0].split()[-4:] == ["--index-url", "${TORCH_INDEX}", "--no-deps", "torch"]


def test_no_image_is_asked_of_a_registry(service: dict[str, Any]) -> None:
    """What is built here is not looked for elsewhere under its bare name."""
    assert (service["pull_policy"], SERVICES["ram"]["pull_policy"]) == ("build", "never")
    assert "podman build --format docker" in (DOCKER / "README.md").read_text()


def test_steps_are_readable_by_a_shell() -> None:
    """Each RUN step parses as a shell command."""
    for step in _all("RUN"):
        assert shlex.split(step)
        subprocess.run(["sh", "-n", "-c", step], timeout=10, check=True)
