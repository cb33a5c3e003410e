"""Large bodies to a service: sent or, where they lie in shared memory, handed over to a service on this host.

A service that refuses a body in shared memory is sent that body and all later ones; the refusal is logged once.

Knows: when shared memory is worth a hand-over, and which refusals mean "send the bytes". Does not know: how a
connection speaks (connection), how memory is shared (memfd), JSON, routes, tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from ema_client.errors import EmaError, MalformedBody, SegmentUnusable
from ema_client.http.address import Address
from ema_client.http.answers import Answer, error_of
from ema_client.http.body import Body
from ema_client.http.connection import Connection
from ema_client.http.place import Place
from ema_client.http.pool import Pool
from ema_client.protocol import HEADER_PUSH, HEADER_SEGMENT

if TYPE_CHECKING:
    from ema_client.http.memfd import SharedBody, SharedSlice

__all__ = ["SHARE_ABOVE", "Uploads"]

_log = logging.getLogger("ema_client")

#: A body of at most so many bytes is sent as quickly as it would be handed over.
SHARE_ABOVE = 1 << 20

#: Bytes up to which a body to a service on the same host goes with its digest, as pulls up to this size are compared.
_DIGEST_UP_TO = 64 << 20


class Uploads:
    """The large bodies that go to the service at ``place``. Thread-safe."""

    def __init__(self, pool: Pool, place: Place) -> None:
        self._pool = pool
        self._place = place
        #: Whether a body has been handed over, and why one was refused.
        self._shared = False
        self._refused: str | None = None

    @property
    def link(self) -> str:
        """How bodies travel, in words for people; says why shared memory was refused where it was."""
        if self._refused:
            return f"{self._place.link}; shared memory was refused: {self._refused}"
        return "shared memory" if self._shared and self._place.may_be_here else self._place.link

    def put(self, path: str, headers: Mapping[str, str], body: Body) -> Answer:
        """PUT a body, by shared memory where that is possible. The answer may be a refusal."""
        headers = {**headers, HEADER_PUSH: body.key}
        shared = body.shared
        if shared is not None and self.shares(body):
            answer = self._hand_over(path, headers, shared, body)
            fault = None if answer.status < 400 else error_of(answer)
            if not _wants_the_bytes(fault):
                return answer
            self._stop_sharing(fault)
        return self._send(path, headers, body)

    def _send(self, path: str, headers: Mapping[str, str], body: Body, patience: float | None = None) -> Answer:
        longer = body.patience if patience is None else patience

        def put(connection: Connection) -> Answer:
            fit = replace(body, digest=None) if _needs_no_digest(connection.address, body) else body
            return connection.put(path, headers, fit, patience=longer)

        connection, answer = self._pool.exchange(put)
        self._pool.give_back(connection)
        return answer

    def _hand_over(self, path: str, headers: Mapping[str, str], shared: SharedBody | SharedSlice, body: Body) -> Answer:
        sent = Body(len(shared.head), lambda: (memoryview(shared.head),), look=body.look)
        with shared.offered() as segment:
            named = {**headers, HEADER_SEGMENT: segment.to_header()}
            answer = self._send(path, named, sent, body.patience)
        if answer.status < 400:
            body.moved(body.length)
        self._shared = self._shared or answer.status < 400
        return answer

    def shares(self, body: Body) -> bool:
        """Whether the body is handed over and not sent, as far as is known now."""
        if body.shared is None or self._refused is not None or body.length <= SHARE_ABOVE:
            return False
        # A fork sends: the secret in front of the memory is the parent's, who may be handing the same memory over.
        return self._place.may_be_here and body.shared.home.is_here

    def _stop_sharing(self, fault: EmaError) -> None:
        self._refused = fault.detail
        _log.warning("pushes to %s are sent and not shared: %s", self._place.url, fault.detail)


def _needs_no_digest(address: Address, body: Body) -> bool:
    """Whether something else protects the body's bytes on their way to ``address``.

    TLS has a digest of its own. To a service on the same host there is no wire that could flip a bit, and the digest of
    a large body would cost a fifth of its rate.
    """
    return address.secure or (address.same_host and body.length > _DIGEST_UP_TO)


def _wants_the_bytes(fault: EmaError | None) -> TypeGuard[EmaError]:
    """Whether the answer to a hand-over means that the body has to be sent.

    MalformedBody: a service without shared memory, or behind a proxy that drops the header, finds an empty body.
    """
    return isinstance(fault, SegmentUnusable | MalformedBody)
