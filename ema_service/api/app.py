"""The application: makes the parts of a server, opens them at the start, closes them in order at the end.

Knows every part by name. Does not know what any of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version

import torch
from fastapi import FastAPI

from ema_service import dashboard
from ema_service.api import errors, openapi
from ema_service.api.auth import Auth, read_token_file
from ema_service.api.context import Context
from ema_service.api.limits import BodyLimits
from ema_service.api.routes import events, ops, runs, snapshots, updates, weights
from ema_service.api.transfer.connection import STATE, Guard
from ema_service.memory import Memory
from ema_service.metrics import Metrics
from ema_service.runs import Registry
from ema_service.settings import Settings
from ema_service.storage import Store

__all__ = ["create_app", "open_registry", "pick_device"]

_log = logging.getLogger(__name__)

#: Seconds between two looks for versions to be synced: within a second of its answer a version is on its way to the
#: medium.
SYNC_SECONDS = 0.5

_DESCRIPTION = """Holds the EMA (LitEma) shadow weights of many training runs. Trainers push their parameters,
evaluators
pull the averaged ones. Control is JSON; weights are one safetensors body; errors are problem+json (RFC 9457)."""


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is a CUDA device if there is one, else the CPU.

    Raises RuntimeError for a device that is missing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:  # raised by torch for a device that it was built without
        raise RuntimeError(f"the device {name!r} cannot be used: {str(fault).splitlines()[0]}") from None
    return device


def create_app(settings: Settings, registry: Registry | None = None) -> FastAPI:
    """The ASGI application of one server.

    registry: the open runs, closed when the application stops; None opens them when the application starts. Raises
    OSError or TokenFileError where the token file cannot be read.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Guard]]:
        context = app.state.context = Context(settings, registry or open_registry(settings), metrics)
        _watch(metrics, context)
        tasks = [asyncio.create_task(work(context)) for work in (_checkpoint, _sync, _expire)]
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
                context.close()

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
    errors.install(app, metrics)
    openapi.install(app, tokens=settings.token_file is not None)
    app.add_middleware(BodyLimits, limit=settings.json_bytes, silence=settings.body_timeout, refused=metrics.refused)
    if settings.token_file:
        # Added last, so Auth comes first: a request without a right to its answer is refused before anything is read.
        app.add_middleware(Auth, grants=read_token_file(settings.token_file), refused=metrics.refused)
    # In the order in which each request's route is searched: routes that trainers use all day come first.
    for part in (updates, weights, runs, snapshots, events, ops):
        app.include_router(part.router)
    dashboard.install(app)

    return app


def open_registry(settings: Settings) -> Registry:
    """Bring every run back from disk.

    Raises RuntimeError (no such device), FolderLocked, CatalogUnusable, OSError.
    """
    memory = Memory(pick_device(settings.device), keep_bytes=settings.staging_bytes)
    store = Store(settings.data_dir) if settings.data_dir else None
    return Registry(memory, store, staging_bytes=settings.staging_bytes, frozen_bytes=settings.frozen_bytes)


def _watch(metrics: Metrics, context: Context) -> None:
    """Add to the metrics the gauges whose values the parts of the server know."""
    registry = context.registry
    metrics.watch("ema_runs", "Runs held.", lambda: len(registry.runs()))
    metrics.watch("ema_degraded_runs", "Runs that are not as they should be.", lambda: _degraded(registry))
    metrics.watch("ema_shadow_bytes", "Bytes of shadows.", lambda: sum(run.info().bytes for run in registry.runs()))
    metrics.watch("ema_staging_bytes", "Bytes of pushes in flight.", lambda: registry.staging.bytes_in_use)
    metrics.watch("ema_partial_updates", "Updates of which parts are awaited.", lambda: registry.gathering)
    metrics.watch("ema_waiting_pushes", "Pushes that wait for staging.", lambda: context.pushers.waiting)
    metrics.watch("ema_waiting_readers", "Reads that wait for room.", lambda: context.readers.waiting)
    metrics.watch("ema_frozen_bytes", "Bytes of versions being read.", lambda: registry.frozen.bytes_in_use)
    metrics.watch("ema_idle_bytes", "Bytes kept for reuse.", lambda: registry.memory.pool.idle_bytes)


def _degraded(registry: Registry) -> int:
    return sum(run.info().status == "degraded" for run in registry.runs())


async def _checkpoint(context: Context) -> None:
    """Take checkpoints of runs that moved, at every ``checkpoint_interval``."""
    while True:
        await asyncio.sleep(context.settings.checkpoint_interval)
        await context.workers.block(context.registry.checkpoint)


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
