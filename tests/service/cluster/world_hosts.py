"""One shard's process in the world of the decision core (world.py), with its disk, which damage and losses come to.

It judges, prepares, makes records durable, and only then sends, as the service's hosts do (cluster/hosting). What it
learns it has the oracle look at.

Knows what outlives a process, a machine and a disk. Does not know what is promised, or who sends what when.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ema_service.cluster import (
    Answer,
    Ask,
    Kept,
    Proposal,
    Propose,
    Record,
    Report,
    Resolve,
    Shard,
    Ticket,
    Vote,
    after_loss,
)

if TYPE_CHECKING:
    from tests.service.cluster.world import Seat, World

__all__ = ["Broken", "Host", "Process", "Said", "Slice", "Stuck", "Torn", "is_lasting", "key_of"]


class Broken(AssertionError):
    """A promise was broken."""


class Torn(Broken):
    """A revision differs between shards, or what was acknowledged is lost."""


class Stuck(Broken):
    """The faults have stopped, and not everything is resolved."""


class Slice(NamedTuple):
    """A trainer's request to one host: its slice of an update."""

    step: int
    key: str


class Said(NamedTuple):
    """A host's answer to a trainer. over: the update is not to be sent again, to any host: refused, or stale."""

    place: int
    key: str
    committed: bool
    over: bool = False


class Process(Protocol):
    """What messages are sent to."""

    def receive(self, message: Any, source: Any, /) -> None:
        """source: the coordinator's process that a host's answer goes back to; None for others' messages."""


class Host:
    """One shard's process and its disk: judges, prepares, makes records durable, and only then sends.

    disk: the record that outlives the process. log: the votes that led to the version which the record is at, without
    those that the shards went back over; durable with the record, as the facts of a version are. medium: records with
    their logs, oldest first, the first of which outlives the machine. checkpoints: by revision, the log then; on the
    medium. writing: the checkpoint that is being written. lasting: changes that stay, also when shards go back. slices:
    by their keys, those that were averaged, each with the version that it was averaged on, and the revision that it was
    voted for on; in memory. refuses: what this host can never prepare. differs: what this host makes something else of
    than others. damaged: whether the bytes of its version cannot be read. is_copy: whether the disk is an older copy,
    and the shards have not gone back since. copied: a copy of the disk, as it was once.
    """

    def __init__(self, world: World, place: int) -> None:
        self.world = world
        self.place = place
        self.disk = Record()
        self.log: tuple[Vote, ...] = ()
        self.medium = [(self.disk, self.log)]
        self.checkpoints: dict[int, tuple[Vote, ...]] = {}
        self.writing: tuple[int, tuple[Vote, ...]] | None = None
        self.lasting: set[str] = set()
        self.slices: dict[str, tuple[Slice, str, int]] = {}
        self.refuses: set[str] = set()
        self.differs: set[str] = set()
        self.damaged = self.is_copy = False
        self.copied: tuple[Record, tuple[Vote, ...], dict[int, tuple[Vote, ...]], set[str]] | None = None
        self.shard: Shard | None = None
        self.start()

    def start(self) -> None:
        """Come up with what the disk has, and report."""
        self.shard = self.world.design.shard(self.place, self.recovered())
        self.shard.note_damage(self.damaged)
        self.report()

    def recovered(self) -> Record:
        """What a restart finds."""
        return self.disk

    def crash(self) -> None:
        """End as by SIGKILL; what was in memory is gone."""
        self.shard = self.writing = None
        self.slices = {}

    def lose_power(self) -> None:
        """The machine goes down, with some of the records that are not on the medium, and comes up."""
        self.crash()
        self.disk, self.log = self.world.random.choice(self.medium)
        self.disk = self.after_loss(self.disk)
        self.sync()
        self.world.note_loss()
        self.start()

    def be_damaged(self) -> None:
        """A file of the version is damaged, which a start finds; checkpoints may be as well."""
        self.crash()
        self.damaged = True
        if self.world.happens(0.3):
            gone = self.world.random.choice(sorted(self.checkpoints) or [0])
            gone = -1 if self.disk.vote and self.disk.vote.proposal.back == gone else gone  # written anew by then
            self.checkpoints = {revision: log for revision, log in self.checkpoints.items() if revision != gone}
        self.start()

    def become(self, record: Record, log: tuple[Vote, ...], checkpoints: dict[int, Any], lasting: set[str]) -> None:
        """The disk is replaced by an older copy; its host and all coordinators are started anew."""
        self.crash()
        self.disk, self.log, self.checkpoints, self.lasting = record, log, dict(checkpoints), set(lasting)
        self.damaged, self.is_copy = False, True
        self.sync()
        self.world.note_copy(self)
        self.start()

    @property
    def hurt(self) -> bool:
        """Whether an operator may have a say."""
        return self.damaged or self.is_copy or self.disk.lost

    def after_loss(self, record: Record) -> Record:
        return after_loss(record, has_voted=is_lasting(record.vote))

    def sync(self) -> None:
        """All that is on the disk is on the medium."""
        self.medium = [(self.disk, self.log)]

    def finish(self) -> None:
        """The checkpoint that is being written is on the medium."""
        if self.writing:
            revision, log = self.writing
            self.checkpoints[revision], self.writing = log, None
            self.sync()

    def keep_only(self, kept: int) -> None:
        """Drop all checkpoints but that of one revision."""
        self.checkpoints = {revision: log for revision, log in self.checkpoints.items() if revision == kept}

    @property
    def kept(self) -> Kept:
        return Kept(min(self.checkpoints, default=0), max(self.checkpoints, default=0))

    def report(self) -> None:
        if self.shard:
            self.send([self.shard.report()])

    def insist(self) -> None:
        """What waits has waited for long."""
        if self.shard:
            self.carry_out(self.shard.insist())

    def receive(self, message: Ask | Propose | Resolve | Slice | Proposal, source: Seat | None) -> None:
        if self.shard is None:
            return
        if isinstance(message, Slice):
            self.receive_slice(message)
        elif isinstance(message, Proposal):
            self.prepare(message)
        elif source is None or (source.name, self.place) not in self.world.broken:
            self.carry_out(self.shard.receive(message), source)

    def receive_slice(self, sent: Slice) -> None:
        """A trainer's slice: answered at once where no vote is needed, else prepared."""
        if self.knows(sent.key):
            self.world.acknowledge(sent.key)
            self.world.send(self.world, Said(self.place, sent.key, committed=True))
        elif sent.step <= max((vote.ticket.step or 0 for vote in self.log), default=0):
            self.world.send(self.world, Said(self.place, sent.key, committed=False, over=True))
        else:
            # The version that the update is averaged on is the one at its first byte.
            self.vote_on(sent, self.version)

    def vote_on(self, sent: Slice, version: str) -> None:
        """Have a slice voted for that was averaged on a version; that takes time."""
        self.slices[sent.key] = sent, version, self.disk.revision
        self.world.send(self, Proposal(Ticket(self.disk.revision, sent.step, sent.key)))

    @property
    def version(self) -> str:
        """The name of what updates are averaged on: of the latest vote that made another version."""
        return next((vote.ticket.key for vote in reversed(self.log) if not is_beside(vote)), "nothing")

    def knows(self, key: str) -> bool:
        """Whether the proposal of this key led to the shard's revision."""
        return any(key_of(vote) == key for vote in self.log)

    def prepare(self, proposal: Proposal) -> None:
        """Judge a proposal, prepare it and vote; or refuse it."""
        ticket, world, shard = proposal.ticket, self.world, self.shard
        if shard is None:
            return
        if proposal.back is not None:
            self.prepare_way_back(shard, proposal, proposal.back)
        elif not proposal.change and ticket.step is None and proposal.seating is None:
            raise Torn(f"{ticket} is to go on with what all have, and was proposed as another change")
        elif self.knows(ticket.key):
            self.carry_out(shard.refuse(proposal, "committed before"))
        elif self.lacks_checkpoint(proposal):
            self.carry_out(shard.refuse(proposal, "the checkpoint is not here"))
        elif ticket.key in self.refuses or world.happens(world.refused):
            self.refuses.add(ticket.key)
            world.seen["refused"] += 1
            world.send(world, Said(self.place, ticket.key, committed=False, over=True))
            self.carry_out(shard.refuse(proposal, "not finite"))
        else:
            base = self.log[-1].ticket.key if self.log else "nothing"
            if world.happens(world.different):
                self.differs.add(ticket.key)
            other = " otherwise" if ticket.key in self.differs else ""
            self.carry_out(shard.prepare(Vote(proposal, f"{ticket.key} after {base}{other}")))

    def prepare_way_back(self, shard: Shard, proposal: Proposal, to: int) -> None:
        """Vote for the way back to a checkpoint, or refuse it where the checkpoint is not here."""
        if proposal.word and self.knows(proposal.word):
            self.carry_out(shard.refuse(proposal, "committed before"))
        elif not self.can_read(proposal, to):
            self.carry_out(shard.refuse(proposal, "no such checkpoint"))
        else:
            self.carry_out(shard.prepare(Vote(proposal, f"back to {proposal.to or to}, {proposal.change}")))

    def can_read(self, proposal: Proposal, to: int) -> bool:
        """Whether what the shards are to go back to is here: a snapshot of any revision is, at most times."""
        if proposal.to:
            return proposal.to in self.world.snapshots and (self.world.calm or not self.world.happens(0.2))
        return to == 0 or to in self.checkpoints

    def lacks_checkpoint(self, proposal: Proposal) -> bool:
        """Whether a proposal settles a checkpoint that is not here."""
        return proposal.settles not in (0, *self.checkpoints)

    def carry_out(self, outputs: Iterable[Any], source: Seat | None = None) -> None:
        """Make the record durable, then send; the process may end before either."""
        if self.world.ends():
            self.crash()
            return
        self.persist()
        if self.world.ends():
            self.crash()
            return
        self.send(outputs, source)

    def persist(self) -> None:
        """Make the record durable, and have the oracle look."""
        if self.shard is None or self.shard.record is self.disk:
            return
        before, self.disk = self.disk, self.shard.record
        made = self.disk.made if self.disk.made != before.made else None
        if made:
            sent, version, _ = self.slices.pop(made.ticket.key, (None, "", 0))
            if sent and version != self.version:
                raise Torn(f"{sent} was averaged on {version}, and follows {self.version}")
            self.follow(made)
            self.shard.note_damage(self.damaged)
        self.medium.append((self.disk, self.log))
        if made and is_lasting(made):
            self.lasting.add(made.ticket.key)
        if before.lost or is_lasting(self.disk.vote) or is_lasting(made):
            self.sync()
        self.world.look(self, before)

    def follow(self, made: Vote) -> None:
        """Do what a revision that is committed says."""
        self.is_copy = False
        if (to := made.proposal.back) is not None:
            self.log = self.log_back_at(made.proposal, to)
            if made.proposal.word:
                self.log = (*self.log, made)
            self.writing, self.damaged = None, False
            self.keep_only(to)
            return
        self.log = (*self.log, made)
        if made.proposal.change == "checkpoint":
            self.keep_only(self.disk.settled)
            self.writing = self.disk.revision, self.log

    def log_back_at(self, proposal: Proposal, to: int) -> tuple[Vote, ...]:
        """Of the version that a way back leads to."""
        if proposal.to:
            return self.world.snapshots[proposal.to]
        return self.checkpoints[to] if to else ()

    def send(self, outputs: Iterable[Any], source: Seat | None = None) -> None:
        world = self.world
        for output in outputs:
            if isinstance(output, Answer):
                if output.committed:
                    world.acknowledge(output.key)
                elif not output.reason and self.votes_again(output.key):
                    continue
                world.send(world, Said(self.place, output.key, output.committed, bool(output.reason)))
            elif isinstance(output, Proposal):
                world.send(self, output)  # preparing takes time, and the shard receives other messages meanwhile
            elif seat := source or world.seats.get(output.term.name):
                world.send(seat, self.dressed(output) if isinstance(output, Report) else output)

    def votes_again(self, key: str) -> bool:
        """Whether a slice that another proposal came before is voted for once more: what came left the version as it
        is."""
        sent, version, base = self.slices.pop(key, (None, "", 0))
        if self.shard is None or sent is None or base == self.disk.revision or not self.may_follow(version):
            return False
        self.world.seen["votes again"] += 1
        self.vote_on(sent, version)
        return True

    def may_follow(self, version: str) -> bool:
        """Whether what was averaged on a version can still be applied."""
        return version == self.version

    def dressed(self, report: Report) -> Report:
        """A report with what the shard's holder says in it."""
        return report._replace(kept=self.kept, damaged=self.damaged)


def key_of(vote: Vote) -> str:
    """By which whoever asked for it knows a proposal."""
    return vote.proposal.word or vote.ticket.key


def is_beside(vote: Vote) -> bool:
    """Whether a vote is for a change that leaves the version as it is: a snapshot, say."""
    return vote.proposal.change == "checkpoint" or is_lasting(vote)


def is_lasting(vote: Vote | None) -> bool:
    """Whether a vote is for a change whose vote and verdict are on the medium before they are told, and which stays
    when shards go back: every other one, a snapshot say."""
    change = vote.proposal.change if vote else None
    return bool(change) and str(change).startswith("change ") and int(str(change).rpartition("w")[2]) % 2 == 0
