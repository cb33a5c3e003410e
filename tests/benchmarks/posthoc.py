"""Group posthoc: averages of any length after the training, and what several averages of one push cost.

A run with a ring of snapshots is pulled as an average of another length, which the server works out of all of the
ring's files, beside a loop that only reads these files; and as a sweep of eight, which reads the files once for all.
Passes and pushes with several averages stand beside those with one.

Knows where a ring's files lie, and what is demanded. Does not know how weights of snapshots are found.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import sleep

import torch
from scale import Scale

from ema_client import EmaClient
from ema_client.protocol import MAX_SWEPT, AverageConfig, Posthoc, TensorSpec
from ema_client.targets import spread
from ema_service.bench.children import BenchFailed, Service
from ema_service.bench.rounds import Operation, interleave, timed
from ema_service.bench.rows import Group, Need, Row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic
from ema_service.memory import Layout, Memory, Staged
from ema_service.shadows.passes import Feed, pass_over

__all__ = ["measure"]

READ = "read the ring's files once"
ONE = "pull of an average worked out of them"
SWEEP = "sweep of eight of them"
COUNTS = (1, 2, 4, 8)
#: As many updates as fill the ring, and begin to thin it.
UPDATES = 40
PIECE = 1 << 20
#: Passes and pushes are of so many times the ring's model: a single average of the smaller one stays in the cache.
LARGER = 4
#: Of the parameters, in the averages of the passes.
WEIGHT = 1e-3


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    size = scale.flat_bytes // 16
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ema-bench-")))
        service = stack.enter_context(Service(data_dir=folder / "data"))
        client = stack.enter_context(EmaClient(service.uds))
        on_step("filling a ring")
        files = _fill(client, Traffic("ring", size), folder)
        operations = {
            READ: timed(lambda: _read(files)),
            ONE: timed(lambda: client.pull("ring", sigma_rel=0.1)),
            SWEEP: timed(lambda: client.sweep("ring", lambda *_: 0.0, sigma_rel=_WIDTHS)),
            **{_named("pass", count): _passing(LARGER * size, count) for count in COUNTS},
            **{_named("push", count): _pushing(client, LARGER * size, count) for count in COUNTS},
        }
        seconds = interleave(operations, scale.rounds, on_step=on_step)
    rows = tuple(_row(name, seconds) for name in operations)
    facts = (
        f"a ring of {len(files)} files of {show_size(size)} each; what a sweep fetches is written to files",
        f"passes and pushes of {show_size(LARGER * size)}",
    )
    return Group("posthoc", "posthoc: averages of any length, and several averages, in milliseconds", rows, facts)


_WIDTHS = spread("sigma_rel", 0.02, 0.2, MAX_SWEPT)


def _named(what: str, count: int) -> str:
    return f"{what}, {count} average{'s' if count > 1 else ''}"


def _row(name: str, seconds: Mapping[str, Sequence[float]]) -> Row:
    needs = {
        ONE: Need(2, READ, most=True),
        SWEEP: Need(against=ONE),
        # As many whole passes, and a quarter more.
        **{_named("pass", count): Need(1.25 * count, _named("pass", 1), most=True) for count in COUNTS[1:]},
        **{_named("push", count): Need(against=_named("push", 1)) for count in COUNTS[1:]},
    }
    found = (needs[name],) if name in needs else ()
    return Row(name, "ms", tuple(1e3 * each for each in seconds[name]), found)


# --- the ring -------------------------------------------------------------------------------------------------------


def _fill(client: EmaClient, traffic: Traffic, folder: Path) -> list[Path]:
    """Push until the ring is full, each snapshot when the one before is stored; the ring's files."""
    client.create_run(traffic.run, traffic.state, posthoc=True)
    for _ in range(UPDATES):
        traffic.push(client)
        while (ring := client.run(traffic.run).ring) is not None and ring.waiting:
            sleep(0.01)
    if ring is None or len(ring.times) != Posthoc().snapshots:
        raise BenchFailed(f"the ring is not full: {ring}")
    return sorted(folder.rglob("ring/**/*.safetensors"))


def _read(files: Sequence[Path]) -> None:
    buffer = memoryview(bytearray(PIECE))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):  # type: ignore[attr-defined]
                pass


# --- several averages -----------------------------------------------------------------------------------------------


def _passing(size: int, count: int) -> Operation:
    """The pass over a push that has come, which feeds so many averages; the last result takes the push's place."""
    layout, memory = Layout([TensorSpec("w", (size // 4,), "F32")]), Memory("cpu")
    staged = Staged(layout, memory)
    shadows, outs = [[memory.new_arena(layout) for _ in range(count)] for _ in range(2)]
    for arena in (*shadows, *outs, staged.arena):
        arena.tensor.view(torch.float32).uniform_(0.5, 1.5)
    feeds = [Feed(out, shadow, WEIGHT) for out, shadow in zip([*outs[1:], staged.arena], shadows, strict=True)]

    def operation() -> object:
        over = pass_over(staged, feeds, check=True)
        over.advance(layout.param_bytes)
        return over.finish()

    return timed(operation)


def _pushing(client: EmaClient, size: int, count: int) -> Operation:
    traffic = Traffic(f"averages-{count}", size)
    averages = [AverageConfig(f"a{number}") for number in range(count)]
    client.create_run(traffic.run, traffic.state, averages=averages, durability="memory")
    return timed(lambda: traffic.push(client))
