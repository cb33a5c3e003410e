"""Cluster: a run over several hosts, each of which holds a shard of it. Who decides, and by which messages.

Knows revisions, tickets, votes and coordinators' terms, and the run whose shard is here. Does not know HTTP, how
weights are kept or averaged, or which program starts the hosts.
"""

from __future__ import annotations

from ema_service.cluster.decisions import Coordinator, Shard
from ema_service.cluster.messages import (
    Answer,
    Ask,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Term,
    Ticket,
    Vote,
)
from ema_service.cluster.shard_run import ShardRun
from ema_service.cluster.texts import Change

__all__ = [
    "Answer",
    "Ask",
    "Change",
    "Coordinator",
    "Proposal",
    "Propose",
    "Record",
    "Refusal",
    "Report",
    "Resolve",
    "Shard",
    "ShardRun",
    "Term",
    "Ticket",
    "Vote",
]
