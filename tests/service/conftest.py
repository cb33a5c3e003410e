"""Runs and registries in this process, for tests that need no server.

Knows how a body becomes a staged push. Does not know what a test wants of it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client.protocol import RunConfig, RunInfo, SnapshotInfo, TensorSpec, UpdateResult
from ema_service.bodies import UpdateBody, WeightsStream
from ema_service.memory import Layout, Memory, Staged
from ema_service.runs import Parameters, Registry, Run
from ema_service.shadows import State, Version
from ema_service.storage import ObjectStore, Store
from ema_service.tensors import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Every dtype, an empty and a 0-d tensor; sizes that are no multiple of a cache line.
_SHAPES = {"wide": (3,), "conv.weight": (4, 3, 3), "scalar": (), "none": (0, 5), "emb": (7, 5), "half": (11,)}
_DTYPES = {"wide": torch.float64, "emb": torch.bfloat16, "half": torch.float16}


def parameters(seed: int) -> dict[str, Tensor]:
    """Parameters of a small model with every dtype; each seed gives other values."""
    random = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=random).to(_DTYPES.get(n, torch.float32)) for n, s in _SHAPES.items()}


@pytest.fixture(scope="session")
def model() -> Callable[[int], dict[str, Tensor]]:
    """Parameters of a small model, by seed."""
    return parameters


def host_memory() -> Memory:
    return Memory("cpu", keep_bytes=1 << 20)


@pytest.fixture
def memory() -> Memory:
    return host_memory()


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(tensor.shape), _NAMES[tensor.dtype]) for name, tensor in tensors.items())


@pytest.fixture(scope="session")
def layout_of() -> Callable[[Mapping[str, Tensor]], Layout]:
    """The layout of a model."""
    return lambda tensors: Layout(specs_of(tensors))


def stage_body(staged: Staged, tensors: Mapping[str, Tensor]) -> Staged:
    """Fill staged memory with a body as the safetensors library writes it."""
    body = UpdateBody(staged)
    body.feed(save(dict(tensors)))
    body.finish()
    return staged


class LocalRun:
    """A run in this process: what the routes do with it, without HTTP."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def state(self) -> State:
        return self.run.ready_state()

    @property
    def version(self) -> Version:
        return self.state.version

    @property
    def info(self) -> RunInfo:
        return self.run.info()

    @property
    def etag(self) -> str:
        """Of the first average's weights."""
        info = self.version.weights_info(self.run.config, self.version.averages[0])
        return WeightsStream(self.run.layout.shadows, info, lineage=self.version.lineage).etag

    def bytes(self) -> dict[str, bytes]:
        """Of each average's shadows."""
        pairs = zip(self.version.averages, self.state.arenas, strict=True)
        return {average.name: arena.tensor.cpu().numpy().tobytes() for average, arena in pairs}

    def staged(self, tensors: Mapping[str, Tensor]) -> Staged:
        return stage_body(Staged(self.run.layout, self.run.memory), tensors)

    def begin(self, tensors: Mapping[str, Tensor], **numbers: int) -> None:
        """Give the initial weights."""
        self.run.initialise(Parameters(self.staged(tensors)), **numbers)

    def push(self, step: int, tensors: Mapping[str, Tensor]) -> UpdateResult:
        return self.run.commit(self.run.begin(step, self.staged(tensors)))

    def set_decay(self, decay: float, average: str | None = None) -> None:
        self.run.amend(lambda succession, version: succession.with_decay(version, decay, average))

    def reset_num_updates(self) -> None:
        self.run.amend(lambda succession, version: succession.with_counter_reset(version))

    def shadows(self, average: str | None = None) -> dict[str, Tensor]:
        """The current shadows of one average by name: views, not copies."""
        found = self.state.at(self.run.ledger.succession.member(average))
        assert found, f"{average} has no weights yet"
        _, arena = found
        entries = self.run.layout.shadows
        return {e.name: arena.tensor[e.begin : e.end].view(TORCH_DTYPES[e.dtype]).view(e.shape) for e in entries}


@pytest.fixture
def local_run(memory: Memory) -> Callable[..., LocalRun]:
    """Make a run of a model; it has its initial weights unless ``begun=False``. Keywords go into its RunConfig."""

    def make(tensors: Mapping[str, Tensor], *, begun: bool = True, **config: Any) -> LocalRun:
        specs = specs_of(tensors)
        run = LocalRun(
            Run(RunConfig("r", specs, **config), Layout(specs, config.get("copied", ())), memory, created_at=1.0)
        )
        if begun:
            run.begin(tensors)
        return run

    return make


class LocalServer:
    """A registry on a data dir. ``stop()`` ends it cleanly, ``crash()`` as a kill would; ``start()`` opens it again.

    ram_dir: where versions of durability ``process`` lie in memory; None for slots on disk. objects: where snapshots
    are moved to.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        staging_bytes: int = 1 << 24,
        frozen_bytes: int = 1 << 24,
        ram_dir: Path | None = None,
        new_memory: Callable[[], Memory] = host_memory,
        objects: ObjectStore | None = None,
    ) -> None:
        self.folder = folder
        self.ram_dir = ram_dir
        self._new_memory = new_memory
        self.objects = objects
        self._budgets = {"staging_bytes": staging_bytes, "frozen_bytes": frozen_bytes}
        self._open = False
        self.start()

    def start(self) -> None:
        self.memory = self._new_memory()
        self.store = Store(self.folder) if self.folder else None
        try:
            if self.store and self.ram_dir:
                self.store.use_memory_files(self.ram_dir)
            self.registry = Registry(self.memory, self.store, objects=self.objects, **self._budgets)
        except BaseException:
            if self.store:
                self.store.close()
            raise
        self._open = True

    def stop(self) -> None:
        self.registry.close()
        self._open = False

    def crash(self) -> None:
        if self.registry.offload:
            self.registry.offload.close()  # its thread, which a kill would end
        if self.store:
            self.store.close()
        self._open = False

    def end(self) -> None:
        if self._open:
            self.crash()

    def create(self, name: str, tensors: Mapping[str, Tensor], **config: Any) -> LocalRun:
        run, _ = self.registry.create(RunConfig(name, specs_of(tensors), **config))
        return LocalRun(run)

    def run(self, name: str) -> LocalRun:
        return LocalRun(self.registry.get(name))

    def data_files(self, pattern: str) -> list[Path]:
        """What lies in the folders of runs."""
        assert self.folder is not None
        return sorted((self.folder / "runs").glob(pattern))

    def snapshot(self, name: str, *, run: str = "r", keep: int | None = None) -> tuple[SnapshotInfo, bool]:
        """Take a snapshot of a run as it is now."""
        return self.registry.snapshots(run).take(name, self.registry.get(run).ready_state, keep=keep)


@pytest.fixture
def local_server(tmp_path: Path) -> Iterator[Callable[..., LocalServer]]:
    """Open registries: on the test's data dir or another folder, or with ``memory=True`` on none.

    All are ended after the test.
    """
    opened: list[LocalServer] = []

    def start(*, memory: bool = False, folder: Path | None = None, **options: Any) -> LocalServer:
        opened.append(LocalServer(None if memory else folder or tmp_path / "data", **options))
        return opened[-1]

    yield start
    for server in opened:
        server.end()


@pytest.fixture
def ram_dir() -> Iterator[Path]:
    """A folder for memory files that does not exist yet, in memory where the system has such a place."""
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    name = parent / f"ema-tests-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    for each in parent.glob(f"{name.name}*"):
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
