"""What hosts say of a ring, of snapshots and of themselves, as one server would say it of the whole run.

Knows the dataclasses of the protocol. Does not know HTTP.
"""

from __future__ import annotations

from dataclasses import replace

from ema_client.protocol import RingInfo, ServerInfo, SnapshotInfo
from ema_service.cluster.gateway.whole import whole_ring, whole_server, whole_snapshot


def test_a_ring_is_what_all_hosts_have() -> None:
    """Its times; as many bytes as all have, as much waits as anywhere, and whose trouble it is."""
    first = RingInfo(3, "F32", (0.1,), (1, 2, 4), 0, 10, waiting=1)
    assert whole_ring([first, first]) == replace(first, bytes=20)
    other = replace(first, times=(1, 4, 5), begin=None, bytes=7, waiting=2, trouble="no space")
    whole = replace(first, times=(1, 4), begin=None, bytes=17, waiting=2, trouble="host 1: no space")
    assert whole_ring([first, other]) == whole
    assert whole_ring([None, None]) is None
    assert whole_ring([first, None]) is None


def test_a_snapshot_is_stored_once_all_its_shards_are() -> None:
    """Until then it would be lost with the data dir of a host."""
    local = SnapshotInfo("r", "s", "1.1", 1, 1, ("ema",), 10, 2.5)
    stored = replace(local, stored="store")
    assert whole_snapshot([stored, stored]) == replace(stored, bytes=20)
    assert whole_snapshot([stored, local]) == whole_snapshot([local, stored]) == replace(local, bytes=20)


def test_a_store_that_fails_at_one_host_is_told() -> None:
    """With the host, and what waits at all of them; of hosts without a store nothing waits."""
    well = ServerInfo("ema-service", "1", scopes=("pull",), snapshots_waiting=1)
    ill = replace(well, snapshots_waiting=2, snapshot_store_fault="no such bucket")
    whole = whole_server([well, ill])
    assert (whole.snapshots_waiting, whole.snapshot_store_fault) == (3, "host 1: no such bucket")
    assert whole_server([well, well]).snapshot_store_fault is None
    assert whole_server([replace(well, snapshots_waiting=None)]).snapshots_waiting is None
