"""Snapshots, which are on all hosts or on none.

Knows whom a write is handed to. Does not know who decides, or where files are.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import Response

from ema_client.protocol import SnapshotInfo, SnapshotList, snapshot_path, snapshots_path
from ema_service.cluster.gateway.asking import LONG_SECONDS, Asking, json_answer
from ema_service.cluster.gateway.routes.paths import RUN, Route, RunName, SnapshotName
from ema_service.cluster.gateway.whole import whole_snapshot, whole_snapshots

__all__ = ["SnapshotRoutes"]


@dataclass(frozen=True, slots=True)
class SnapshotRoutes:
    """The answers about snapshots."""

    asking: Asking

    @property
    def routes(self) -> tuple[Route, ...]:
        """Method, path and answer."""
        return (
            ("GET", f"{RUN}/snapshots", self.snapshots),
            ("GET", f"{RUN}/snapshots/{{name}}", self.snapshot),
            ("PUT", f"{RUN}/snapshots/{{name}}", self.take_snapshot),
            ("DELETE", f"{RUN}/snapshots/{{name}}", self.delete_snapshot),
        )

    async def snapshots(self, run: RunName, request: Request) -> Response:
        """The snapshots that are on all hosts, oldest first."""

        async def ask() -> SnapshotList:
            return whole_snapshots(await self.asking.each(request, snapshots_path(run), SnapshotList))

        return json_answer(await self.asking.agreed(ask))

    async def snapshot(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """One of them."""
        return json_answer(await self._snapshot(request, run, name))

    async def take_snapshot(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """Take a snapshot on all hosts, or none."""
        told = await self.asking.hand_over(request, snapshot_path(run, name), seconds=LONG_SECONDS)
        return json_answer(await self._snapshot(request, run, name), told.status_code)

    async def delete_snapshot(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """Delete a snapshot on all hosts, or none."""
        await self.asking.hand_over(request, snapshot_path(run, name))
        return Response(status_code=204)

    async def _snapshot(self, request: Request, run: str, name: str) -> SnapshotInfo:
        async def ask() -> SnapshotInfo:
            return whole_snapshot(await self.asking.each(request, snapshot_path(run, name), SnapshotInfo))

        return await self.asking.agreed(ask)
