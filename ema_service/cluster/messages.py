"""What a coordinator and the shards of a run tell each other, and what a shard keeps on disk.

Plain values, all immutable. Knows which facts go together. Does not know what follows from them (decisions), how they
are encoded, or how they travel: any message may be lost, come twice, late, or after a newer one.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

__all__ = [
    "DIRECTORY",
    "Adjustment",
    "Answer",
    "Arrival",
    "Ask",
    "AverageAdded",
    "AverageRemoved",
    "Change",
    "Checkpoint",
    "Creation",
    "Deletion",
    "Kept",
    "Message",
    "Proposal",
    "Propose",
    "Record",
    "Refusal",
    "Report",
    "Resolve",
    "Rewind",
    "RingKept",
    "Seating",
    "SnapshotBegun",
    "SnapshotGone",
    "SnapshotTaken",
    "Term",
    "Ticket",
    "Vote",
    "run_of",
    "talk_of",
]

#: The talk about which runs there are. No run has the name.
DIRECTORY = "-directory"


def talk_of(run: str, birth: int) -> str:
    """The name of the talk about one run: another than that of a run that had its name before, or will."""
    return f"{run}@{birth}"


def run_of(talk: str) -> tuple[str, int]:
    """The run that a talk is about, and the run's birth, by which a later run of the name has a larger one; the talk
    itself, and 0, where it is about no run."""
    run, _, birth = talk.rpartition("@")
    return (run, int(birth)) if run and birth.isdecimal() else (talk, 0)


class Term(NamedTuple):
    """A coordinator's number, in order of authority; Raft's word, for ``epoch`` is a version's.

    name: drawn at random by each coordinator, so that two that start at once never share a term. The smallest term is
    nobody's: with it a coordinator asks before it claims one.
    """

    number: int = 0
    name: str = ""


class Seating(NamedTuple):
    """Which hosts have a part in what is decided: all but some. Seatings are ordered; the largest one counts.

    term: of the coordinator that says so. number: of the seating, larger than that of the one before. without: places
    of the hosts that were lost, or were silent for too long, and that are to be filled from their twins before they
    count again; parted by spaces.
    """

    term: Term = Term()
    number: int = 0
    without: str = ""

    @property
    def absent(self) -> frozenset[int]:
        """The places that the seating is without."""
        return frozenset(map(int, self.without.split()))


class Ticket(NamedTuple):
    """The name of a proposal, the same on all shards and at each retry.

    base: the revision that the proposal follows. step: the trainer's, of an update; None of any other proposal. key:
    drawn at random, for an update by its trainer, so that slices which two trainers send for one step are never taken
    for one update; for any other write its Idempotency-Key.
    """

    base: int
    step: int | None
    key: str


class Proposal(NamedTuple):
    """What is to lead from one revision of a run to the next.

    change: what a coordinator brings to all shards, as the cluster encodes it: a decay, a reset, a rewind, a snapshot,
    a writer, creation, deletion. None for an update and for first weights, whose bytes a trainer sends to each shard.
    back: the revision whose checkpoint all shards go back to, 0 to have no weights; None for any other proposal. The
    change of a way back is the outcome of the newest revision that any shard knows, empty where there is none. settles:
    the revision whose checkpoint a shard must have that votes for the proposal, 0 where there is none. seating: with
    which a host that was lost counts again, once the host has the revision that the proposal follows; None for any
    other proposal. word: of a way back, the key of the operator's call that asked for it, empty where the shards go
    back by themselves. to: of such a way back, the change that says what all shards go back to in the checkpoint's
    place, a rewind; empty where that is the checkpoint.
    """

    ticket: Ticket
    change: str | None = None
    back: int | None = None
    settles: int = 0
    seating: Seating | None = None
    word: str = ""
    to: str = ""


class Vote(NamedTuple):
    """A proposal that a shard has prepared: whole, beside the current version, and durable.

    outcome: the facts of base and result that all shards must agree on (version, step, counter, decays, writer), as the
    cluster encodes them.
    """

    proposal: Proposal
    outcome: str

    @property
    def ticket(self) -> Ticket:
        """The ticket of the proposal."""
        return self.proposal.ticket


class Record(NamedTuple):
    """What a shard keeps on disk of one run. A record is replaced as a whole.

    term: of the coordinator that the shard obeys. edition: grows with each change of the three facts below, so that a
    report and a verdict name the very state that they are about. revision: how many proposals were committed since the
    talk began: of a run, since it was made; of the directory, ever. made: the vote that led to the revision. vote: the
    shard's vote for the next. lost: whether the shard's machine took the bytes of the revision with it, and later
    revisions maybe: then the shard votes for the way back alone. settled: the revision whose checkpoint all shards have
    on their disks, 0 before there is one. seating: the largest that the shard was told of; without its own place the
    shard counts for nothing.
    """

    term: Term = Term()
    edition: int = 0
    revision: int = 0
    made: Vote | None = None
    vote: Vote | None = None
    lost: bool = False
    settled: int = 0
    seating: Seating = Seating()


class Kept(NamedTuple):
    """The revisions of which a shard has a checkpoint on its disk: the older and the newer one, equal where there is
    one alone, 0 where there is none."""

    older: int = 0
    newer: int = 0


# --- from a coordinator to a shard; ``shard``: its place among the shards, from 0 ------------------------------------


class Ask(NamedTuple):
    """Report, and from now on obey no coordinator of an earlier term, and know of this seating."""

    shard: int
    term: Term
    seating: Seating = Seating()


class Propose(NamedTuple):
    """Prepare this proposal, which is none that a trainer sends the bytes of."""

    shard: int
    term: Term
    proposal: Proposal


class Resolve(NamedTuple):
    """The verdict on the vote in one edition of a shard's record: committed or aborted. reason: as in Answer."""

    shard: int
    term: Term
    edition: int
    committed: bool
    reason: str = ""


# --- from a shard to its coordinator ---------------------------------------------------------------------------------


class Arrival(NamedTuple):
    """A shard's first words to a coordinator: who it is, and where.

    shard: its place among ``shards``. address: at which others reach the shard. start, stop: its stretch of the bytes
    of all shadows, both 0 while there is no run. twins: whether the later half of the places are those of twins.
    """

    shard: int
    shards: int
    address: str
    start: int = 0
    stop: int = 0
    twins: bool = False


class Report(NamedTuple):
    """How a shard stands. A report whose record holds a vote is that vote.

    waiting: a proposal that the shard has in hand and would prepare if its vote were aborted. overdue: whether that
    proposal has waited as long as a proposal should. kept: by the shard's holder, as the report is sent. returns: so
    too, whether a shard that the seating is without can be filled from its twin. damaged: so too, whether the bytes of
    the record's revision cannot be read, while the record is as it was.
    """

    shard: int
    record: Record
    waiting: Proposal | None = None
    overdue: bool = False
    kept: Kept = Kept()
    returns: bool = False
    damaged: bool = False

    @property
    def term(self) -> Term:
        """Of the coordinator that the shard obeys."""
        return self.record.term


class Refusal(NamedTuple):
    """A shard will never prepare a proposal: its vote against that. reason: for whoever sent or asked for it."""

    shard: int
    term: Term
    ticket: Ticket
    reason: str


# --- between a coordinator, or a shard, and whoever sent a change or a slice to it -----------------------------------


class Change(NamedTuple):
    """What a coordinator is asked to bring to all shards. key: as in Ticket. change, settles: as in Proposal.

    mends: whether it is an operator's word, by which shards may go on after damage: with ``change``, a rewind, or where
    that is empty with the newest checkpoint that all have.
    """

    key: str
    change: str
    settles: int = 0
    mends: bool = False


class Adjustment(NamedTuple):
    """What a change changes, encoded as Proposal.change has it.

    kind: ``decay``, of one average, the first by default; ``reset``, of the counters; ``writer``, a trainer that takes
    over.
    """

    kind: str
    decay: float | None = None
    average: str | None = None


class Checkpoint(NamedTuple):
    """A change after which each shard writes its version of that revision to its disk; the version stays."""


class SnapshotBegun(NamedTuple):
    """A change after which each shard writes its version of that revision as a snapshot, which nobody finds yet.

    created_at: the same on all hosts. key: of the call that asked, by which the call is known when it comes again.
    held: whether the shard keeps its version in memory instead, for an average that is to be worked out of it.
    """

    name: str
    created_at: float
    key: str
    held: bool = False


class SnapshotTaken(NamedTuple):
    """A change by which a snapshot that was begun is there. gone: names of older ones of its series that go, parted by
    spaces. recipe: how the one average of a snapshot is worked out whose version was held, as one host has found it;
    empty of any other snapshot."""

    name: str
    created_at: float
    gone: str = ""
    recipe: str = ""


class SnapshotGone(NamedTuple):
    """A change by which a snapshot is there no more. begun: whether it was begun alone, and may not be on all hosts."""

    name: str
    created_at: float
    begun: bool = False


class Rewind(NamedTuple):
    """A change by which the run goes back to a snapshot, in a new epoch.

    created_at, version, step: of the snapshot. source: the run of the snapshot, where the run branches from another.
    """

    snapshot: str
    created_at: float
    version: str = ""
    step: int | None = None
    source: str | None = None


class RingKept(NamedTuple):
    """A change after which a run's ring has these snapshots, and no others.

    epoch: of the run's versions, by which the snapshots were chosen. versions: their names, parted by spaces.
    """

    epoch: int
    versions: str


class AverageAdded(NamedTuple):
    """A change by which the run has one more average. config: of the average, JSON. lineage: tells the average apart
    from others of its name, the same on all hosts."""

    config: str
    lineage: str


class AverageRemoved(NamedTuple):
    """A change by which the run has one average less."""

    name: str


class Creation(NamedTuple):
    """A change of the directory: one run more. config: of the whole run, packed. created_at: the same on all hosts."""

    config: str
    created_at: float


class Deletion(NamedTuple):
    """A change of the directory: one run less. birth: the directory's revision that the run came with, which no other
    run of the name has."""

    run: str
    birth: int


class Answer(NamedTuple):
    """What became of a proposal.

    reason: why a shard refused the proposal, empty where none did. A proposal that was neither committed nor refused is
    superseded: nothing was changed, and its sender sends the proposal again, if it is still meant.
    """

    key: str
    committed: bool
    reason: str = ""


#: Whatever is encoded: a message, what a change changes, or the record that a shard keeps.
Message: TypeAlias = (
    Adjustment
    | Answer
    | Arrival
    | Ask
    | AverageAdded
    | AverageRemoved
    | Change
    | Checkpoint
    | Creation
    | Deletion
    | Propose
    | Record
    | Refusal
    | Report
    | Resolve
    | Rewind
    | RingKept
    | SnapshotBegun
    | SnapshotGone
    | SnapshotTaken
)
