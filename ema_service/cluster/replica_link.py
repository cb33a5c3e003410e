"""What a replica of a host says to coordinators, once a second: that it is there, and where it is read. It is told
where its host is by now.

Knows HTTP, and a thread. Does not know how a replica follows, or what is decided.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import threading
from collections.abc import Callable, Sequence

from ema_service.cluster.encoding import encode
from ema_service.cluster.messages import Arrival
from ema_service.cluster.reasons import detail_in
from ema_service.cluster.token import ClusterToken
from ema_service.cluster.whereabouts import coordinator_address
from ema_service.tls import trusting, why_no_tls

__all__ = ["ReplicaLink"]

_log = logging.getLogger(__name__)

#: Seconds between two words, and for a coordinator to answer one.
_PAUSE, _SILENCE = 1.0, 5.0
#: Bytes that are read of an answer.
_ANSWER_BYTES = 64 << 10


class ReplicaLink:
    """A replica's talk with the coordinators of its cluster; a thread, from start() to close()."""

    def __init__(
        self,
        arrival: Arrival,
        coordinators: Sequence[str],
        token: ClusterToken,
        ready: Callable[[], bool],
    ) -> None:
        """arrival: the host's place, and the replica's own address. coordinators: their URLs. ready: whether the
        replica can be read; until then nobody is sent to it."""
        self._arrival = arrival
        self._coordinators = coordinators
        self._headers = {**token.headers, "Content-Type": "application/json"}
        self._ready = ready
        self._stopped = threading.Event()
        #: The URL of the host, empty until a coordinator has told it.
        self.original = ""
        #: By coordinator: why it was not heard the last time, empty where it was.
        self._faults: dict[str, str] = {}
        self._thread = threading.Thread(target=self._talk, name="ema-replica-link", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def close(self) -> None:
        """Say nothing any more: a few seconds later the replica is listed no more."""
        self._stopped.set()
        self._thread.join(_SILENCE)

    def _talk(self) -> None:
        while not self._stopped.is_set():
            for url in self._coordinators:
                fault = self._speak(url)
                if fault and fault != self._faults.get(url):
                    _log.warning("no coordinator at %s, trying again: %s", url, fault)
                self._faults[url] = fault
            self._stopped.wait(_PAUSE)

    def _speak(self, url: str) -> str:
        """Say a word to one coordinator, and note where the host is. Returns why it was not heard."""
        arrival = self._arrival if self._ready() else self._arrival._replace(address="")
        try:
            with contextlib.closing(_connection(url)) as to:
                to.request("POST", "/v1/replicas", encode(arrival).encode(), self._headers)
                answer = to.getresponse()
                said = answer.read(_ANSWER_BYTES)
            if answer.status != 200:
                return f"{answer.status} {detail_in(said)}"
            self.original = str(json.loads(said)["original"] or "").rstrip("/")
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as fault:
            return why_no_tls(fault) or f"{type(fault).__name__}: {fault}"
        return ""


def _connection(url: str) -> http.client.HTTPConnection:
    """A connection to a coordinator, over TLS where its address says so. Raises NoCoordinator."""
    to = coordinator_address(url)
    if to.secure:
        return http.client.HTTPSConnection(to.host, to.port, timeout=_SILENCE, context=trusting())
    return http.client.HTTPConnection(to.host, to.port, timeout=_SILENCE)
