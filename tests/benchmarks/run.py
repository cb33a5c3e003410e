"""The full comparison, as ``make bench`` runs it.

``python tests/benchmarks/run.py [--quick] [--rounds N] [--only GROUP]...``

    trainer   time inside update() on a GPT-2-sized model, beside one copy and the libraries that average in the trainer
    loop      a whole training step with and without an EMA
    kernel    the averaging on flat memory
    gpt2      one update of a GPT-2-sized model, by us and by the libraries that do it in the trainer
    wire      one gigabyte by every way, ours and others', beside the raw sockets
    lanes     large bodies over several connections, on links that give each connection a share, and on loopback
    hosts     a run on several hosts with a link each, beside one server with such a link
    links     the same, on machines behind links of 1600 Mbit/s: wants root
    replicas  evaluators that pull from one server, and from one with replicas, each with a link of its own
    connections   one gigabyte pushed over one connection, and split over several
    tls       pushes and pulls over TLS beside those without, and what the server's threads spend on them
    sizes     push and pull at 100 KB, 10 MB and 1 GiB, and the line through them
    latency   a small push beside an empty PUT
    start     a server's start, and what it takes at rest
    readers   sixteen pull one version
    memory    peaks of server and client
    durability   pushes that survive a crash beside the disk's own rate, and a restart
    large     the first minutes of a model of 860 M parameters: wants 20 GiB of memory
    posthoc   averages of any length after the training, and several averages of one push
    gap       how far off an EMA is that gets each k-th step only, with the decay made good and without
    history   what it costs to measure how far shadow and parameters are apart, and to tell of a year
    gpu       what a CUDA device adds, where there is one
    gpu-trainer   time and memory that an EMA costs a training on a CUDA device

The libraries to compare with come with the extra ``[bench]``; one that is not installed is said to be missing.
Tables go to the screen, every figure of every round to ``tests/benchmarks/results/`` (not kept in git). A demand that
is missed is shown, and is no failure: that a machine is slow or busy is for the reader to see.

Knows the groups and their order. Does not know what they measure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import connections
import durability
import gap
import gpu
import gpu_training
import history
import hosts
import kernel
import lanes
import large
import latency
import links
import memory
import models
import posthoc
import replicas
import start
import tls
import training
import wire
from scale import FULL, QUICK, Scale

from ema_client import EmaError
from ema_service.bench import machine
from ema_service.bench.children import BenchFailed, Stopped, stoppable
from ema_service.bench.fit import Fit
from ema_service.bench.rows import Group
from ema_service.bench.screen import Screen, fits_json, write_json

RESULTS = Path(__file__).parent / "results"

Measure = Callable[[Scale, Callable[[str], object]], Group | tuple[Group, dict[str, Fit]]]
#: First those that time this process' own allocations: what the C library does with freed memory depends on all before.
GROUPS: dict[str, Measure] = {
    "trainer": training.measure,
    "loop": training.measure_loop,
    "kernel": kernel.measure,
    "gpt2": models.measure,
    "wire": wire.measure,
    "lanes": lanes.measure,
    "hosts": hosts.measure,
    "links": links.measure,
    "replicas": replicas.measure,
    "connections": connections.measure,
    "tls": tls.measure,
    "sizes": latency.measure_sizes,
    "latency": latency.measure,
    "start": start.measure,
    "readers": memory.measure_readers,
    "memory": memory.measure,
    "durability": durability.measure,
    "large": large.measure,
    "posthoc": posthoc.measure,
    "gap": gap.measure,
    "history": history.measure,
    "gpu": gpu.measure,
    "gpu-trainer": gpu_training.measure,
}


def main() -> int:
    """Exit status: 0; 1 where a group failed; 128 + the signal where it was stopped."""
    arguments = _arguments()
    scale = QUICK if arguments.quick else FULL
    if arguments.rounds is not None:
        scale = replace(scale, rounds=arguments.rounds)
    try:
        with stoppable():
            return _run(arguments.only or list(GROUPS), scale, arguments.quick, arguments.json)
    except Stopped as stop:
        Screen().note(f"stopped by {stop}")
        return 128 + stop.signum


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The full comparison; see the head of this file.")
    parser.add_argument("--quick", action="store_true", help="small and once: shows that everything runs, no more")
    parser.add_argument("--rounds", type=_positive, metavar="N", help=f"figures for each row (default {FULL.rounds})")
    parser.add_argument("--only", action="append", choices=GROUPS, help="this group; may be given several times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go, instead of results/")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("one round at least")
    return number


def _run(names: list[str], scale: Scale, quick: bool, to: Path | None) -> int:
    screen = Screen()
    about = machine.describe()
    screen.machine(about)
    if quick:
        screen.note("--quick: small sizes, few rounds; these figures mean nothing")
    groups, fits, failed = list[Group](), dict[str, Fit](), list[str]()
    for name in names:
        try:
            with screen.stage(f"measuring {name}") as status:
                found = GROUPS[name](scale, status.update)
        except (BenchFailed, EmaError) as failure:
            screen.note(f"the group {name} failed: {failure}")
            failed.append(name)
            continue
        group, lines = found if isinstance(found, tuple) else (found, {})
        groups.append(group)
        fits |= lines
        screen.group(group)
        screen.fits(lines)
    path = to or RESULTS / f"{about['date'].replace(':', '').replace('+0000', 'Z')}.json"
    write_json(path, about, groups, quick=quick, rounds=scale.rounds, fits=fits_json(fits), failed=failed)
    missed = sum(group.missed for group in groups)
    screen.note(f"{missed} of the figures demanded were missed; all figures: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
