"""How a trainer that has joined its run sends: updates by their step and, without a step, initial weights anew.

Knows: which version of the run initial weights replace, in all tries. Does not know: tensors, who of several ranks
sends what (plan), or when weights are given anew (beginning).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ema_client.client import EmaClient
from ema_client.errors import Fenced, WeightsExist
from ema_client.http.body import Body
from ema_client.protocol import RunInfo
from ema_client.training.joining import Joined
from ema_client.training.plan import Plan

__all__ = ["Anew", "sending"]

_log = logging.getLogger("ema_client")


class Anew:
    """Sends initial weights in place of a run's. For the sending thread alone.

    made: the run as its initial weights made it, None on a rank that sends nothing. writer: the trainer's number.
    """

    def __init__(self, client: EmaClient, run: str, plan: Plan, made: RunInfo | None, writer: int | None) -> None:
        self._client = client
        self._run = run
        self._plan = plan
        #: The run whose weights are replaced. The same in all tries: a try that arrives late finds another version.
        self._replaced = made
        self._writer = writer

    def send(self, body: Body) -> bool:
        """A single try; whether no other rank's part is awaited.

        A run that went on by others, such as the processes that this one spawned, keeps what it has. Raises EmaError.
        """
        if self._replaced is None:
            self._replaced = self._client.run(self._run)
        try:
            done = self._plan.give_anew(self._client, self._replaced, self._writer, body)
        except (Fenced, WeightsExist) as went_on:
            _log.info("run %r keeps its weights: %s", self._run, went_on)
            done = True
        self._settle(done)
        return done

    def fate(self) -> bool | None:
        """As Sender's. Raises EmaError."""
        fate = self._plan.fate_anew(self._client, self._replaced) if self._replaced else None
        self._settle(fate)
        return fate

    def _settle(self, done: bool | None) -> None:
        if done:
            # Weights given anew once more replace the version that came of these.
            self._replaced = None


def sending(
    client: EmaClient, run: str, plan: Plan, joined: Joined
) -> tuple[Callable[[int | None, Body], bool], Callable[[int | None], bool | None], Callable[[], None]]:
    """What a Publisher sends by, learns the fate of what was sent by, and leaves by."""
    anew = Anew(client, run, plan, joined.made, joined.writer)

    def send(step: int | None, body: Body) -> bool:
        return anew.send(body) if step is None else plan.push(client, run, joined.writer, step, body)

    def fate(step: int | None) -> bool | None:
        return anew.fate() if step is None else plan.fate(client, run, step)

    def leave() -> None:
        if joined.writer is not None and plan.part == 0:
            client.detach(run, joined.writer)

    return send, fate, leave
