"""Large updates over several connections: stretches of one update, which the service applies as one; and updates, whole
or in parts, of runs that lie on several hosts.

A push that goes over one connection is measured, too: whether two would bring more is tried with the next one.

Knows: the routes of an update and of a run's layout, which bodies may go in stretches, and which refusals concern one
stretch alone. Does not know: sockets, tensors, how many lanes pay.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import replace

from ema_client import protocol
from ema_client.errors import (
    ConnectionLost,
    DigestMismatch,
    Forbidden,
    LayoutMismatch,
    Overloaded,
    RunNotFound,
    TransportError,
)
from ema_client.forks import Lock
from ema_client.hosts.finding import HostedRun, Hosts
from ema_client.hosts.parts import HostedParts, PartName
from ema_client.hosts.pushing import push as push_to_hosts
from ema_client.http.body import Body, cut
from ema_client.http.digests import Digest, blocks
from ema_client.http.lanes import Moved, carry_all
from ema_client.http.pace import PUSHES, Pace
from ema_client.http.stretches import Stretch, Stretches
from ema_client.http.transport import Query, Reply, Transport
from ema_client.protocol import RunLayout

__all__ = ["STRETCHED_ABOVE", "Pushes"]

#: An update of at most so many bytes is there before a second connection would be worth its thread.
STRETCHED_ABOVE = 32 << 20
#: What concerns one stretch, or one connection, and not the update.
_ALONE = (TransportError, Overloaded, DigestMismatch)
#: So many runs are remembered with what their layouts say of stretches.
_MOST_RUNS = 1000


class Pushes:
    """The updates that one client sends. Thread-safe.

    stretched_above: updates of more bytes than this may go in stretches.
    """

    def __init__(
        self, transport: Transport, hosts: Hosts | None = None, *, stretched_above: int = STRETCHED_ABOVE
    ) -> None:
        """hosts: of runs that lie on several; by default those that the service names."""
        self._transport = transport
        self._hosts = hosts or Hosts(transport)
        self._parts = HostedParts(self._hosts)
        self._stretched_above = stretched_above
        #: run -> the run's layout.
        self._layouts: dict[str, RunLayout] = {}
        self._lock = Lock()

    def push(self, run: str, step: int, body: Body, headers: Mapping[str, str], *, once: bool) -> Reply:
        """Send an update; ``once``: tried once. Raises what the transport raises, and what the service answers."""
        if hosted := self._hosted(run, body):
            try:
                return push_to_hosts(self._hosts, hosted, step, body, headers)
            except (RunNotFound, LayoutMismatch):
                self._doubt(run)
        pace = self._pace(run, body)
        if pace is None or pace.lanes <= 1:
            upload = self._transport.upload_once if once else self._transport.upload
            measured = body if pace is None else replace(body, moved=_Measured(body, pace))
            reply = upload(protocol.update_path(run, step), measured, headers=headers)
            if pace is not None:
                pace.ends()
            return reply
        push = _LanedPush(self._transport, run, step, body, headers, self._layouts[run], pace)
        try:
            return push.attempt() if once else self._transport.retrying(lambda _: push.attempt())
        except LayoutMismatch:
            self._forget(run)
            raise

    def push_part(
        self, run: str, name: PartName, body: Body, query: Query, headers: Mapping[str, str], *, once: bool
    ) -> Reply:
        """Send a part of an update or of initial weights; ``once``: tried once. Raises as push()."""
        upload = self._transport.upload_once

        def attempt(_: int) -> Reply:
            if hosted := self._hosted(run, body):
                try:
                    return self._parts.put(hosted, name, body, query, headers)
                except (RunNotFound, LayoutMismatch):
                    self._doubt(run)
            return upload(name.path(run), body, query=query, headers=headers)

        return attempt(0) if once else self._transport.retrying(attempt)

    def _pace(self, run: str, body: Body) -> Pace | None:
        """The pace of a body that may go in stretches, None for any other body."""
        if body.data is None or body.length <= self._stretched_above or self._transport.shares(body):
            return None
        layout = self._layout(run)
        if layout.lanes <= 1 or not layout.block_bytes or not layout.digest:
            return None
        self._transport.bound(PUSHES, layout.lanes)
        return self._transport.pace(PUSHES)

    def _hosted(self, run: str, body: Body) -> HostedRun | None:
        """The hosts that a body goes to past the gateway; None for any other body."""
        if body.data is None or body.length <= self._stretched_above or self._transport.shares(body):
            return None
        return self._hosts.of(run) if self._layout(run).shards > 1 else None

    def _layout(self, run: str) -> RunLayout:
        with self._lock:
            known = self._layouts.get(run)
        if known is not None:
            return known
        try:
            found = self._transport.json("GET", protocol.layout_path(run)).parsed(RunLayout)
        except Forbidden:
            # A token that may push and not read: such a trainer has one connection.
            found = RunLayout(run, ())
        found = replace(found, layout=())
        with self._lock:
            if len(self._layouts) >= _MOST_RUNS:
                self._layouts.clear()
            self._layouts[run] = found
        return found

    def _doubt(self, run: str) -> None:
        """The run may be another one by now: the service knows."""
        self._hosts.forget(run)
        self._forget(run)

    def _forget(self, run: str) -> None:
        with self._lock:
            self._layouts.pop(run, None)


class _LanedPush:
    """One update in stretches. Each attempt is of a group of its own: the service takes no stretch of another one."""

    def __init__(
        self,
        transport: Transport,
        run: str,
        step: int,
        body: Body,
        headers: Mapping[str, str],
        layout: RunLayout,
        pace: Pace,
    ) -> None:
        self._transport = transport
        self._run = run
        self._step = step
        self._body = body
        self._headers = {**headers, protocol.HEADER_LAYOUT: layout.digest}
        self._layout = layout
        self._pace = pace
        self._views = () if body.data is None else body.data()

    def attempt(self) -> Reply:
        """Send all stretches, each again alone where it breaks off.

        Raises what the service answers to any of them where that concerns the update; the fault of a stretch where no
        lane can go on; ConnectionLost where the service forgot those that it had.
        """
        size, group = sum(map(len, self._views)), secrets.token_hex(16)
        stretches = Stretches(0, size, grain=self._layout.block_bytes, expect_alike=self._pace.alike)
        told, results = _Told(self._body), list[Reply]()

        def carry(stretch: Stretch, moved: Moved) -> None:
            path = protocol.stretch_path(self._run, self._step, stretch.start, stretch.stop)
            body = self._stretch_body(stretch, moved)
            reply = self._transport.upload_once(path, body, query={"group": group}, headers=self._headers)
            if reply.data.get("state") != "staged":
                results.append(reply)

        carry_all(stretches, carry, self._pace, moved=told.moved, alone=lambda fault: isinstance(fault, _ALONE))
        if not results:
            raise ConnectionLost(f"{self._transport.url} was started anew while step {self._step} was sent")
        return results[-1]

    def _stretch_body(self, stretch: Stretch, moved: Moved) -> Body:
        return Body(
            stretch.size,
            lambda: cut(self._views, stretch.start, stretch.stop),
            # Between two processes of one host there is no wire that could flip a bit.
            digest=None if self._body.digest is None or self._transport.same_host else lambda: Digest(blocks()),
            moved=_Steps(moved),
        )


class _Steps:
    """Tells of the bytes since the call before, where a body tells of those since its beginning."""

    def __init__(self, moved: Moved) -> None:
        self._moved = moved
        self._sent = 0

    def __call__(self, sent: int) -> None:
        count, self._sent = sent - self._sent, sent
        self._moved(count)


class _Measured:
    """Tells a body's own listener, and the pace of its only lane."""

    def __init__(self, body: Body, pace: Pace) -> None:
        self._told = body.moved
        self._steps = _Steps(pace.moved)
        pace.at_work(frozenset({threading.get_native_id()}))

    def __call__(self, sent: int) -> None:
        self._steps(sent)
        self._told(sent)


class _Told:
    """Tells a body's listener of the bytes of all lanes, by one thread at a time."""

    def __init__(self, body: Body) -> None:
        self._told = body.moved
        self._sent = body.length - sum(map(len, body.data())) if body.data is not None else 0
        self._lock = threading.Lock()

    def moved(self, count: int) -> None:
        with self._lock:
            self._sent += count
            self._told(self._sent)
