"""Group durability: what it costs that an answered push survives, and how soon a server is back.

Knows the durabilities, what is demanded of each, and the disk's own rates beside them. Does not know how a version is
kept.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Self

from scale import Scale
from torch import Tensor

from ema_client import EmaClient
from ema_client.protocol import Durability
from ema_service.bench.ceiling import RAW_TCP, Ceiling
from ema_service.bench.children import BenchFailed, Service
from ema_service.bench.machine import written_bytes
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, Row, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic, make_state
from ema_service.memory import Memory
from ema_service.runs import Registry
from ema_service.storage import Store

__all__ = ["NO_CHECKPOINT", "NO_MEMORY_FILES", "measure", "seconds_until_back"]

WRITTEN = "write a file again and fdatasync"
READ = "read the run's file"
RESTORE = "a run of durability disk, back in memory"
DURABILITIES: tuple[Durability, ...] = ("memory", "process", "disk")
PUSH = {durability: f"push, durability {durability}" for durability in DURABILITIES}
SHARED = {durability: f"push from shared memory, {durability}" for durability in DURABILITIES[:2]}
CHECKPOINTED = {durability: f"push, {durability}, during a checkpoint" for durability in DURABILITIES[:2]}
IN_SLOTS = "push, durability process, no memory files"
DISK_BYTES = "written to disk by a push, durability process"
EMPTY = "start of a server without runs"
BACK = "start after kill -9 of 4 runs"
BEYOND = "the same, beyond a server without runs"
#: Seconds: how often the service looks for runs to be checkpointed, and how long it is given to begin with one.
LOOKS = 0.05
BEGINS = 0.15
#: Pushes in a row: in the first, the disk may still be busy with what came before, and a version's memory is one that
#: was not used for long.
IN_A_ROW = 3
PIECE = 1 << 20
RESTARTED_RUNS = 4
MEGA = 1e6
NO_CHECKPOINT = ("--checkpoint-interval", "1000000")
#: A folder that cannot be made: versions go to slots on disk, as they do where there is no file system in memory.
NO_MEMORY_FILES = ("--ram-dir", "/proc/no/such/folder")

NEEDS: dict[str, tuple[Need, ...]] = {
    RAW_TCP: (),
    WRITTEN: (),
    PUSH["memory"]: (Need(against=RAW_TCP),),
    CHECKPOINTED["memory"]: (Need(1 / 1.5, PUSH["memory"]),),
    PUSH["process"]: (Need(0.95, PUSH["memory"]), Need(0.75, RAW_TCP)),
    CHECKPOINTED["process"]: (Need(0.8, PUSH["memory"]),),
    SHARED["memory"]: (Need(against=RAW_TCP),),
    SHARED["process"]: (Need(0.95, SHARED["memory"]),),
    IN_SLOTS: (Need(against=PUSH["memory"]),),
    PUSH["disk"]: (Need(0.8, WRITTEN),),
    READ: (),
    RESTORE: (Need(0.5, READ),),
}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes = scale.wire_bytes
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as name:
        folder = Path(name)
        seconds, written, met = _pushes(folder, nbytes, scale.rounds, on_step)
        again = {READ: timed(partial(_read, folder / "data")), RESTORE: timed(partial(_restore, folder / "data"))}
        seconds |= interleave(again, scale.rounds, on_step=on_step)
        starts = _restarts(folder, scale, on_step)
    rows = [rate_row(name, nbytes, seconds, needs, met.get(name, "")) for name, needs in NEEDS.items()]
    rows.insert(list(NEEDS).index(IN_SLOTS), Row(DISK_BYTES, "MB", written, (Need(0.1, most=True),)))
    facts = (
        f"pushes over TCP but for those from shared memory; {WRITTEN}: {IN_A_ROW} times in a row, as the pushes, in "
        "pieces of a MiB, its blocks in use already; the disk is synced before and after each figure",
        f"{READ} and {RESTORE}: from the page cache, into memory that is new each time",
        f"{BACK}: each of {show_size(scale.reader_bytes)} and durability process; until it listens",
    )
    title = f"durability: {show_size(nbytes)} of float32 in {len(make_state(nbytes))} tensors"
    return Group("durability", title, (*rows, *starts), facts)


def _pushes(
    folder: Path, nbytes: int, rounds: int, on_step: Callable[[str], object]
) -> tuple[dict[str, tuple[float, ...]], tuple[float, ...], dict[str, str]]:
    """Seconds of each way, MB written to disk by a push of durability process, and notes by row."""
    with contextlib.ExitStack() as stack:
        ceiling = stack.enter_context(Ceiling(nbytes))
        service = stack.enter_context(Service(*NO_CHECKPOINT, data_dir=folder / "data"))
        client = stack.enter_context(EmaClient(service.url))
        file = stack.enter_context((folder / "file").open("wb", buffering=0))
        operations: dict[str, Operation] = {RAW_TCP: ceiling.operations()[RAW_TCP]}
        operations[WRITTEN] = _settled(partial(_write, file.fileno(), memoryview(bytearray(nbytes))))
        counted, state = list[float](), make_state(nbytes)
        shared = client.shared_state(state)
        for durability, name in PUSH.items():
            traffic = Traffic(durability, nbytes, state)
            traffic.create(client, durability=durability)
            push = _settled(partial(traffic.push, client))
            operations[name] = _counting(push, service.pid, counted) if durability == "process" else push
            if durability in SHARED:
                _check_shared(client, traffic, shared)
                operations[SHARED[durability]] = _settled(partial(traffic.push, client, shared))
        checkpointed = {
            name: stack.enter_context(_Checkpointed(folder / f"checkpointed-{durability}", durability, nbytes, state))
            for durability, name in CHECKPOINTED.items()
        }
        operations |= {name: each.push for name, each in checkpointed.items()}
        slots = stack.enter_context(Service(*NO_MEMORY_FILES, data_dir=folder / "slots"))
        operations[IN_SLOTS] = _in_slots(stack.enter_context(EmaClient(slots.url)), nbytes, state)
        seconds = interleave(operations, rounds, on_step=on_step)
        for durability in SHARED:
            client.delete_run(durability)
    # The first figure is that of warming up.
    return seconds, tuple(counted[1:]), {name: each.note for name, each in checkpointed.items()}


def _check_shared(client: EmaClient, traffic: Traffic, shared: Mapping[str, Tensor]) -> None:
    """Push once. Raises BenchFailed where the push does not travel by shared memory."""
    traffic.push(client, shared)
    if client.link != "shared memory":
        raise BenchFailed(f"pushes travel by {client.link}")


def _counting(push: Operation, pid: int, counted: list[float]) -> Operation:
    """The push, which also notes how many MB the service has had written to disk by each."""

    def operation() -> float:
        before = written_bytes(pid) or 0
        seconds = push()
        counted.append(((written_bytes(pid) or 0) - before) / IN_A_ROW / MEGA)
        return seconds

    return operation


def _in_slots(client: EmaClient, nbytes: int, state: Mapping[str, Tensor]) -> Operation:
    traffic = Traffic("slots", nbytes, state)
    traffic.create(client, durability="process")
    return _settled(partial(traffic.push, client))


def _restarts(folder: Path, scale: Scale, on_step: Callable[[str], object]) -> list[Row]:
    """How soon a server is back that was killed with its runs in memory, beside a server that has none."""
    runs, none = folder / "runs", folder / "none"
    on_step(f"{RESTARTED_RUNS} runs to be killed")
    with Service(*NO_CHECKPOINT, data_dir=runs) as service, EmaClient(service.url) as client:
        for number in range(RESTARTED_RUNS):
            traffic = Traffic(f"run-{number}", scale.reader_bytes)
            traffic.create(client, durability="process")
            traffic.push(client)
        service.kill()
    operations = {EMPTY: partial(seconds_until_back, none), BACK: partial(seconds_until_back, runs)}
    seconds = interleave(operations, scale.rounds, on_step=on_step)
    with Service(data_dir=runs):
        pass  # gives the memory back
    beyond = tuple(back - empty for back, empty in zip(seconds[BACK], seconds[EMPTY], strict=True))
    needs = {BEYOND: (Need(0.3, most=True),)}
    return [Row(name, "s", values, needs.get(name, ())) for name, values in {**seconds, BEYOND: beyond}.items()]


def seconds_until_back(data: Path, *arguments: str) -> float:
    """Start a server on this data dir, and kill it once it listens; how many seconds that took."""
    start = perf_counter()
    with Service(*(arguments or NO_CHECKPOINT), data_dir=data) as service:
        seconds = perf_counter() - start
        service.kill()
    return seconds


class _Checkpointed:
    """A service that does little but write checkpoints, within the ``with`` block."""

    def __init__(self, data: Path, durability: Durability, nbytes: int, state: Mapping[str, Tensor]) -> None:
        self._durability: Durability = durability
        self._service = Service("--checkpoint-interval", str(LOOKS), data_dir=data)
        self._traffic = Traffic("checkpointed", nbytes, state)
        self._clean = contextlib.ExitStack()
        self._met = list[bool]()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(self._service)
            self._client = stack.enter_context(EmaClient(service.url))
            self._traffic.create(self._client, durability=self._durability)
            self._clean = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._clean.close()

    @property
    def note(self) -> str:
        return f"{sum(self._met)} of {len(self._met)} met one that was being written"

    def push(self) -> float:
        os.sync()
        self._traffic.push(self._client)
        seconds = sum(self._push_beside_one() for _ in range(IN_A_ROW)) / IN_A_ROW
        os.sync()
        return seconds

    def _push_beside_one(self) -> float:
        sleep(BEGINS)
        info = self._client.run("checkpointed")
        self._met.append(info.checkpoint_step != info.step)
        start = perf_counter()
        self._traffic.push(self._client)
        return perf_counter() - start


def _settled(action: Callable[[], object]) -> Operation:
    """One of several in a row; what it left to be written is, before anything else is measured."""

    def operation() -> float:
        os.sync()
        start = perf_counter()
        for _ in range(IN_A_ROW):
            action()
        seconds = (perf_counter() - start) / IN_A_ROW
        os.sync()
        return seconds

    return operation


def _write(descriptor: int, data: memoryview) -> None:
    for start in range(0, len(data), PIECE):
        os.pwrite(descriptor, data[start : start + PIECE], start)
    os.fdatasync(descriptor)


def _read(data: Path) -> None:
    newest = max(data.glob("runs/*/slots/*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    newest.read_bytes()


def _restore(data: Path) -> None:
    memory = Memory("cpu")
    registry = Registry(memory, Store(data), staging_bytes=0, frozen_bytes=0)
    registry.close()
