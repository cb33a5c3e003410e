"""The world of the decision core with two hosts for each shard: disks are lost as a whole, and filled from their twins.

Beside what happens in any world (world.py), a host loses its disk and memory, or has them damaged, while its twin is in
step; and hosts are held for silent, also those that are up. What was acknowledged has to outlast all of that, without
an operator.

Knows what is promised, and what may fail. Does not know how the core keeps its promises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ema_service.cluster import (
    Ask,
    Coordinator,
    Proposal,
    Record,
    Report,
    Seating,
    Ticket,
    Vote,
    emptied,
)
from tests.service.cluster.world import Design, Seat, World
from tests.service.cluster.world_hosts import Host, Torn

__all__ = ["TwinHost", "TwinWorld", "play_twins"]

#: So many proposals that a host returns are refused at first, for its copy was not made, say.
_UNFILLED = 0.1
#: So many begin with nothing, for they have other averages than their twin.
_EMPTIED = 0.4


class Copy(NamedTuple):
    """What a host has copied from its twin, to return by a proposal."""

    proposal: Proposal
    record: Record
    log: tuple[Vote, ...]
    checkpoints: dict[int, tuple[Vote, ...]]
    lasting: set[str]


class TwinHost(Host):
    """A host with a twin. copies: by ticket, what was prepared for its return, as durable as the vote. pauses: whether
    it has just copied, or could not, and has not said since that it cannot return now."""

    world: TwinWorld
    pauses: bool = False

    def __init__(self, world: World, place: int) -> None:
        self.copies: dict[Ticket, Copy] = {}
        super().__init__(world, place)

    def lose_disk(self) -> None:
        """All that the host had is gone, and it starts with nothing."""
        self.crash()
        self.disk = self.emptied()
        self.log, self.checkpoints, self.lasting, self.copies = (), {}, set(), {}
        self.damaged = False
        self.world.needed.update(self.world.words)
        self.sync()
        self.start()

    def emptied(self) -> Record:
        """The record of an empty disk."""
        return emptied(self.world.new_edition())

    @property
    def twin(self) -> TwinHost:
        return self.world.twin_of(self)

    def dressed(self, report: Report) -> Report:
        returns = self.place in report.record.seating.absent and not self.pauses
        self.pauses = False
        return super().dressed(report)._replace(returns=returns)

    def prepare(self, proposal: Proposal) -> None:
        absent = self.shard is not None and self.place in self.shard.record.seating.absent
        if absent and proposal.seating:
            self.copy(proposal)
        elif not absent:
            super().prepare(proposal)

    def copy(self, proposal: Proposal) -> None:
        """Copy what the twin has, while the twin holds its vote for the return; the copy takes time."""
        twin = self.twin
        held = twin.disk.vote
        if self.shard and self.world.happens(_UNFILLED):
            self.pauses = True
            self.carry_out(self.shard.refuse(proposal, "not filled"))
        elif twin.shard and self.is_held(proposal, held) and twin.disk.revision == proposal.ticket.base:
            if self.world.happens(_EMPTIED):
                self.let_go(proposal)
            copied = Copy(proposal, twin.disk, twin.log, dict(twin.checkpoints), set(twin.lasting))
            self.world.send(self, copied)  # type: ignore[arg-type]

    def let_go(self, proposal: Proposal) -> None:
        """Begin with nothing, in one transaction."""
        before = self.disk
        if self.shard:
            self.carry_out(self.shard.let_go(proposal))
        if self.disk is not before:
            self.log, self.checkpoints, self.lasting, self.copies = (), {}, set(), {}
            self.writing = None
            self.sync()
            self.world.seen["emptied"] += 1

    def is_held(self, proposal: Proposal, vote: Vote | None) -> bool:
        """Whether the twin cannot move on from what it has."""
        return vote is not None and vote.ticket == proposal.ticket

    def receive(self, message: Any, source: Seat | None) -> None:
        if not isinstance(message, Copy):
            super().receive(message, source)
        elif self.shard:
            base = message.log[-1].ticket.key if message.log else "nothing"
            self.copies[message.proposal.ticket], self.pauses = message, True
            self.carry_out(self.shard.prepare(Vote(message.proposal, f"{message.proposal.ticket.key} after {base}")))

    def follow(self, made: Vote) -> None:
        copied = self.copies.pop(made.ticket, None)
        if copied and made.proposal.seating:
            self.log, self.checkpoints, self.lasting = copied.log, dict(copied.checkpoints), set(copied.lasting)
            self.world.seen["filled after damage"] += self.damaged
            self.damaged = False
            self.world.seen["filled"] += 1
        super().follow(made)


class TwinWorld(World):
    """All processes of one schedule, with two hosts for each shard."""

    editions = 0

    def draw_hosts(self) -> int:
        return self.random.choice((4, 4, 4, 6))

    def new_core(self, name: str) -> Coordinator:
        return self.design.coordinator(name, len(self.hosts), twins=True)

    def new_edition(self) -> int:
        self.editions += 1 << 40
        return self.editions

    def twin_of(self, host: Host) -> TwinHost:
        found = self.hosts[(host.place + len(self.hosts) // 2) % len(self.hosts)]
        assert isinstance(found, TwinHost)
        return found

    def seating(self) -> Seating:
        """The seating that counts: the largest that any disk has."""
        return max(host.disk.seating for host in self.hosts)

    def is_member(self, host: Host) -> bool:
        return host.place not in self.seating().absent

    # --- the oracle -------------------------------------------------------------------------------------------------

    def note_loss(self) -> None:
        """A machine went down. What it alone of those that count knew to be committed is as if it had not been."""
        self.seen["losses of power"] += 1
        last = max(host.disk.revision for host in self.hosts if self.is_member(host))
        self.chosen = {revision: vote for revision, vote in self.chosen.items() if revision <= last}
        self.logs = {revision: log for revision, log in self.logs.items() if revision <= last}

    def look(self, host: Host, before: Record) -> None:
        if self.is_member(host):
            super().look(host, before)
        elif host.disk.revision > before.revision and host.disk.made and not self.is_return(host.disk.made):
            # It obeyed a coordinator that had everybody's votes: so the others will commit as well.
            super().look(host, before)

    def look_at_revision(self, host: Host, record: Record, before: Record) -> None:
        chosen = self.chosen.get(record.revision)
        went_back = record.made is not None and record.made.proposal.back is not None
        if chosen and chosen != record.made and (self.is_late(chosen) or went_back):
            # The host that returned was silent, and the others went on without; or it alone knew of the revision.
            for each in self.hosts:
                if self.is_member(each) and each.disk.revision == record.revision and each.disk.made == chosen:
                    raise Torn(f"{chosen} was given up, and shard {each.place} has it")
            del self.chosen[record.revision], self.logs[record.revision]
            self.seen["returns that came to nothing"] += 1
        super().look_at_revision(host, record, before)

    def gave_up(self, host: Host, vote: Vote) -> bool:
        return not self.is_late(vote) and super().gave_up(host, vote)

    @staticmethod
    def is_return(vote: Vote) -> bool:
        return vote.proposal.seating is not None

    def is_late(self, vote: Vote) -> bool:
        return vote.proposal.seating is not None and vote.proposal.seating < self.seating()

    def look_at_all(self, vote: Vote) -> None:
        """Every host that counts has what was voted for, and each shard has one that lost nothing: perhaps one that was
        left behind while nobody knew what its twin had lost."""
        half = len(self.hosts) // 2
        safe = set()
        for host in self.hosts:
            has = vote in (host.disk.vote, host.disk.made, *host.log)
            if self.is_member(host) and not has and not host.disk.lost:
                raise Torn(f"{vote} was committed, and shard {host.place} is without: {host.disk}")
            if has and not host.disk.lost and not host.damaged:
                safe.add(host.place % half)
        if len(safe) < half and not self.seen["losses of power"]:
            raise Torn(f"{vote} was committed, and only hosts of {safe} have it")

    def acknowledge(self, key: str) -> None:
        if not key.startswith("return-"):
            super().acknowledge(key)

    # --- events -----------------------------------------------------------------------------------------------------

    def faults(self) -> Sequence[tuple[Callable[[Any], None], float]]:
        own = (World.lose_power, World.damage, World.replace_disk)
        others = [each for each in super().faults() if each[0] not in own]
        others += [(TwinWorld.damage, weight) for event, weight in super().faults() if event is World.damage]
        others += [(TwinWorld.lose_power, 0.4), (TwinWorld.suspect, 1.5), (TwinWorld.lose_disk, 0.7)]
        return (*others, (TwinWorld.fall_apart, 0.3))

    def receive(self, message: Any, source: None) -> None:
        super().receive(message, source)
        if message.key == self.key and message.committed:
            half = len(self.hosts) // 2
            self.unanswered.discard((message.place + half) % (2 * half))

    def lose_power(self) -> None:
        """A machine goes down whose twin is in step, or all do while all are in step."""
        if self.happens(0.3):
            if all(isinstance(host, TwinHost) and self.is_in_step(host) for host in self.hosts):
                for host in self.hosts:
                    host.lose_power()
            return
        host = self.random.choice(self.hosts)
        assert isinstance(host, TwinHost)
        if self.may_lose(host):
            host.lose_power()

    def suspect(self) -> None:
        """A host is held for silent, or all of one machine are, which mostly they are."""
        hosts = self.on_one_machine()
        for host in hosts:
            if self.happens(0.7):
                host.crash()
        for seat in tuple(self.seats.values()):
            for host in hosts:
                if self.happens(0.8):
                    seat.send(seat.core.note_silence(host.place))
        for _ in range(self.random.randrange(4 * len(self.hosts))):
            if self.happens(0.1):
                self.ask_again()
            self.deliver()

    def fall_apart(self) -> None:
        """The network does: of two coordinators one reaches some hosts, the other one the others, and holds those that
        it does not reach for silent. The trainer reaches all."""
        self.start_coordinator()
        side = {host.place for host in self.hosts if self.happens(0.5)}
        for at, seat in enumerate(tuple(self.seats.values())):
            away = [host.place for host in self.hosts if (host.place in side) == (at == 0)]
            self.broken |= {(seat.name, place) for place in away}
            for place in away:
                seat.send(seat.core.note_silence(place))
            seat.send(seat.core.ask())
        for _ in range(self.random.randrange(12 * len(self.hosts))):
            if self.happens(0.1):
                self.push()
            self.deliver()

    def lose_disk(self) -> None:
        """A host loses all it has, or some do at once that are on one machine, where their twins are in step, for all
        that anyone knows."""
        hosts = self.on_one_machine()
        if all(self.may_lose(host) for host in hosts):
            for host in hosts:
                self.seen["lost disks"] += 1
                host.lose_disk()

    def on_one_machine(self) -> list[TwinHost]:
        """Some hosts, fewer than there are shards, and no two of one shard: one, mostly."""
        half = len(self.hosts) // 2
        shards = self.random.sample(range(half), 1 if self.happens(0.7) else half - 1)
        hosts = [self.hosts[shard + self.random.choice((0, half))] for shard in shards]
        return [host for host in hosts if isinstance(host, TwinHost)]

    def damage(self) -> None:
        """A file of a version is damaged, where the host's twin is in step."""
        host = self.random.choice(self.hosts)
        assert isinstance(host, TwinHost)
        if self.may_lose(host):
            self.seen["damaged"] += 1
            self.needed.update(self.words)
            host.be_damaged()

    def needs_word(self) -> bool:
        """Never: what one host cannot read its twin has."""
        return False

    def may_lose(self, host: TwinHost) -> bool:
        return self.is_in_step(host.twin) and not any(each.disk.lost or each.damaged for each in self.hosts)

    def is_in_step(self, host: TwinHost) -> bool:
        """Whether a host has everything, and nobody is about to say that it has not."""
        said = [seat.core.seating for seat in self.seats.values()]
        said += [message.seating for _, message, _ in self.flying if isinstance(message, Ask)]
        said += [
            vote.proposal.seating for each in self.hosts for vote in [each.disk.vote] if vote and self.is_return(vote)
        ]
        absent = {place for seating in said if seating for place in seating.absent}
        has_all = not host.disk.lost and not host.damaged
        return self.is_member(host) and host.place not in absent and has_all

    def is_whole(self) -> bool:
        return super().is_whole() and not self.seating().absent


def play_twins(seed: int, design: Design | None = None) -> TwinWorld:
    """Play one schedule. Raises Broken."""
    world = TwinWorld(seed, design or Design(host=TwinHost))
    world.drain()
    for event in world.events():
        event(world)
    world.heal()
    return world
