"""What all hosts of a run are sent at once, each a body of its own. One that breaks off is sent again alone, to where
its host is by then.

    shard 0   host A ---- slice ---->      of twins both that count: one that is left behind meanwhile is left alone,
              host C ---- slice ---->      and one that comes back is sent its slice as well
    shard 1   host B ---- slice ---->

Knows: which hosts count by the newest map, and when to try again. Does not know: what is sent, or sockets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ema_client.errors import ConnectionLost, EmaError, Overloaded, TransportError
from ema_client.hosts.finding import GivenUp, HostedRun, Hosts, raise_foremost
from ema_client.http.body import Body
from ema_client.http.transport import Reply, Transport

__all__ = ["Target", "Upload", "send_to_all"]

#: Tries to send a host its body, with these header fields, and returns the answer.
Upload = Callable[[Transport, Body, Mapping[str, str]], Reply]

#: Seconds until the first look at the map of twins once some hosts have answered, and between two looks at most: one
#: that says nothing may be left behind, by the others' answers.
_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.25, 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """A host that is sent its body now. place: of its shard. copies: to how many hosts the shard's body goes. number:
    of the try, not 0 for a host that comes while others are sent to. look: raises where the body is not wanted there
    any more."""

    place: int
    transport: Transport
    copies: int
    number: int
    look: Callable[[], None]


def send_to_all(hosts: Hosts, run: HostedRun, send: Callable[[Target], Reply]) -> list[Reply]:
    """Call ``send`` for each host that counts, all at once and again where it fails, and return the answers.

    Raises the error that another try would not mend, of several; else that of one host; once nothing is sent any more.
    What a host answers that does not count any more is nobody's error.
    """
    return _Sending(hosts, run, send).answers()


class _Needless(GivenUp):
    """Nobody waits for what a host answers: the others go on without it, or another's fault ends the whole."""


@dataclass(eq=False, slots=True)
class _Copy:
    """One host's body. transport: to where the host is by the newest map, None where the host does not count. late:
    whether the host came while others were sent to. reply, faults: once the sending has ended."""

    place: int
    transport: Transport | None
    late: bool = False
    ended: bool = False
    reply: Reply | None = None
    faults: list[BaseException] = field(default_factory=list)

    @property
    def awaited(self) -> bool:
        return self.transport is not None and not self.ended


class _Sending:
    """One body for each host that counts. run: by the newest map."""

    def __init__(self, hosts: Hosts, run: HostedRun, send: Callable[[Target], Reply]) -> None:
        self._hosts = hosts
        self._run = run
        self._send = send
        self._copies: list[_Copy] = []
        self._given_up = False
        self._looks = 0
        self._changed = threading.Condition()

    def answers(self) -> list[Reply]:
        """As send_to_all()."""
        # Those that count, and as many that are left behind and about to end.
        with ThreadPoolExecutor(4 * len(self._run.hosts), "ema host") as self._threads:
            try:
                self._take_in(self._run)
                while self._must_look():
                    self._look_again()
            finally:
                self._give_up()
        raise_foremost([fault for copy in self._copies for fault in copy.faults])
        return [copy.reply for copy in self._copies if copy.reply]

    def _must_look(self) -> bool:
        """Wait until every host that counts has answered, or one has failed: False; of twins also until it is time to
        look at the map."""
        with self._changed:
            while any(copy.awaited for copy in self._copies) and not self._given_up:
                watched = self._run.twins and any(copy.ended for copy in self._copies)
                pause = min(_LOOK_SECONDS, _FIRST_LOOK_SECONDS * 2.0 ** min(self._looks, 10))
                if not self._changed.wait(pause if watched else None):
                    self._looks += 1
                    return True
        return False

    def _give_up(self) -> None:
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    # --- the map ----------------------------------------------------------------------------------------------------

    def _look_again(self) -> None:
        if found := self._hosts.again(self._run):
            self._take_in(found)

    def _take_in(self, run: HostedRun) -> None:
        """Go by a newer map: hosts that are elsewhere are sent to there, and hosts that came are begun with."""
        with self._changed:
            begun, self._run = bool(self._copies), run
            for host in run.hosts:
                there = [copy for copy in self._copies if copy.place == host.shard.place and copy.transport]
                free = [to for to in host.both if to not in [copy.transport for copy in there]]
                for copy in there:
                    if copy.transport not in host.both:
                        copy.transport = free.pop(0) if free else None
                for to in free if not self._given_up else ():
                    self._copies.append(copy := _Copy(host.shard.place, to, late=begun))
                    self._threads.submit(self._carry, copy)
            self._changed.notify_all()

    # --- one host ---------------------------------------------------------------------------------------------------

    def _carry(self, copy: _Copy) -> None:
        """Send one host its body until the body is taken, or the host is left behind."""
        policy, transport = self._hosts.patient, copy.transport
        try:
            if transport:
                copy.reply = transport.retrying(lambda number: self._try(copy, number), policy=policy)
        except _Needless:
            pass
        except BaseException as fault:  # noqa: BLE001  # raised by answers(), on the thread of the caller
            copy.faults.append(fault)
        with self._changed:
            copy.ended = True
            self._given_up |= bool(copy.faults)
            self._changed.notify_all()

    def _try(self, copy: _Copy, number: int) -> Reply:
        target = self._target(copy, number)
        try:
            return self._send(target)
        except EmaError as fault:
            self._doubt(copy, target, fault)
            raise

    def _target(self, copy: _Copy, number: int) -> Target:
        """Where a host is sent its body by now. Raises _Needless."""
        with self._changed:
            to = copy.transport
            if to is None or self._given_up:
                raise _Needless
            copies = len(self._run.hosts[copy.place].both)

        def look() -> None:
            if copy.transport is None or self._given_up:
                raise _Needless
            if copy.transport is not to:
                raise ConnectionLost(f"the host at {to.url} is elsewhere by now")

        return Target(copy.place, to, copies, number + copy.late, look)

    def _doubt(self, copy: _Copy, target: Target, fault: EmaError) -> None:
        """Look at the map for what a host's fault may mean: the host is elsewhere, or was left behind, or its twin has
        come back. Raises _Needless for a host that does not count; ConnectionLost in place of what was said by another
        program, where the host was before."""
        silent = isinstance(fault, TransportError)
        if silent or (self._run.twins and (isinstance(fault, Overloaded) or not fault.retryable)):
            self._look_again()
            if not silent or copy.transport is None:
                target.look()
