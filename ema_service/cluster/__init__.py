"""Cluster: a run over several hosts, each of which holds a shard of it. Who decides, and by which messages.

Knows revisions, tickets, votes and coordinators' terms. Does not know HTTP, files, tensors, or which program starts the
hosts.
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

__all__ = [
    "Answer",
    "Ask",
    "Coordinator",
    "Proposal",
    "Propose",
    "Record",
    "Refusal",
    "Report",
    "Resolve",
    "Shard",
    "Term",
    "Ticket",
    "Vote",
]
