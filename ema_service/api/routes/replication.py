"""The route that tells a replica of a version, whose weights it then pulls as any reader does.

Knows how a version is kept for a moment, for who was told of it. Does not know replicas, or how they read.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request

from ema_client.errors import AwaitingWeights, InvalidRequest, Overloaded, RunDegraded, RunNotFound, VersionGone
from ema_client.protocol import RunVersion
from ema_service.api.context import Context
from ema_service.api.errors import problem_responses
from ema_service.api.reading import Reading
from ema_service.api.routes.parameters import VERSION_PATTERN, CreatedAt, RunName, Server
from ema_service.bodies import WeightsStream
from ema_service.runs import Run, replicated
from ema_service.shadows import State

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}", tags=["weights"])

#: No bytes of a body, and not its first ones: who asks for all bytes next is the one reader that is counted.
_NOTHING = (1, 1)


@router.get(
    "/version",
    summary="Show the facts of a version",
    responses=problem_responses(RunNotFound, InvalidRequest, AwaitingWeights, RunDegraded, VersionGone, Overloaded),
)
async def show_version(
    run: RunName,
    request: Request,
    server: Server,
    created_at: CreatedAt = None,
    hold: Annotated[bool, Query(description="Whether all weights of the version are to stay for a second")] = False,
    version: Annotated[
        str | None, Query(pattern=VERSION_PATTERN, description="Which one, that stays by now; none: the present one")
    ] = None,
) -> RunVersion:
    """All that a replica serves the run by, but for the weights: those are pulled by ETag, average by average.

    With ``hold`` the version can be asked for by ``If-Range`` within the next second, though the run goes on; and its
    weights be part of an average that is worked out.
    """
    found = server.registry.get(run, created_at)
    state = found.state if version is None else server.readings.state(found, version)
    if hold and state:
        await _hold(request, server, found, state)
    return replicated.told(found, state)


async def _hold(request: Request, server: Context, run: Run, state: State) -> None:
    """Have all weights of a state stay for a moment. Raises Overloaded."""
    version = state.version
    infos = [version.weights_info(run.config, average) for average in version.averages]
    streams = await server.workers.block(
        lambda: [WeightsStream(run.layout.shadows, info, lineage=version.lineage) for info in infos]
    )
    await server.hold(request, *state.arenas)
    for stream, arena in zip(streams, state.arenas, strict=True):
        release = partial(server.registry.frozen.release, arena)
        server.readings.begin(run, Reading(stream, arena, state), release, _NOTHING)()
