"""One trainer's updates that come to the hosts of a run in stretches, several for each host's slice, by plain HTTP.

Knows routes, and which bytes a host's stretches have. Does not know what is tried with them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
from safetensors.torch import save
from torch import Tensor

from ema_client.protocol import HEADER_LAYOUT, HEADER_PUSH, HEADER_WRITER, stretch_path
from ema_client.wire import LENGTH_BYTES
from tests.service.cluster.servers import Servers, cut

__all__ = ["BLOCK", "Stretched"]

BLOCK = 8 << 20


class Stretched:
    """One trainer of one run. writer: its number, None where it did not attach."""

    def __init__(
        self, servers: Servers, model: Callable[[int], dict[str, Tensor]], run: str, writer: int | None = None
    ) -> None:
        self.servers, self.run = servers, run
        self._model = model
        self._groups = itertools.count(1)
        self._threads = ThreadPoolExecutor(8)
        self._layouts: dict[int, str] = {}
        self._sizes = [sum(each.nbytes for each in slice_.values()) for slice_ in cut(model(0), servers.of)]
        #: A step, and what each host's stretches have of it.
        self._latest: tuple[int, list[bytes]] = -1, []
        self._lock = threading.Lock()
        self._writer = {} if writer is None else {HEADER_WRITER: str(writer)}

    def group(self) -> str:
        """A token for one try."""
        return f"try-{next(self._groups)}"

    def data(self, step: int, place: int) -> bytes:
        """What a host's stretches have together."""
        with self._lock:
            if self._latest[0] != step:
                bodies = map(save, cut(self._model(step), self.servers.of))
                found = [body[LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little") :] for body in bodies]
                self._latest = step, found
            return self._latest[1][place]

    def bounds(self, place: int) -> list[tuple[int, int]]:
        """The stretches of a host's slice, of one block each."""
        size = self._sizes[place]
        return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]

    def send(
        self,
        step: int,
        place: int,
        bounds: tuple[int, int],
        group: str,
        *,
        data: bytes | None = None,
        key: str | None = None,
    ) -> httpx.Response:
        """One stretch of a host's slice, once. data: of the whole slice, if others than the model's. key: of the push,
        by default the step's own."""
        return self._sent(self.servers.once, step, place, bounds, group, data, key)

    def _sent(
        self,
        send: Callable[..., httpx.Response],
        step: int,
        place: int,
        bounds: tuple[int, int],
        group: str,
        data: bytes | None,
        key: str | None,
    ) -> httpx.Response:
        if place not in self._layouts:
            self._layouts[place] = self.servers.ask(place, "GET", f"/v1/runs/{self.run}/layout").json()["digest"]
        found = self.data(step, place) if data is None else data
        said = {HEADER_LAYOUT: self._layouts[place], HEADER_PUSH: key or f"step-{step}", **self._writer}
        path = stretch_path(self.run, step, *bounds)
        content = found[slice(*bounds)]
        return send(place, "PUT", path, params={"group": group}, content=content, headers=said)

    def ask(self, step: int, place: int, bounds: tuple[int, int], group: str) -> httpx.Response:
        """As send(), again while the host is away or says to come again."""
        return self._sent(self.servers.ask, step, place, bounds, group, None, None)

    def begin(self, step: int, place: int, bounds: tuple[int, int], group: str) -> Future[httpx.Response]:
        """As send(), on a thread."""
        return self._threads.submit(self.send, step, place, bounds, group)

    def begin_asking(self, step: int, place: int, group: str) -> list[Future[httpx.Response]]:
        """As ask(), of each stretch of a host's slice, on threads."""
        return [self._threads.submit(self.ask, step, place, bounds, group) for bounds in self.bounds(place)]

    def send_all(
        self, step: int, place: int, group: str, only: Sequence[tuple[int, int]] | None = None
    ) -> list[httpx.Response]:
        """The stretches of a host's slice, all at once."""
        some = self.bounds(place) if only is None else only
        return [each.result() for each in [self.begin(step, place, bounds, group) for bounds in some]]

    def push(self, step: int) -> list[httpx.Response]:
        """Send each host all of its stretches, and return each host's answer to the one that completed the slice."""
        places = range(self.servers.of)
        with ThreadPoolExecutor(len(places)) as threads:
            answers = [*threads.map(lambda place: self.send_all(step, place, self.group()), places)]
        assert all(sorted(each.status_code for each in of)[:-1] == [200] + [202] * (len(of) - 2) for of in answers)
        return [next(each for each in of if each.status_code == 200) for of in answers]
