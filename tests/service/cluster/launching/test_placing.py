"""Which node each host is to be on: its data's, else one with few, and no node for both hosts of a shard.

Knows places and nodes. Does not know Ray, which need not be installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_service.cluster.launching.placing import chosen, places_in, twin_of


@pytest.mark.parametrize(
    ("places", "has", "expected"),
    [
        ([0, 1, 2], {"a": set(), "b": set()}, {0: "a", 1: "b", 2: "a"}),
        ([0, 1], {"a": {1}, "b": {0}}, {0: "b", 1: "a"}),
        ([2], {"a": {0, 1}, "b": set()}, {2: "b"}),
        ([0, 1, 2], {"a": {0, 1, 2}, "b": set()}, {0: "a", 1: "a", 2: "a"}),
    ],
)
def test_a_host_is_where_its_data_is(places: list[int], has: dict[str, set[int]], expected: dict[int, str]) -> None:
    """And a new one where there are few."""
    assert chosen(places, has) == expected


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shards", [2, 3, 5])
def test_twins_are_on_two_nodes(shards: int, nodes: int) -> None:
    """However many of each there are, and evenly, where there are two; on one node all are."""
    of = 2 * shards
    found = chosen(range(of), {f"n{i}": set() for i in range(nodes)}, of)
    together = [place for place in range(shards) if found[place] == found[twin_of(place, of)]]
    assert together == ([] if nodes > 1 else [*range(shards)])
    many = [list(found.values()).count(node) for node in set(found.values())]
    assert max(many) - min(many) <= 1


def test_a_twin_goes_by_data_first() -> None:
    """A host without data is not put beside its twin, whose data is there, though that node has the fewest; one that
    has its data there stays."""
    assert chosen([2], {"a": {0}, "b": {1, 3}}, 4) == {2: "b"}
    assert chosen([0, 2], {"a": {0, 2}, "b": set()}, 4) == {0: "a", 2: "a"}


def test_what_is_in_a_folder(tmp_path: Path) -> None:
    """Data dirs of hosts that have been started; nothing else that lies there."""
    for name in ("host-0", "host-12", "host-x", "replica-1-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "catalog.db").touch()
    (tmp_path / "host-3").mkdir()
    assert places_in(tmp_path) == {0, 12}
    assert places_in(tmp_path / "none") == set()
