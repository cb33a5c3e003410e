"""A coordinator's side of its talk with the shards of a run: what they say goes to the decision core, what the core
says to those of them that listen.

Nothing is kept for a shard that does not listen, nor said twice for safety. Whatever a shard missed is said again when
it reports the next time, and all shards are asked to report as soon as they listen, and every second from then on.

Lives on one event loop, and waits for nothing but answers. Knows the decision core and queues. Does not know HTTP, or
what a change does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from ema_client.errors import Conflict, Fenced, InvalidRequest, Overloaded, RunNotFound, Stopping, listed
from ema_service.cluster.counting import CoordinatorMetrics, TalkCount
from ema_service.cluster.decisions import Coordinator, Output
from ema_service.cluster.messages import (
    DIRECTORY,
    Answer,
    Arrival,
    Ask,
    Change,
    Propose,
    Refusal,
    Report,
    Resolve,
    run_of,
)

__all__ = ["Conversation", "Conversations", "Listening", "Seat"]

_log = logging.getLogger(__name__)

#: What one listening shard is to be sent; None ends the listening.
Listening: TypeAlias = "asyncio.Queue[Ask | Propose | Resolve | None]"

#: Questions, one a second, that a shard may leave without an answer before the others go on with its twin: one whose
#: connection ended, one that is connected and says nothing, and one that never came, whose host may have much to bring
#: back.
_AWAY, _SILENT, _NEVER_CAME = 5, 10, 60
#: Questions that the twin of a silent shard may have left without an answer, for the others to go on with the twin: one
#: that left more is as silent, and has the shard's bytes for nobody.
_HEARD = 3
#: Messages that a shard has not read: with more it is not listening any more.
_UNREAD = 64
#: Questions, one a second, after which a talk is forgotten: a host that is started again comes before.
_UNHEARD = 60


@dataclass(frozen=True, slots=True)
class Seat:
    """What is known of a shard. address: None where it never came. start, stop: as in Arrival. listens: for now; since:
    when that began, Unix seconds, None where the shard never listened. revision: by its latest report, None before."""

    place: int
    address: str | None
    start: int
    stop: int
    listens: bool
    since: float | None = field(default=None, compare=False)
    revision: int | None = None


class Conversation:
    """The talk of one coordinator about one run.

    shards: how many the run has. core: what decides.
    """

    def __init__(
        self, run: str, name: str, shards: int, metrics: CoordinatorMetrics | None = None, *, twins: bool = False
    ) -> None:
        """run: the talk's name. name, twins: as in Coordinator. metrics: by default those of nobody."""
        self.core = Coordinator(name, shards, twins=twins)
        self.shards = shards
        self.twins = twins
        self._told_absent: frozenset[int] = frozenset()
        #: By place, the questions that it has not answered.
        self._unheard: Counter[int] = Counter()
        self._run = run
        self._count = TalkCount(metrics or CoordinatorMetrics())
        self._arrivals: dict[int, Arrival] = {}
        self._listening: dict[int, Listening] = {}
        #: When each shard began to listen, or ended.
        self._since: dict[int, float] = {}
        #: key -> what those who asked for the change wait for.
        self._asked: dict[str, asyncio.Future[Answer]] = {}

    def arrive(self, arrival: Arrival) -> Listening:
        """Let a shard listen, from its first question on. Another process that listened as the same shard does so no
        more.

        Raises Conflict where the shard believes that the run has more shards, or fewer.
        """
        place = arrival.shard
        self._note(arrival)
        self._end(place)
        listening = self._listening[place] = asyncio.Queue(_UNREAD)
        self._since[place] = time.time()
        self._say(ask for ask in self.core.ask() if ask.shard == place)
        return listening

    def leave(self, place: int, listening: Listening) -> None:
        """A shard's connection is gone."""
        if self._listening.get(place) is listening:
            del self._listening[place]
            self._since[place] = time.time()

    def hear(self, message: Arrival | Refusal | Report) -> None:
        """Take in what a shard says. Raises Conflict as arrive()."""
        if isinstance(message, Arrival):
            self._note(message)
            return
        if message.shard >= self.shards:
            raise InvalidRequest(f"shard {message.shard}: run {self._run!r} has shards 0 to {self.shards - 1}")
        self._count.heard(message)
        self._unheard[message.shard] = 0
        if message.term < self.core.term:
            # The claim came while the shard was not listening.
            self._say(ask for ask in self.core.ask() if ask.shard == message.shard)
        self._say(self.core.receive(message))

    @property
    def quiet(self) -> bool:
        """Whether nobody listens."""
        return not self._listening

    def ask_again(self) -> None:
        """Ask all that listen to report: a sign of life for them, and what mends whatever was lost. Note who does not
        listen for too long, while the twin does: where both are gone, as from the talk of a deleted run, nobody is left
        behind."""
        places = range(self.shards) if self.twins else ()
        self._unheard.update(places)
        for place in places:
            if self._unheard[place] > self._most_unheard(place) and self._unheard[self.core.twin(place)] <= _HEARD:
                self._say(self.core.note_silence(place))
        self._say(self.core.ask())

    async def change(self, asked: Change, seconds: float) -> Answer:
        """Bring a change to all shards, and return what became of it. The same key may ask again, and waits again.

        Raises Overloaded where nothing was decided in so many seconds; Stopping where the coordinator ended.
        """
        answer = self._asked.setdefault(asked.key, asyncio.get_running_loop().create_future())
        self._say(self.core.propose(asked.key, asked.change, asked.settles, mends=asked.mends))
        try:
            return await asyncio.wait_for(asyncio.shield(answer), seconds)
        except TimeoutError:
            absent = self.core.seating.absent
            away = [str(seat.place) for seat in self.seats() if not seat.listens and seat.place not in absent]
            why = self.core.fault or (f"without shard {listed(away)}" if away else "the shards are busy")
            raise Overloaded(
                f"the change was not decided in {seconds:g} seconds: {why}",
                hint="ask again with the same key; the change may still be made",
                retry_after=1.0,
            ) from None

    def _most_unheard(self, place: int) -> int:
        """How many questions a place may leave without an answer."""
        if place in self._listening:
            return _SILENT
        return _AWAY if place in self._arrivals else _NEVER_CAME

    def note_away(self, places: Iterable[int]) -> None:
        """Note those of these places that never came: their hosts are left behind anyway."""
        for place in places:
            if place not in self._arrivals:
                self._say(self.core.note_silence(place))

    def seats(self) -> list[Seat]:
        """All shards, by place."""
        nobody = Arrival(0, self.shards, "")
        known = [(place, self._arrivals.get(place, nobody)) for place in range(self.shards)]
        return [
            Seat(
                place,
                each.address or None,
                each.start,
                each.stop,
                listens=place in self._listening,
                since=self._since.get(place),
                revision=self.core.revision(place),
            )
            for place, each in known
        ]

    def end(self) -> None:
        """Let nobody listen or wait any more."""
        for place in tuple(self._listening):
            self._end(place)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(Stopping("the coordinator ends", retry_after=1.0))
                answer.exception()  # looked at, where nobody waits any more
        self._asked.clear()

    # ----------------------------------------------------------------------------------------------------------------

    def _note(self, arrival: Arrival) -> None:
        if (arrival.shards, arrival.twins) != (self.shards, self.twins):
            raise Conflict(
                f"shard {arrival.shard} says that run {self._run!r} has {arrival.shards} shards, others say "
                f"{self.shards}",
                hint="start all shards of a run with the same number of shards, and all with twins or none",
            )
        self._arrivals[arrival.shard] = arrival

    def _say(self, outputs: Iterable[Output]) -> None:
        """Send to those that listen, and answer those that asked."""
        self._tell()
        for output in outputs:
            if isinstance(output, Resolve):
                self._count.said(output)
            if isinstance(output, Answer):
                answer = self._asked.pop(output.key, None)
                if answer and not answer.done():
                    answer.set_result(output)
            elif listening := self._listening.get(output.shard):
                if listening.full():
                    self._end(output.shard)
                else:
                    listening.put_nowait(output)

    def _tell(self) -> None:
        """Log who is left behind, or counts again."""
        before, self._told_absent = self._told_absent, self.core.seating.absent
        for place in self._told_absent - before:
            _log.warning("run %s: goes on without host %d, whose twin has its shard alone", self._run, place)
        for place in before - self._told_absent:
            _log.warning("run %s: host %d has its shard again, as its twin has", self._run, place)

    def _end(self, place: int) -> None:
        """End a shard's listening, if it does."""
        listening = self._listening.pop(place, None)
        if listening:
            self._since[place] = time.time()
            while listening.full():
                listening.get_nowait()
            listening.put_nowait(None)


class Conversations:
    """The talks of one coordinator, by name. Each begins when the first shard comes, and is forgotten once nobody has
    listened for a while: of a run that was deleted nobody comes again, and for any other a coordinator keeps nothing.
    """

    def __init__(self, new_name: Callable[[], str], metrics: CoordinatorMetrics | None = None) -> None:
        """new_name: draws the name that this coordinator has in one talk, as in Coordinator. metrics: by default those
        of nobody."""
        self._metrics = metrics or CoordinatorMetrics()
        self._new_name = new_name
        self._by_run: dict[str, Conversation] = {}
        #: How many questions nobody heard, of those talks.
        self._unheard: Counter[str] = Counter()
        #: By place, the number of the host's latest process.
        self._numbers: dict[str, int] = {}
        self._ended = False

    @property
    def deposed(self) -> bool:
        """Whether another coordinator has taken over one of the runs. Then this one is to end."""
        return any(each.core.deposed for each in self._by_run.values())

    def admit(self, place: str, number: int) -> None:
        """Take note of the process that speaks for a place. Raises Fenced for one that a later one has replaced."""
        latest = self._numbers.setdefault(place, number)
        if number < latest:
            raise Fenced(
                f"process {number} of host {place} was replaced by process {latest}",
                hint="the numbers are those of the host's data dir: stop one of the two, or, where a data dir was lost "
                "or went back to an older copy, start the coordinator anew",
            )
        self._numbers[place] = number

    def arrive(self, run: str, arrival: Arrival) -> tuple[Conversation, Listening]:
        """Let a shard of a run listen. Raises InvalidRequest for a place that there is not; Stopping; what
        Conversation.arrive() raises."""
        if self._ended:
            raise Stopping("the coordinator ends", retry_after=1.0)
        if not arrival.shard < arrival.shards:
            raise InvalidRequest(f"shard {arrival.shard} of {arrival.shards}: places are counted from 0")
        conversation = self._by_run.get(run) or Conversation(
            run, self._new_name(), arrival.shards, self._metrics, twins=arrival.twins
        )
        listening = conversation.arrive(arrival)
        self._by_run[run] = conversation
        return conversation, listening

    def find(self, run: str) -> Conversation:
        """The talk about a run. Raises RunNotFound where none of its shards came."""
        if run not in self._by_run:
            raise RunNotFound(
                f"no shard of a run {run!r} has come to this coordinator", hint="are the hosts of its shards up?"
            )
        return self._by_run[run]

    def absent(self) -> dict[str, list[int]]:
        """By talk, the places that the others go on without; of runs of one name of the latest alone: an earlier one is
        deleted, and its talk yet to be forgotten."""
        latest: dict[str, tuple[int, str]] = {}
        for talk in self._by_run:
            run, birth = run_of(talk)
            latest[run] = max(latest.get(run, (0, "")), (birth, talk))
        found = {talk: sorted(self._by_run[talk].core.seating.absent) for _, talk in latest.values()}
        return {talk: places for talk, places in found.items() if places}

    def all(self) -> list[Conversation]:
        """The talks that there are."""
        return list(self._by_run.values())

    def ask_again(self) -> None:
        """As Conversation.ask_again(), for all talks. Those that nobody hears are forgotten."""
        if directory := self._by_run.get(DIRECTORY):
            # A run that was made while a host is away is made without it.
            for each in self._by_run.values():
                each.note_away(directory.core.seating.absent)
        self._unheard = Counter({run: self._unheard[run] + 1 for run, each in self._by_run.items() if each.quiet})
        for run, times in self._unheard.items():
            if times > _UNHEARD:
                del self._by_run[run]
        for each in self._by_run.values():
            each.ask_again()

    def end(self) -> None:
        """As Conversation.end(), for all runs, and for good."""
        self._ended = True
        for each in self._by_run.values():
            each.end()
