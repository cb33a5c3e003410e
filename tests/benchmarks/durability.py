"""Group durability: what it costs that an answered push survives, and how soon a server is back.

Knows the durabilities, what is demanded of each, and the disk's own rates beside them. Does not know how a version is
kept.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Self

import torch
from scale import Scale

from ema_client import EmaClient
from ema_service.bench.ceiling import RAW_TCP, Ceiling
from ema_service.bench.children import Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic, make_state
from ema_service.memory import Memory
from ema_service.runs import Registry
from ema_service.storage import Store

__all__ = ["measure"]

WRITTEN = "write a file again and fdatasync"
READ = "read the run's file"
RESTART = "restart: the run back in memory"
PUSH = {durability: f"push, durability {durability}" for durability in ("memory", "process", "disk")}
CHECKPOINTED = "push, durability memory, during a checkpoint"
#: Seconds: how often the service looks for runs to be checkpointed, and how long it is given to begin with one.
LOOKS = 0.05
BEGINS = 0.15
#: Pushes in a row: in the first, the disk may still be busy with what came before.
IN_A_ROW = 3
PIECE = 1 << 20

NEEDS: dict[str, tuple[Need, ...]] = {
    RAW_TCP: (),
    WRITTEN: (),
    PUSH["memory"]: (Need(against=RAW_TCP),),
    CHECKPOINTED: (Need(1 / 1.5, PUSH["memory"]),),
    PUSH["process"]: (Need(0.75, RAW_TCP), Need(against=PUSH["memory"])),
    PUSH["disk"]: (Need(0.8, WRITTEN),),
    READ: (),
    RESTART: (Need(0.5, READ),),
}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes = scale.wire_bytes
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        data = Path(folder) / "data"
        with contextlib.ExitStack() as stack:
            ceiling = stack.enter_context(Ceiling(nbytes))
            service = stack.enter_context(Service(data_dir=data))
            client = stack.enter_context(EmaClient(service.url))
            file = stack.enter_context((Path(folder) / "file").open("wb", buffering=0))
            operations: dict[str, Operation] = {RAW_TCP: ceiling.operations()[RAW_TCP]}
            operations[WRITTEN] = _settled(partial(_write, file.fileno(), memoryview(bytearray(nbytes))))
            for durability, name in PUSH.items():
                traffic = Traffic(durability, nbytes)
                client.create_run(durability, traffic.state, durability=durability)  # type: ignore[arg-type]
                operations[name] = _settled(partial(traffic.push, client))
            checkpointed = stack.enter_context(_Checkpointed(Path(folder) / "checkpointed", nbytes))
            operations[CHECKPOINTED] = checkpointed.push
            seconds = interleave(operations, scale.rounds, on_step=on_step)
            for durability in ("memory", "disk"):
                client.delete_run(durability)
        again = {READ: timed(partial(_read, data)), RESTART: timed(partial(_restart, data))}
        seconds |= interleave(again, scale.rounds, on_step=on_step)
    notes = {CHECKPOINTED: checkpointed.note}
    rows = tuple(rate_row(name, nbytes, seconds, needs, notes.get(name, "")) for name, needs in NEEDS.items())
    facts = (
        f"{WRITTEN}: {IN_A_ROW} times in a row, as the pushes, in pieces of a MiB, its blocks in use already; the disk "
        "is synced before and after each figure",
        f"{READ} and {RESTART}: from the page cache, into memory that is new each time",
    )
    title = f"durability: {show_size(nbytes)} of float32 in {len(make_state(nbytes))} tensors, over TCP"
    return Group("durability", title, rows, facts)


class _Checkpointed:
    """A service that does little but write checkpoints, within the ``with`` block."""

    def __init__(self, data: Path, nbytes: int) -> None:
        self._service = Service("--checkpoint-interval", str(LOOKS), data_dir=data)
        self._traffic = Traffic("checkpointed", nbytes)
        self._clean = contextlib.ExitStack()
        self._met = list[bool]()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(self._service)
            self._client = stack.enter_context(EmaClient(service.url))
            self._client.create_run("checkpointed", self._traffic.state, durability="memory")
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
        sleep(BEGINS)
        info = self._client.run("checkpointed")
        self._met.append(info.durable_step != info.step)
        start = perf_counter()
        self._traffic.push(self._client)
        seconds = perf_counter() - start
        os.sync()
        return seconds


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


def _restart(data: Path) -> None:
    memory = Memory(torch.device("cpu"))
    registry = Registry(memory, Store(data), staging_bytes=0, frozen_bytes=0)
    registry.close()
