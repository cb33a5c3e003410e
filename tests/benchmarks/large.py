"""Group large: a model of the size that people train, and a server that has not met it yet.

What users meet first is neither a gigabyte nor warm: the constructor, the first updates, the server's memory, a
restart. The same trainer has its versions kept in three ways, one after the other; each is measured once.

Knows what the trainer tells, and what is demanded. Does not know how versions are kept.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from durability import NO_CHECKPOINT, NO_MEMORY_FILES, seconds_until_back
from scale import Scale
from wire import PROCESSES

from ema_service.bench.children import Child, Service
from ema_service.bench.rows import Group, Need, Row
from ema_service.bench.sizes import show_size

__all__ = ["measure"]

TOUCHED = "memory of three shadows, used for the first time"
MEMORY, PROCESS, SLOTS = "memory", "process", "process in slots"
#: way -> durability, and arguments of the server.
WAYS = {MEMORY: ("memory", NO_CHECKPOINT), PROCESS: ("process", NO_CHECKPOINT), SLOTS: ("process", NO_MEMORY_FILES)}
#: Model, two buffers of the trainer, two shadows, and the rest of the machine: in models.
_MODELS_NEEDED = 6
_SECONDS = 900.0
_TOLD = re.compile(r"told (.*)")
GIGA = 1 << 30


@dataclass(frozen=True, slots=True)
class _Told:
    """By one trainer: seconds and bytes, see processes/large_trainer.py. start: seconds until the server was back."""

    constructor: float
    updates: list[float]
    shares: list[int]
    written: int
    scope: float
    start: float


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed."""
    shadow = scale.large_width**2 * 4 * scale.large_tensors
    title = (
        f"large: {scale.large_width**2 * scale.large_tensors / 1e6:.0f} M parameters in {scale.large_tensors} tensors"
    )
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < _MODELS_NEEDED * shadow:
        return Group("large", title, (Row("constructor", "s", note=f"skipped: {_MODELS_NEEDED} models do not fit"),))
    on_step("memory used for the first time")
    # The machine's own memory may be new to it, too: whoever uses all of it first waits for that as well.
    touched = min(_touching(3 * shadow) for _ in range(2))
    told = {}
    for way in WAYS:
        on_step(f"a trainer beside a server: {way}")
        told[way] = _told(way, scale)
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        empty = seconds_until_back(Path(folder) / "data")
    facts = (
        f"shadow {show_size(shadow)}; over loopback to a server that has just started; {scale.large_updates} updates, "
        f"{scale.large_pause} s apart; the server's memory is its share of pages that are shared (Pss), at most",
        f"a restart, after kill -9, is beyond that of a server without runs, {empty:.1f} s; {MEMORY} comes back with "
        "nothing, and only a clean stop keeps it",
    )
    rows = [Row(TOUCHED, "s", (touched,)), *(row for way in WAYS for row in _rows(way, told[way], shadow, empty))]
    return Group("large", title, tuple(rows), facts)


def _touching(nbytes: int) -> float:
    """Seconds until one thread has touched so many bytes of shared memory: a trainer and its server begin with as many,
    of two versions and of what the trainer copies its parameters to."""
    begun = time.perf_counter()
    with mmap.mmap(-1, nbytes) as memory:
        view = np.frombuffer(memory, np.uint8)
        view[:: mmap.PAGESIZE] = 1
        del view
        return time.perf_counter() - begun


def _told(way: str, scale: Scale) -> _Told:
    durability, arguments = WAYS[way]
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        data = Path(folder) / "data"
        with Service(*arguments, data_dir=data) as service:
            sizes = [scale.large_width, scale.large_tensors, scale.large_updates, scale.large_pause]
            argv = [service.url, str(service.pid), durability, *map(str, sizes)]
            with Child("large_trainer", argv, path=PROCESSES, says=_TOLD, patience=_SECONDS) as trainer:
                said = json.loads(trainer.said)
            service.kill()
        start = seconds_until_back(data, *arguments)
        with Service(data_dir=data):
            pass  # gives the memory back
    return _Told(**said, start=start)


def _rows(way: str, told: _Told, shadow: int, empty: float) -> list[Row]:
    def row(what: str, unit: str, value: float, *needs: Need) -> Row:
        return Row(f"{what}, {way}", unit, (value,), needs if way == PROCESS else ())

    return [
        row("constructor", "s", told.constructor, Need(0.7, TOUCHED, most=True)),
        row("update, median", "ms", median(told.updates) * 1e3, Need(against=f"update, median, {MEMORY}")),
        row("longest update", "ms", max(told.updates) * 1e3, Need(2.0, f"update, median, {way}", most=True)),
        row("scope, in and out", "s", told.scope, Need(against=f"scope, in and out, {MEMORY}")),
        row("server's memory", "GiB", max(told.shares) / GIGA, Need(2.2 * shadow / GIGA + 0.4, most=True)),
        row("written to disk by updates", "GiB", told.written / GIGA, Need(0.001, most=True)),
        row("restart", "s", told.start - empty, Need(1.0, most=True)),
    ]
