"""Staging: the memory that a push is received into, and the budget of all pushes.

A push is received straight into the buffer that becomes the next shadow, or stays in memory that its client shares.

Knows layouts, devices and budgets. Does not know the byte stream, sockets, or what an update does with the memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass

from ema_client.errors import BodyTooLarge, Overloaded
from ema_service.memory.arena import Arena, Mark, Memory, buffer_bytes, param_offset
from ema_service.memory.budget import Budget
from ema_service.memory.layout import Layout
from ema_service.values import Array, Values, address, array_over, typed

__all__ = ["Region", "Shared", "Staged", "Staging"]


@dataclass(frozen=True, slots=True)
class Shared:
    """A body in memory that a client's process shares with this one: all of it, or the data without the header.

    body: the bytes; mapped as long as views of ``body`` live. check: raises SegmentUnusable if the client withdrew the
    body, and may have changed it. helpers: threads to divide the pass among, as there is no socket to leave cores to.
    passed: told, as the reading goes on, up to which byte the body is not read any more; None where nobody asks.
    """

    body: memoryview
    check: Callable[[], None]
    helpers: Executor
    passed: Callable[[int], None] | None = None


class Staged:
    """The parameters of one push, in memory that becomes an arena. Owned by the request that receives the push.

    data: the parameters in host memory, layout.param_bytes long. on_host: whether they are averaged in host memory.
    arena: the same buffer once averages are written over the parameters; on the device. shared: the client's memory
    that ``data`` is a view of, None where the push is received; a reader of ``data`` must call settle() after it.
    expected: the digest of the parameters as they were sent, None where the sender gave none. buffer: what becomes the
    arena, on the device. adopted: the client's memory, as ``data``. helpers: threads to divide the averaging among, by
    blocks that each lie in a region of their own; None where whoever receives averages, or the parameters lie in one
    region. The budget is given back by release(), or when this object dies; the memory lives as long as its views.

    More than a dozen attributes: the memory of a push as each of its readers wants it, and who gives it back.

    allocate: take the memory at once; else allocate() has to be called before anything else is asked.
    """

    def __init__(self, layout: Layout, memory: Memory, *, allocate: bool = True) -> None:
        self.layout = layout
        self.on_host = memory.on_host
        self._memory = memory
        self._allocating = threading.Lock()
        self._host: Array | None = None
        self.shared: Shared | None = None
        self.expected: bytes | None = None
        self.adopted: Array | None = None
        self.helpers: Executor | None = None
        self._adopted_at = 0
        if allocate:
            self.allocate()

    def allocate(self) -> None:
        """Take the memory, unless that was done. Raises Overloaded.

        Memory of a device is to be taken off the event loop: CUDA may wait for the device, and locking new pages takes
        0.23 s a GiB.
        """
        with self._allocating:
            if self._host is not None:
                return
            layout, size = self.layout, buffer_bytes(self.layout)
            host = self._memory.landing(size if self.on_host else layout.param_bytes)
            self.buffer: Values = host if self.on_host else self._memory.allocate(size)
            self.arena = Arena(layout, self.buffer)
            self._host = host
            self.data = self.region().data

    def adopt(self, shared: Shared, start: int) -> bool:
        """Leave the parameters in the client's memory, where they lie in canonical order from byte ``start`` of the
        body on.

        False, and nothing done, where a pass could not read them there in any order: addresses that are not aligned, or
        on a device parameters narrower than their shadows, which are averaged in order.
        """
        data = shared.body[start : start + self.layout.param_bytes]
        adopted, as_wide = array_over(data), self.layout.param_bytes == self.layout.shadow_bytes
        if address(adopted) % self.layout.alignment or not (self.on_host or as_wide):
            return False
        self.shared, self.data, self.adopted, self._adopted_at = shared, data, adopted, start
        self.helpers = shared.helpers
        return True

    def passed(self, stop: int) -> None:
        """Tell whose memory the parameters lie in that they are averaged up to byte ``stop``."""
        if self.shared is not None and self.shared.passed is not None:
            self.shared.passed(self._adopted_at + stop)

    def divide(self, helpers: Executor) -> None:
        """The parameters are all there, each block in its own region: have them averaged by many threads."""
        self.helpers = helpers

    def region(self, start: int = 0, stop: int | None = None) -> Region:
        """Where bytes ``start`` to ``stop`` of the parameters lie that are averaged by themselves; all by default."""
        return Region(self, start, self.layout.param_bytes if stop is None else stop)

    @property
    def landed(self) -> Array:
        """The host memory that the push is received into."""
        if self._host is None:
            raise RuntimeError("staging has no memory before allocate()")
        return self._host

    def host_twin(self, arena: Arena) -> Array:
        """Host memory, uint8, as long as an arena of the device: for a copy of its results. The arena keeps it."""
        arena.twin = self._memory.twin(len(arena.data))
        return arena.twin

    def mark(self) -> Mark:
        """A mark behind all work given to the device so far, see Memory.mark()."""
        return self._memory.mark()

    @property
    def followers(self) -> Executor:
        """Threads that wait for a device's results, see Memory."""
        return self._memory.followers

    def settle(self) -> None:
        """Return once no parameter is read any more. Raises SegmentUnusable where the client withdrew them meanwhile.

        The check comes after the reading, as a seqlock's readers do it: what was read is one push, or the push is
        refused.
        """
        if not self.on_host:
            self.mark().synchronize()
        if self.shared is not None:
            self.shared.check()

    def release(self) -> None:
        """Give the budget back, and let go of a client's memory. Can be called again."""
        self._give_back()
        if self.shared is not None:
            # The client's memory is freed as soon as nobody reads it.
            self.shared = self.adopted = None
            self.data = memoryview(b"")

    def charge(self, budget: Budget, nbytes: int) -> None:
        """Return ``nbytes`` to ``budget`` when this object is released or dies. Called once, by Staging."""
        self._give_back = weakref.finalize(self, budget.give_back, nbytes)


class Region:
    """Where the parameters of one stretch of a push lie: at the end of the stretch's own shadows, so that no result of
    another stretch is written over them. Without them in staging: in a client's memory (Staged.adopt).

    start, stop: bytes of the parameters. data: the host memory that the stretch is received into.
    """

    __slots__ = ("_offset", "_staged", "data", "start", "stop")

    def __init__(self, staged: Staged, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self._staged = staged
        self._offset = param_offset(staged.layout, stop)
        shift = self._offset if staged.on_host else 0
        self.data = staged.landed[shift + start : shift + stop].data

    def bytes(self, start: int, stop: int) -> memoryview:
        """Bytes ``start`` to ``stop`` of the push's parameters, which lie in the stretch, in host memory."""
        if self._staged.shared is not None:
            return self._staged.data[start:stop]
        return self.data[start - self.start : stop - self.start]

    def param(self, index: int) -> Values:
        """The parameters of one section on the device, flat, in the dtype they were pushed in.

        Only what lies in the stretch has a meaning; on a GPU: as far as uploaded.
        """
        staged = self._staged
        section = staged.layout.sections[index]
        if staged.adopted is not None and staged.on_host:
            param: Values = staged.adopted[section.param]
        else:
            param = staged.buffer[self._offset + section.param.start : self._offset + section.param.stop]
        return typed(param, section.param_dtype)

    def upload(self, start: int, stop: int) -> None:
        """Copy bytes ``start`` to ``stop`` of the parameters to the device, without waiting. Nothing to do on the
        CPU."""
        staged = self._staged
        if not staged.on_host:
            from ema_service.tensors import tensor_of

            host = tensor_of(staged.landed)
            if staged.adopted is not None:
                host[start:stop].copy_(tensor_of(staged.adopted[start:stop]))
            param = tensor_of(staged.buffer[self._offset + start : self._offset + stop])
            param.copy_(host[start:stop], non_blocking=True)


class Staging:
    """The budget of pushes being received or applied. Thread-safe.

    budget: most bytes of staging, of all pushes together. Whether a push fits is decided before its body is read.
    """

    def __init__(self, memory: Memory, budget: int) -> None:
        self._memory = memory
        self._budget = Budget(min(budget, memory.budget.limit))

    @property
    def bytes_in_use(self) -> int:
        """Bytes that pushes have reserved."""
        return self._budget.used

    def on_room(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called whenever a push gives bytes back: on any thread, perhaps in a garbage collection."""
        self._budget.on_room = tell

    def needed(self, layout: Layout, averages: int = 1) -> int:
        """How many bytes one push of this layout reserves. Raises BodyTooLarge where the whole budget has fewer.

        averages: of the run; each has a new shadow, one of which is the push's own memory.
        """
        nbytes = buffer_bytes(layout) + (averages - 1) * layout.shadow_bytes
        if nbytes > self._budget.limit:
            raise BodyTooLarge(
                f"a push of this run takes {nbytes} bytes of staging, the budget is {self._budget.limit}",
                hint="start the server with a larger --staging-bytes, or --memory-limit",
            )
        return nbytes

    def reserve(self, layout: Layout, averages: int = 1, memory: Memory | None = None) -> Staged:
        """Memory for one push of this layout, and room for the new shadows of all averages.

        memory: the run's, where its arenas are not those of all. Memory of a device is taken by Staged.allocate() only,
        which the caller has to call off the event loop. Raises BodyTooLarge where the whole budget is too small,
        Overloaded where too little of it is free, or where there is no memory all the same; Superseded where the run's
        memory was given back meanwhile.
        """
        nbytes = self.needed(layout, averages)
        if not self._budget.take(nbytes):
            raise Overloaded(
                f"pushes in flight take {self._budget.used} of {self._budget.limit} bytes (staging_bytes); "
                f"{nbytes} more do not fit",
                retry_after=1.0,
            )
        with ExitStack() as undo:
            undo.callback(self._budget.give_back, nbytes)
            memory = memory or self._memory
            staged = Staged(layout, memory, allocate=memory.on_host)
            staged.charge(self._budget, nbytes)
            undo.pop_all()
        return staged
