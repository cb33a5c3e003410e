"""Staging: the memory a push lands in, and the parser that decides where each of its bytes goes.

A push is received straight into the buffer that becomes the next shadow. ``UpdateBody`` tells whoever holds the socket
where the next bytes belong (``window``) and is told how many came (``advance``); nothing of a run changes until the
body is whole and right.

Knows layouts, budgets and the byte stream. Does not know sockets, the event loop, or what an update does with the
memory.
"""

from __future__ import annotations

import threading
import weakref

import torch
import xxhash
from torch import Tensor

from ema_client.errors import BodyTooLarge, MalformedBody, Overloaded
from ema_client.protocol import MAX_HEADER_BYTES
from ema_client.wire import LENGTH_BYTES, parse_header, parse_length
from ema_service.runs.arena import TORCH_DTYPES, Arena, Memory, buffer_bytes, param_offset
from ema_service.runs.layout import Layout

__all__ = ["Staged", "Staging", "UpdateBody"]


class Staged:
    """The parameters of one push, in memory that becomes an arena. Owned by the request that received it.

    data: the host memory of the parameters, layout.param_bytes long.
    release(): gives the budget back; also happens when the object dies. The memory itself lives as long as its views.
    """

    def __init__(self, layout: Layout, memory: Memory) -> None:
        self.layout = layout
        self._memory = memory
        start = param_offset(layout)
        self._buffer = memory.pool.lend(buffer_bytes(layout) if memory.on_host else layout.param_bytes)
        host = self._buffer[start:] if memory.on_host else self._buffer
        self.data = host[: layout.param_bytes].numpy().data

    def load(self) -> tuple[Arena, list[Tensor]]:
        """The parameters on the device:

        one flat tensor for each section, lying at the end of the arena to be written.
        """
        buffer = self._buffer if self._memory.on_host else self._to_device()
        params = buffer[param_offset(self.layout) :]
        sections = [params[s.param].view(TORCH_DTYPES[s.param_dtype]) for s in self.layout.sections]
        return Arena(self.layout, buffer), sections

    def release(self) -> None:
        self._give_back()

    def _to_device(self) -> Tensor:
        buffer = self._memory.allocate(buffer_bytes(self.layout))
        start = param_offset(self.layout)
        buffer[start : start + self.layout.param_bytes].copy_(self._buffer, non_blocking=True)
        torch.cuda.current_stream(self._memory.device).synchronize()
        return buffer

    def charge(self, budget: _Budget, nbytes: int) -> None:
        """Let this object's end, by release() or by death, return ``nbytes`` to ``budget``. Called once, by Staging."""
        self._give_back = weakref.finalize(self, budget.give_back, nbytes)


class _Budget:
    """Bytes in use out of a limit. Thread-safe;

    giving back may happen in a garbage collection, hence the re-entrant lock.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> bool:
        with self._lock:
            if self.used + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes


class Staging:
    """The budget of pushes being received or applied, decided before a body is read. Thread-safe."""

    def __init__(self, memory: Memory, budget: int) -> None:
        self._memory = memory
        self._budget = _Budget(budget)

    @property
    def bytes_in_use(self) -> int:
        return self._budget.used

    def reserve(self, layout: Layout) -> Staged:
        """Memory for one push of this layout.

        Raises BodyTooLarge where the budget could never hold it, Overloaded where it cannot now.
        """
        nbytes = buffer_bytes(layout)
        if nbytes > self._budget.limit:
            raise BodyTooLarge(
                f"a push of this run takes {nbytes} bytes of staging, the budget is {self._budget.limit}",
                hint="start the server with a larger --staging-bytes",
            )
        if not self._budget.take(nbytes):
            raise Overloaded(
                f"pushes in flight take {self._budget.used} of {self._budget.limit} bytes (staging_bytes); "
                f"{nbytes} more do not fit",
                retry_after=1.0,
            )
        try:
            staged = Staged(layout, self._memory)
            staged.charge(self._budget, nbytes)
        except (MemoryError, OSError, RuntimeError):
            self._budget.give_back(nbytes)
            raise
        return staged


class UpdateBody:
    """Takes the bytes of one push in order and puts each where it belongs.

    Use: ``while not body.complete: n = read_into(body.window()); body.advance(n)``, then ``body.finish()``.
    """

    def __init__(self, staged: Staged, content_length: int | None = None) -> None:
        """Raises MalformedBody or BodyTooLarge where the announced length cannot be right."""
        layout = staged.layout
        most = LENGTH_BYTES + MAX_HEADER_BYTES + layout.param_bytes
        if content_length is not None and content_length > most:
            raise BodyTooLarge(f"the body announces {content_length} bytes; a push of this run has at most {most}")
        self._layout = layout
        self._data = staged.data
        self._content_length = content_length
        self._hash = xxhash.xxh3_128()
        self._header: bytearray | None = None
        self._targets: list[slice] | None = None
        self._window = memoryview(bytearray(LENGTH_BYTES))
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Every byte of the data has come; one more would be too many."""
        return self._targets is not None and not self._window

    def window(self) -> memoryview:
        """Where the next bytes belong; empty once complete."""
        return self._window[self._filled :]

    def advance(self, count: int) -> None:
        """``count`` bytes were written into window().

        Raises MalformedBody or LayoutMismatch at the first wrong byte.
        """
        self._filled += count
        while self._window and self._filled == len(self._window):
            filled, self._filled = self._window, 0
            if self._header is None:
                self._begin_header(filled)
            elif self._targets is None:
                self._begin_data(bytes(filled))
            else:
                self._hash.update(filled)
                self._next_target()

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take a chunk that lies elsewhere. Raises as advance(), and MalformedBody for bytes beyond the data."""
        rest = memoryview(chunk)
        while rest:
            window = self.window()
            if not window:
                raise MalformedBody(
                    f"the body is longer than its header says: {len(rest)} bytes or more follow the data"
                )
            count = min(len(window), len(rest))
            window[:count] = rest[:count]
            self.advance(count)
            rest = rest[count:]

    def finish(self) -> bytes:
        """The digest (xxh3, 128 bits) of the whole body's tensors. Raises MalformedBody if bytes are missing."""
        if not self.complete:
            raise MalformedBody("the body ends before its header says")
        return self._hash.digest()

    def _begin_header(self, prefix: memoryview) -> None:
        length = parse_length(prefix)
        if self._content_length is not None and LENGTH_BYTES + length > self._content_length:
            raise MalformedBody(f"the header claims {length} bytes, the whole body has {self._content_length}")
        self._header = bytearray(length)
        self._window = memoryview(self._header)

    def _begin_data(self, raw: bytes) -> None:
        if raw == self._layout.header[LENGTH_BYTES:]:
            self._check_length(len(raw))
            self._targets = [slice(0, self._layout.param_bytes)] if self._layout.param_bytes else []
        else:
            entries = parse_header(raw).entries
            self._targets = self._layout.targets(entries)
            self._check_length(len(raw))
            if len(self._targets) > 1:
                # The same bytes under exchanged names are another update.
                self._hash.update("\0".join(entry.name for entry in entries).encode())
        self._targets.reverse()
        self._next_target()

    def _check_length(self, header_bytes: int) -> None:
        whole = LENGTH_BYTES + header_bytes + self._layout.param_bytes
        if self._content_length is not None and self._content_length != whole:
            fault = "longer" if self._content_length > whole else "shorter"
            raise MalformedBody(f"the body has {self._content_length} bytes, {fault} than its header says ({whole})")

    def _next_target(self) -> None:
        self._window = self._data[self._targets.pop()] if self._targets else memoryview(b"")
