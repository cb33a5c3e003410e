"""The hosts of a run: a gateway says where each is, and which rows of which tensors each has.

Hosts that this process does not reach, in a network of their own, are left to the gateway, and asked after again later.

Knows: the gateway's map, and that a host must have the shard that the map says. Does not know: bodies, tensors' bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

from ema_client import protocol
from ema_client.errors import EmaError, ProtocolError
from ema_client.forks import Lock
from ema_client.http.body import Body
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.protocol import HostedShard, RunInfo, RunShards
from ema_client.reading.pulls import Pulls
from ema_client.wire import build_header, place

__all__ = ["GivenUp", "Host", "HostedRun", "Hosts", "at_all", "raise_foremost"]

T = TypeVar("T")

#: Seconds until hosts that were not reached are asked after again.
_AGAIN_SECONDS = 60.0
#: A host that is away is not waited for: the gateway knows where it is by then.
_SOON = RetryPolicy(attempts=3, base=0.1, cap=0.1)
#: So many tries take 30 seconds, by the client's own pauses: so long hosts wait for one that is away.
_WAITED_TRIES = 24
#: So many runs are remembered with their hosts.
_MOST_RUNS = 1000


@dataclass(frozen=True)
class Host:
    """One host of a run. transport: to it. replicas: to those that may hold its versions as well. twin: to the other
    host of the shard, which is sent the same; None where there is none that counts. rows: by tensor, the rows [start,
    stop) of the run's tensor that are here; None: a tensor without dimensions."""

    shard: HostedShard
    transport: Transport
    replicas: tuple[Transport, ...] = ()
    twin: Transport | None = None

    @property
    def both(self) -> tuple[Transport, ...]:
        """To all who are sent what is written: the host, and its twin."""
        return (self.transport, self.twin) if self.twin else (self.transport,)

    @cached_property
    def header(self) -> bytes:
        """What a body of the host's tensors begins with."""
        return build_header(place(self.shard.layout))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the host's parameters."""
        return max((entry.end for entry in place(self.shard.layout)), default=0)

    @cached_property
    def rows(self) -> Mapping[str, tuple[int, int] | None]:
        pairs = zip(self.shard.layout, self.shard.first_rows, strict=True)
        return {spec.name: (first, first + spec.shape[0]) if spec.shape else None for spec, first in pairs}

    @cached_property
    def pulls(self) -> Pulls:
        """What is read of the host's rows, from the host, its twin and its replicas."""
        return Pulls(self.transport, self.replicas, twin=self.twin)


@dataclass(frozen=True)
class HostedRun:
    """A run on several hosts, by place. twins: whether each shard has two, of which one may be left behind."""

    run: str
    hosts: tuple[Host, ...]
    twins: bool = False

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the run's parameters."""
        return sum(host.nbytes for host in self.hosts)

    def shares(self, body: Body) -> bool:
        """Whether some host takes its slice of the body from shared memory, as far as is known now."""
        return any(each.shares(body) for host in self.hosts for each in host.both)


class GivenUp(Exception):
    """What is done at one host is given up, for the fault of another."""


class Hosts:
    """The hosts of the runs of one service. Thread-safe. transport: to the service."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        #: By the run's name: its hosts, or None, and until when that is to be believed.
        self._runs: dict[str, tuple[HostedRun | None, float]] = {}
        #: By address.
        self._transports: dict[str, Transport] = {}
        self._lock = Lock()

    def known(self, run: str) -> HostedRun | None:
        """The hosts of a run that were found before. Of twins they are asked after now and then: one that was left
        behind, and is still reached, would be read for ever."""
        with self._lock:
            found, until = self._runs.get(run, (None, 0.0))
        if found is None or not found.twins or time.monotonic() < until:
            return found
        self._remember(run, found)  # where nobody tells, those of before are asked
        return self.again(found) or found

    def of(self, run: str) -> HostedRun | None:
        """The hosts of a run of which the service says that it lies on several; None where they are not reached.

        Raises what the service answers of the run, RunNotFound say.
        """
        if found := self.known(run):
            return found
        with self._lock:
            _, until = self._runs.get(run, (None, 0.0))
        if time.monotonic() < until:
            return None
        found = self._hosted(self._transport.json("GET", protocol.shards_path(run)).parsed(RunShards))
        # A gateway names none while a host is yet to come.
        named = bool(found.hosts) and self._may_go_to(found)
        reached = found if named and all(at_all(found.hosts, partial(_has, run))) else None
        self._remember(run, reached)
        return reached

    def again(self, before: HostedRun) -> HostedRun | None:
        """Where the hosts of a run are by now, with the very shards that they had; None where that is not known, or
        where the run is another one. Raises nothing."""
        with contextlib.suppress(EmaError):
            said = self._transport.json_once("GET", protocol.shards_path(before.run)).parsed(RunShards)
            found = self._hosted(said)
            same = [_identity(host) for host in found.hosts] == [_identity(host) for host in before.hosts]
            if same and self._may_go_to(found):
                self._remember(found.run, found)
                return found
        return None

    def near(self, run: str) -> bool:
        """Whether hosts of a run were found on this machine, which can share memory with them. Asks nobody."""
        with self._lock:
            found, _ = self._runs.get(run, (None, 0.0))
        return found is not None and any(each.may_be_here for host in found.hosts for each in host.both)

    @property
    def link(self) -> str:
        """How large bodies travel to hosts on this machine, and by its URL to each host over how many connections, in
        words; nothing where no hosts were found there, and as many connections pay as there are at first."""
        with self._lock:
            runs = [found for found, _ in self._runs.values() if found]
        reached = {each for run in runs for host in run.hosts for each in host.both}
        ways = Counter(each.way for each in reached if each.may_be_here).items()
        here = ", ".join(f"{way} with {count} host{'s' * (count > 1)} on this machine" for way, count in ways)
        wide = sorted(f"{each.url}: {each.widths}" for each in reached if each.widths)
        return "; ".join(filter(None, [here, *wide]))

    @property
    def patient(self) -> RetryPolicy:
        """When to send one host's slice again: for about as long as the other hosts wait for that host. As often as the
        service is tried, where that is more; once, where that is once."""
        retry = self._transport.retry
        return retry if retry.attempts == 1 else replace(retry, attempts=max(retry.attempts, _WAITED_TRIES))

    def forget(self, run: str) -> None:
        """Ask the gateway anew the next time: a host may have moved, or the run may be another."""
        with self._lock:
            self._runs.pop(run, None)

    def close(self) -> None:
        """Close the connections to all hosts."""
        with self._lock:
            transports, self._transports = list(self._transports.values()), {}
        for transport in transports:
            transport.close()

    def _hosted(self, said: RunShards) -> HostedRun:
        for shard in said.shards:
            if len(shard.layout) != len(shard.first_rows):
                raise ProtocolError(
                    f"the map of run {said.run!r} does not say where tensors of shard {shard.place} begin"
                )
        return HostedRun(said.run, tuple(map(self._host, said.shards)), said.twins)

    def _host(self, shard: HostedShard) -> Host:
        twin = self._to(shard.twin) if shard.twin else None
        return Host(shard, self._to(shard.address), tuple(map(self._to, shard.replicas)), twin)

    def _may_go_to(self, found: HostedRun) -> bool:
        """Whether token and weights may go to the hosts: not in plain text where they come over TLS to the service."""
        return not self._transport.secure or all(each.secure for host in found.hosts for each in host.both)

    def _remember(self, run: str, found: HostedRun | None) -> None:
        with self._lock:
            if len(self._runs) >= _MOST_RUNS:
                self._runs.clear()
            self._runs[run] = found, time.monotonic() + _AGAIN_SECONDS

    def _to(self, address: str) -> Transport:
        with self._lock:
            known = self._transports.get(address)
            if known is None:
                known = self._transports[address] = self._transport.beside(address, _SOON)
            return known


def at_all(hosts: Sequence[Host], do: Callable[[Host], T]) -> list[T]:
    """Call ``do`` for each host, all at once, and return the answers by place once all are there.

    Raises the error that another try would not mend, of several; else that of the first host that has one.
    """
    with ThreadPoolExecutor(len(hosts), "ema host") as threads:
        doing = [threads.submit(do, host) for host in hosts]
    try:
        raise_foremost([fault for each in doing if (fault := each.exception())])
        return [each.result() for each in doing]
    finally:
        del doing  # an error that knows its own frame is a cycle


def raise_foremost(faults: Sequence[BaseException]) -> None:
    """Raise, of several faults, the first that another try would not mend, else the first; nothing where there is
    none."""
    try:
        if faults:
            raise min(faults, key=_rank)
    finally:
        del faults  # an error that knows its own frame is a cycle


def _rank(fault: BaseException) -> int:
    """Which of several faults is told: a defect of the program before the service's word, and that before silence."""
    if isinstance(fault, GivenUp):
        return 3
    return 1 + fault.retryable if isinstance(fault, EmaError) else 0


def _has(run: str, host: Host) -> bool:
    """Whether a host, and its twin, is reached at once, and has the shard that the map says."""
    try:
        infos = [to.json_once("GET", protocol.run_path(run)).parsed(RunInfo) for to in host.both]
    except EmaError:
        return False
    have = {(info.shard.place, info.shard.birth) for info in infos if info.shard}
    return have == {(host.shard.place, host.shard.birth)} and all(info.shard for info in infos)


def _identity(host: Host) -> tuple[object, ...]:
    """What a host has, wherever it is."""
    return host.shard.place, host.shard.birth, host.shard.layout, host.shard.first_rows
