"""What the routes share: the server's state, and the off-loop threads it works in.

Knows the parts of a running server. Does not know HTTP beyond reaching the state through a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, TypeVar

import torch
from fastapi import Depends, Header, Path, Request
from pydantic import BeforeValidator

from ema_client.protocol import HEADER_WRITER, MAX_STEP, NAME_PATTERN
from ema_service.api.transfer.admission import Admission
from ema_service.api.transfer.segments import Mappings
from ema_service.api.transfer.socket_threads import Lenders
from ema_service.memory import Arena, Layout, Staged
from ema_service.metrics import Metrics
from ema_service.runs import Registry, Run, RunFiles
from ema_service.settings import Settings
from ema_service.threads import Threads

__all__ = ["Context", "Number", "RunName", "Server", "SnapshotName", "Step", "WriterNumber"]

T = TypeVar("T")

_NUMBER = re.compile(r"(0|[1-9][0-9]*)\Z", re.ASCII)

#: Threads that receive large pushes and average them on the way. A core each; more would only take turns.
_RECEIVE_THREADS = os.cpu_count() or 1
#: Threads that send weights, likewise.
_SEND_THREADS = os.cpu_count() or 1
#: Threads that apply updates, and how many cores each may use. Averaging runs while the push is still arriving, so it
#: must leave cores to the socket: on 2 cores one thread gave 1.8 GB/s end to end where two gave 1.5.
_APPLY_THREADS = 2
_TORCH_THREADS = max(1, (os.cpu_count() or 1) // 4)
#: A push in shared memory has no socket to leave cores to: all work through it.
_HELPERS = os.cpu_count() or 1
#: Received bytes are worked through in pieces of this at least: a thread is not woken for less.
PIECE_BYTES = 8 << 20
#: Threads that wait for disks.
_FILE_THREADS = 8
#: Threads that sync what was acknowledged; they may be as slow as the disk is.
_SYNC_THREADS = 4


class Context:
    """One running server: its settings, registry and metrics, its threads, for updates and for files, and the queues
    before its two budgets. Made where the event loop runs.

    helpers: threads that updates are divided among where they do not arrive by a socket. mappings: of the memory that
    such updates lie in.
    """

    def __init__(self, settings: Settings, registry: Registry, metrics: Metrics) -> None:
        self.settings = settings
        self.registry = registry
        self.metrics = metrics
        #: Set once the server is told to stop: whoever waits for a run stops waiting.
        self.stopping = False
        #: Streams of events that are open, for their limit.
        self.watchers = 0
        self._waiting: set[asyncio.Event] = set()
        self._apply_threads = Threads(_APPLY_THREADS, "ema-apply", torch.set_num_threads, (_TORCH_THREADS,))
        self._receive_threads = Threads(_RECEIVE_THREADS, "ema-receive", torch.set_num_threads, (1,))
        self.receivers = Lenders(self._receive_threads, _RECEIVE_THREADS)
        self._send_threads = Threads(_SEND_THREADS, "ema-send", torch.set_num_threads, (1,))
        self.senders = Lenders(self._send_threads, _SEND_THREADS)
        self.helpers = Threads(_HELPERS, "ema-help", torch.set_num_threads, (1,))
        self.mappings = Mappings()
        self._file_threads = Threads(_FILE_THREADS, "ema-files")
        self._sync_threads = Threads(_SYNC_THREADS, "ema-sync")
        self._syncing: set[RunFiles] = set()
        self.pushers, self.readers = Admission(), Admission()
        registry.staging.on_room(self.pushers.room)
        registry.frozen.on_room = self.readers.room

    async def stage(self, request: Request, layout: Layout, averages: int = 1) -> Staged:
        """Staging for the push that ``request`` brings, once there is room. Nothing of its body has been asked for.

        Raises BodyTooLarge at once where it can never fit; Overloaded, ClientDisconnect.
        """
        self.registry.staging.needed(layout, averages)
        return await self.pushers.take(request, partial(self.registry.staging.reserve, layout, averages))

    async def hold(self, request: Request, arena: Arena) -> None:
        """Hold a version for the reader, once there is room; the caller releases it. Raises as stage()."""
        await self.readers.take(request, partial(self.registry.frozen.hold, arena))

    async def compute(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a thread for updates. Once begun it is finished, even if the request is given up."""
        return await asyncio.get_running_loop().run_in_executor(self._apply_threads, work)

    def background(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """A function that takes a growing number of bytes and has ``advance`` called with it off the event loop.

        On a thread of the caller's it is called at once. On the event loop calls are gathered, and passed on to a
        thread for updates: at most one is under way, for at least PIECE_BYTES more than the one before.
        """
        return _Background(self._apply_threads, advance).progress

    async def block(self, work: Callable[[], T]) -> T:
        """Run ``work``, which waits for a disk or a lock, on a thread for files."""
        return await asyncio.get_running_loop().run_in_executor(self._file_threads, work)

    @contextlib.contextmanager
    def watching(self, run: Run) -> Iterator[asyncio.Event]:
        """An event that is set after each change of the run, and when the server is ``stopping``.

        On the event loop only. Who waits clears it first and looks then, so that no change goes unseen.
        """
        loop, moved = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(moved.set)

        run.listeners.add(tell)
        self._waiting.add(moved)
        try:
            yield moved
        finally:
            self._waiting.discard(moved)
            run.listeners.discard(tell)

    def stop_watching(self) -> None:
        """Send everyone away who waits for something to happen: a stream of events has no end of its own."""
        self.stopping = True
        for moved in self._waiting:
            moved.set()

    def sync(self) -> None:
        """Begin to sync every run that moved, unless its last sync is still under way."""
        for files in self.registry.unsynced():
            if files not in self._syncing:
                self._syncing.add(files)
                done = asyncio.get_running_loop().run_in_executor(self._sync_threads, files.sync)
                done.add_done_callback(partial(self._synced, files))

    def _synced(self, files: RunFiles, done: asyncio.Future[None]) -> None:
        self._syncing.discard(files)
        done.result()

    def close(self) -> None:
        """Finish the updates and files in hand, then keep every run."""
        self._receive_threads.shutdown()
        self._send_threads.shutdown()
        self._apply_threads.shutdown()
        self._sync_threads.shutdown()
        self.helpers.shutdown()
        self._file_threads.shutdown()
        self.registry.close()


class _Background:
    """Runs behind a progress that the event loop reports."""

    def __init__(self, threads: Threads, advance: Callable[[int], None]) -> None:
        self._threads = threads
        self._advance = advance
        self._reached = 0
        self._begun = 0
        self._running = False
        self._lock = threading.Lock()
        self._loop_thread = threading.get_ident()

    def progress(self, reached: int) -> None:
        if threading.get_ident() != self._loop_thread:
            self._advance(reached)
            return
        with self._lock:
            self._reached = reached
            start = not self._running and reached - self._begun >= PIECE_BYTES
            self._running |= start
        if start:
            self._threads.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._reached - self._begun < PIECE_BYTES:
                    self._running = False
                    return
                self._begun = self._reached
            self._advance(self._begun)


# A plain function would be called on a thread, for each request.
async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Server = Annotated[Context, Depends(_context)]
RunName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the run", examples=["cogview3-base"])]
SnapshotName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the snapshot", examples=["epoch-10"])]
WriterNumber = Annotated[
    int | None, Header(alias=HEADER_WRITER, ge=1, le=MAX_STEP, description="What attaching gave this trainer")
]


def _plain_number(value: object) -> object:
    """``1.0``, ``+5`` and ``007`` are numbers to a lenient reader; here each step has one way to be written."""
    if isinstance(value, str) and not _NUMBER.match(value):
        raise ValueError("a number in decimal digits, without sign, point or leading zeros, is expected")
    return value


#: A number in a path or query.
Number = Annotated[int, BeforeValidator(_plain_number)]
Step = Annotated[Number, Path(ge=0, le=MAX_STEP, description="The trainer's step", examples=[1000])]
