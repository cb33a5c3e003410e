"""The application: makes the parts of a server, opens them at the start, closes them in order at the end.

Knows every part by name. Does not know what any of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.routing import APIRoute

from ema_service import dashboard
from ema_service.api import errors, openapi
from ema_service.api.auth import Auth
from ema_service.api.context import Context
from ema_service.api.facts import gauge
from ema_service.api.left_behind import LeftBehind
from ema_service.api.limits import BodyLimits, JsonBudget
from ema_service.api.origins import Origins
from ema_service.api.reads_alone import ReadsAlone
from ema_service.api.requests import Requests
from ema_service.api.routes import (
    averages,
    events,
    history,
    ops,
    replication,
    runs,
    snapshots,
    sweeps,
    updates,
    weights,
)
from ema_service.api.tracing import open_tracing
from ema_service.api.transfer.connection import STATE, Guard
from ema_service.api.writes import WriteGate, Writes
from ema_service.machine_memory import resident_bytes
from ema_service.memory import Memory, pick_device
from ema_service.metrics import Metrics
from ema_service.runs import Registry
from ema_service.settings import Settings
from ema_service.storage import Store, open_objects, open_store
from ema_service.tokens import Tokens

if TYPE_CHECKING:
    from ema_service.cluster.hosting.host import Host
    from ema_service.replica.following import Following

__all__ = ["create_app", "open_registry", "pick_device"]

_log = logging.getLogger(__name__)

#: Seconds between two looks for versions to be synced: within a second of its answer a version is on its way to the
#: medium.
SYNC_SECONDS = 0.5
#: Seconds after which memory that nobody used again goes to the system. A trainer whose steps are longer has its pages
#: cleared anew for each push, which is nothing to such a step.
_IDLE_SECONDS = 60.0
#: Bytes that the server itself may grow by, beyond weights and layouts: connections, requests, the interpreter's own.
_GROWTH_BYTES = 128 << 20
#: What torch takes, where a run that needs torch is yet to come.
_TORCH_BYTES = 200 << 20

#: In the order in which each request's route is searched: routes that trainers use all day come first.
_PARTS = (updates, weights, runs, averages, snapshots, events, history, sweeps, replication, ops)

_DESCRIPTION = """Holds the EMA (LitEma) shadow weights of many training runs. Trainers push their parameters,
evaluators
pull the averaged ones. Control is JSON; weights are one safetensors body; errors are problem+json (RFC 9457)."""


def create_app(settings: Settings, registry: Registry | None = None) -> FastAPI:
    """The ASGI application of one server.

    registry: the open runs, closed when the application stops; None opens them when the application starts. Raises
    OSError or TokenFileError where the token file cannot be read.
    """
    tracing = open_tracing()
    metrics = Metrics(tracing.phase if tracing else None)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Guard]]:
        opened = registry or open_registry(settings)
        host = _host(settings, opened)
        replica = _following(settings, opened)
        context = app.state.context = Context(settings, opened, metrics, host, replica)
        gauge(metrics, context)
        if host and settings.twins:
            _serve_twin(app, host)
        if partner := host or replica:  # no server is both
            partner.start()
        tasks = [asyncio.create_task(work(context)) for work in (_verify, _checkpoint, _sync, _expire, _trim)]
        try:
            yield {STATE: Guard(settings.body_timeout, metrics.refused, metrics.slow_readers.inc)}
        finally:
            for task in tasks:
                task.cancel()
            try:
                for task in tasks:
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            finally:
                if partner:
                    await partner.close()
                context.close()
                if tracing:
                    tracing.close()

    app = FastAPI(
        title="ema-service",
        version=version("ema-service"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=openapi.SERVERS,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.metrics = metrics
    errors.install(app, metrics)
    openapi.install(app, tokens=settings.token_file is not None)
    app.add_middleware(
        BodyLimits,
        routes=[route for part in _PARTS for route in part.router.routes if isinstance(route, APIRoute)],
        budget=JsonBudget(settings.json_bytes),
        silence=settings.body_timeout,
        refused=metrics.refused,
    )
    app.add_middleware(ReadsAlone, original=partial(_original_of, app), refused=metrics.refused)
    app.add_middleware(LeftBehind, check=partial(_check_counts, app), refused=metrics.refused)
    app.state.writes = Writes()
    app.add_middleware(WriteGate, writes=app.state.writes, refused=metrics.refused)
    app.state.tokens = Tokens(settings.token_file) if settings.token_file else None
    if app.state.tokens:
        # Added later, so Auth comes before: a request without a right to its answer is refused before anything is read.
        app.add_middleware(Auth, tokens=app.state.tokens, refused=metrics.refused)
    app.add_middleware(
        Origins, names=settings.allowed_hosts, refused=metrics.refused, any_host=settings.token_file is not None
    )
    app.add_middleware(
        Requests, metrics=metrics, tracing=tracing, slow=settings.slow_request, access=settings.access_log
    )
    for part in _PARTS:
        app.include_router(part.router)
    app.router.routes.insert(0, updates.DIRECT)
    dashboard.install(app)

    return app


def open_registry(settings: Settings, store: Store | None = None) -> Registry:
    """Bring every run back.

    store: by default opened here. Raises RuntimeError (no such device, no memory, or no such object store), and what
    open_store() raises.
    """
    objects = open_objects(settings.snapshot_store) if settings.snapshot_store else None
    if store is None and settings.data_dir:
        lease, first = settings.lease or 0.0, settings.first_number
        store = open_store(settings.data_dir, settings.ram_dir, lease=lease, first=first)
    if store:
        with contextlib.ExitStack() as undo:
            undo.callback(store.close)
            store.be_host(settings.shard)
            undo.pop_all()
    device = pick_device(settings.device)
    memory = Memory(device, keep_bytes=settings.staging_bytes, limit=_left_for_weights(settings.memory_limit))
    return Registry(
        memory,
        store,
        staging_bytes=settings.staging_bytes,
        frozen_bytes=settings.frozen_bytes,
        max_snapshots=settings.max_snapshots,
        measure=settings.measurements,
        objects=objects,
    )


def _host(settings: Settings, registry: Registry) -> Host | None:
    """The host of a cluster that the server is; None where it decides alone. Raises RuntimeError, OSError, ValueError
    where the settings do not make a host."""
    if settings.shard is None:
        return None
    from ema_service.cluster.hosting.host import Host, Membership
    from ema_service.cluster.token import read_cluster_token

    if registry.store is None or settings.cluster_token_file is None or not settings.coordinators:
        raise RuntimeError("a host of a cluster has a data dir, coordinators, and the cluster's token in a file")
    place, of = settings.shard
    token = read_cluster_token(settings.cluster_token_file)
    membership = Membership(
        place, of, settings.cluster_address or "", settings.coordinators, token, settings.lease, twins=settings.twins
    )
    return Host(registry, registry.store, membership)


def _following(settings: Settings, registry: Registry) -> Following | None:
    """What follows the original, where the server is a replica."""
    if settings.replica_of is None and settings.replica_place is None:
        return None
    from ema_service.replica.following import Following
    from ema_service.replica.original import Original

    if settings.replica_place is None:
        url = settings.replica_of or ""
        return Following(registry, Original(lambda: url, settings.replica_token))
    from ema_service.cluster.messages import Arrival
    from ema_service.cluster.replica_link import ReplicaLink
    from ema_service.cluster.token import read_cluster_token

    arrival = Arrival(*settings.replica_place, settings.cluster_address or "")
    token = read_cluster_token(settings.cluster_token_file or Path())
    link = ReplicaLink(arrival, settings.coordinators, token, lambda: following.filled)
    following = Following(registry, Original(lambda: link.original, settings.replica_token), link)
    return following


def _original_of(app: FastAPI) -> str | None:
    """Where writes go that come to a replica, empty while that is not known; None where the server is none."""
    context: Context = app.state.context
    return context.replica.original_url if context.replica else None


def _check_counts(app: FastAPI, run: str | None) -> None:
    """Raises Overloaded where the server is a host that was left behind: of a run, or of which runs there are."""
    context: Context = app.state.context
    if context.host:
        context.host.check_counts(run)


def _serve_twin(app: FastAPI, host: Host) -> None:
    """Let the host's twin copy what it has."""
    from ema_service.cluster.hosting.lending import LENDING, lending_app

    app.mount(LENDING, lending_app(host, host.token))


def _left_for_weights(memory_limit: int) -> int:
    """What the process itself leaves of its memory. Raises RuntimeError where that is nothing."""
    itself = resident_bytes() + _GROWTH_BYTES + (0 if "torch" in sys.modules else _TORCH_BYTES)
    if memory_limit <= itself:
        raise RuntimeError(
            f"{memory_limit} bytes of memory (--memory-limit, or the control group's) leave none for weights: "
            f"the server itself takes {itself}"
        )
    return memory_limit - itself


async def _verify(context: Context) -> None:
    """Look through the versions that were taken up from memory, while their runs are read already."""
    await context.workers.block(context.registry.verify)


async def _checkpoint(context: Context) -> None:
    """Take checkpoints of runs that moved, at every ``checkpoint_interval``."""
    while True:
        await asyncio.sleep(context.settings.checkpoint_interval)
        await context.workers.block(context.registry.checkpoint)
        if context.host:
            await context.host.checkpoint()


async def _sync(context: Context) -> None:
    """Bring acknowledged versions to the medium, twice a second."""
    while True:
        await asyncio.sleep(SYNC_SECONDS)
        context.sync()


async def _expire(context: Context) -> None:
    """Give up updates of which a part does not arrive: a rank of their trainer died."""
    silence = context.settings.body_timeout
    while True:
        await asyncio.sleep(min(1.0, silence / 4))
        for run, expired in context.registry.expire_parts(silence):
            _log.warning("run %s: %s within %g seconds", run, expired, silence)
            context.metrics.updates.labels("expired").inc()


async def _trim(context: Context) -> None:
    """Let the system have memory that waited to be used again, and was not."""
    while True:
        await asyncio.sleep(_IDLE_SECONDS / 4)
        await context.workers.block(partial(context.registry.memory.pool.trim, _IDLE_SECONDS))
