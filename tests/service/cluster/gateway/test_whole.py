"""What hosts say of a ring, of snapshots, of themselves, and of a run that is damaged, as one server would say it of
the whole run.

Knows the dataclasses of the protocol. Does not know HTTP.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ema_client.protocol import (
    RingInfo,
    RunConfig,
    RunInfo,
    ServerInfo,
    ShardInfo,
    SnapshotInfo,
    SnapshotList,
    TensorSpec,
)
from ema_service.cluster.gateway.whole import (
    Apart,
    degraded_info,
    whole_info,
    whole_ring,
    whole_server,
    whole_snapshot,
    whole_snapshots,
)
from tests.service.conftest import LocalServer


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


def info_of_a_shard() -> RunInfo:
    """What a host tells of its shard of a run of three tensors, one of them copied."""
    server = LocalServer(None)
    server.registry.create(RunConfig("r", (TensorSpec("a.w", (4, 2), "F32"),)))
    return replace(server.run("r").info, shard=ShardInfo(0, 2, 5, tensors=3, copied=1))


def test_a_run_is_counted_without_its_layout() -> None:
    """A tensor that is cut is on two hosts and counts once; of dtypes each is told once. Hosts that tell of runs of two
    times are apart, though either is as new as the other."""
    info = info_of_a_shard()
    other = replace(info, shadow_dtype="F64+F32", shard=ShardInfo(1, 2, 5, tensors=3, copied=1))
    told = whole_info([other, info])
    assert (told.tensors, told.copied, told.parameters, told.shadow_dtype) == (3, 1, 16, "F64+F32")
    with pytest.raises(Apart):
        whole_info([info, replace(other, shard=ShardInfo(1, 2, 6, tensors=3, copied=1))])


def test_a_degraded_run_is_as_the_host_has_it_that_is_behind() -> None:
    """With that host's reason, or else the coordinator's; hosts that are apart for a moment are no answer."""
    info = info_of_a_shard()
    ahead = replace(info, status="ready", version="1.4", step=4, parameters=8)
    behind = replace(ahead, version="1.2", step=2)
    damaged = replace(behind, status="degraded", reason="steps 3 and 4 are gone", remedy="ema rewind")
    with pytest.raises(Apart):
        whole_info([ahead, behind])
    told = degraded_info([ahead, behind], "an older copy?")
    assert (told.status, told.version, told.step, told.reason) == ("degraded", "1.2", 2, "an older copy?")
    assert "ema rewind" in str(told.remedy)
    told = degraded_info([ahead, damaged], "shard 1 is damaged")
    assert (told.version, told.reason, told.remedy) == ("1.2", "host 1: steps 3 and 4 are gone", "ema rewind")
    assert told.parameters == 16


def test_snapshots_are_those_that_all_hosts_have() -> None:
    """A host whose data dir is an older copy lacks some, and has others of the same name."""
    first = SnapshotInfo("r", "s", "1.1", 1, 1, ("ema",), 10, 5.0)
    later, other = replace(first, name="later", created_at=6.0), replace(first, name="t", created_at=7.0)
    found = whole_snapshots(
        [SnapshotList((first, later, other)), SnapshotList((replace(other, created_at=4.0), first))]
    )
    assert [(each.name, each.bytes) for each in found.snapshots] == [("s", 20)]
