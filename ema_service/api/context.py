"""What the routes share: the server's state, and the off-loop threads it works in.

Knows the parts of a running server. Does not know HTTP beyond reaching the state through a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Request

from ema_client.protocol import MAX_STEP, NAME_PATTERN
from ema_service.metrics import Metrics
from ema_service.runs import Registry
from ema_service.settings import Settings

__all__ = ["Context", "RunName", "Server", "SnapshotName", "Step"]

T = TypeVar("T")

#: Threads that apply updates. Each brings torch's own threads along, so few: one works, one more has the next run's
#: update.
_APPLY_THREADS = 2
#: Threads that wait for disks.
_FILE_THREADS = 8


class Context:
    """One running server: its settings, registry and metrics, and two kinds of threads, for updates and for files."""

    def __init__(self, settings: Settings, registry: Registry, metrics: Metrics) -> None:
        self.settings = settings
        self.registry = registry
        self.metrics = metrics
        self._apply_threads = ThreadPoolExecutor(_APPLY_THREADS, thread_name_prefix="ema-apply")
        self._file_threads = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="ema-files")

    async def compute(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a thread for updates. Once begun it is finished, even if the request is given up."""
        return await asyncio.get_running_loop().run_in_executor(self._apply_threads, work)

    async def block(self, work: Callable[[], T]) -> T:
        """Run ``work``, which waits for a disk or a lock, on a thread for files."""
        return await asyncio.get_running_loop().run_in_executor(self._file_threads, work)

    def close(self) -> None:
        """Finish the updates and files in hand, then keep every run."""
        self._apply_threads.shutdown()
        self._file_threads.shutdown()
        self.registry.close()


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Server = Annotated[Context, Depends(_context)]
RunName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the run", examples=["cogview3-base"])]
SnapshotName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the snapshot", examples=["epoch-10"])]
Step = Annotated[int, Path(ge=0, le=MAX_STEP, description="The trainer's step", examples=[1000])]
