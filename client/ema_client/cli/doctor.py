"""``ema doctor``: whether this machine and a service get along, and what to mend where they do not.

Changes nothing, and ends within five seconds, also where nobody answers.

Knows: what a healthy service answers, and what follows from an answer. Does not know: how requests travel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from ema_client import __version__
from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.cli.refusals import hint_of
from ema_client.errors import EmaError, Forbidden, RouteNotFound, Unauthorized
from ema_client.protocol import RunInfo, ServerInfo
from ema_client.reading.probing import Probe, check_can_share

__all__ = ["Finding", "doctor"]

#: Seconds, and bytes, for which weights are read to see how fast they come.
_LINK_SECONDS, _LINK_BYTES = 1.0, 256 << 20
#: From so many bytes on the link's speed is that of the bytes, and no longer that of the first answer.
_TELLING_BYTES = 4 << 20
#: How often the service is asked for the time of its answers, and the seconds that this may take.
_PINGS, _PING_SECONDS = 5, 0.5
#: Seconds of an answer that is slow, and of all checks after which the link is not measured any more: each question may
#: take 1.5 s, and all have five.
_SLOW, _LATE = 1.0, 2.5
#: Seconds between two clocks that nobody minds.
_CLOCKS_APART = 2.0
#: The share of memory or disk from which on it is time to make room; at 5 % of the disk runs and snapshots are refused.
_FULL = 0.9

Verdict = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do where it is not "ok"."""

    check: str
    verdict: Verdict
    found: str
    remedy: str | None = None


def doctor(probe: Probe) -> Answer:
    """Is the service there, who is it, may this token do what it should, how fast is the way, and what is to be mended?

    Takes at most five seconds, and changes nothing. The exit code is 1 where something has failed.
    """
    findings = list(_findings(probe))
    table = Table()
    for each in findings:
        table.add(each.verdict, f"{each.check}: {each.found}" + (f"\n-> {each.remedy}" if each.remedy else ""))
    failed = any(each.verdict == "failed" for each in findings)
    return Answer(findings, (table,), code=1 if failed else 0)


def _findings(probe: Probe) -> Iterator[Finding]:
    yield from _here()
    started, begun = time.monotonic(), time.time()
    try:
        server = probe.server()
    except RouteNotFound:
        # A server of before this route: what other routes tell is there all the same.
        yield Finding("service", "warning", f"{probe.url} answers, and is older than this client", _same_version())
        yield _sharing(probe, None)
        yield from _runs(probe, started)
        return
    except EmaError as error:
        yield Finding("service", "failed", error.detail, hint_of(error))
        return
    ended = time.time()
    yield Finding("service", "ok", f"{server.name} {server.version} at {probe.url}")
    yield _versions(server)
    yield _token(server)
    if server.time is not None:
        yield _clock(server.time - (begun + ended) / 2, (ended - begun) / 2)
    yield _way(probe, ended - begun)
    yield _sharing(probe, server.hosts)
    yield from _room(server)
    yield from _replica(server)
    yield from _snapshot_store(server)
    yield from _runs(probe, started)


def _here() -> Iterator[Finding]:
    """What of this client's own packages is missing."""
    found = {name: _installed(name) for name in ("torch", "xxhash")}
    missing = [name for name, there in found.items() if there is None]
    said = ", ".join(f"{name} {there or 'is missing'}" for name, there in found.items())
    remedy = "pip install torch xxhash: tensors need torch, and digests of weights xxhash" if missing else None
    yield Finding("client", "warning" if missing else "ok", f"ema-client {__version__}, {said}", remedy)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _same_version() -> str:
    return f"install the same version on both sides: this client is {__version__}"


def _versions(server: ServerInfo) -> Finding:
    same = server.version.split(".")[:2] == __version__.split(".")[:2]
    remedy = None if same else _same_version()
    return Finding("versions", "ok" if same else "warning", f"client {__version__}, server {server.version}", remedy)


def _token(server: ServerInfo) -> Finding:
    if server.scopes:
        return Finding("token", "ok", f"may {', '.join(server.scopes)}")
    return Finding("token", "failed", "the server asks for a token, and none was given", hint_of(Unauthorized("")))


def _clock(apart: float, uncertain: float) -> Finding:
    said = f"the server's is {abs(apart):.2f} s {'ahead' if apart > 0 else 'behind'} (measured to {uncertain:.2f} s)"
    if abs(apart) <= _CLOCKS_APART + uncertain:
        return Finding("clock", "ok", said)
    return Finding("clock", "warning", said, "set both by NTP: ages, logs and the end of tokens go by these clocks")


def _way(probe: Probe, first: float) -> Finding:
    """How long the service takes to answer at all. first: seconds of the first answer, with the connection's."""
    if first > _SLOW:
        return Finding("answers", "warning", f"in {first:.1f} s", "look at the server's load, and the way to it")
    times: list[float] = []
    while len(times) < _PINGS and sum(times) < _PING_SECONDS:
        begun = time.perf_counter()
        try:
            probe.server()
        except EmaError as error:
            return Finding("answers", "failed", error.detail, hint_of(error))
        times.append(time.perf_counter() - begun)
    return Finding("answers", "ok", f"in {1e3 * statistics.median(times):.1f} ms")


def _sharing(probe: Probe, hosts: int | None) -> Finding:
    """Whether pushes from here can be handed over instead of sent. hosts: of a cluster, None of a single server."""
    if hosts is None and not probe.may_be_here:
        return Finding("shared memory", "skipped", "the service is on another host: pushes are sent")
    try:
        check_can_share()
    except OSError as fault:
        return Finding("shared memory", "warning", f"none here: {fault}", "pushes are sent; Linux has shared memory")
    taker = "service" if hosts is None else "a host of the cluster on this machine"
    return Finding(
        "shared memory", "ok", f"pushes from here are handed over, where {taker} and trainer are of one user"
    )


def _room(server: ServerInfo) -> Iterator[Finding]:
    if server.memory_bytes is not None and server.memory_limit_bytes:
        yield _filled(
            "memory",
            server.memory_bytes,
            server.memory_limit_bytes,
            "`ema du` says what takes it; delete runs that are done, or raise --memory-limit of the server",
        )
    if server.disk_free_bytes is not None and server.disk_total_bytes:
        yield _filled(
            "disk",
            server.disk_total_bytes - server.disk_free_bytes,
            server.disk_total_bytes,
            "`ema du` says what takes it; `ema delete-snapshot` and `ema delete` make room",
        )


def _replica(server: ServerInfo) -> Iterator[Finding]:
    """That writes go elsewhere, and how far behind what is read here may be."""
    found = server.replica
    if found is None:
        return
    remedy = None if found.reached else "look at the original, and the way to it; what is held is served meanwhile"
    yield Finding("replica", "ok" if found.reached else "warning", f"{show.replica(found)}; writes go there", remedy)


def _snapshot_store(server: ServerInfo) -> Iterator[Finding]:
    waiting = server.snapshots_waiting
    if waiting is None:
        return
    said = f"{waiting or 'no'} snapshot{' waits' if waiting == 1 else 's wait'} to be moved there"
    if server.snapshot_store_fault is None:
        yield Finding("snapshot store", "ok", said)
        return
    yield Finding(
        "snapshot store",
        "warning",
        f"{server.snapshot_store_fault}; {said}",
        "mend the store, or the server's credentials; snapshots are kept on the server's disk, and moved by themselves",
    )


def _filled(check: str, used: int, limit: int, remedy: str) -> Finding:
    full = used > _FULL * limit
    said = f"{show.size(used)} of {show.size(limit)} in use"
    return Finding(check, "warning" if full else "ok", said, remedy if full else None)


def _runs(probe: Probe, started: float) -> Iterator[Finding]:
    try:
        runs = probe.runs()
    except Forbidden as error:
        yield Finding("runs", "skipped", error.detail)
        return
    except EmaError as error:
        yield Finding("runs", "failed", error.detail, hint_of(error))
        return
    yield Finding("runs", "ok", f"{len(runs)}, of which {sum(run.status == 'ready' for run in runs)} are ready")
    for run in runs:
        if run.status == "degraded":
            yield Finding(f"run {run.run}", "failed", run.reason or run.status, run.remedy)
    if time.monotonic() - started > _LATE:
        yield Finding("link", "skipped", "the service answers too slowly to measure the link too")
    else:
        yield _speed(probe, runs)


def _speed(probe: Probe, runs: tuple[RunInfo, ...]) -> Finding:
    """How fast weights come: a second of the largest run's, which are thrown away."""
    there = [run for run in runs if run.version is not None and run.status == "ready"]
    if not there:
        return Finding("link", "skipped", "there is no run with weights to measure with")
    run = max(there, key=lambda each: each.bytes)
    try:
        speed = probe.speed(run.run, seconds=_LINK_SECONDS, most=_LINK_BYTES)
    except Forbidden:
        return Finding("link", "skipped", f"the token may not pull {run.run}")
    except EmaError as error:
        return Finding("link", "warning", error.detail, hint_of(error))
    small = "; too few bytes to tell" if speed.bytes < _TELLING_BYTES else ""
    measured = f"{show.size(speed.bytes)} of {run.run} in {speed.seconds:.2f} s{small}"
    return Finding("link", "ok", f"{show.size(speed.rate)}/s ({measured})")
