"""Bodies that come in: the parser of a safetensors stream that decides where each of its bytes goes.

A ``Body`` tells whoever holds the socket where the next bytes belong (``window``) and is told how many came
(``advance``); nothing of a run changes until the body is whole and right.

Knows the byte stream, layouts and staged memory. Does not know sockets, the event loop, or what an update does with the
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ema_client.errors import BodyTooLarge, MalformedBody
from ema_client.wire import LENGTH_BYTES, parse_header, parse_length
from ema_service.memory import Shared, Staged

__all__ = ["READ_AT_ONCE", "Body", "UpdateBody"]

#: A body that lies in shared memory and has to be copied is copied in pieces of this, by all of torch's threads.
COPY_BYTES = 8 << 20

#: A header that has to be read and is longer than this takes more than 30 ms: off the event loop.
READ_AT_ONCE = 256 << 10


class Body(ABC):
    """Takes the bytes of one safetensors stream in order and puts each where it belongs.

    Use: ``while not body.complete: n = read_into(body.window()); body.advance(n)``, then ``body.finish()``.
    """

    def __init__(self, max_header_bytes: int, content_length: int | None) -> None:
        self._max_header_bytes = max_header_bytes
        self._content_length = content_length
        self._header: bytearray | None = None
        self._unread: bytes | None = None
        self._begun = False
        self._window = memoryview(bytearray(LENGTH_BYTES))
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Every byte of the data has come; one more would be too many."""
        return self._begun and not self._window

    @property
    def arrived(self) -> int:
        """How many bytes of the data are in place, from the first on, for whoever works behind the receiving; 0 where
        they do not come in the layout's order."""
        return 0

    @property
    def unread(self) -> bool:
        """The header is there and takes long to read: call read_header(), off the event loop, before window()."""
        return self._unread is not None

    @property
    def long_header(self) -> bool:
        """A header is coming that feed() may take long to read."""
        return not self._begun and self._header is not None and len(self._header) > READ_AT_ONCE

    def read_header(self) -> None:
        """Raises MalformedBody or LayoutMismatch."""
        if self._unread is not None:
            raw, self._unread = self._unread, None
            self._begin(raw)

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
            elif self._begun:
                self._window = self._next_window()
            elif len(filled) > READ_AT_ONCE and not self._is_known(raw := bytes(filled)):
                self._unread, self._window = raw, memoryview(b"")
            else:
                self._begin(bytes(filled))

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take a chunk that lies elsewhere, and read the header at once if it ends there.

        Raises as advance() and read_header(), and MalformedBody for bytes beyond the data.
        """
        rest = memoryview(chunk)
        while rest:
            window = self.window()
            if not window:
                raise self.surplus(len(rest))
            count = min(len(window), len(rest))
            window[:count] = rest[:count]
            self.advance(count)
            self.read_header()
            rest = rest[count:]

    def take_over(self, shared: Shared) -> None:
        """Take a whole body that lies in shared memory. Raises as feed(), finish() and shared.check()."""
        self.feed(shared.body[:LENGTH_BYTES])
        start = LENGTH_BYTES + len(self.window())
        self.feed(shared.body[LENGTH_BYTES:start])
        self._take_data(shared, start)
        self.finish()

    def _take_data(self, shared: Shared, start: int) -> None:
        # By torch and not as feed() does it: on many threads, and without the interpreter lock.
        data = shared.body[start:]
        while data and (window := self.window()[:COPY_BYTES]):
            count = min(len(window), len(data))
            target, source = torch.frombuffer(window, dtype=torch.uint8), torch.frombuffer(data, dtype=torch.uint8)
            target[:count].copy_(source[:count])
            self.advance(count)
            data = data[count:]
        shared.check()

    def surplus(self, count: int) -> MalformedBody:
        """The error of a body that goes on behind its data."""
        return MalformedBody(f"the body is longer than its header says: {count} bytes or more follow the data")

    def finish(self) -> None:
        """The sender has nothing more to send. Raises MalformedBody if bytes are missing."""
        if not self.complete:
            raise MalformedBody("the body ends before its header says")

    def _begin(self, raw: bytes) -> None:
        self._begin_data(raw)
        self._begun = True
        self._window = self._next_window()

    def _is_known(self, raw: bytes) -> bool:  # noqa: ARG002 - of no header, unless a body says otherwise
        """Whether the header need not be read."""
        return False

    @abstractmethod
    def _begin_data(self, raw: bytes) -> None:
        """The header, without its length prefix, is there. Raises MalformedBody or LayoutMismatch."""

    @abstractmethod
    def _next_window(self) -> memoryview:
        """The memory of the next bytes of the data; empty behind the last."""

    def _begin_header(self, prefix: memoryview) -> None:
        length = parse_length(prefix, limit=self._max_header_bytes)
        if self._content_length is not None and LENGTH_BYTES + length > self._content_length:
            raise MalformedBody(f"the header claims {length} bytes, the whole body has {self._content_length}")
        self._header = bytearray(length)
        self._window = memoryview(self._header)

    def _check_length(self, header_bytes: int, data_bytes: int) -> None:
        whole = LENGTH_BYTES + header_bytes + data_bytes
        if self._content_length is not None and self._content_length != whole:
            fault = "longer" if self._content_length > whole else "shorter"
            raise MalformedBody(f"the body has {self._content_length} bytes, {fault} than its header says ({whole})")


class UpdateBody(Body):
    """A push that carries every tensor of the run."""

    def __init__(self, staged: Staged, content_length: int | None = None) -> None:
        """Raises MalformedBody or BodyTooLarge where the announced length cannot be right."""
        layout = staged.layout
        most = LENGTH_BYTES + layout.max_header_bytes + layout.param_bytes
        if content_length is not None and content_length > most:
            raise BodyTooLarge(f"the body announces {content_length} bytes; a push of this run has at most {most}")
        super().__init__(layout.max_header_bytes, content_length)
        self._layout = layout
        self._staged = staged
        self._data = staged.data
        self._in_order = False
        self._targets: list[slice] = []

    @property
    def arrived(self) -> int:
        if not self._in_order:
            return 0
        return self._layout.param_bytes if self.complete else self._filled

    def _is_known(self, raw: bytes) -> bool:
        return raw == self._layout.header[LENGTH_BYTES:]

    def _begin_data(self, raw: bytes) -> None:
        if self._is_known(raw):
            self._targets = [slice(0, self._layout.param_bytes)] if self._layout.param_bytes else []
        else:
            self._targets = self._layout.targets(parse_header(raw).entries)
        self._check_length(len(raw), self._layout.param_bytes)
        self._in_order = len(self._targets) == 1
        self._targets.reverse()

    def _next_window(self) -> memoryview:
        return self._data[self._targets.pop()] if self._targets else memoryview(b"")

    def _take_data(self, shared: Shared, start: int) -> None:
        if self._in_order and self._staged.adopt(shared, start):
            self._window = memoryview(b"")
        else:
            super()._take_data(shared, start)
