"""The ranks of one sharded trainer, which send parts to the hosts of a run, by plain HTTP.

A rank keeps what it sent until the step is applied, and sends a host again what the host has lost. Knows routes, and
how a rank's part is cut. Does not know what is tried with ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import httpx
from torch import Tensor

from ema_client.protocol import DIGEST_BYTES
from ema_client.wire import LENGTH_BYTES, PartCut, cut_part, parse_header
from ema_service.averaging.digest import SizedDigest
from ema_service.cluster import LayoutMap
from ema_service.memory import Layout
from tests.service.cluster.servers import Servers
from tests.service.conftest import specs_of
from tests.service.runs.gatherer import part_body, rows

__all__ = ["Ranks", "bodies_of", "digest_of"]

_SECONDS = 60.0


def bodies_of(body: bytes, shards: LayoutMap) -> list[bytes]:
    """What each host is sent of a part."""
    length = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
    held = [{name: box[0] if box else None for name, box in shard.boxes.items()} for shard in shards.shards]
    cuts: tuple[PartCut, ...] = cut_part(parse_header(body[LENGTH_BYTES:length]), held)
    return [each.header + b"".join(body[length:][start:stop] for start, stop in each.spans) for each in cuts]


def digest_of(body: bytes) -> bytes:
    """What follows a part whose sender digests it."""
    length = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
    entries = parse_header(body[LENGTH_BYTES:length]).entries
    digest = SizedDigest(entry.end - entry.begin for entry in entries if entry.end > entry.begin)
    digest.update(memoryview(body)[length:])
    found = digest.digest()
    assert len(found) == DIGEST_BYTES
    return found


class Ranks:
    """One start of a trainer of so many ranks, each of which has rows of every tensor that is long enough.

    group: of the start. writer: the trainer's number, None where it did not attach. replaces: the version in place of
    which initial weights are given anew.
    """

    def __init__(
        self,
        servers: Servers,
        model: Callable[[int], dict[str, Tensor]],
        of: int,
        group: str = "g",
        writer: int | None = None,
        replaces: str | None = None,
    ) -> None:
        self.servers, self.of, self.group = servers, of, group
        self._model = model
        self._anew = {} if replaces is None else {"replaces": replaces}
        self._shards = LayoutMap(Layout(specs_of(model(0))), servers.of)
        self._headers = {} if writer is None else {"Ema-Writer": str(writer)}
        #: What every rank has for every host.
        self.all = [*product(range(of), range(servers.of))]

    def body(self, step: int, rank: int, place: int) -> bytes:
        tensors = self._model(step)
        return bodies_of(part_body(tensors, rows(tensors, rank, self.of)), self._shards)[place]

    def once(self, step: int, rank: int, place: int, body: bytes | None = None) -> httpx.Response:
        """Send one part to one host. Step 0: of the initial weights."""
        what = f"updates/{step}" if step else "weights"
        content = self.body(step, rank, place) if body is None else body
        query = {"of": self.of, "group": self.group, **({} if step else self._anew)}
        path = f"/v1/runs/r/{what}/parts/{rank}"
        return self.servers.once(place, "PUT", path, content=content, params=query, headers=self._headers)

    def send(self, step: int, only: Iterable[tuple[int, int]] | None = None) -> list[httpx.Response]:
        """Send parts, of these ranks to these hosts, all at once."""
        some = self.all if only is None else [*only]
        with ThreadPoolExecutor(len(some) or 1) as threads:
            return [*threads.map(lambda each: self.once(step, *each), some)]

    def state(self, step: int, place: int) -> tuple[str, list[int]]:
        """What a host says of a step."""
        first = {} if step else {"first": self.group}
        told = self.servers.once(place, "GET", f"/v1/runs/r/updates/{step}", params=first).json()
        return told["state"], told["parts"]

    def push(self, step: int) -> None:
        """Send an update, and again what hosts lose of it, until it is applied on all.

        Sent first, and asked after then: a host tells of a step's parts whichever trainer sent them. So a host may have
        applied a later step by then, and call this one stale.
        """
        until, missing = time.monotonic() + _SECONDS, self.all
        while missing:
            assert time.monotonic() < until, f"step {step}: {missing}\n{self.servers.log()}"
            with contextlib.suppress(httpx.TransportError):
                answers = self.send(step, [each for each in missing if each[0] >= 0])
                told = {each.json().get("code", "taken") for each in answers if each.status_code != 503}
                assert told <= {"taken", "stale_step"}, [each.text for each in answers]
            time.sleep(0.01)
            missing = self._missing(step)

    def _missing(self, step: int) -> list[tuple[int, int]]:
        """What hosts have not of a step, as for send(); rank -1 where a host has not applied it, and none where all
        have."""
        found = []
        for place in range(self.servers.of):
            with contextlib.suppress(httpx.TransportError):
                state, parts = self.state(step, place)
                if state == "applied":
                    continue
                found += [(rank, place) for rank in range(self.of) if rank not in parts]
            found.append((-1, place))
        return found
