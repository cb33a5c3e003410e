"""Two hosts for each shard, as a gateway reaches them: which of the two is read from, and who hears what is written.

    shard 0    host 0  host 2        of k shards, host k + i has the same as host i
    shard 1    host 1  host 3        one of the two is left out while the others go on without it
    replicas are those of the shard, whichever of its hosts they name

Knows the coordinator's map. Does not know requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ema_client.errors import Overloaded
from ema_service.cluster.messages import DIRECTORY, run_of

__all__ = ["HostAddress", "Twins"]

_RUN = re.compile(r"/v1/runs/([^/?]+)")


class HostAddress(NamedTuple):
    """A shard's host, or a replica of it. place: of the shard. address: a URL, without a slash at the end. chosen:
    whether this very host is meant, and not whichever of two has the shard. replicas: the URLs of a host's."""

    place: int
    address: str
    chosen: bool = False
    replicas: tuple[str, ...] = ()
    is_replica: bool = False

    @property
    def holders(self) -> tuple[HostAddress, ...]:
        """Who may hold a version: the host itself, then its replicas."""
        return self, *(HostAddress(self.place, each, is_replica=True) for each in self.replicas)

    def __str__(self) -> str:
        return f"{'a replica of ' if self.is_replica else ''}host {self.place} ({self.address})"


class Twins:
    """The hosts of a map of twins. hosts: one for each shard, which is there where one is."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        """told: by a coordinator. Raises Overloaded where no host of a shard ever came; ValueError for what is no
        map."""
        try:
            seats = sorted(told["shards"], key=lambda seat: int(seat["place"]))
            self._addresses = [str(seat["address"] or "").rstrip("/") for seat in seats]
            self._there = {int(seat["place"]) for seat in seats if seat["listens"]}
            self._absent = {str(talk): frozenset(map(int, places)) for talk, places in told["absent"].items()}
            self._talks = [(*run_of(talk), talk) for talk in self._absent]
            self._shards = len(seats) // 2
            self._replicas: dict[int, tuple[str, ...]] = dict.fromkeys(range(self._shards), ())
            for each in told.get("replicas", ()):
                self._replicas[int(each["place"]) % self._shards] += (str(each["address"]).rstrip("/"),)
        except (AttributeError, KeyError, TypeError) as fault:
            raise ValueError(f"no map: {type(fault).__name__}") from None
        self.hosts = tuple(self._best(shard, self._absent_of(None)) for shard in range(self._shards))

    @property
    def every(self) -> tuple[HostAddress, ...]:
        """All hosts, by their own places."""
        return tuple(
            HostAddress(place, address, chosen=True, replicas=self._replicas[place % self._shards])
            for place, address in enumerate(self._addresses)
        )

    def serving(self, host: HostAddress, path: str) -> HostAddress:
        """The host that answers a request to a shard, of a path."""
        if host.chosen or host.is_replica:
            return host
        found = _RUN.match(path)
        return self._best(host.place, self._absent_of(None) | self._absent_of(found[1] if found else None))

    def counts(self, host: HostAddress, path: str) -> bool:
        """Whether the host of an address counts for what a request with this path is about."""
        found = _RUN.match(path)
        absent = self._absent_of(None) | self._absent_of(found[1] if found else None)
        return any(host.address == address for place, address in enumerate(self._addresses) if place not in absent)

    def both(self, run: str) -> tuple[tuple[HostAddress, ...], ...]:
        """By shard, the hosts that count for a run, those that are there before others."""
        absent = self._absent_of(run)
        return tuple(
            tuple(self._chosen(shard, place) for place in self._places(shard) if place not in absent)
            for shard in range(self._shards)
        )

    def _places(self, shard: int) -> list[int]:
        return sorted((shard, shard + self._shards), key=lambda place: place not in self._there)

    def _chosen(self, shard: int, place: int) -> HostAddress:
        return HostAddress(shard, self._addresses[place], chosen=True, replicas=self._replicas[shard])

    def _best(self, shard: int, absent: frozenset[int]) -> HostAddress:
        """A shard's host that has everything, and is there; the first one where none is."""
        known = [place for place in self._places(shard) if self._addresses[place]]
        if not known:
            raise Overloaded(f"no host of shard {shard} has come to the coordinator yet")
        whole = [place for place in known if place not in absent] or known
        return HostAddress(shard, self._addresses[whole[0]], replicas=self._replicas[shard])

    def _absent_of(self, run: str | None) -> frozenset[int]:
        """The places that the others go on without: of a run, of the latest of its name; None: of the directory."""
        if run is None:
            return self._absent.get(DIRECTORY, frozenset())
        births = [(birth, talk) for name, birth, talk in self._talks if name == run]
        return self._absent[max(births)[1]] if births else frozenset()
