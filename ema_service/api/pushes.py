"""A push from its head to its answer: one owner, with one exit.

Entering the block takes what the push needs (staging, or a place among the parts of its step); receive() fills the
staging, from the socket or from shared memory, and averages what has arrived; decide() has the run commit, off the
event loop. Leaving the block gives everything back, however the push ended. Until the commit nothing of the run has
changed.

Knows that order, and how a push may arrive. Does not know bytes (transfer, bodies), nor whether an update counts
(runs).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import Request

from ema_client.errors import EmaError, InvalidRequest, SegmentUnusable
from ema_client.protocol import DIGEST_FOLLOWS, HEADER_DIGEST, HEADER_SEGMENT, RunInfo, Segment, UpdateResult
from ema_service.api.context import Context
from ema_service.api.transfer.filling import Work, content_length, receive, receive_head
from ema_service.api.transfer.lending import link_of
from ema_service.api.transfer.segments import named, take_over
from ema_service.bodies import Body, UpdateBody
from ema_service.memory import Staged
from ema_service.runs import Run, Terms
from ema_service.runs.gathering import Key, PartStretch, Piece, Voter
from ema_service.runs.parts import Outcome
from ema_service.runs.verdicts import PATIENCE_SECONDS
from ema_service.shadows import Preparation

__all__ = ["PartialPush", "Push", "StretchPush"]

T = TypeVar("T")


class _Incoming:
    """How a push arrives: as the request's body, or as a segment of shared memory that the request names. Of a segment
    without a header that is the request's body."""

    def __init__(self, request: Request, server: Context, run: Run) -> None:
        self._request = request
        self._server = server
        self._run = run
        self._named: str | None = request.headers.get(HEADER_SEGMENT)

    async def fill(self, body_of: Callable[[int | None], Body], work: Work | None = None) -> None:
        """Receive the body that ``body_of`` makes for the announced length. work: done behind the receiving.

        Raises as a Body; RequestTimeout, ClientDisconnect, SegmentUnusable, InvalidRequest.
        """
        if self._named is None:
            body, server = body_of(content_length(self._request)), self._server
            if self._digested():
                body.expect_digest()
            silence = server.settings.body_timeout
            await receive(self._request, body, server.workers.receivers, silence=silence, work=work)
            return
        try:
            segment, head = self._segment(self._named), content_length(self._request) or 0
            body, workers = body_of(head + segment.length), self._server.workers
            if head:
                await receive_head(self._request, body, silence=self._server.settings.body_timeout)
            await workers.take_over(partial(take_over, segment, body, workers.helpers, self._server.mappings))
        except SegmentUnusable as fault:
            self._run.links.refused(fault.detail)
            raise

    def tell(self, nbytes: int) -> None:
        """Count a push of ``nbytes`` of tensors, which arrived whole and right, by its link."""
        shared = self._named is not None
        link = "shared memory" if shared else link_of(self._request)
        self._run.links.shared() if shared else self._run.links.came(link)
        self._server.metrics.pushes.labels(link).inc()
        self._server.metrics.received.inc(nbytes)

    def ended(self, error: BaseException | None) -> None:
        """Note with the run why the push was refused, if it was for something that another try would not mend."""
        if isinstance(error, EmaError) and not error.retryable:
            self._run.links.turned_down(error.detail, self._run.ledger.version)

    def _digested(self) -> bool:
        """Whether the sender's digest follows the data. Raises InvalidRequest for any other digest."""
        said = self._request.headers.get(HEADER_DIGEST)
        if said not in (None, DIGEST_FOLLOWS):
            raise InvalidRequest(f"{HEADER_DIGEST}: {said[:40]!r} is not {DIGEST_FOLLOWS!r}")
        return said is not None

    def _segment(self, header: str) -> Segment:
        """The segment that the request names.

        Raises SegmentUnusable; InvalidRequest where the request has a body of unknown length as well.
        """
        if "transfer-encoding" in self._request.headers:
            raise InvalidRequest(f"a request with {HEADER_SEGMENT} has a body of a length that is not told")
        return named(header, same_host=link_of(self._request) != "TCP")


class Push:
    """A push of all tensors, to be used with ``async with``. Owns its staging until the end of the block.

    averages: how many shadows the push will feed. Entering raises BodyTooLarge, Overloaded, ClientDisconnect.
    """

    def __init__(self, request: Request, server: Context, run: Run, *, averages: int = 1) -> None:
        self._request = request
        self._server = server
        self._run = run
        self._averages = averages
        self._incoming = _Incoming(request, server, run)
        self._preparation: Preparation | None = None

    async def __aenter__(self) -> Self:
        with self._server.metrics.push("wait"):
            self.staged: Staged = await self._server.stage(self._request, self._run, self._averages)
        return self

    async def receive(self, preparation: Preparation | None = None) -> None:
        """Return once the body is whole. preparation: advanced behind the receiving. Raises as _Incoming.fill()."""
        self._preparation = preparation
        work = self._server.workers.behind(preparation.advance) if preparation else None
        with self._server.metrics.push("receive"):
            await self._incoming.fill(partial(UpdateBody, self.staged), work)

    async def decide(self, commit: Callable[[], T], *, quick: bool = False) -> T:
        """The answer of ``commit``, called on a thread for updates, or at once on the event loop where it is
        ``quick``."""
        answer = commit() if quick else await self._commit(commit)
        self._incoming.tell(self.staged.layout.param_bytes)
        return answer

    async def _commit(self, commit: Callable[[], T]) -> T:
        async with self._server.turn(self._run.config.run):
            return await self._server.workers.compute(commit)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._incoming.ended(error)
        if self._preparation:
            self._preparation.drop()
        self.staged.release()


class PartialPush:
    """One piece of an update (step None: of the initial weights), to be used with ``async with``: a part.

    A part that does not become whole is given up at the end of the block. Entering raises as Parts.admit(), and as Push
    where the part is the first of its step.
    """

    def __init__(self, request: Request, server: Context, run: Run, step: int | None, key: Key, terms: Terms) -> None:
        self._request = request
        self._server = server
        self._run = run
        self._place = step, key, terms
        self._parts = server.registry.parts(run.config.run, run.created_at)
        self._incoming = _Incoming(request, server, run)
        self._whole = False

    async def __aenter__(self) -> Self:
        self._part = await self._begun()
        with ExitStack() as undo:
            undo.callback(self._parts.give_up, self._part)
            await self._server.allocate(self._run, partial(self._parts.prepare, self._part))
            undo.pop_all()
        return self

    async def _begun(self) -> Piece:
        """The piece, in the staging of its step. Raises as Parts.admit(), and as Push where there was none yet."""
        averages = 1 if self._place[0] is None else len(self._run.config.averages)
        staging = self._server.registry.staging
        begin = partial(
            self._parts.begin, *self._place, partial(staging.reserve, self._run.layout, averages, self._run.memory)
        )
        if self._parts.admit(*self._place):
            staging.needed(self._run.layout, averages)
            return await self._server.pushers.take(self._request, begin)
        # The step has its staging already. Waiting in the queue would be wrong: the others may wait for this part's
        # step to end.
        return begin()

    async def receive(self) -> Outcome:
        """Receive the piece, and return what becomes of it (Outcome) once the piece is whole. What of it can be
        averaged by itself is averaged behind the receiving, or before the answer.

        Raises as Push.receive() and Parts.complete(), and as Piece.settle().
        """
        piece, workers = self._part, self._server.workers
        with self._server.metrics.push("receive"):
            await self._receiving(self._incoming.fill(self._announced, workers.behind(piece.average)))
            if piece.settles:
                await workers.compute(piece.settle)
        outcome = self._parts.complete(piece)
        self._whole = True
        if outcome == "staged" and piece.waits:
            # Whatever stands in the way of averaging now is told to whoever sends the last part.
            with contextlib.suppress(EmaError):
                await workers.compute(piece.average)
        return outcome

    async def _receiving(self, receiving: Coroutine[Any, Any, None]) -> None:
        """Await ``receiving``, of the piece's body."""
        await receiving

    async def decide(self) -> UpdateResult | RunInfo:
        """Have the run apply the complete set. Raises as Parts.apply()."""
        apply = self._server.metrics.timed(partial(self._parts.apply, self._part, self._server.workers.helpers))
        async with self._server.turn(self._run.config.run):
            return await self._server.workers.compute(apply)

    async def vote(self, shard: Voter) -> Future[Any]:
        """Have the complete set voted for, once earlier ones of the same trainer are decided. May be called for a push
        that is left by then. Raises as Parts.vote()."""
        if ahead := self._parts.ahead(self._part):
            await asyncio.wait(map(asyncio.wrap_future, ahead), timeout=PATIENCE_SECONDS)
        vote = self._server.metrics.timed(partial(self._parts.vote, self._part, self._server.workers.helpers, shard))
        async with self._server.turn(self._run.config.run):
            return await self._server.workers.compute(vote)

    @property
    def verdict(self) -> Future[Any] | None:
        """As Parts.verdict(), of the set that the piece is of."""
        return self._parts.verdict(self._part)

    def tell(self) -> None:
        """Count the part, which arrived whole and right, by its link."""
        self._incoming.tell(self._part.received)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._incoming.ended(error)
        if not self._whole:
            self._parts.give_up(self._part)

    def _announced(self, length: int | None) -> Piece:
        """The part's body, told its announced length. Raises BodyTooLarge, MalformedBody."""
        self._part.announce(length)
        return self._part


class StretchPush(PartialPush):
    """One stretch of an update, or of a part of one, to be used with ``async with``: what one of several lanes brings.

    As PartialPush. Entering ends the lane of the same stretch before, if there is one, and waits for its end; raises
    Overloaded where too many stretches are coming, Superseded where a later ``attempt`` at the stretch is on its way.
    """

    def __init__(
        self, request: Request, server: Context, run: Run, step: int, key: Key, terms: Terms, *, attempt: int
    ) -> None:
        super().__init__(request, server, run, step, key, terms)
        self._attempt = attempt

    async def __aenter__(self) -> Self:
        step, key, terms = self._place
        self._parts.admit(*self._place)
        part = key.part if isinstance(key, PartStretch) else None
        push = self._run.config.run, self._run.created_at, step, terms, part
        async with AsyncExitStack() as undo:
            self._lane = await undo.enter_async_context(
                self._server.lanes.lane(push, key, self._attempt, terms.of or 1)
            )
            await super().__aenter__()
            self._undo = undo.pop_all()
        return self

    async def _begun(self) -> Piece:
        step, _, terms = self._place
        # All lanes of a push come at once. One waits for staging, the others for that one: behind it in the queue they
        # would wait for pushes that wait for theirs.
        async with self._server.turn(self._run.config.run, str(step), terms.group):
            return await super()._begun()

    async def receive(self) -> Outcome:
        """As PartialPush.receive(). Raises DigestMismatch where the stretch alone has to be sent again."""
        outcome = await super().receive()
        again = self._part.known is not None or outcome == "applied"
        self._result = "repeated" if again else "applied" if outcome == "complete" else "staged"
        return outcome

    async def _receiving(self, receiving: Coroutine[Any, Any, None]) -> None:
        await self._lane.receive(receiving)

    def tell(self) -> None:
        """Count the stretch, which arrived whole and right, by its link and its result."""
        super().tell()
        self._server.metrics.stretches.labels(self._result).inc()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        async with self._undo:
            await super().__aexit__(kind, error, where)
