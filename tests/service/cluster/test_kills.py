"""A kill costs an update seconds, not minutes: the bounds that are promised, on a machine that does little else.

Knows the bounds. Does not know how the time is taken (kills).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from statistics import median

import pytest

from tests.service.cluster.kills import BOUNDS, seconds_after
from tests.service.cluster.launched import Launched

_KILLS = 7


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    found = Launched(tmp_path_factory.mktemp("cluster") / "all", "--local", "2").start()
    yield found
    found.end()


@pytest.mark.soak
@pytest.mark.parametrize("program", BOUNDS)
def test_an_update_after_a_kill(cluster: Launched, program: str) -> None:
    """A host's, and the coordinator's: within the bounds, which are as many times longer as a core is shared."""
    found = list(seconds_after(cluster, program, _KILLS))
    shared = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    usual, worst = BOUNDS[program]
    assert median(found) <= usual * shared, found
    assert max(found) <= worst * shared, found
