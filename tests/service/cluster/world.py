"""A world for the decision core: hosts, coordinators, trainers and a network, all of which fail at random.

One seed is one schedule. Messages are lost, come twice, late, or after newer ones; links break; hosts and coordinators
end in the middle of what they do, before or after a record is durable, before or after messages are sent; two
coordinators act at once; trainers die with some of their slices sent, and come back at the step before. Machines go
down, and take all records since the last one on the medium with them. Files are damaged, disks are replaced by older
copies, and operators say how to go on, rightly or wrongly. Then the faults stop, and everything has to be
resolved.

The oracle looks whenever a record becomes durable, and whenever anyone is told that a proposal is committed. Hosts use
Shard, and coordinators' processes Coordinator, as the service is meant to.

Knows what is promised, and what may fail. Does not know how the core keeps its promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

from ema_service.cluster import (
    Answer,
    Coordinator,
    Proposal,
    Record,
    Refusal,
    Report,
    Shard,
    Ticket,
    Vote,
)
from tests.service.cluster.world_hosts import Host, Process, Said, Slice, Stuck, Torn, key_of

__all__ = ["Design", "Seat", "World", "play"]

#: Events of a schedule before the faults stop.
_EVENTS = 55
#: More messages are never under way at once, but for those that lead to ever more.
_MOST_FLYING = 10_000
#: How often everyone says again what has no answer, until all has to be resolved; from which round on what waits is
#: overdue.
_ROUNDS, _PATIENCE = 14, 0
#: A shard refuses so many of the proposals that come to it, for parameters that are not finite, say.
_REFUSED = 0.03
#: Of so many proposals a shard's outcome differs from those of the others, also when they come again.
_DIFFERENT = 0.02


class Seat:
    """A coordinator's process."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.core = world.new_core(name)

    def receive(self, message: Report | Refusal, _: None) -> None:
        world = self.world
        if world.seats.get(self.name) is self and (self.name, message.shard) not in world.broken:
            self.send(self.core.receive(message))

    def send(self, outputs: Iterable[Any]) -> None:
        """Send what the coordinator says; the process may end in the middle, and does where another took over."""
        world = self.world
        for output in outputs:
            if world.ends():
                world.seats.pop(self.name, None)
                return
            if isinstance(output, Answer):
                if output.committed:
                    world.acknowledge(output.key)
                world.changes.pop(output.key, None)
                world.words.pop(output.key, None)
            else:
                world.send(world.hosts[output.shard], output, self)
        if self.core.deposed and world.seats.pop(self.name, None):
            world.seen["deposed"] += 1


class Design(NamedTuple):
    """What a world is built of: the core and what holds it, or a mutant of one of them."""

    shard: type[Shard] = Shard
    coordinator: type[Coordinator] = Coordinator
    host: type[Host] = Host
    seat: type[Seat] = Seat


class World:
    """All processes of one schedule, their network, and the oracle.

    chosen: by revision, the vote that led to it on the shard that came there first. logs: by revision, the votes that
    led to its version; kept_logs: also of revisions that no machine knows any more. settled: the revision whose
    checkpoint all are to have. committed: keys of all proposals that ever were. acknowledged: those that somebody was
    told of, and that were not gone back over. words: of operators that have no answer, by key. snapshots: what they
    name, of hosts that can read it. needed: the keys of words that were said while something was damaged, or before
    something was. ways: those that were taken. seen: how often what happened, to know that schedules are worth
    something.

    More than twenty methods, more than twelve attributes: each thing that may happen, and each that is known.
    """

    def __init__(self, seed: int, design: Design) -> None:
        self.design = design
        self.seed = seed
        self.random = random = Random(seed)
        self.crashes = random.choice((0.0, 0.0, 0.02, 0.05))
        self.losses = random.choice((0.0, 0.0, 0.05, 0.15))
        self.repeats = random.choice((0.0, 0.0, 0.1, 0.2))
        self.haste = random.choice((0.2, 0.5, 1.0))
        self.refused, self.different = _REFUSED, _DIFFERENT
        self.calm = False
        self.chosen: dict[int, Vote] = {}
        self.logs: dict[int, tuple[Vote, ...]] = {0: ()}
        self.kept_logs: dict[int, tuple[Vote, ...]] = {0: ()}
        self.settled = 0
        self.committed: set[str] = set()
        self.acknowledged: set[str] = set()
        self.seen: Counter[str] = Counter()
        self.flying: list[tuple[Process, Any, Seat | None]] = []
        self.broken: set[tuple[str, int]] = set()
        self.seats: dict[str, Seat] = {}
        self.changes: dict[str, None] = {}
        self.words: dict[str, str] = {}
        self.snapshots: dict[str, tuple[Vote, ...]] = {}
        self.needed: set[str] = set()
        self.ways: set[Proposal] = set()
        self.names = 0
        self.step, self.key = 0, ""
        self.unanswered: set[int] = set()
        self.hosts: list[Host] = []
        for place in range(self.draw_hosts()):
            self.hosts.append(design.host(self, place))
        self.start_coordinator()
        self.new_update()

    def draw_hosts(self) -> int:
        """How many hosts there are."""
        return self.random.choice((2, 2, 2, 2, 3, 4))

    def new_core(self, name: str) -> Coordinator:
        """The core of another coordinator."""
        return self.design.coordinator(name, len(self.hosts))

    def happens(self, chance: float) -> bool:
        return self.random.random() < chance

    def ends(self) -> bool:
        """Whether a process ends here."""
        return self.crashes > 0.0 and self.random.random() < self.crashes

    def new_name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    # --- the oracle -------------------------------------------------------------------------------------------------

    def look(self, host: Host, before: Record) -> None:
        """A host's record has become durable."""
        record = host.disk
        if record.term < before.term or record.edition < before.edition or record.revision < before.revision:
            raise Torn(f"shard {host.place} went back from {before} to {record}")
        if record.revision > before.revision:
            self.look_at_revision(host, record, before)
        if host.damaged and record.vote and record.vote != before.vote and not self.is_way(record.vote):
            raise Torn(f"shard {host.place} votes for {record.vote.ticket}, and has not the bytes for that")
        if record.revision == before.revision and before.vote and record.vote != before.vote:
            self.seen["aborted after the faults" if self.calm else "aborted"] += 1
            # A lost shard may hear a late proposal, an older copy have an early vote, that the others have long left.
            late = (before.lost or host.is_copy) and before.vote.ticket.base + 1 < max(self.chosen, default=0)
            if self.gave_up(host, before.vote) and not late:
                raise Torn(f"shard {host.place} gave up {before.vote.ticket}, which others have committed")

    def gave_up(self, _: Host, vote: Vote) -> bool:
        """Whether a vote that a host gives up is one that others have committed."""
        return self.chosen.get(vote.ticket.base + 1) == vote

    def look_at_revision(self, host: Host, record: Record, before: Record) -> None:
        """A host is the first at a revision, or follows."""
        made, chosen = record.made, self.chosen.get(record.revision)
        if made is None:
            raise Torn(f"shard {host.place} came to revision {record.revision} by nothing")
        if chosen is None:
            if made.proposal.back is not None:
                self.look_at_way_back(host, made.proposal, made.proposal.back, before)
            # Of a way back what came before may be known to nobody any more.
            earlier = (
                self.logs[record.revision - 1] if made.proposal.back is None else self.logs.get(made.ticket.base, ())
            )
            if any(key_of(vote) == key_of(made) for vote in earlier):
                raise Torn(f"{made.ticket} was committed twice")
            if made.ticket.base != record.revision - 1:
                raise Torn(f"{made.ticket} was prepared on another revision than it is committed to, {record.revision}")
            self.look_at_all(made)
            self.chosen[record.revision], self.logs[record.revision] = made, host.log
            self.kept_logs[record.revision] = host.log
            self.committed.update((key_of(made), made.ticket.key))
            self.settled = record.settled
            self.seen["committed after the faults" if self.calm else "committed"] += 1
        elif chosen != made:
            raise Torn(f"revision {record.revision} is {chosen} on some shards, {made} on shard {host.place}")
        if host.log != self.logs[record.revision]:
            raise Torn(f"revision {record.revision} is {host.log} on shard {host.place}: {self.logs[record.revision]}")

    def note_loss(self) -> None:
        """A machine went down. What it alone knew to be committed is as if it had not been."""
        self.seen["losses of power"] += 1
        last = max(host.disk.revision for host in self.hosts)
        self.chosen = {revision: vote for revision, vote in self.chosen.items() if revision <= last}
        self.logs = {revision: log for revision, log in self.logs.items() if revision <= last}

    def is_way(self, vote: Vote) -> bool:
        """Whether a shard may vote so that has not the bytes of its version."""
        return vote.proposal.back is not None

    def look_at_way_back(self, host: Host, way: Proposal, to: int, before: Record) -> None:
        """The shards go back: after a loss, or on the word of an operator who had reason to say so, and no further than
        to what all were to keep, or to what was named."""
        again = before.made is not None and before.made.proposal.back is not None
        if way.word and not way.to and not to:
            raise Torn(f"the shards were to go on with what all have, and went back to their beginning by {way}")
        # A disk that had gone back may have been replaced by an older copy since.
        lost = before.lost or again or way in self.ways or any(each.disk.lost for each in self.hosts)
        if not lost and way.word not in self.needed:
            raise Torn(f"the shards went back to {way}, nothing was lost, and nobody had reason to say so")
        log = host.log[:-1] if way.word else host.log
        if to < self.settled_yet(host, before) or log != (self.snapshots[way.to] if way.to else self.kept_logs[to]):
            raise Torn(f"the shards went back to {host.log} of revision {to}, and all had {self.settled}")
        self.ways.add(way)
        self.seen["went back on a word" if way.word else "went back" if to else "went back to nothing"] += 1
        self.acknowledged &= {key_of(vote) for vote in host.log}

    def settled_yet(self, host: Host, before: Record) -> int:
        """The revision whose checkpoint all are to have; where a disk was an older copy, as far as one still knows."""
        if not self.seen["older copies"]:
            return self.settled
        known = [before if each is host else each.disk for each in self.hosts]
        return min(self.settled, max(record.settled for record in known))

    def note_copy(self, host: Host) -> None:
        """A disk is an older copy. What it alone knew to be committed is as if it had not been; nobody who spoke with
        the earlier one is there any more."""
        self.seen["older copies"] += 1
        last = max(each.disk.revision for each in self.hosts)
        self.chosen = {revision: vote for revision, vote in self.chosen.items() if revision <= last}
        self.logs = {revision: log for revision, log in self.logs.items() if revision <= last}
        self.acknowledged &= {key_of(vote) for vote in self.logs[max(self.logs)]}
        self.seats.clear()
        self.flying = [each for each in self.flying if each[0] is not host]
        self.needed.update(self.words)

    def look_at_all(self, vote: Vote) -> None:
        """Every disk has what was voted for, committed or prepared, but for those that lost what they had, and older
        copies, in whose place another disk had it when a verdict was passed."""
        for host in self.hosts:
            excused = host.disk.lost or host.is_copy
            if vote not in (host.disk.vote, host.disk.made, *host.log) and not excused:
                raise Torn(f"{vote} was committed, and shard {host.place} is without: {host.disk}")

    def acknowledge(self, key: str) -> None:
        """Somebody is told that a proposal is committed."""
        if key in self.acknowledged:
            return
        if key not in self.committed:
            raise Torn(f"{key} was acknowledged, and no shard has it")
        votes = [vote for vote in self.logs[max(self.logs)] if key_of(vote) == key]
        if votes:
            self.acknowledged.add(key)
            self.look_at_all(votes[0])
        elif not any(self.seen[kind] for kind in ("losses of power", "older copies", "went back on a word")):
            raise Torn(f"{key} was acknowledged, and no shard has it any more")

    # --- the network ------------------------------------------------------------------------------------------------

    def send(self, to: Process, message: Any, source: Seat | None = None) -> None:
        self.flying.append((to, message, source))

    def deliver(self) -> None:
        """Deliver a message that is under way, or lose it, or deliver it and have it come again later.

        Mostly one of the newest: then much happens between a message that is late and the others. Where none is under
        way the trainer goes on.
        """
        if self.flying:
            self.deliver_one(int(self.random.random() ** self.haste * len(self.flying)))
        else:
            self.push()

    def deliver_one(self, at: int) -> None:
        to, message, source = self.flying[at]
        if not self.happens(self.repeats):
            self.flying[at] = self.flying[-1]
            self.flying.pop()
        if not self.happens(self.losses):
            to.receive(message, source)

    # --- coordinators, trainers, and whoever asks for changes -------------------------------------------------------

    def start_coordinator(self) -> None:
        """One more; of three the oldest ends."""
        # Names are drawn: a later coordinator's may be the smaller one.
        name = f"{self.random.random():.4f} {self.new_name('c')}"
        while len(self.seats) >= 2:
            del self.seats[next(iter(self.seats))]
        seat = self.seats[name] = self.design.seat(self, name)
        seat.send(seat.core.ask())

    def ask_again(self) -> None:
        for seat in tuple(self.seats.values()):
            seat.send(seat.core.ask())

    def new_update(self) -> None:
        """A trainer's next update, or a trainer that was started again, at an earlier step maybe."""
        self.step = max(self.step + self.random.choice((1, 1, 1, 1, 0, -1)), 1)
        self.key = self.new_name("u")
        self.unanswered = set(range(len(self.hosts)))

    def push(self) -> None:
        """Send the slices that have no answer, or some of them."""
        if not self.unanswered:
            self.new_update()
        some = self.happens(0.5)
        for place in tuple(self.unanswered):
            if not some or self.happens(0.5):
                self.send(self.hosts[place], Slice(self.step, self.key))

    def leave_orphans(self) -> None:
        """Another trainer sends some of its slices, and is gone."""
        step, key = self.step + self.random.choice((-1, 0, 1)), self.new_name("o")
        for host in self.hosts:
            if self.happens(0.5):
                self.send(host, Slice(step, key))

    def receive(self, message: Said, _: None) -> None:
        """What the trainer is told."""
        if message.key == self.key and message.over:
            self.unanswered.clear()
        elif message.key == self.key and message.committed:
            self.unanswered.discard(message.place)

    def change(self) -> None:
        """Somebody asks for a change, or for one again, or gives it up."""
        if self.changes and self.happens(0.2):
            del self.changes[min(self.changes)]
        self.request(min(self.changes) if self.changes and self.happens(0.5) else self.new_name("w"))

    def request(self, key: str, change: str = "", settles: int = 0) -> None:
        """Ask any coordinator for a change."""
        self.changes[key] = None
        if self.seats:
            seat = self.random.choice(tuple(self.seats.values()))
            seat.send(seat.core.propose(key, change or f"change {key}", settles))

    def say_word(self, *, named: bool = False) -> None:
        """An operator says how to go on after damage, whether there is any or not: with what all have, or with a
        snapshot, which may be one that there is not. named: with a snapshot, for all may have nothing."""
        key = self.new_name("w")
        self.words[key] = to = "" if self.happens(0.5) and not named else f"rewind {key}"
        if self.calm or self.happens(0.8):
            self.snapshots[to] = self.kept_logs[self.random.choice(tuple(self.kept_logs))]
        # A report that says so may be under way for long, and the files be back.
        if self.seen["damaged"] or any(host.hurt for host in self.hosts):
            self.needed.add(key)
        self.say_words()

    def say_words(self) -> None:
        """Operators who have no answer say again what they said."""
        for key, to in tuple(self.words.items()):
            if self.seats:
                seat = self.random.choice(tuple(self.seats.values()))
                seat.send(seat.core.propose(key, to, mends=True))

    def damage(self) -> None:
        """A file of a version is damaged."""
        self.random.choice(self.hosts).be_damaged()
        self.seen["damaged"] += 1
        self.needed.update(self.words)

    def restore_file(self) -> None:
        """Somebody puts damaged files back from a backup."""
        host = self.random.choice(self.hosts)
        if host.damaged:
            host.crash()
            host.damaged = False
            host.start()

    def replace_disk(self) -> None:
        """A copy of a disk is made, or a disk replaced by the copy that was made before."""
        host = self.random.choice(self.hosts)
        if host.copied and not any(each.hurt for each in self.hosts):
            host.become(*host.copied)
        elif not host.hurt:
            host.copied = host.disk, host.log, dict(host.checkpoints), set(host.lasting)

    def take_checkpoint(self) -> None:
        """A host asks all for another checkpoint, which mostly settles the one before; or some write the one in hand.
        Mostly that goes well: there would be few ways back to one."""
        host = self.random.choice(self.hosts)
        if self.happens(0.5):
            key = self.new_name("s")
            self.request(key, "checkpoint", host.kept.newer if self.happens(0.8) else 0)
            self.changes.pop(key, None)  # nobody asks again
            if self.happens(0.7):
                self.drain()
        for each in self.hosts:
            if self.happens(0.8):
                each.finish()

    def lose_power(self) -> None:
        """A machine goes down, or some at once; or one that lacks the verdict on a change that others have committed,
        and which nobody asks for again."""
        hosts = self.random.sample(self.hosts, len(self.hosts) if self.happens(0.2) else 1)
        if self.happens(0.3):
            key = self.new_name("w")
            self.request(key)
            self.changes.pop(key)
            for _ in range(8 * len(self.hosts)):
                behind = [host for host in self.hosts if not host.knows(key)]
                if len(behind) < len(self.hosts):
                    hosts = behind
                    break
                self.deliver()
        for host in hosts:
            host.lose_power()

    # --- events -----------------------------------------------------------------------------------------------------

    def events(self) -> list[Callable[[World], None]]:
        """What happens, in order. Each schedule leaves out some kinds of events and has more of others."""
        faults = self.faults()
        weights = [weight * self.random.choice((0, 0, 1, 3)) for _, weight in faults]
        kinds = [event for event, _ in (*_WORK, *faults)]
        return self.random.choices(kinds, [*(weight for _, weight in _WORK), *weights], k=_EVENTS)

    def faults(self) -> Sequence[tuple[Callable[[Any], None], float]]:
        """What may go wrong, and how often: in most schedules without damage, which has others wait for a word."""
        return (*_FAULTS, *_DAMAGE) if self.seed % 3 == 2 else _FAULTS

    def visit(self) -> None:
        """A host that is down starts; one that is up says again what has no answer, or that it has waited for long.
        Links are mended, and where no coordinator is left another starts."""
        self.broken.clear()
        if not self.seats:
            self.start_coordinator()
        host = self.random.choice(self.hosts)
        if host.shard is None:
            host.start()
        elif self.happens(0.4):
            host.report()
        else:
            host.insist()

    def crash(self) -> None:
        """A host ends, and mostly is there again at once."""
        host = self.random.choice(self.hosts)
        host.crash()
        if self.happens(0.7):
            host.start()

    def take_over(self) -> None:
        """Another coordinator, for hosts that restart with it maybe, which mostly gets what it asks for before what is
        under way arrives."""
        for host in self.hosts:
            if self.happens(0.3):
                host.crash()
                host.start()
        self.start_coordinator()
        for _ in range(self.random.randrange(5 * len(self.hosts))):
            if self.flying:
                self.deliver_one(len(self.flying) - 1)

    def lose_coordinators(self) -> None:
        self.seats.clear()

    def lose_all(self) -> None:
        self.seats.clear()
        for host in self.hosts:
            host.crash()

    def toggle_link(self) -> None:
        if self.seats:
            self.broken ^= {(self.random.choice(tuple(self.seats)), self.random.randrange(len(self.hosts)))}

    # --- the end ----------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """The faults stop, everybody says again what has no answer, and everything has to be resolved."""
        self.calm = True
        self.crashes = self.refused = self.different = 0.0
        self.broken.clear()
        if self.happens(0.5):
            self.flying.clear()
        if self.happens(0.5):
            self.new_update()
        self.settle()
        for _ in range(3):
            if self.done() and not any(host.disk.vote for host in self.hosts):
                break
            # The update is stale, or was refused before; or a trainer that is gone left votes, which wait for a newer
            # step. So one more has to come through.
            applied = (*self.chosen.values(), *self.hosts[0].log, Vote(_NONE, ""))
            self.step = 1 + max(vote.ticket.step or 0 for vote in applied)
            self.key, self.unanswered = self.new_name("u"), set(range(len(self.hosts)))
            self.settle()
        self.look_at_end()

    def done(self) -> bool:
        """Whether the trainer's update led to a revision."""
        return any(vote.ticket.key == self.key for vote in self.chosen.values())

    def settle(self) -> None:
        """Rounds in which everybody says again what is not answered, until nothing is left."""
        for turn in range(_ROUNDS):
            while len(self.seats) > 1:
                del self.seats[next(iter(self.seats))]
            if not self.seats:
                self.start_coordinator()
            self.say_again(turn)
            self.drain()
            if not self.unanswered and not self.changes and not self.words and self.is_whole():
                return
            if turn == _ROUNDS // 2 and self.unanswered and self.went_back():
                # What one shard had applied and another had not was gone back over: the trainer gives its update up.
                self.new_update()
        raise Stuck(f"update {self.key} on shards {self.unanswered}, or changes {list(self.changes)}, have no answer")

    def needs_word(self) -> bool:
        """Whether nobody but an operator can have the shards go on; after a loss of power alone they do by themselves,
        unless a checkpoint was damaged."""
        lost = any(host.disk.lost for host in self.hosts) and self.seen["damaged"] + self.seen["older copies"]
        return bool(lost) or any(host.damaged or host.is_copy for host in self.hosts)

    def went_back(self) -> bool:
        """Whether what was applied may have been given up."""
        return any(self.seen[kind] for kind in ("losses of power", "older copies", "damaged"))

    def is_whole(self) -> bool:
        """Whether all hosts are at one revision, and have it."""
        lacking = any(host.disk.lost or host.damaged for host in self.hosts)
        return len({host.disk.revision for host in self.hosts}) == 1 and not lacking

    def say_again(self, turn: int) -> None:
        """Hosts that are down start; the others, the coordinator, the trainer, and whoever asks for changes, say again
        what they said."""
        for host in self.hosts:
            if host.shard is None:
                host.start()
            elif turn >= _PATIENCE:
                host.insist()
        if turn > _PATIENCE:
            self.ask_again()
        for place in self.unanswered:
            self.send(self.hosts[place], Slice(self.step, self.key))
        for key in tuple(self.changes):
            self.request(key)
        if not self.words and turn > _PATIENCE and self.needs_word():
            self.say_word(named=turn > _ROUNDS // 2)
        else:
            self.say_words()

    def drain(self) -> None:
        """Deliver all messages in turn, and what follows from them."""
        for _ in range(300):
            flying, self.flying = self.flying, []
            if not flying:
                return
            for to, message, source in flying:
                to.receive(message, source)
                if len(self.flying) > _MOST_FLYING:
                    raise Stuck("more and more messages follow from messages")
        raise Stuck("messages follow from messages without end")

    def look_at_end(self) -> None:
        """Every shard is at one revision, holds no vote, and has what was acknowledged."""
        first = self.hosts[0].log
        if any(host.log != first or host.disk.vote or host.disk.lost for host in self.hosts):
            raise Stuck(f"at the end: {[host.disk for host in self.hosts]}")
        if not self.seen["older copies"] and any(host.lasting != self.hosts[0].lasting for host in self.hosts):
            raise Torn(f"on some shards alone: {[host.lasting for host in self.hosts]}")
        if lost := self.acknowledged - {key_of(vote) for vote in first}:
            raise Torn(f"acknowledged and lost: {lost}")
        if not self.done():
            raise Stuck(f"update {self.key} is missing")


_NONE = Proposal(Ticket(0, None, ""))

#: The kinds of events, and how often they happen.
_WORK = ((World.deliver, 30.0), (World.push, 1.0), (World.visit, 2.0))
_FAULTS = (
    *(
        (World.new_update, 0.7),
        (World.leave_orphans, 0.7),
        (World.change, 0.6),
        (World.ask_again, 0.4),
        (World.take_over, 0.9),
    ),
    *((World.crash, 0.8), (World.lose_coordinators, 0.1), (World.lose_all, 0.1), (World.toggle_link, 0.4)),
    *((World.take_checkpoint, 3.0), (World.lose_power, 0.5)),
)
_DAMAGE = ((World.damage, 0.6), (World.restore_file, 0.3), (World.replace_disk, 0.6), (World.say_word, 0.8))


def play(seed: int, design: Design | None = None) -> World:
    """Play one schedule. Raises Broken."""
    world = World(seed, design or Design())
    world.drain()
    for event in world.events():
        event(world)
    world.heal()
    return world
