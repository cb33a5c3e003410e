"""The container image: built from the Dockerfile by buildah, on Debian's packages, and run as a host would run it.

No registry is asked: the base is made by debootstrap. What it needs (root, buildah, podman, debootstrap, Debian's and
Python's package indices) makes it a long form. docker itself is not run.

Knows the Dockerfile's arguments and what docker/README.md promises of the image. Does not know the server's flags but
for its address.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_client import EmaClient
from tests.waiting import wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
USER = "10001"
#: Without the base, which is debootstrap's here.
MOST_MB = 900
INDEX = "https://pypi.org/simple"
TORCH = "https://download.pytorch.org/whl/cpu"
#: Where the build finds the wheel of torch, and the certificates of this machine.
WHEELS = "/torch-wheels"
_PORT = re.compile(r"http://127\.0\.0\.1:(\d+)")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Image:
    """An image that was built. folder: of buildah's storage, and where the image's files lie."""

    folder: Path
    container: str
    files: Path

    def buildah(self, *words: str) -> str:
        return buildah(self.folder, *words)

    def run(self, *words: str) -> list[str]:
        """The command that runs words in the image, as its user and without privileges."""
        return [*command(self.folder), "run", "--cap-drop", "all", self.container, "--", *words]


def command(folder: Path) -> list[str]:
    return ["buildah", "--root", f"{folder}/store", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]


def buildah(folder: Path, *words: str) -> str:
    done = subprocess.run([*command(folder), *words], capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    return {**os.environ, "BUILDAH_ISOLATION": "chroot"}


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image, built; a container of it, not running."""
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install buildah debootstrap")
    if os.geteuid():
        pytest.skip("an image on a base of debootstrap's is built by root")
    folder = Path(tempfile.mkdtemp(prefix="ema-image-"))
    try:
        _base(folder)
        _build(folder)
        container = buildah(folder, "from", "--pull-never", "localhost/ema-service")
        yield Image(folder, container, Path(buildah(folder, "mount", container)))
    finally:
        subprocess.run([*command(folder), "rm", "--all"], capture_output=True, check=False)
        shutil.rmtree(folder)


def _base(folder: Path) -> None:
    """An image of Debian with Python, as the indices have them today."""
    words = ["--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", f"{folder}/root"]
    made = subprocess.run(["debootstrap", *words], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"debootstrap made no Debian: {made.stdout[-300:]}")
    container = buildah(folder, "from", "scratch")
    buildah(folder, "copy", "-q", container, f"{folder}/root", "/")
    buildah(folder, "commit", "-q", "--rm", container, "localhost/base")


def _build(folder: Path) -> None:
    """The Dockerfile's image. torch is the one that the tests run with."""
    wheels = folder / "wheels"
    wheels.mkdir()
    # One of another Python's than the image's is of no use there: pip then takes the index's.
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    subprocess.run(
        [*download, f"torch=={torch.__version__}", "--extra-index-url", TORCH], capture_output=True, check=False
    )
    arguments = {"BASE": "localhost/base", "TORCH_INDEX": INDEX, "PIP_ARGS": f"--find-links {WHEELS}"}
    words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    mounts = ["-v", f"{wheels}:{WHEELS}:ro"]
    if Path(CERTIFICATES).exists():
        mounts += ["-v", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
    buildah(
        folder, "bud", "-q", "--format", "docker", "--pull-never", *words, *mounts,
        "-t", "localhost/ema-service", "-f", str(ROOT / "docker" / "Dockerfile"), str(ROOT),
    )  # fmt: skip


def test_what_it_says_of_itself(image: Image) -> None:
    """Labels, a user without privileges, a health check, no word of who may connect."""
    found: dict[str, Any] = json.loads(image.buildah("inspect", "--type", "image", "localhost/ema-service"))["Docker"]
    config = found["config"]

    assert config["Labels"]["org.opencontainers.image.title"] == "ema-service"
    assert config["User"] == USER
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Entrypoint"][:2] == ["ema-service", "serve"]
    assert "--insecure-no-auth" not in config["Entrypoint"]


def test_it_is_slim(image: Image) -> None:
    """What is added to Debian is no more than README.md says: no headers, no pip."""
    found = subprocess.run(["du", "-sm", image.files / "opt"], capture_output=True, text=True, check=True).stdout

    assert int(found.split()[0]) <= MOST_MB
    assert not list((image.files / "opt/venv/bin").glob("pip*"))
    assert not list((image.files / "opt/venv/lib").glob("python3*/site-packages/torch/include"))


def _pid_of(words: list[str]) -> int:
    """The process of Python that was started with these words."""
    wanted = "\0".join(words).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if (found := path.read_bytes()).rstrip(b"\0").endswith(wanted) and b"buildah" not in found:
                return int(path.parent.name)
    raise LookupError(words)


def test_it_serves(image: Image, tmp_path: Path, run_name: str) -> None:
    """As its user, on the image's volume: a run is pushed to, the health check says yes, SIGTERM ends it."""
    entry = json.loads(image.buildah("inspect", "--type", "image", "localhost/ema-service"))["Docker"]["config"]
    start = [*entry["Entrypoint"], "--host", "127.0.0.1", "--port", "0", "--ram-dir", "/data/versions"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(image.run(*start), stdout=log, stderr=log, env=_environment())
    try:
        wait_until(lambda: _PORT.search((tmp_path / "log").read_text()) or server.poll() is not None)
        listens = _PORT.search((tmp_path / "log").read_text())
        assert listens, (tmp_path / "log").read_text()
        port = listens[1]
        check = [word.replace("8470", port) for word in entry["Healthcheck"]["Test"][1:]]
        assert subprocess.run(image.run(*check), env=_environment(), check=False).returncode == 0
        with EmaClient(f"http://127.0.0.1:{port}") as client:
            client.create_run(run_name, {"w": torch.zeros(1000)}, decay=0.5, use_num_updates=False)
            client.push(run_name, {"w": torch.ones(1000)}, step=1)
            assert torch.equal(client.pull(run_name)["w"], torch.full((1000,), 0.5))
        # buildah passes no signal on.
        os.kill(_pid_of(start[1:]), signal.SIGTERM)
        server.wait(60)
    finally:
        if server.poll() is None:
            server.kill()
    assert "stopped" in (tmp_path / "log").read_text()
    who = subprocess.run(image.run("id", "-u"), capture_output=True, text=True, env=_environment(), check=True)
    assert who.stdout.strip() == USER


def test_podman_finds_it_healthy(image: Image, tmp_path: Path, run_name: str) -> None:
    """With no network, on a read-only root: podman's own look at its health says yes, and its stop ends it in order."""
    podman = _podman(image.folder)
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, int(USER), int(USER))
    words = ["--insecure-no-auth", "--uds", "/data/ema.sock", "--ram-dir", "/data/versions"]
    container = podman("run", "-d", *_CONTAINED, "-v", f"{data}:/data", "localhost/ema-service", *words)
    try:
        wait_until(lambda: podman("healthcheck", "run", container, may_fail=True) is not None, "the container's health")
        with EmaClient(f"unix://{data}/ema.sock") as client:
            client.create_run(run_name, {"w": torch.zeros(1000)}, decay=0.5, use_num_updates=False)
            client.push(run_name, {"w": torch.ones(1000)}, step=1)
            assert torch.equal(client.pull(run_name)["w"], torch.full((1000,), 0.5))
        podman("stop", "-t", "60", container)
        assert podman("inspect", "-f", "{{.State.ExitCode}}", container) == "0"
        assert "stopped" in podman("logs", container)
        assert (data / "catalog.db").stat().st_uid == int(USER)
    finally:
        podman("rm", "-f", container)


#: Limits are given, for podman would raise them, which a container around it may not.
_CONTAINED = ("--network", "none", "--read-only", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")


def _podman(folder: Path) -> Callable[..., Any]:
    """Runs podman over buildah's storage, and gives what it prints; None where it fails and may. Skips without one."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed: apt-get install podman runc")
    runtime = ["--runtime", "runc"] if shutil.which("runc") else []
    places = ["--root", f"{folder}/store", "--runroot", f"{folder}/run", "--tmpdir", f"{folder}/tmp"]
    command = ["podman", *places, "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", *runtime]

    def run(*words: str, may_fail: bool = False) -> str | None:
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        if done.returncode and may_fail:
            return None
        assert done.returncode == 0, done.stderr[-2000:]
        return (done.stdout if words[0] != "logs" else done.stdout + done.stderr).strip()

    tried = subprocess.run(
        [*command, "run", "--rm", *_CONTAINED, "--entrypoint", '["id", "-u"]', "localhost/ema-service"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"podman starts no container here: {tried.stderr[-300:]}")
    assert tried.stdout.strip() == USER
    return run
