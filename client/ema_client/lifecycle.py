"""The life of a run: made, given its initial weights, brought back to a snapshot, deleted.

Knows: the routes of these, and that between two requests another trainer may have made the run anew: each request says
of which time the run is that it means. Does not know: a user's arguments, how tensors become bytes, updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from ema_client import protocol
from ema_client.arguments import named
from ema_client.errors import ProtocolError, RunExists, RunNotFound, WeightsExist
from ema_client.http.body import Body
from ema_client.http.transport import Query, Reply, Transport
from ema_client.protocol import Rewind, RunConfig, RunInfo
from ema_client.steps import Steps

__all__ = ["WORK_SECONDS", "Lifecycle", "run_of", "told_if_replaced"]

#: Sends the initial weights of a run: a body, with a query and headers. The answer is None where several hosts took
#: them.
Initialising = Callable[[str, Body, Query, Mapping[str, str]], Reply | None]

#: Seconds that the service may write to its disk, or make room in its memory, before it answers.
WORK_SECONDS = 50.0


class Lifecycle:
    """The runs that one client makes, brings back and deletes. Thread-safe.

    initialise: sends initial weights (Pushes.initialise). steps: told of each run as it then stands.
    """

    def __init__(self, transport: Transport, initialise: Initialising, steps: Steps) -> None:
        self._transport = transport
        self._initialise = initialise
        self._steps = steps

    def create(
        self,
        config: RunConfig,
        body: Callable[[], Body],
        query: Query,
        *,
        from_snapshot: tuple[str, str] | None,
        exist_ok: bool,
    ) -> RunInfo:
        """Make a run with its initial weights; see EmaClient.create_run().

        body: makes the initial weights' body, once the service wants them. query: goes with the weights. from_snapshot:
        (run, snapshot), whose weights are the initial ones instead.
        """
        run = config.run
        if from_snapshot is not None:
            # A snapshot that is not there leaves no run without weights behind.
            source, snapshot = named(from_snapshot[0], "run"), named(from_snapshot[1], "snapshot")
            self._transport.json("GET", protocol.snapshot_path(source, snapshot))
        info = self._declare(config)
        if info.status == "awaiting_weights":
            with told_if_replaced(run):
                if from_snapshot is not None:
                    return self.rewind(run, snapshot, source, info.created_at)
                try:
                    query = {**query, "created_at": info.created_at}
                    reply = self._initialise(run, body(), query, {})
                    return self._steps.seen(run_of(run, reply) if reply else self._declare(config))
                except WeightsExist:
                    # Another trainer sent the weights between our two requests. Asked so as a trainer may, who need
                    # not have the right to read.
                    info = self._declare(config)
        if not exist_ok:
            raise _exists(info)
        return self._steps.seen(info)

    def declare(self, config: RunConfig, *, exist_ok: bool) -> RunInfo:
        """Make a run whose initial weights come later; see EmaClient.declare_run()."""
        info = self._declare(config)
        if info.status != "awaiting_weights" and not exist_ok:
            raise _exists(info)
        return self._steps.seen(info)

    def rewind(self, run: str, snapshot: str | None, from_run: str | None, created_at: float | None = None) -> RunInfo:
        """Bring a run back to a snapshot; see EmaClient.rewind(). created_at: only the run that was made then."""
        self._steps.forget(run)
        where = Rewind(
            None if snapshot is None else named(snapshot, "snapshot"),
            None if from_run is None else named(from_run, "run"),
        )
        # A server of before branches knows no `run`: left out where there is none.
        body = {key: value for key, value in protocol.to_json(where).items() if key != "run" or value is not None}
        path = _of_that_time(protocol.rewind_path(named(run, "run")), created_at)
        return self._steps.seen(run_of(run, self._transport.json("POST", path, body, patience=WORK_SECONDS)))

    def delete(self, path: str, created_at: float, gone: type[Exception]) -> None:
        """Delete the run, or the snapshot, of this path that was made then. Raises ``gone`` where there is none."""
        # Of that time: a try that comes late does not delete what was made since under the same name.
        path = _of_that_time(path, created_at)

        def attempt(number: int) -> None:
            try:
                self._transport.json_once("DELETE", path, patience=WORK_SECONDS)
            except gone:
                # At a second try: the first try deleted it, and the answer was lost.
                if number == 0:
                    raise

        self._transport.retrying(attempt)

    def _declare(self, config: RunConfig) -> RunInfo:
        # A server of before rings knows no `posthoc`: left out where there is none.
        body = {key: value for key, value in protocol.to_json(config).items() if key != "posthoc" or value is not None}
        return run_of(config.run, self._transport.json("POST", protocol.runs_path(), body, patience=WORK_SECONDS))


def run_of(run: str, reply: Reply) -> RunInfo:
    """The run that an answer tells of. Raises ProtocolError where that is another run than the one asked about."""
    info = reply.parsed(RunInfo)
    if info.run != run:
        raise ProtocolError(f"{reply.url} was asked about run {run!r} and answered of {info.run!r}")
    return info


@contextlib.contextmanager
def told_if_replaced(run: str) -> Iterator[None]:
    """Raises RunExists where the service has no run of the time any more at which this trainer made it."""
    try:
        yield
    except RunNotFound:
        raise RunExists(
            f"run {run!r} was made anew by another trainer, or deleted, before its initial weights were there",
            hint="choose another name, or find out who makes runs of this one",
        ) from None


def _of_that_time(path: str, created_at: float | None) -> str:
    return path if created_at is None else f"{path}?created_at={created_at!r}"


def _exists(info: RunInfo) -> RunExists:
    return RunExists(f"run {info.run!r} exists already and is at step {info.step}")
