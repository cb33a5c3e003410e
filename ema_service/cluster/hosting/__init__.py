"""Hosting: what makes a server a host of a cluster, each of whose runs is a shard.

Knows the runs of this server, the coordinators that decide for them, and what is kept before anything is said to one.
Does not know the other hosts, or what the runs are as a whole.
"""

from __future__ import annotations

from ema_service.cluster.hosting.reporting import RecordStore, Reporting
from ema_service.cluster.hosting.shard_run import ShardRun

__all__ = ["RecordStore", "Reporting", "ShardRun"]
