"""The threads of a server: for updates, for sockets, for disks.

Knows how many of each there are and why, and how a coroutine waits for them. Does not know what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import TypeVar

import anyio

from ema_service.api.transfer.socket_threads import SocketThreads
from ema_service.threads import Threads, use_cores

__all__ = ["Behind", "Workers"]

T = TypeVar("T")

#: Threads that receive large pushes and average them on the way. Each keeps a core busy; more than cores would only
#: take turns.
_RECEIVE_THREADS = os.cpu_count() or 1
#: Threads that send weights. Each keeps a core busy, too.
_SEND_THREADS = os.cpu_count() or 1
#: Threads that apply updates, and how many cores each may use. Averaging runs while the push is still arriving, so it
#: must leave cores to the socket: on 2 cores, one thread gave 1.8 GB/s end to end where two gave 1.5.
_APPLY_THREADS = 2
_APPLY_CORES = max(1, (os.cpu_count() or 1) // 4)
#: Threads that a push in shared memory is divided among: there is no socket to leave cores to.
_HELPERS = os.cpu_count() or 1
#: Threads that wait for the helpers of one push each.
_SHARE_THREADS = os.cpu_count() or 1
#: Threads that wait for disks.
_FILE_THREADS = 8
#: Threads that wait for an object store, which may not answer for half a minute.
_FETCH_THREADS = 16
#: Threads that sync acknowledged versions, at the speed of the disk.
_SYNC_THREADS = 4
#: Threads that take memory of a device for pushes, and wait for the device meanwhile.
_DEVICE_THREADS = 2
#: Bytes that must have arrived before a thread is woken to average them.
_WORTH_WAKING_BYTES = 8 << 20


class Workers:
    """The threads of one server.

    receivers, senders: threads that sockets are lent to. helpers: threads that an update in shared memory is divided
    among.
    """

    def __init__(self) -> None:
        self._apply = Threads(_APPLY_THREADS, "ema-apply", use_cores, (_APPLY_CORES,))
        self._receive = Threads(_RECEIVE_THREADS, "ema-receive", use_cores, (1,))
        self._send = Threads(_SEND_THREADS, "ema-send", use_cores, (1,))
        self._files = Threads(_FILE_THREADS, "ema-files")
        self._fetch = Threads(_FETCH_THREADS, "ema-fetch")
        self._sync = Threads(_SYNC_THREADS, "ema-sync")
        self._share = Threads(_SHARE_THREADS, "ema-share")
        self._device = Threads(_DEVICE_THREADS, "ema-device")
        self._report = Threads(1, "ema-report")
        self.helpers = Threads(_HELPERS, "ema-help", use_cores, (1,))
        self.receivers = SocketThreads(self._receive, _RECEIVE_THREADS)
        self.senders = SocketThreads(self._send, _SEND_THREADS)

    async def compute(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a thread for updates. Returns, or raises, only after the work is over."""
        return await _outlasting(self._apply, work)

    async def block(self, work: Callable[[], T]) -> T:
        """Run ``work``, which waits for a disk or a lock, on a thread for files.

        Returns, or raises, only after the work is over.
        """
        return await _outlasting(self._files, work)

    async def fetch(self, work: Callable[[], T]) -> T:
        """Run ``work``, which may wait for an object store, on a thread that nothing else waits for.

        Returns, or raises, only after the work is over.
        """
        return await _outlasting(self._fetch, work)

    async def take_over(self, work: Callable[[], T]) -> T:
        """Run ``work``, which averages a push in shared memory, on a thread that no disk holds up.

        Returns, or raises, only after the work is over.
        """
        return await _outlasting(self._share, work)

    async def allocate(self, work: Callable[[], T]) -> T:
        """Run ``work``, which takes memory of a device, on a thread that no disk holds up.

        Returns, or raises, only after the work is over.
        """
        return await _outlasting(self._device, work)

    async def report(self, work: Callable[[], T]) -> T:
        """Run ``work``, which looks at the whole server for an operator, on a thread of its own: one at a time, and no
        update waits for it, nor it for updates.

        Returns, or raises, only after the work is over.
        """
        return await _outlasting(self._report, work)

    def sync(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Begin ``work``, which waits for the medium, on a thread for syncing."""
        return asyncio.get_running_loop().run_in_executor(self._sync, work)

    def behind(self, advance: Callable[[int], None]) -> Behind:
        """Work behind the receiving of one push: ``advance`` is called with how many bytes have arrived, off the event
        loop."""
        return Behind(self._apply, advance)

    def close(self) -> None:
        """Finish the updates and files in hand, and end the threads."""
        updates = self._receive, self._send, self._apply, self._share, self._device, self.helpers
        for threads in (*updates, self._sync, self._files, self._fetch, self._report):
            threads.shutdown()


async def _outlasting(threads: Executor, work: Callable[[], T]) -> T:
    """What ``work`` returns.

    Where the request is given up, the coroutine still waits for the end of the work, which uses what the request owns.
    """
    # In the context of the request: lines that the work logs are lines of it.
    working = asyncio.get_running_loop().run_in_executor(threads, copy_context().run, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        # A request that starlette gives up is cancelled at every step until it ends; the shield keeps that off.
        with anyio.CancelScope(shield=True):
            while not working.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([working])
        raise


class Behind:
    """Work behind the receiving of one push (transfer.filling.Work): calls ``advance`` with a growing count of bytes.

    On a thread that receives, ``advance`` is called at once. On the event loop, counts are gathered and passed on to a
    thread for updates: at most one call is under way, for at least _WORTH_WAKING_BYTES more than the call before.
    """

    def __init__(self, threads: Executor, advance: Callable[[int], None]) -> None:
        self._threads = threads
        self._advance = advance
        self._arrived = 0
        self._begun = 0
        self._running = False
        self._lock = threading.Lock()

    def here(self, arrived: int) -> None:
        """Average on the calling thread."""
        self._advance(arrived)

    def elsewhere(self, arrived: int) -> None:
        """Have a thread average, once enough bytes have arrived."""
        with self._lock:
            self._arrived = arrived
            start = not self._running and arrived - self._begun >= _WORTH_WAKING_BYTES
            self._running |= start
        if start:
            self._threads.submit(self._work)

    def _work(self) -> None:
        """On a thread for updates: average until too little is left."""
        while True:
            with self._lock:
                if self._arrived - self._begun < _WORTH_WAKING_BYTES:
                    self._running = False
                    return
                self._begun = self._arrived
            self._advance(self._begun)
