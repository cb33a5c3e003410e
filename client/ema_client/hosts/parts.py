"""A rank's part of an update for all hosts of a run at once: each is sent what the rank has of the host's rows.

A part that broke off is sent again to that host alone, wherever it is by then, unless the host has lost earlier parts
of the same rank: it must have those first, and whoever sends parts sees to them. A part that is sent a second time goes
to those hosts that lack it.

Knows: which host has what of a part. Does not know: sockets, whose memory is sent, or what became of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from ema_client import protocol
from ema_client.errors import ConnectionLost
from ema_client.forks import Lock
from ema_client.hosts.finding import GivenUp, HostedRun, Hosts
from ema_client.hosts.sending import Target, Upload, send_to_all
from ema_client.hosts.slicing import Slices, offered
from ema_client.http.body import Body
from ema_client.http.transport import Reply, Transport
from ema_client.protocol import UpdateStatus
from ema_client.wire import LENGTH_BYTES, PartCut, cut_part, parse_header

__all__ = ["HostedParts", "PartName", "is_staged"]

#: A rank has so many parts on their way at the most, and so many are remembered as sent.
_MOST_AWAITED, _MOST_SENT = 3, 64
#: So many runs are remembered with how a part of them is cut.
_MOST_CUTS = 16
#: Of a run so many addresses are remembered: more than it has hosts.
_MOST_REACHED = 4096


@dataclass(frozen=True, slots=True)
class PartName:
    """Which part of what a body is. step: None of initial weights, which are asked after at the step ``first_step``."""

    step: int | None
    part: int
    group: str
    first_step: int = 0

    def path(self, run: str) -> str:
        """Where the part is sent."""
        return protocol.part_path(run, self.step, self.part)

    def status_path(self, run: str) -> str:
        """Where the part is asked after."""
        if self.step is not None:
            return protocol.update_path(run, self.step)
        return f"{protocol.update_path(run, self.first_step)}?{urlencode({'first': self.group})}"


class HostedParts:
    """The parts that one client sends past the gateway. Thread-safe."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        #: Parts that were sent, by run, name, and key of the body; the oldest first.
        self._sent: dict[tuple[str, PartName, str], None] = {}
        #: By run: its hosts, the header of a part, and how such a part is cut.
        self._cuts: dict[str, tuple[HostedRun, bytes, tuple[PartCut, ...]]] = {}
        #: By run and part: the addresses of hosts that were sent it at any step, the oldest first.
        self._reached: dict[tuple[str, int], dict[str, None]] = {}
        self._lock = Lock()

    def put(self, run: HostedRun, name: PartName, body: Body, headers: Mapping[str, str], upload: Upload) -> Reply:
        """Send a part whose data lies in memory (Body.data). upload: tries to send one host what is its of the part.

        Returns an answer that says that the update is applied, where a host gives one; else that it is staged. Raises
        what ``upload`` raises, once nothing is sent any more; ConnectionLost where a host has lost earlier parts;
        LayoutMismatch, MalformedBody before anything is sent.
        """
        cuts = self._cut(run, bytes(next(iter(body.pieces()))))
        with offered(body, wanted=run.shares(body)) as segment:
            return self._put(run, name, Slices(body, cuts, segment=segment), body.key, headers, upload)

    def _put(
        self, run: HostedRun, name: PartName, slices: Slices, key: str, headers: Mapping[str, str], upload: Upload
    ) -> Reply:
        earlier, again = self._earlier(run.run, name), self._was_sent((run.run, name, key))

        def send(target: Target) -> Reply:
            to = target.transport
            if (again or target.number) and (known := _known(to, run.run, name)):
                return known
            if target.number or self._is_new(run.run, name.part, to.url):
                _check_earlier(to, run.run, earlier)
            said = {**headers, protocol.HEADER_COPIES: str(target.copies)}
            reply = upload(to, slices.of(target.place, to.url, target.look), said)
            self._remember_sent(run.run, name.part, to.url)
            return reply

        try:
            replies = send_to_all(self._hosts, run, send)
        except _Behind as behind:
            raise ConnectionLost(str(behind)) from None
        return next((reply for reply in replies if not is_staged(reply)), replies[0])

    def _earlier(self, run: str, name: PartName) -> list[PartName]:
        """The parts of the latest earlier steps that were sent, and may have been applied since."""
        with self._lock:
            of_rank = [each for of, each, _ in self._sent if (of, each.group) == (run, name.group)]
        found = {each.step: each for each in of_rank if each.part == name.part}
        steps = sorted(step for step in found if step is not None and step < (name.step or 0))
        return [found[step] for step in steps[-_MOST_AWAITED:]]

    def _cut(self, run: HostedRun, header: bytes) -> tuple[PartCut, ...]:
        """How a part with this header is cut: the same at each step, and some milliseconds of work."""
        with self._lock:
            known = self._cuts.get(run.run)
        if known is not None and known[0] is run and known[1] == header:
            return known[2]
        found = cut_part(parse_header(header[LENGTH_BYTES:]), [host.rows for host in run.hosts])
        with self._lock:
            if len(self._cuts) >= _MOST_CUTS:
                self._cuts.clear()
            self._cuts[run.run] = run, header, found
        return found

    def _is_new(self, run: str, part: int, address: str) -> bool:
        """Whether a host was never sent this part at any step: one that comes back has lost those of earlier steps."""
        with self._lock:
            return address not in self._reached.get((run, part), ())

    def _remember_sent(self, run: str, part: int, address: str) -> None:
        with self._lock:
            if len(self._reached) >= _MOST_CUTS:
                self._reached = {key: each for key, each in self._reached.items() if key == (run, part)}
            reached = self._reached.setdefault((run, part), {})
            reached[address] = None
            if len(reached) > _MOST_REACHED:
                del reached[next(iter(reached))]

    def _was_sent(self, which: tuple[str, PartName, str]) -> bool:
        """Whether a part was sent before, perhaps not to all hosts; from here on it was."""
        with self._lock:
            again = which in self._sent
            self._sent[which] = None
            if len(self._sent) > _MOST_SENT:
                del self._sent[next(iter(self._sent))]
        return again


class _Behind(GivenUp):
    """A host has lost parts of earlier steps."""


def is_staged(reply: Reply) -> bool:
    """Whether a part was kept until the others come."""
    return reply.data.get("state") == "staged"


def _known(to: Transport, run: str, name: PartName) -> Reply | None:
    """What a host would say to a part that it has; None where it lacks the part."""
    reply = to.json_once("GET", name.status_path(run))
    status = reply.parsed(UpdateStatus)
    return reply if status.state == "applied" or name.part in status.parts else None


def _check_earlier(to: Transport, run: str, earlier: Sequence[PartName]) -> None:
    """Raises _Behind where a host lacks an earlier part: a later one would go past it."""
    for name in earlier:
        if _known(to, run, name) is None:
            raise _Behind(f"{to.url} was started anew, and lacks parts of step {name.step}")
