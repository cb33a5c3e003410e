"""Cluster: a run over several hosts, each of which holds a shard of it. Which rows those are, who decides, and by which
messages.

Knows layouts, revisions, tickets, votes and coordinators' terms. Does not know how weights are kept or averaged: the
runs of a host are hosting's, those of all hosts together a gateway's, and which program starts them launching's.
"""

from __future__ import annotations

from ema_service.cluster.decisions import Coordinator, Shard, after_loss, emptied
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.layout_map import LayoutMap, MergedBody, ShardLayout, Span
from ema_service.cluster.messages import (
    Adjustment,
    Answer,
    Arrival,
    Ask,
    AverageAdded,
    AverageRemoved,
    Change,
    Checkpoint,
    Creation,
    Deletion,
    Kept,
    Message,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Rewind,
    RingKept,
    Seating,
    SnapshotBegun,
    SnapshotGone,
    SnapshotTaken,
    Term,
    Ticket,
    Vote,
)
from ema_service.cluster.token import ClusterToken

__all__ = [
    "Adjustment",
    "Answer",
    "Arrival",
    "Ask",
    "AverageAdded",
    "AverageRemoved",
    "Change",
    "Checkpoint",
    "ClusterToken",
    "Coordinator",
    "Creation",
    "Deletion",
    "Kept",
    "LayoutMap",
    "MalformedMessage",
    "MergedBody",
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
    "Shard",
    "ShardLayout",
    "SnapshotBegun",
    "SnapshotGone",
    "SnapshotTaken",
    "Span",
    "Term",
    "Ticket",
    "Vote",
    "after_loss",
    "decode",
    "emptied",
    "encode",
]
