"""What every test shares: real servers, each a process of its own on a real port.

Knows how to start, stop and kill ``ema-service serve``. Does not know what a test wants of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import trustme
from hypothesis import settings
from safetensors.torch import load, save
from torch import Tensor

from tests.forked import Forked
from tests.service.cluster.launched import Launched

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_LISTENS = re.compile(r"listens on (https?://\S+)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", type=float, default=0.0, metavar="SECONDS", help="go on with random lives, and overload, for so long"
    )
    parser.addoption(
        "--hosts", type=int, default=0, metavar="K", help="have tests that share a server share a cluster of K hosts"
    )


#: Where the memory of servers lies that tests start and kill: no file of theirs may outlive the tests.
_RAM_DIR = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / f"ema-tests-{os.getpid()}"


def pytest_configure() -> None:
    # The workers of xdist are started with Ctrl-C ignored, and every process that a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    base = os.environ.setdefault("EMA_SERVICE_RAM_DIR", str(_RAM_DIR))
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        Path(base).mkdir(mode=0o700, exist_ok=True)
        os.environ["EMA_SERVICE_RAM_DIR"] = str(Path(base) / worker)


#: Tests that wait longest for processes come first: one that is left for last has a worker alone at the end.
_FIRST = ("tests/e2e/test_bench.py", "tests/integrations/", "tests/e2e/", "tests/contract/", "tests/fuzz/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="a long form of other tests: make soak"))
    for item in items if config.getoption("--hosts") else ():
        if alone := item.get_closest_marker("one_server"):
            item.add_marker(pytest.mark.skip(reason=f"of one server alone: {alone.args[0]}"))
    ranks = {path: rank for rank, path in enumerate(_FIRST)}
    items.sort(key=lambda item: next((ranks[path] for path in _FIRST if item.nodeid.startswith(path)), len(_FIRST)))


def pytest_collection_finish() -> None:
    _freeze()


def _freeze() -> None:
    """Have no garbage collection go through what there is by now: ten thousand tests, and the modules of a dozen
    frameworks, which take a second each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(_RAM_DIR, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _what_a_module_imported() -> Iterator[None]:
    """After the last test of a module: the frameworks that its tests have imported stay."""
    yield
    _freeze()


@pytest.fixture(scope="module", autouse=True)
def _what_servers_leave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the last test of a module: the memory and the data dirs of servers that are no more, which were killed as a
    rule. All modules together leave more than a machine has."""
    yield
    for owner in Path(os.environ["EMA_SERVICE_RAM_DIR"]).glob("*/owner"):
        with contextlib.suppress(OSError), owner.open("r+") as claimed:
            fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while a server has it
            data_dir = Path(json.loads(claimed.read())["data_dir"])
            if data_dir.is_relative_to(tmp_path_factory.getbasetemp()):
                shutil.rmtree(data_dir, ignore_errors=True)
                shutil.rmtree(owner.parent, ignore_errors=True)


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """Seconds to go on for after the short round; 0 unless --soak was given."""
    return float(request.config.getoption("--soak"))


@dataclass
class ServerProcess:
    """A running server. ``url`` and ``uds`` (unix://...) reach it; ``data_dir`` is None with --memory.

    program: what Python runs, if not the service itself.
    """

    folder: Path
    arguments: tuple[str, ...] = ()
    data_dir: Path | None = None
    program: tuple[str, ...] = ("-m", "ema_service")
    url: str = ""
    process: Forked = field(init=False)

    @property
    def uds(self) -> str:
        return f"unix://{self.folder / 'ema.sock'}"

    @property
    def log(self) -> str:
        """Everything it printed so far."""
        return (self.folder / "log").read_text()

    def start(self) -> ServerProcess:
        """Start, or start again on the same data dir, and wait until it accepts connections."""
        where = ["--data-dir", str(self.data_dir)] if self.data_dir else ["--memory"]
        command = [*self.program, "serve", "--port", "0", *where, *self.arguments]
        log = self.folder / "log"
        log.write_bytes(b"")
        self.process = Forked([*command, "--uds", str(self.folder / "ema.sock")], log)
        deadline = time.monotonic() + _START_SECONDS
        while not (found := _LISTENS.search(self.log)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log}")
            time.sleep(0.02)
        self.url = found.group(1)
        return self

    def stop(self) -> int:
        """End it gracefully, as an operator would, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs after this."""
        self.process.kill()
        self.process.wait(_STOP_SECONDS)

    def http(self) -> httpx.Client:
        """A plain HTTP client of it, with none of our client's code."""
        return httpx.Client(base_url=self.url, timeout=30)


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers with flags of one's own; ``memory=True`` for --memory. All are ended after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str, memory: bool = False) -> ServerProcess:
        folder = tmp_path_factory.mktemp("server")
        server = ServerProcess(folder, arguments, None if memory else folder / "data")
        started.append(server.start())
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


class SharedCluster(Launched):
    """A cluster in a server's place, reached through its gateway. What only a server has skips the test."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"a cluster has no {name}")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server with a data dir for all tests that can share it; use ``run_name`` for a run of one's own."""
    folder = tmp_path_factory.mktemp("server")
    if hosts := request.config.getoption("--hosts"):
        cluster = SharedCluster(folder / "all", "--local", str(hosts)).start()
        yield cluster
        cluster.stop()
        return
    running = ServerProcess(folder, data_dir=folder / "data").start()
    yield running
    if running.process.poll() is None:
        running.stop()


_numbers = itertools.count()


@pytest.fixture
def run_name() -> str:
    """A name no other test has."""
    return f"run-{os.getpid()}-{next(_numbers)}"


# A busy machine is no failure, and the same commit gives the same result twice.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class PlainRun:
    """A run, spoken to with plain HTTP and the safetensors library: none of our client's code."""

    def __init__(self, http: httpx.Client, name: str) -> None:
        self.http = http
        self.name = name
        self.path = f"/v1/runs/{name}"

    def create(self, tensors: Mapping[str, Tensor], **config: object) -> httpx.Response:
        layout = [{"name": n, "shape": list(t.shape), "dtype": _DTYPES[t.dtype]} for n, t in tensors.items()]
        return self.http.post("/v1/runs", json={"run": self.name, "layout": layout, **config})

    def begin(self, tensors: Mapping[str, Tensor], **query: int) -> httpx.Response:
        """Give the initial weights."""
        return self.http.put(f"{self.path}/weights", content=save(dict(tensors)), params=query)

    def push(self, step: int, tensors: Mapping[str, Tensor]) -> httpx.Response:
        return self.http.put(f"{self.path}/updates/{step}", content=save(dict(tensors)))

    def pull(self, **query: str | int | float) -> httpx.Response:
        return self.http.get(f"{self.path}/weights", params=query)

    def weights(self, **query: str | int | float) -> dict[str, Tensor]:
        """What load() of the safetensors library makes of a pull."""
        weights: dict[str, Tensor] = load(self.pull(**query).raise_for_status().content)
        return weights

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = self.http.get(self.path).raise_for_status().json()
        return info


@pytest.fixture(scope="session")
def plain_run_at() -> Callable[..., PlainRun]:
    """Make a run through an open connection: with tensors it has its initial weights, without it is not there.

    Further keywords go into its configuration.
    """

    def make(http: httpx.Client, name: str, tensors: Mapping[str, Tensor] | None = None, **config: object) -> PlainRun:
        run = PlainRun(http, name)
        if tensors is not None:
            run.create(tensors, **config).raise_for_status()
            run.begin(tensors).raise_for_status()
        return run

    return make


@pytest.fixture
def plain_run(run_name: str, plain_run_at: Callable[..., PlainRun]) -> Iterator[Callable[..., PlainRun]]:
    """Make the test's own run on a server, or with ``name`` another: ``plain_run(server, tensors, decay=0.5)``."""
    opened: list[httpx.Client] = []

    def make(
        server: ServerProcess, tensors: Mapping[str, Tensor] | None = None, *, name: str = run_name, **config: object
    ) -> PlainRun:
        opened.append(server.http())
        run: PlainRun = plain_run_at(opened[-1], name, tensors, **config)
        return run

    yield make
    for http in opened:
        http.close()


class LitEmaOracle:
    """LitEma as latent-diffusion has it, in tensors of torch: float32 scalars, sub, mul, sub.

    Differs where the service says it does: dotted names, and a shadow that is float32 for bf16 and fp16 parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float = 0.9999, use_num_updates: bool = True) -> None:
        self.decay = torch.tensor(decay, dtype=torch.float32)
        self.num_updates = torch.tensor(0 if use_num_updates else -1, dtype=torch.int)
        self.shadow = {name: _widened(tensor).clone() for name, tensor in tensors.items()}

    def retention(self) -> tuple[Tensor, Tensor]:
        """Count one update; its decay and one minus that, both 0-d float32."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        return decay, 1.0 - decay

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        _, one_minus_decay = self.retention()
        for name, param in tensors.items():
            shadow = self.shadow[name]
            shadow.sub_(one_minus_decay * (shadow - param.to(shadow.dtype)))


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


@pytest.fixture(scope="session")
def litema() -> type[LitEmaOracle]:
    """The class LitEma, written independently of the service, to compare with."""
    return LitEmaOracle


@dataclass(frozen=True)
class Certificate:
    """A certificate for 127.0.0.1 and localhost, and who signed it: an authority that no machine knows."""

    cert: Path
    key: Path
    authority: Path

    @property
    def flags(self) -> tuple[str, ...]:
        """What makes ``ema-service serve`` speak TLS with it."""
        return ("--ssl-certfile", str(self.cert), "--ssl-keyfile", str(self.key))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    made = Certificate(folder / "cert.pem", folder / "key.pem", folder / "authority.pem")
    made.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    made.key.write_bytes(issued.private_key_pem.bytes())
    made.authority.write_bytes(authority.cert_pem.bytes())
    return made


@pytest.fixture(scope="session")
def plain_run_class() -> type[PlainRun]:
    """For runs that a test makes itself."""
    return PlainRun


@pytest.fixture(scope="session")
def server_class() -> type[ServerProcess]:
    """For fixtures that start a server of another scope than start_server."""
    return ServerProcess
