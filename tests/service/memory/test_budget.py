"""The memory of the host has a limit: whoever would go beyond gives up what waits for reuse, and is refused then.

Knows sizes and references. Does not know runs.
"""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ema_client.errors import Overloaded, Superseded
from ema_client.protocol import TensorSpec
from ema_service.memory import FilePool, Layout, Memory, Staging
from ema_service.memory import pool as module
from ema_service.memory.budget import Budget
from ema_service.memory.pool import HostPool
from ema_service.storage import memory_files
from ema_service.storage.memory_files import MemoryFiles, MemoryFilesUnusable
from ema_service.values import address

SIZE = 1000


@pytest.fixture
def pool() -> HostPool:
    """A pool with a budget of ten buffers, of which five may wait for reuse."""
    return HostPool(keep_bytes=5 * SIZE, budget=Budget(10 * SIZE))


def test_lent_and_idle_memory_is_counted(pool: HostPool) -> None:
    """Until it goes to the system, whoever has it."""
    lent = [pool.lend(SIZE) for _ in range(3)]
    assert pool.budget.used == 3 * SIZE
    del lent
    gc.collect()
    assert (pool.budget.used, pool.idle_bytes) == (3 * SIZE, 3 * SIZE)
    pool.trim(0.0)

    assert (pool.budget.used, pool.idle_bytes) == (0, 0)


def test_beyond_the_limit(pool: HostPool) -> None:
    """Refused with what is in use and what sets the limit; what is there stays."""
    lent = [pool.lend(SIZE) for _ in range(10)]
    with pytest.raises(MemoryError, match=r"10000 of 10000 bytes are in use \(--memory-limit\)"):
        pool.lend(1)
    lent.pop()
    gc.collect()

    assert len(pool.lend(SIZE)) == SIZE


def test_idle_memory_is_given_up_first(pool: HostPool) -> None:
    """Of other sizes, those that were used least recently; so the limit is no obstacle to anyone but the greedy."""
    for size in (SIZE, 2 * SIZE):
        pool.lend(size)
        gc.collect()
    assert pool.idle_bytes == 3 * SIZE
    large = pool.lend(8 * SIZE)

    assert (pool.budget.used, pool.idle_bytes) == (10 * SIZE, 2 * SIZE)
    del large


def test_a_size_that_is_in_use_stays(pool: HostPool) -> None:
    """Memory of a size nobody uses any more makes way for that of the next, which would be cleared anew for ever."""
    old = [pool.lend(SIZE) for _ in range(5)]
    del old
    gc.collect()
    assert pool.idle_bytes == 5 * SIZE
    first = pool.lend(SIZE * 2)
    before = address(first)
    del first
    gc.collect()

    assert address(pool.lend(SIZE * 2)) == before


def test_memory_that_waits_too_long(pool: HostPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes to the system; that of a size in use stays."""
    clock = itertools.count()
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    pool.lend(SIZE)
    for _ in range(10):
        pool.lend(2 * SIZE)
    gc.collect()
    assert pool.idle_bytes == 3 * SIZE
    pool.trim(5.0)

    assert pool.idle_bytes == 2 * SIZE


def test_machine_without_memory(pool: HostPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine has left is asked for, whatever the limit: memory beyond it would end the process."""
    pool.budget.limit = 1 << 40
    monkeypatch.setattr(module, "memory_room", lambda: 1 << 20)
    with pytest.raises(MemoryError, match=r"the machine, or this server's control group, has 0 bytes left"):
        pool.lend(32 << 20)

    assert pool.budget.used == 0


def test_refusal_is_for_whoever_asked() -> None:
    """A request that needs memory there is none of is told to come again."""
    memory = Memory("cpu", limit=SIZE)
    with pytest.raises(Overloaded, match="2000 bytes of memory could not be had: 0 of 1000 bytes are in use"):
        memory.allocate(2 * SIZE)


# --- files in memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Iterator[MemoryFiles]:
    made = MemoryFiles(tmp_path, tmp_path / "ram")
    yield made
    made.sweep(())
    made.close()


def test_files_are_counted(files: MemoryFiles, pool: HostPool) -> None:
    """As memory of the server that they are, for which idle memory is given up; also those of an earlier process."""
    pool.lend(5 * SIZE)
    gc.collect()
    of_run = FilePool(files, 4 * SIZE, "1.", pool)
    of_run.reserve(2)
    assert (pool.budget.used, pool.idle_bytes) == (8 * SIZE, 0)
    with pytest.raises(MemoryError, match="8000 of 10000"):
        of_run.reserve(3)
    names = files.names()
    again = HostPool(budget=Budget(SIZE))
    attached = [FilePool(files, 4 * SIZE, "1.", again).attach(name) for name in names]
    assert again.budget.used == 8 * SIZE

    of_run.close()
    del attached, of_run
    gc.collect()
    assert (pool.budget.used, again.budget.used) == (0, 0)


# --- what fails -------------------------------------------------------------------------------------------------------

#: Of every family that has to do with memory, and of one that has not.
FAULTS = [OSError, MemoryError, RuntimeError, Superseded, KeyboardInterrupt]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[object, str], None]:
    """Has a function raise the test's fault."""

    def fail(*_: object, **__: object) -> None:
        raise request.getfixturevalue("fault")("no room")

    return lambda owner, name: monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("fault", FAULTS)
def test_file_that_failed_is_not_counted(
    fault: type[BaseException], failing: Callable[[object, str], None], files: MemoryFiles, pool: HostPool
) -> None:
    """A file that could not be made costs nothing of the budget, and no name: not for want of room alone."""
    failing(files, "create")
    with pytest.raises(fault):
        FilePool(files, SIZE, "1.", pool).lend(SIZE)
    assert pool.budget.used == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_file_that_was_not_mapped_is_gone(
    fault: type[BaseException], failing: Callable[[object, str], None], files: MemoryFiles, pool: HostPool
) -> None:
    """Nor does one stay that was made and could not be used."""
    failing(memory_files, "taken")
    with pytest.raises(MemoryFilesUnusable if fault is OSError else fault):
        FilePool(files, SIZE, "1.", pool).lend(SIZE)
    assert (pool.budget.used, files.names()) == (0, set())


@pytest.mark.parametrize("fault", FAULTS)
def test_memory_that_failed_is_not_counted(
    fault: type[BaseException], failing: Callable[[object, str], None], pool: HostPool
) -> None:
    """Memory that the system refused costs nothing of the budget."""
    failing(module.mmap, "mmap")
    with pytest.raises(fault):
        pool.lend(SIZE)
    assert pool.budget.used == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_push_that_failed_is_not_counted(fault: type[BaseException], failing: Callable[[object, str], None]) -> None:
    """A push for which there is no memory costs nothing of the budget of pushes, whatever the reason is: the run's end,
    say."""
    memory = Memory("cpu")
    staging = Staging(memory, 10 * SIZE)
    failing(memory, "landing")
    with pytest.raises(fault):
        staging.reserve(Layout([TensorSpec("w", (1,), "F32")]))
    assert staging.bytes_in_use == 0


def test_kernel_without_huge_pages(pool: HostPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel knows none, memory is lent in ordinary pages."""

    class Refused(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module.mmap, "mmap", Refused)
    assert len(pool.lend(SIZE)) == SIZE
    assert pool.budget.used == SIZE
