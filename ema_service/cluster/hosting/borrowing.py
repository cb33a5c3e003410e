"""What a host copies from its twin, to have what that one has: see lending, the other end.

Knows HTTP, and where the twin is, by the coordinators' map. Does not know what becomes of what is copied.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ema_client.errors import Overloaded
from ema_client.protocol import DIGEST_BYTES
from ema_service.averaging.digest import Digest
from ema_service.cluster.hosting.lending import LENDING
from ema_service.cluster.messages import DIRECTORY
from ema_service.cluster.token import ClusterToken
from ema_service.cluster.whereabouts import coordinator_url
from ema_service.memory import Arena
from ema_service.persistence.rows import read_setup, version_of
from ema_service.runs import Run, Setup, State
from ema_service.tls import trusting

__all__ = ["Copied", "Twin"]

#: Seconds of silence, and in all, after which a copy is given up: all hosts hold their votes meanwhile.
_SILENCE, _MOST_SECONDS = 5.0, 900.0
_LINE_BYTES = 1 << 20
_PIECE = 4 << 20


@dataclass(frozen=True, slots=True)
class Copied:
    """A run as the twin has it. outcome: of the twin's vote. state: None where the run has no weights."""

    outcome: str
    state: State | None


class Twin:
    """The other host of a shard. place: its place among all hosts."""

    def __init__(self, place: int, coordinators: Sequence[str], token: ClusterToken) -> None:
        self._place = place
        self._coordinators = coordinators
        self._token = token

    def runs(self, key: str | None = None) -> list[dict[str, Any]]:
        """The runs that the twin has. key: of the vote that the twin must hold. Raises Overloaded."""
        query = f"?key={quote(key)}" if key else ""
        with self._opened(f"/directory{query}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["runs"]
            return found

    def averages(self, run: Run, key: str) -> Setup:
        """Which averages the twin's run is to have, while the twin holds its vote of this key. Raises Overloaded."""
        with self._opened(f"/runs/{quote(run.config.run)}/averages?key={quote(key)}") as answer:
            return read_setup(run.ledger.setup.created, json.load(answer)["averages"])

    def copy(self, run: Run, key: str) -> Copied:
        """The version of a run that has the twin's averages, while the twin holds its vote of this key. Raises
        Overloaded, where the twin is away, or its bytes are not those that it says."""
        until = time.monotonic() + _MOST_SECONDS
        with self._opened(f"/runs/{quote(run.config.run)}?key={quote(key)}") as answer:
            head = json.loads(answer.readline(_LINE_BYTES))
            if head["state"] is None:
                return Copied(head["outcome"], None)
            version = version_of(head["state"], run.ledger.setup)
            if len(head["averages"]) != len(version.averages):
                raise ValueError(f"{len(head['averages'])} averages, and this host has {len(version.averages)} of them")
            arenas = tuple(_arena(run, answer, count, until) for count in head["averages"])
            return Copied(head["outcome"], State(version, arenas))

    def snapshots(self, run: str) -> list[dict[str, Any]]:
        """The snapshots of a run that the twin has, as Snapshots.lent() tells of them. Raises Overloaded."""
        with self._opened(f"/runs/{quote(run)}/snapshots") as answer:
            found: list[dict[str, Any]] = json.load(answer)["snapshots"]
            return found

    def snapshot(self, run: str, name: str, average: str, size: int) -> Iterator[bytes]:
        """The file of one average of a snapshot, of so many bytes. Raises Overloaded."""
        return self._file(f"/runs/{quote(run)}/snapshots/{quote(name)}/{quote(average)}", size)

    def ring(self, run: str) -> list[dict[str, Any]]:
        """The snapshots of a run's ring that the twin has, as ShardRing.lent() tells of them. Raises Overloaded."""
        with self._opened(f"/runs/{quote(run)}/ring") as answer:
            found: list[dict[str, Any]] = json.load(answer)["ring"]
            return found

    def ring_file(self, run: str, version: str, name: str, size: int) -> Iterator[bytes]:
        """One file of a snapshot of a ring, of so many bytes. Raises Overloaded."""
        return self._file(f"/runs/{quote(run)}/ring/{quote(version)}/{quote(name)}", size)

    def _file(self, path: str, size: int) -> Iterator[bytes]:
        with self._opened(path) as answer:
            while size:
                piece = answer.read(min(size, _PIECE))
                if not piece:
                    raise OSError(f"{path} broke off")
                size -= len(piece)
                yield piece

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[http.client.HTTPResponse]:
        """The twin's answer. Raises Overloaded."""
        try:
            with self._asked(f"{self._address()}{LENDING}{path}") as answer:
                yield answer
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as fault:
            raise Overloaded(
                f"host {self._place} lends nothing to its twin: {type(fault).__name__}: {fault}", retry_after=1.0
            ) from fault

    def _address(self) -> str:
        """Where the twin is. Raises OSError, ValueError, KeyError."""
        for url in self._coordinators:
            with contextlib.suppress(OSError):
                with self._asked(f"{coordinator_url(url)}/v1/runs/{DIRECTORY}/shards") as answer:
                    seats = json.load(answer)["shards"]
                return str(next(seat["address"] for seat in seats if seat["place"] == self._place)).rstrip("/")
        raise ValueError("no coordinator says where it is")

    def _asked(self, url: str) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, headers={"Authorization": self._token.header})
        tls = urllib.request.HTTPSHandler(context=trusting())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
        answer: http.client.HTTPResponse = opener.open(request, timeout=_SILENCE)
        return answer


def _arena(run: Run, answer: http.client.HTTPResponse, count: int, until: float) -> Arena:
    """One average's bytes. Raises ValueError where others come than were announced, OSError where they take too
    long."""
    if count != run.layout.shadow_bytes:
        raise ValueError(f"{count} bytes, and the run's layout has {run.layout.shadow_bytes}")
    host, found = run.memory.landing(count), Digest()
    data = memoryview(host.data)
    at = 0
    while at < count:
        got = answer.readinto(data[at : at + _PIECE])
        if not got or time.monotonic() > until:
            raise OSError(f"{at} of {count} bytes came")
        found.update(data[at : at + got])
        at += got
    if answer.read(DIGEST_BYTES) != found.digest():
        raise ValueError("bytes were damaged on their way")
    arena = Arena(run.layout, run.memory.to_device(host))
    arena.digest = found.digest()
    return arena
