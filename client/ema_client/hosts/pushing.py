"""A push to all hosts of a run at once: each is sent the rows that it has, under one key.

The hosts decide together, so each answers once the update is applied on all, or on none. A slice that broke off is sent
again alone, to wherever its host is by then: the others keep what they have, and wait.

Knows: where a body's bytes lie, and which are whose. Does not know: sockets, or how a host is found.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate

from ema_client import protocol
from ema_client.errors import LayoutMismatch, TransportError
from ema_client.hosts.finding import GivenUp, Host, HostedRun, Hosts, at_all
from ema_client.http.body import Body, cut
from ema_client.http.digests import Digest, blocks
from ema_client.http.transport import Reply

__all__ = ["push", "together"]

#: Seconds in which hosts answer that wait for another one; then they say so themselves.
_DECISION_SECONDS = 30.0


def push(hosts: Hosts, run: HostedRun, step: int, body: Body, headers: Mapping[str, str]) -> Reply:
    """Send an update whose data lies in memory in canonical order (Body.data).

    Returns what the hosts answer together. Raises what hosts answer, or what their transports raise, once nothing is
    sent any more; LayoutMismatch before anything is sent.
    """
    slices = _Slices(body, run)
    path = protocol.update_path(run.run, step)
    given_up = threading.Event()

    def send(host: Host) -> Reply:
        place = host.shard.place
        there = [host]

        def attempt(_: int) -> Reply:
            if given_up.is_set():
                raise GivenUp
            try:
                return there[0].transport.upload_once(path, slices.of(place), headers=headers)
            except TransportError:
                if found := hosts.again(run):
                    there[0] = found.hosts[place]
                raise

        with ExitStack() as undo:
            undo.callback(given_up.set)
            reply = host.transport.retrying(attempt, policy=hosts.patient)
            undo.pop_all()
        return reply

    return together(at_all(run.hosts, send))


def together(replies: Sequence[Reply]) -> Reply:
    """The answer to an update that all hosts have answered: applied by this push where one says so, as a slice that was
    sent again is told "applied before"; durable as far as on each host."""
    steps = [step for reply in replies if (step := reply.data.get("durable_step")) is not None]
    least = min(steps) if len(steps) == len(replies) else None
    told = next((reply for reply in replies if reply.data.get("applied")), replies[0])
    return replace(told, data={**told.data, "durable_step": least})


class _Slices:
    """A body cut into what each host has. Tells the body's listener of the bytes that went to all hosts, by one thread
    at a time."""

    def __init__(self, body: Body, run: HostedRun) -> None:
        """Raises LayoutMismatch for a body of another length."""
        self._body = body
        self._run = run
        self._views = () if body.data is None else body.data()
        have = sum(map(len, self._views))
        if have != run.nbytes:
            raise LayoutMismatch(f"an update of run {run.run!r} has {run.nbytes} bytes of tensors, this one {have}")
        self._bounds = [0, *accumulate(host.nbytes for host in run.hosts)]
        #: The bytes of the body's own header, which goes to nobody.
        self._head = body.length - have
        self._sent: dict[int, int] = {}
        self._lock = threading.Lock()

    def of(self, place: int) -> Body:
        """The body for one host; again for each try."""
        header = self._run.hosts[place].header
        start, stop = self._bounds[place : place + 2]

        def pieces() -> Iterator[memoryview]:
            yield memoryview(header)
            yield from cut(self._views, start, stop)

        return Body(
            len(header) + stop - start,
            pieces,
            digest=None if self._body.digest is None else lambda: Digest(blocks(), skip=len(header)),
            moved=lambda sent: self._moved(place, sent - len(header)),
            waits=_DECISION_SECONDS,
            key=self._body.key,
        )

    def _moved(self, place: int, sent: int) -> None:
        with self._lock:
            self._sent[place] = max(0, sent)
            self._body.moved(self._head + sum(self._sent.values()))
