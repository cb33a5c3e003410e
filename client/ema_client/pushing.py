"""The updates of one client, whole or in a rank's parts: to its service or, of a run that lies on several hosts,
straight to each of them.

Knows: which bodies go past a gateway, and when what is known of a run is doubted. Does not know: how one server is sent
a body (stretched), where hosts are (hosts), sockets, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ema_client import protocol
from ema_client.errors import LayoutMismatch, RunNotFound
from ema_client.forks import Lock
from ema_client.hosts.finding import HostedRun, Hosts
from ema_client.hosts.parts import HostedParts, PartName
from ema_client.hosts.pushing import initialise as initialise_hosts
from ema_client.hosts.pushing import push as push_to_hosts
from ema_client.http.body import Body
from ema_client.http.transport import Query, Reply, Transport
from ema_client.http.uploads import SHARE_ABOVE
from ema_client.stretched import Server

__all__ = ["STRETCHED_ABOVE", "Pushes"]

#: An update of at most so many bytes is there before a second connection would be worth its thread.
STRETCHED_ABOVE = 32 << 20
#: So many servers are remembered: more than a run has hosts.
_MOST_SERVERS = 4096


class Pushes:
    """The updates that one client sends. Thread-safe.

    stretched_above: updates of more bytes than this may go in stretches, and past a gateway.
    """

    def __init__(
        self, transport: Transport, hosts: Hosts | None = None, *, stretched_above: int = STRETCHED_ABOVE
    ) -> None:
        """hosts: of runs that lie on several; by default those that the service names."""
        self._transport = transport
        self._hosts = hosts or Hosts(transport)
        self._parts = HostedParts(self._hosts)
        self._stretched_above = stretched_above
        self._service = Server(transport)
        #: By address: the hosts that were sent something.
        self._servers: dict[str, Server] = {}
        self._lock = Lock()

    def push(self, run: str, step: int, body: Body, headers: Mapping[str, str], *, once: bool) -> Reply:
        """Send an update; ``once``: tried once. Raises what the transport raises, and what the service answers."""
        if hosted := self._hosted_whole(run, body):
            try:
                return push_to_hosts(self._hosts, hosted, body, headers, partial(self._push_one, run, step))
            except (RunNotFound, LayoutMismatch):
                self._doubt(run)
        attempt = self._service.update(run, step, self._for_service(run, body), headers, above=self._stretched_above)
        try:
            return attempt() if once else self._transport.retrying(lambda _: attempt())
        except LayoutMismatch:
            self._service.forget(run)
            raise

    def initialise(
        self, run: str, body: Body, query: Query, headers: Mapping[str, str], *, once: bool = False
    ) -> Reply | None:
        """Send initial weights; ``once``: tried once. The answer is None where several hosts took them. Raises as
        push()."""
        self._doubt(run)  # what is known of the name may be of a run before
        if hosted := self._hosted_whole(run, body):
            try:
                initialise_hosts(self._hosts, hosted, body, query, headers)
                return None
            except (RunNotFound, LayoutMismatch):
                self._doubt(run)
        upload = self._transport.upload_once if once else self._transport.upload
        return upload(protocol.weights_path(run), self._for_service(run, body), query=query, headers=headers)

    def push_part(
        self, run: str, name: PartName, body: Body, query: Query, headers: Mapping[str, str], *, once: bool
    ) -> Reply:
        """Send a part of an update or of initial weights; ``once``: tried once. Raises as push()."""

        def attempt(_: int) -> Reply:
            if hosted := self._hosted(run, body):
                try:
                    return self._parts.put(hosted, name, body, headers, partial(self._put_one, run, name, query))
                except (RunNotFound, LayoutMismatch):
                    self._doubt(run)
            return self._service.part(
                run, name, self._for_service(run, body), query, headers, above=self._stretched_above
            )

        return attempt(0) if once else self._transport.retrying(attempt)

    def _push_one(self, run: str, step: int, to: Transport, body: Body, headers: Mapping[str, str]) -> Reply:
        """Try to send one host its slice of an update."""
        return self._server(to).update(run, step, body, headers, above=self._stretched_above)()

    def _put_one(
        self, run: str, name: PartName, query: Query, to: Transport, body: Body, headers: Mapping[str, str]
    ) -> Reply:
        """Try to send one host what is its of a part."""
        return self._server(to).part(run, name, body, query, headers, above=self._stretched_above)

    def _server(self, to: Transport) -> Server:
        to.lanes = self._transport.lanes  # which may have been set since the host was found
        with self._lock:
            found = self._servers.get(to.url)
            if found is None:
                if len(self._servers) >= _MOST_SERVERS:
                    self._servers.clear()
                found = self._servers[to.url] = Server(to)
            return found

    def _hosted_whole(self, run: str, body: Body) -> HostedRun | None:
        """The hosts that a body of the whole run goes to past the gateway; None for any other body."""
        found = self._hosted(run, body)
        return found if found and self._service.fits(run, body) else None

    def _hosted(self, run: str, body: Body) -> HostedRun | None:
        """The hosts that a body goes to past the gateway; None for any other body."""
        # To hosts on this machine 2 MiB of shared memory go in half the time that they take by the gateway, as 31 do.
        least = self._stretched_above if body.shared is None else min(SHARE_ABOVE, self._stretched_above)
        if body.data is None or body.length <= least:
            return None
        return self._hosts.of(run) if self._service.layout(run).shards > 1 else None

    def _for_service(self, run: str, body: Body) -> Body:
        """A body as the service is sent it: a gateway has no shared memory with anybody, and need not be offered
        any."""
        several = self._transport.shares(body) and self._service.layout(run).shards > 1
        return replace(body, shared=None) if several else body

    def _doubt(self, run: str) -> None:
        """The run may be another one by now: the service knows."""
        self._hosts.forget(run)
        with self._lock:
            servers = [self._service, *self._servers.values()]
        for each in servers:
            each.forget(run)
