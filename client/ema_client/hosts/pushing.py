"""A push to all hosts of a run at once: each is sent the rows that it has, under one key.

The hosts decide together, so each answers once the update is applied on all, or on none. A slice that broke off is sent
again alone (sending): the others keep what they have, and wait.

Knows: which bytes of a whole body are whose. Does not know: sockets, where a host is, or when to try again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from ema_client import protocol
from ema_client.errors import LayoutMismatch
from ema_client.hosts.finding import HostedRun, Hosts
from ema_client.hosts.sending import Target, Upload, send_to_all
from ema_client.hosts.slicing import Slices, offered
from ema_client.http.body import Body
from ema_client.http.transport import Query, Reply
from ema_client.wire import PartCut

__all__ = ["initialise", "push", "together"]

#: Seconds in which hosts answer that wait for another one; then they say so themselves.
_DECISION_SECONDS = 30.0


def push(hosts: Hosts, run: HostedRun, body: Body, headers: Mapping[str, str], upload: Upload) -> Reply:
    """Send an update whose data lies in memory in canonical order (Body.data). upload: tries to send one host's slice.

    Returns what the hosts answer together. Raises what ``upload`` raises, once nothing is sent any more; LayoutMismatch
    before anything is sent.
    """
    return together(_send(hosts, run, body, headers, upload))


def initialise(hosts: Hosts, run: HostedRun, body: Body, query: Query, headers: Mapping[str, str]) -> None:
    """Send initial weights, as push()."""
    path = protocol.weights_path(run.run)
    _send(hosts, run, body, headers, lambda to, each, said: to.upload_once(path, each, query=query, headers=said))


def together(replies: Sequence[Reply]) -> Reply:
    """The answer to an update that all hosts have answered: applied by this push where one says so, as a slice that was
    sent again is told "applied before"; durable as far as on each host."""
    steps = [step for reply in replies if (step := reply.data.get("durable_step")) is not None]
    least = min(steps) if len(steps) == len(replies) else None
    told = next((reply for reply in replies if reply.data.get("applied")), replies[0])
    return replace(told, data={**told.data, "durable_step": least})


def _send(hosts: Hosts, run: HostedRun, body: Body, headers: Mapping[str, str], upload: Upload) -> list[Reply]:
    cuts = _cuts(body, run)
    with offered(body, wanted=run.shares(body)) as segment:
        slices = Slices(body, cuts, waits=_DECISION_SECONDS, segment=segment)

        def send(target: Target) -> Reply:
            said = {**headers, protocol.HEADER_COPIES: str(target.copies)}
            return upload(target.transport, slices.of(target.place, target.transport.url, target.look), said)

        return send_to_all(hosts, run, send)


def _cuts(body: Body, run: HostedRun) -> tuple[PartCut, ...]:
    """What each host is sent of a whole body. Raises LayoutMismatch for a body of another length."""
    have = 0 if body.data is None else sum(map(len, body.data()))
    if have != run.nbytes:
        raise LayoutMismatch(f"a body of run {run.run!r} has {run.nbytes} bytes of tensors, this one {have}")
    bounds = [0, *accumulate(host.nbytes for host in run.hosts)]
    return tuple(PartCut(host.header, (span,), ()) for host, span in zip(run.hosts, pairwise(bounds), strict=True))
