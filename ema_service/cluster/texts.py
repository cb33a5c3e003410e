"""The texts of a cluster: a shard's record as its catalog keeps it, the changes that a coordinator brings, reasons.

JSON, readable also for whoever has to look at a catalog by hand. Knows the members of those texts. Does not know what
follows from a record (decisions), or where a text is kept or sent.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from ema_client.errors import EmaError, Superseded, error_from_problem
from ema_service.cluster.messages import Proposal, Record, Term, Ticket, Vote

__all__ = ["Adjustment", "dump_record", "error_of", "lineage_of", "load_record", "reason_of"]


class Adjustment(NamedTuple):
    """A write other than weights. kind: ``decay``, of one average, the first by default; ``reset``, of the counters;
    ``writer``, a trainer that takes over."""

    kind: str
    decay: float | None = None
    average: str | None = None

    def dump(self) -> str:
        """The text of the change, as Proposal.change has it."""
        return json.dumps(self._asdict())

    @classmethod
    def load(cls, text: str) -> Adjustment:
        """The change of a text. Raises ValueError, TypeError."""
        return cls(**json.loads(text))


def dump_record(record: Record) -> str:
    """The text of a record; its member ``revision`` is what a restart goes by."""
    return json.dumps(
        {
            "revision": record.revision,
            "edition": record.edition,
            "term": record.term,
            "made": _said(record.made),
            "vote": _said(record.vote),
        }
    )


def load_record(text: str) -> Record:
    """The record of a text; the empty text is that of a shard that never kept one."""
    if not text:
        return Record()
    said = json.loads(text)
    vote, made = _vote(said["vote"]), _vote(said["made"])
    return Record(Term(*said["term"]), said["edition"], said["revision"], made, vote)


def reason_of(fault: EmaError) -> str:
    """Why a proposal is refused, for every shard's sender."""
    return json.dumps(fault.to_problem())


def error_of(reason: str) -> EmaError:
    """The error that a refusal on another shard stands for; Superseded for a reason that no error gave."""
    try:
        problem = json.loads(reason)
        return error_from_problem(problem, problem["status"])
    except (ValueError, KeyError, TypeError):
        return Superseded(reason, retry_after=0.0)


def lineage_of(key: str) -> str:
    """The lineage of a run whose initial weights come under this key: the same on all shards, and no other run's."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _said(vote: Vote | None) -> dict[str, Any] | None:
    if vote is None:
        return None
    return {**vote.ticket._asdict(), "change": vote.proposal.change, "outcome": vote.outcome}


def _vote(said: dict[str, Any] | None) -> Vote | None:
    if said is None:
        return None
    return Vote(Proposal(Ticket(said["base"], said["step"], said["key"]), said["change"]), said["outcome"])
