"""Single requests to a service, each tried once and given up soon: for whoever asks whether a service is well.

Knows: the routes that change nothing, and how long is long. Does not know: what follows from an answer, tensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ema_client import protocol
from ema_client.http.connection import Timeouts
from ema_client.http.memfd import SharedBody
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.protocol import RunInfo, RunList, ServerInfo

__all__ = ["Probe", "Speed", "check_can_share"]

#: Seconds for a sign of life.
_PATIENCE = 1.5
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Speed:
    """So many bytes came in so many seconds."""

    bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


class Probe:
    """Questions to the service at ``url``, each of which raises what Transport raises, within two seconds or so."""

    def __init__(self, url: str, token: str | None) -> None:
        timeouts = Timeouts(connect=_PATIENCE, transfer=_PATIENCE, kept=_PATIENCE)
        self._transport = Transport(url, token=token, retry=RetryPolicy(attempts=1), timeouts=timeouts)
        self.url = self._transport.url

    @property
    def may_be_here(self) -> bool:
        """Whether the service can be on this host, by its address."""
        return self._transport.may_be_here

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def server(self) -> ServerInfo:
        """What the service says of itself. Raises RouteNotFound where it is of before that route."""
        return self._transport.json("GET", protocol.server_path()).parsed(ServerInfo)

    def runs(self) -> tuple[RunInfo, ...]:
        """All runs that the token may read."""
        return self._transport.json("GET", protocol.runs_path()).parsed(RunList).runs

    def speed(self, run: str, *, seconds: float, most: int) -> Speed:
        """How fast the weights of a run come, which are thrown away. seconds, most: for so long, and so many bytes."""
        buffer, come, begun = memoryview(bytearray(_PIECE_BYTES)), 0, time.perf_counter()
        with self._transport.download(protocol.weights_path(run), stop=most) as download:
            while come < download.length and time.perf_counter() - begun < seconds:
                come += download.read_some(buffer[: download.length - come])
        return Speed(come, time.perf_counter() - begun)


def check_can_share() -> None:
    """Raises OSError where this machine has no memory that can be handed over to a service."""
    SharedBody(b"", 1)
