"""Every setting of the server, with its default and its reason.

Knows plain values. Does not know how they are used; reads neither the environment nor a file (the command line does,
see cli.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from ema_service.machine_memory import memory_limit

__all__ = ["DEFAULT_DATA_DIR", "Settings", "quarter_of_memory"]

DEFAULT_DATA_DIR = Path("ema-data")


def quarter_of_memory() -> int:
    """A quarter of what this machine, or this process' control group, has of memory, in bytes."""
    return memory_limit() // 4


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    data_dir: where runs are kept; None keeps everything in memory (no snapshots, nothing survives the process).
    ram_dir: where versions of durability ``process`` lie in memory; None for a folder of the user's own in /dev/shm.
    device: where shadows lie: "auto" (a CUDA device if there is one, else the CPU), or any torch device.
    memory_limit: most memory of the server's process in all, with the files in memory that belong to it: what the
    process is made of, shadows, layouts, pushes, versions being read, and memory that waits to be used again.
    staging_bytes: of that, most for pushes being received or applied.
    frozen_bytes: of that, most for versions held for readers beside the current ones.
    checkpoint_interval: seconds between two looks for runs of durability ``process`` or ``memory`` that moved since
    their last checkpoint.
    body_timeout: seconds that a sender may stay silent in the middle of a body, and that a reader may take nothing.
    max_connections: most connections at once; fewer where the process may not have twice as many descriptors.
    max_watchers: most streams of events at once, and no more than half of the connections: each keeps one open.
    With the reads that wait for a step they keep three quarters of the connections at most.
    max_lanes: most connections at once that bring stretches of one update, shared evenly by its parts, one each at the
    least; 1 takes none. With those of all updates they are a quarter of the connections at most.
    max_snapshots: most snapshots of one run: whoever may take them shall not fill the disk.
    snapshot_store: URL of an object store, or a folder, that snapshots are moved to; None leaves them in the data dir.
    token_file: tokens and what each may do; None asks nobody for a token.
    allowed_hosts: names by which clients reach the server, beside IP addresses and this machine's own names. Where no
    token is asked for, other names are refused (api/origins.py).
    announce: what others know the server by: a host name, an address, or a whole URL; None for the address that it
    listens on. slow_request: seconds beyond which the log tells of a request. access_log: whether it tells of each.
    measurements: whether each update is measured: how far shadow and parameters are apart, rates, times.
    address_file: a file for clients that says where the server is, while it listens; None for none.
    shard: which host of a cluster the server is, from 0, of how many; None for a server that decides alone.
    twins: whether the later half of the hosts are twins of the earlier half, each with the same shard.
    coordinators: URLs of the cluster's coordinators. cluster_token_file: the secret that coordinators and hosts share.
    cluster_address: URL at which other hosts reach the server; None for what it announces. lease: seconds without a
    word of a coordinator, or of what started the server, after which a host ends itself; None for none.
    replica_of: URL of the server whose runs this one follows and serves, taking no write; None for a server of its own
    runs. replica_place: in a cluster, which host of how many the server is a replica of, in place of a URL.
    replica_token: of a reader there, where tokens are asked for.
    json_bytes: most bytes of JSON bodies held at one time; the largest there may be, a layout, has 32 MiB.
    """

    data_dir: Path | None = DEFAULT_DATA_DIR
    ram_dir: Path | None = None
    device: str = "auto"
    memory_limit: int = field(default_factory=memory_limit)
    staging_bytes: int = field(default_factory=quarter_of_memory)
    frozen_bytes: int = field(default_factory=quarter_of_memory)
    checkpoint_interval: float = 60.0
    body_timeout: float = 60.0
    json_bytes: int = 64 << 20
    max_connections: int = 2048
    max_watchers: int = 512
    max_lanes: int = 8
    max_snapshots: int = 1000
    snapshot_store: str | None = None
    token_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    announce: str | None = None
    address_file: Path | None = None
    slow_request: float = 30.0
    access_log: bool = False
    measurements: bool = True
    shard: tuple[int, int] | None = None
    twins: bool = False
    coordinators: tuple[str, ...] = ()
    cluster_token_file: Path | None = None
    cluster_address: str | None = None
    lease: float | None = None
    replica_of: str | None = None
    replica_place: tuple[int, int] | None = None
    replica_token: str | None = field(default=None, repr=False)

    @property
    def first_number(self) -> int:
        """The least number that this process has among those of the data dir (Store.number): of a host of a cluster the
        time, so that a host whose data dir was lost, and with it the count, is heard as the latest."""
        return int(time.time()) if self.shard else 1
