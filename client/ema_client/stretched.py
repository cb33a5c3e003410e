"""What one server is sent of updates: an update, or a rank's part of one, as one body or, where several lanes pay, in
stretches, which the server puts together.

A body that goes over one connection is measured, too: whether two would bring more is tried with the next one.

Knows: the routes of an update and of a run's layout, which bodies may go in stretches, and which refusals concern one
stretch alone. Does not know: other servers, sockets, tensors, how many lanes pay.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from ema_client import protocol
from ema_client.errors import (
    ConnectionLost,
    DigestMismatch,
    EmaError,
    Forbidden,
    MalformedBody,
    Overloaded,
    TransportError,
)
from ema_client.forks import Lock
from ema_client.hosts.parts import PartName, is_staged
from ema_client.hosts.slicing import Slices
from ema_client.http.body import Body, cut
from ema_client.http.digests import Digest, blocks
from ema_client.http.lanes import Moved, carry_all
from ema_client.http.pace import PUSHES, Pace
from ema_client.http.stretches import Stretch, Stretches
from ema_client.http.transport import Query, Reply, Transport
from ema_client.protocol import RunLayout, UpdateStatus
from ema_client.wire import LENGTH_BYTES, PartCut, build_header, parse_header, place, stretches_of_part

__all__ = ["Server"]

#: What concerns one stretch, or one connection, and not the update.
_ALONE = (TransportError, Overloaded, DigestMismatch)
#: So many runs are remembered with what their layouts say of stretches.
_MOST_RUNS = 1000
#: So many stretches a part is cut into at the most, and so many ways of cutting parts are remembered.
_MOST_STRETCHES, _MOST_CUTS = 64, 16
#: So many parts are remembered with how they were first sent: as one body, or in stretches.
_MOST_SENT = 64
#: Numbers for attempts at stretches, each higher than the one before.
_attempts = itertools.count(1)


class Server:
    """The updates that one client sends to one server. Thread-safe.

    above, where a method takes it: updates of more bytes than this may go in stretches.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        #: run -> the run's layout, without the tensors, and the hash of the header that a body of these has.
        self._layouts: dict[str, tuple[RunLayout, int]] = {}
        #: The header of a part -> its stretches; none where it cannot be cut.
        self._cuts: dict[bytes, tuple[PartCut, ...]] = {}
        #: Whether a part went in stretches at its first try, the oldest first.
        self._sent: dict[tuple[str, PartName], bool] = {}
        self._lock = Lock()

    def update(self, run: str, step: int, body: Body, headers: Mapping[str, str], *, above: int) -> Callable[[], Reply]:
        """What tries to send an update, as often as it is called.

        A call raises what the transport raises, and what the server answers.
        """
        pace = self._pace(run, body, above)
        if pace is not None and pace.lanes > 1 and self.fits(run, body):
            return _LanedPush(self._transport, run, step, body, headers, self.layout(run), pace).attempt
        return _measured(self._transport, protocol.update_path(run, step), pace, body, {}, headers)

    def part(
        self, run: str, name: PartName, body: Body, query: Query, headers: Mapping[str, str], *, above: int
    ) -> Reply:
        """Try to send a part. A part goes as it first went, for the server may have some of it. Raises as update()."""
        pace = None if name.step is None else self._pace(run, body, above, senders=int(query.get("of") or 1))
        cuts = () if pace is None else self._cut(run, body)
        laned = self._goes_in_stretches((run, name), wanted=bool(cuts) and pace is not None and pace.lanes > 1)
        if pace is not None and cuts and laned:
            return _LanedPart(self._transport, run, name, body, query, headers, cuts, pace).attempt()
        return _measured(self._transport, name.path(run), pace, body, query, headers)()

    def layout(self, run: str) -> RunLayout:
        """What the server says of a run's layout, without the tensors. Raises as update()."""
        return self._known(run)[0]

    def fits(self, run: str, body: Body) -> bool:
        """Whether the tensors of a body are the run's, in the order that they have there. Raises as update().

        Stretches are bytes without names, and so is what a whole body's data are to hosts: of other tensors, as many
        bytes would be averaged all the same. A body that does not fit goes as one body, whose header the service reads.
        """
        if self._known(run)[1] == hash(bytes(next(iter(body.pieces())))):
            return True
        self.forget(run)  # the run may be another one by now: the next body goes by its layout
        return False

    def _known(self, run: str) -> tuple[RunLayout, int]:
        with self._lock:
            known = self._layouts.get(run)
        if known is not None:
            return known
        try:
            found = self._transport.json("GET", protocol.layout_path(run)).parsed(RunLayout)
        except Forbidden:
            # A token that may push and not read: such a trainer has one connection.
            found = RunLayout(run, ())
        known = replace(found, layout=()), hash(build_header(place(found.layout)))
        with self._lock:
            if len(self._layouts) >= _MOST_RUNS:
                self._layouts.clear()
            self._layouts[run] = known
        return known

    def forget(self, run: str) -> None:
        """Ask for the run's layout anew the next time: the run may be another one by now."""
        with self._lock:
            self._layouts.pop(run, None)

    def _goes_in_stretches(self, which: tuple[str, PartName], *, wanted: bool) -> bool:
        """Whether a part goes in stretches: as at its first try, or, if this is the first, as is wanted."""
        with self._lock:
            laned = self._sent.setdefault(which, wanted)
            if len(self._sent) > _MOST_SENT:
                del self._sent[next(iter(self._sent))]
            return laned

    def _cut(self, run: str, body: Body) -> tuple[PartCut, ...]:
        """The stretches of a part, the same at each step and in each try; none where the part cannot be cut, or has no
        data, as of a rank that has nothing for one host."""
        header = bytes(next(iter(body.pieces())))
        with self._lock:
            known = self._cuts.get(header)
        if known is not None:
            return known
        block, size = self.layout(run).block_bytes, body.length - len(header)
        blocks = -(-size // block)
        found: tuple[PartCut, ...] = ()
        with contextlib.suppress(MalformedBody):
            if size:
                found = stretches_of_part(parse_header(header[LENGTH_BYTES:]), block * -(-blocks // _MOST_STRETCHES))
        with self._lock:
            if len(self._cuts) >= _MOST_CUTS:
                self._cuts.clear()
            self._cuts[header] = found
        return found

    def _pace(self, run: str, body: Body, above: int, *, senders: int = 1) -> Pace | None:
        """The pace of a body that may go in stretches, None for any other body. senders: of the update, which share the
        lanes that there may be."""
        if body.data is None or body.length <= above or self._transport.shares(body):
            return None
        layout = self.layout(run)
        if layout.lanes <= 1 or not layout.block_bytes or not layout.digest:
            return None
        self._transport.bound(PUSHES, max(1, layout.lanes // senders))
        return self._transport.pace(PUSHES)


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
            query: Query = {"group": group, "attempt": next(_attempts)}
            reply = self._transport.upload_once(path, body, query=query, headers=self._headers)
            if reply.data.get("state") != "staged":
                results.append(reply)

        carry_all(stretches, carry, self._pace, moved=told.moved, alone=lambda fault: isinstance(fault, _ALONE))
        if not results:
            raise ConnectionLost(f"{self._transport.url} was started anew while step {self._step} was sent")
        return results[0]

    def _stretch_body(self, stretch: Stretch, moved: Moved) -> Body:
        return Body(
            stretch.size,
            lambda: cut(self._views, stretch.start, stretch.stop),
            # Between two processes of one host there is no wire that could flip a bit.
            digest=None if self._body.digest is None or self._transport.same_host else lambda: Digest(blocks()),
            moved=_Steps(moved),
            look=self._body.look,
            waits=self._body.waits,
            key=self._body.key,
        )


class _LanedPart:
    """A rank's part in stretches, the same ones in each attempt: the service keeps those that it has, of any attempt,
    and compares them with those that come again."""

    def __init__(
        self,
        transport: Transport,
        run: str,
        name: PartName,
        body: Body,
        query: Query,
        headers: Mapping[str, str],
        cuts: tuple[PartCut, ...],
        pace: Pace,
    ) -> None:
        self._transport = transport
        self._run = run
        self._name = name
        self._body = body
        self._size = sum(each.nbytes for each in cuts)
        self._query = {**query, "size": self._size}
        self._headers = headers
        self._cuts = cuts
        self._pace = pace
        self._slices = Slices(body, cuts)
        self._replies: list[Reply] = []

    def attempt(self) -> Reply:
        """Send all stretches, each again alone where it breaks off.

        Raises what the service answers to any of them where that concerns the part or the update; the fault of a
        stretch where no lane can go on; ConnectionLost where the service forgot those that it had.
        """
        size = self._cuts[0].nbytes
        stretches = Stretches(0, self._size, grain=size, smallest=size, largest=size)
        carry_all(stretches, self._carry, self._pace, moved=_Told(self._body).moved, alone=self._is_alone)
        return self._answer()

    def _carry(self, stretch: Stretch, moved: Moved) -> None:
        if self._name.step is None:
            raise TypeError("initial weights go as one body")
        body = replace(self._slices.of(stretch.start // self._cuts[0].nbytes), moved=_Steps(moved))
        if self._transport.same_host:
            body = replace(body, digest=None)
        path = protocol.part_stretch_path(self._run, self._name.step, self._name.part, stretch.start, stretch.stop)
        query = {**self._query, "attempt": next(_attempts)}
        self._replies.append(self._transport.upload_once(path, body, query=query, headers=self._headers))

    def _is_alone(self, fault: EmaError) -> bool:
        """Whether a fault concerns one stretch alone.

        Not a broken connection before the first answer: a service that was started anew may have lost earlier parts,
        and would take all stretches of this one. Whoever sends parts sees to the earlier ones before each attempt.
        """
        return isinstance(fault, _ALONE) and (bool(self._replies) or not isinstance(fault, TransportError))

    def _answer(self) -> Reply:
        """What the service says of the part once all stretches were answered: applied, or staged.

        Raises ConnectionLost where the service has not all of them.
        """
        for reply in self._replies:
            if not is_staged(reply) or self._name.part in reply.parsed(UpdateStatus).parts:
                return reply
        # Another rank's part may have completed the update, and every answer is of a time before.
        reply = self._transport.json_once("GET", self._name.status_path(self._run))
        status = reply.parsed(UpdateStatus)
        if status.state == "applied" or self._name.part in status.parts:
            return reply
        raise ConnectionLost(f"{self._transport.url} was started anew while step {self._name.step} was sent")


def _measured(
    transport: Transport, path: str, pace: Pace | None, body: Body, query: Query, headers: Mapping[str, str]
) -> Callable[[], Reply]:
    """What tries to send a body over one connection, which its pace, if there is one, takes into account."""
    sent = body if pace is None else replace(body, moved=_Measured(body, pace))

    def attempt() -> Reply:
        reply = transport.upload_once(path, sent, query=query, headers=headers)
        if pace is not None:
            pace.ends()
        return reply

    return attempt


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
