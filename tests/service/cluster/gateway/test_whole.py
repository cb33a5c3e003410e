"""What hosts say of a ring, as one server would say it of the whole run.

Knows the dataclasses of the protocol. Does not know HTTP.
"""

from __future__ import annotations

from dataclasses import replace

from ema_client.protocol import RingInfo
from ema_service.cluster.gateway.whole import whole_ring


def test_a_ring_is_what_all_hosts_have() -> None:
    """Its times; as many bytes as all have, as much waits as anywhere, and whose trouble it is."""
    first = RingInfo(3, "F32", (0.1,), (1, 2, 4), 0, 10, waiting=1)
    assert whole_ring([first, first]) == replace(first, bytes=20)
    other = replace(first, times=(1, 4, 5), begin=None, bytes=7, waiting=2, trouble="no space")
    whole = replace(first, times=(1, 4), begin=None, bytes=17, waiting=2, trouble="host 1: no space")
    assert whole_ring([first, other]) == whole
    assert whole_ring([None, None]) is None
    assert whole_ring([first, None]) is None
