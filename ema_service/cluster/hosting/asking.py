"""What a host asks of coordinators: to bring a change to all hosts.

Several coordinators may be named, of which one is obeyed; all are asked at once, and whoever answers first has brought
the change about, for a change is made once however often, and by whomever, it is brought.

Lives on one event loop; nothing here holds a thread. Knows HTTP and how long to wait. Does not know what a change does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx2

from ema_client.errors import InternalError, Overloaded
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.messages import Answer, Change
from ema_service.cluster.reaching import client_of
from ema_service.cluster.reasons import detail_in
from ema_service.cluster.token import ClusterToken
from ema_service.cluster.whereabouts import NoCoordinator, coordinator_url
from ema_service.tls import may_be_tls, why_no_tls

__all__ = ["Asking"]

#: Seconds in which a change is decided or the request is answered 503: a coordinator itself waits for 30, and says why.
_SECONDS = 32.0
#: Seconds between two tries at one coordinator.
_PAUSE_SECONDS = 0.1
#: What a coordinator answers that may be another in a moment: no shard has come to it yet; it waited, or it ends.
_PASSING = (404, 503)


class Asking:
    """The coordinators of one cluster, as whoever asks for a change knows them."""

    def __init__(self, coordinators: Sequence[str], token: ClusterToken, *, seconds: float = _SECONDS) -> None:
        """coordinators: their URLs. seconds: that a change may take."""
        self._coordinators = coordinators
        self._seconds = seconds
        self._client = client_of(headers={"Authorization": token.header}, timeout=seconds + 5)

    async def change(self, talk: str, change: Change) -> Answer:
        """Bring a change to all who take part in a talk, and return what became of it.

        Raises Overloaded where nothing was decided in time; InternalError where a coordinator takes no change of this
        host.
        """
        said: list[str] = []
        tries = [asyncio.create_task(self._ask(url, talk, change, said)) for url in self._coordinators]
        try:
            async with asyncio.timeout(self._seconds):
                done, _ = await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
                return done.pop().result()
        except TimeoutError:
            raise Overloaded(
                f"the change was not decided in {self._seconds:g} seconds: {said[-1] if said else 'no answer'}",
                hint="come again with the same Idempotency-Key; the change may still be made",
                retry_after=1.0,
            ) from None
        finally:
            for each in tries:
                each.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    async def close(self) -> None:
        """Ask nobody any more."""
        await self._client.aclose()

    async def _ask(self, url: str, talk: str, change: Change, said: list[str]) -> Answer:
        """Ask one coordinator until it answers. said: why it did not, the latest last."""
        while True:
            try:
                path = f"{coordinator_url(url)}/v1/runs/{talk}/changes"
                response = await self._client.post(path, content=encode(change))
            except (httpx2.TransportError, NoCoordinator) as fault:
                ended = isinstance(fault, (httpx2.RemoteProtocolError, httpx2.ReadError))
                why = type(fault).__name__ + (may_be_tls(url) if ended else "")
                said.append(f"the coordinator {url} cannot be reached ({why_no_tls(fault) or why})")
            else:
                if response.status_code == 200:
                    return _answer_in(response.content)
                said.append(f"the coordinator {url} says: {detail_in(response.content)}")
                if response.status_code not in _PASSING:
                    raise InternalError(said[-1])
            del said[:-1]
            await asyncio.sleep(_PAUSE_SECONDS)


def _answer_in(content: bytes) -> Answer:
    """Raises InternalError."""
    try:
        found: Answer = decode(content, Answer)
        return found
    except MalformedMessage as fault:
        raise InternalError(f"a coordinator answered a change with something else: {fault}") from None
