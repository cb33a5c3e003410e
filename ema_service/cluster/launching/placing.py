"""Which node each host of a cluster is to be on, where hosts have data on their nodes' disks. Pure, but for one look at
a folder.

Knows places, twins, and what nodes have. Does not know Ray, or how anything is started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["chosen", "places_in", "twin_of"]


def twin_of(place: int, of: int) -> int:
    """The other place with the same shard, of so many places with twins."""
    return (place + of // 2) % of


def places_in(folder: Path) -> set[int]:
    """Which places have a data dir in a folder of this node."""
    found = (each.parent.name.removeprefix("host-") for each in folder.glob("host-*/catalog.db"))
    return {int(each) for each in found if each.isdigit()}


def chosen(places: Iterable[int], has: Mapping[str, set[int]], twins_of: int | None = None) -> dict[int, str]:
    """A node for each place: the one with its data, else one with few places, that of its twin last of all.

    has: the nodes that may be chosen, and the places whose data each of them has. twins_of: the number of places where
    they are twins', None where no place has a twin.
    """
    homes: dict[int, str] = {}
    taken = {node: set(found) for node, found in has.items()}
    # Shard by shard, so that the nodes with the fewest places are left to both hosts of the next one.
    for place in sorted(places, key=lambda place: place if twins_of is None else place % (twins_of // 2)):
        twin = None if twins_of is None else twin_of(place, twins_of)
        having = [node for node, found in has.items() if place in found]
        few = min(taken, key=lambda node: (twin in taken[node], len(taken[node]), node))
        homes[place] = having[0] if having else few
        taken[homes[place]].add(place)
    return homes
