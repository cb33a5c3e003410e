"""The benchmark that a user runs: a service, runs of its own on the service, some rounds, a table; nothing left behind.

Knows the order of events, and what is undone however the benchmark ends. Does not know what an operation is or how a
result is shown.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from ema_client import EmaClient, EmaError
from ema_client.errors import RunNotFound
from ema_service.bench import machine
from ema_service.bench.ceiling import RAW_TCP, RAW_UNIX, Ceiling
from ema_service.bench.children import BenchFailed, Service, Stopped, stoppable, undisturbed
from ema_service.bench.rounds import interleave
from ema_service.bench.rows import Group
from ema_service.bench.screen import Screen, fits_json, write_json
from ema_service.bench.sizes import SMALL_SIZES, Link, Sizes, ceiling_rows
from ema_service.sizes import parse_size, show_size

__all__ = ["run_bench"]


@dataclass(frozen=True, slots=True)
class _Plan:
    url: str | None
    size: int
    rounds: int
    json_file: Path | None

    @property
    def sizes(self) -> list[int]:
        return [*(small for small in SMALL_SIZES if small < self.size), self.size]


def run_bench(
    url: str | None = None,
    size: str = "1GiB",
    rounds: int = 5,
    json_file: Path | None = None,
    *,
    token: str | None = None,
) -> int:
    """Measure push and pull and print the table.

    Its runs are deleted and its processes ended, however the benchmark ends.

    url: the service to measure; None starts one on this machine, in memory.
    size: of the largest run, such as ``1GiB``; the client takes three times that memory, the service up to three times.
    rounds: figures for each row, after one round of warming up. json_file: where all figures go.
    token: as for EmaClient.

    Returns an exit status: 0; 1 where the service failed; 2 for an impossible size or file; 128 + the signal where the
    benchmark was stopped.
    """
    screen = Screen()
    try:
        plan = _plan(url, size, rounds, json_file)
    except ValueError as fault:
        screen.note(f"ema-service bench: {fault}")
        return 2
    try:
        with stoppable():
            _bench(plan, screen, token)
    except Stopped as stop:
        screen.note(f"stopped by {stop}")
        return 128 + stop.signum
    except (BenchFailed, EmaError) as failure:
        screen.note(f"the benchmark failed: {failure}")
        return 1
    return 0


def _plan(url: str | None, size: str, rounds: int, json_file: Path | None) -> _Plan:
    nbytes = parse_size(size)
    if nbytes < 4 or rounds < 1:
        raise ValueError("there is nothing to measure: give a size of 4 bytes or more, and 1 round or more")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {json_file.absolute().parent} to write {json_file.name} to")
    return _Plan(url, nbytes, rounds, json_file)


def _bench(plan: _Plan, screen: Screen, token: str | None) -> None:
    about = machine.describe()
    screen.machine(about)
    with contextlib.ExitStack() as stack:
        with screen.stage("starting"):
            links = _links(plan, stack, token)
            ceiling = stack.enter_context(Ceiling(plan.size)) if links[0].ceiling else None
        screen.note(f"service: {', '.join(link.client.url for link in links)}")
        sizes = Sizes(f"bench-{uuid.uuid4().hex[:12]}", plan.sizes, links)
        with contextlib.suppress(RunNotFound):
            links[0].client.run(sizes.runs[0])  # a service that does not answer fails here, with nothing to undo
        stack.callback(_delete, sizes, screen)
        operations = {**(ceiling.operations() if ceiling else {}), **sizes.operations()}
        with screen.stage(f"{plan.rounds} rounds of {show_size(plan.size)}") as status:
            sizes.create()
            seconds = interleave(operations, plan.rounds, on_step=status.update)
    group = Group(
        "bench",
        f"{plan.rounds} rounds; GB/s are 10^9 bytes a second",
        (*ceiling_rows(plan.size, seconds), *sizes.rows(seconds)),
        _facts(plan),
    )
    fits = sizes.fits(seconds)
    screen.group(group)
    screen.fits(fits)
    if plan.json_file is not None:
        write_json(plan.json_file, about, [group], rounds=plan.rounds, url=plan.url, fits=fits_json(fits))
        screen.note(f"all figures: {plan.json_file}")


def _links(plan: _Plan, stack: contextlib.ExitStack, token: str | None) -> Sequence[Link]:
    """The ways to the service: TCP and Unix socket of the benchmark's own service, else the URL that the user gave."""
    if plan.url is not None:
        client = stack.enter_context(EmaClient(plan.url, token=token))
        return [Link("Unix" if client.url.startswith("unix:") else "TCP", client, _ceiling_of(client.url))]
    service = stack.enter_context(Service())
    return [
        Link("TCP", stack.enter_context(EmaClient(service.url)), RAW_TCP),
        Link("Unix", stack.enter_context(EmaClient(service.uds)), RAW_UNIX),
    ]


def _ceiling_of(url: str) -> str:
    """The raw loop on this machine that a URL is to be compared with; empty where the URL leads to another machine."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return RAW_UNIX
    with contextlib.suppress(ValueError):
        return RAW_TCP if parts.hostname == "localhost" or ip_address(parts.hostname or "").is_loopback else ""
    return ""


def _delete(sizes: Sizes, screen: Screen) -> None:
    """Delete every run that may have been made; say which could not be deleted."""
    with undisturbed():
        for run in sizes.runs:
            try:
                sizes.links[0].client.delete_run(run)
            except RunNotFound:
                continue
            except EmaError as fault:
                screen.note(f"the run {run} may still be there, delete it by hand: {fault}")


def _facts(plan: _Plan) -> tuple[str, ...]:
    where = "a server of our own, --memory" if plan.url is None else f"{plan.url}, with its own durability"
    return (
        f"float32 tensors, {where}; 100 KB is the median of 20 in a row each round, 10 MB of 5",
        "raw: sendall from one warm buffer to a process that only receives, with one byte back",
    )
