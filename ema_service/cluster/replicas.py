"""Which replicas of hosts there are: heard within the last seconds, as every replica speaks once a second.

Pure. A replica has no vote: nothing that is decided hangs on one. Does not know what a replica holds, which its readers
find out by ETag, or how one follows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ema_service.cluster.messages import Arrival

if TYPE_CHECKING:
    from ema_service.cluster.conversation import Seat

__all__ = ["Replica", "Replicas", "original_of"]

#: Seconds without a word after which a replica counts as gone.
_SILENCE = 5.0


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica of the host at a place. address: at which others read it. since: when it was heard first, Unix
    seconds."""

    place: int
    address: str
    since: float


class Replicas:
    """The replicas of one cluster, as its coordinator hears them. now: Unix seconds, wherever a method takes it."""

    def __init__(self) -> None:
        self._heard: dict[tuple[int, str], tuple[Replica, float]] = {}

    def hear(self, arrival: Arrival, now: float) -> None:
        """A replica has spoken. One that cannot be read yet says so by an empty address, and is not listed."""
        if not arrival.address:
            return
        key = arrival.shard, arrival.address
        replica, _ = self._heard.get(key, (Replica(*key, since=now), now))
        self._heard[key] = replica, now

    def now(self, now: float) -> tuple[Replica, ...]:
        """The replicas that are there, by place and address; those that fell silent are forgotten."""
        self._heard = {key: each for key, each in self._heard.items() if now - each[1] < _SILENCE}
        return tuple(self._heard[key][0] for key in sorted(self._heard))


def original_of(place: int, seats: Mapping[int, Seat], left: Collection[int], *, twins: bool) -> str | None:
    """The address of the host that a replica of this place follows, None while there is none. Of twins the other host,
    where that one alone is there, or has everything.

    left: the places that the others go on without, in any talk.
    """
    pair = [seats[place]]
    if twins:
        pair.append(seats[(place + len(seats) // 2) % len(seats)])
    return min(pair, key=lambda seat: (not seat.listens, seat.place in left)).address
