"""Incoming bodies: the parser of a safetensors stream that says where in memory the next bytes belong.

Whoever holds the socket asks a ``Body`` where the next bytes belong (``window``), writes them there, and says how many
arrived (``advance``). Nothing of a run changes until the body is whole and right.

Knows the byte stream, layouts and staged memory. Does not know sockets, the event loop, or what an update does with the
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from ema_client.errors import BodyTooLarge, MalformedBody
from ema_client.protocol import DIGEST_BYTES
from ema_client.wire import LENGTH_BYTES, parse_header, parse_length
from ema_service.memory import Shared, Staged
from ema_service.values import Array, array_over

__all__ = ["LONG_HEADER_BYTES", "Body", "UpdateBody"]

#: A body in a client's memory that cannot stay there is copied to staging, so many bytes at once, of which each helper
#: copies a part.
_COPIED_AT_ONCE, _COPIED_BY_ONE = 8 << 20, 2 << 20

#: Parsing a header longer than this takes more than 30 ms, so it is parsed off the event loop.
LONG_HEADER_BYTES = 256 << 10


class Body(ABC):
    """Takes the bytes of one safetensors stream in order and puts each where it belongs.

    Use: ``while not body.complete: n = read_into(body.window()); body.advance(n)``, then ``body.finish()``.

    More than twenty methods: what a receiver asks of any body, and what each kind of body answers.

    max_header_bytes: a longer header is refused. content_length: the announced length of the whole body, None where it
    is not known. digest: the sender's, which follows the data, once it has arrived; None where none was announced.
    """

    def __init__(self, max_header_bytes: int, content_length: int | None) -> None:
        self.digest: bytearray | None = None
        self._data_over = False
        self._max_header_bytes = max_header_bytes
        self._content_length = content_length
        self._header: bytearray | None = None
        self._unread: bytes | None = None
        self._begun = False
        self._window = memoryview(bytearray(LENGTH_BYTES))
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether every byte of the data has arrived; one more would be too many."""
        return self._begun and not self._window

    @property
    def arrived(self) -> int:
        """How many bytes of the parameters are in place, from the first on, for a pass behind the receiving.

        0 where the bytes do not come in the layout's order.
        """
        return 0

    @property
    def unread(self) -> bool:
        """Whether the header has arrived and takes long to parse: then read_header() must be called, off the event
        loop, before window()."""
        return self._unread is not None

    @property
    def long_header(self) -> bool:
        """Whether a header is arriving that feed() may take long to parse."""
        return not self._begun and self._header is not None and len(self._header) > LONG_HEADER_BYTES

    def read_header(self) -> None:
        """Parse a header that was left unread, if there is one. Raises MalformedBody or LayoutMismatch."""
        if self._unread is not None:
            raw, self._unread = self._unread, None
            self._begin(raw)

    def expect_digest(self) -> None:
        """The sender's digest follows the data. Before the first byte."""
        self.digest = bytearray(DIGEST_BYTES)

    def window(self) -> memoryview:
        """The memory that the next bytes belong in; empty once the body is complete."""
        return self._window[self._filled :]

    def advance(self, count: int) -> None:
        """Take note that ``count`` bytes were written into window().

        Raises MalformedBody or LayoutMismatch at the first wrong byte.
        """
        self._filled += count
        while self._window and self._filled == len(self._window):
            filled, self._filled = self._window, 0
            if self._header is None:
                self._begin_header(filled)
            elif self._begun:
                self._go_on()
            elif len(filled) > LONG_HEADER_BYTES and not self._is_known(raw := bytes(filled)):
                self._unread, self._window = raw, memoryview(b"")
            else:
                self._begin(bytes(filled))

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Copy a chunk of the stream to where it belongs, and parse the header at once if it ends there.

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

    @property
    def head_bytes(self) -> int | None:
        """Bytes in front of the data, with the header's length; None before the header has arrived."""
        return LENGTH_BYTES + len(self._header) if self._begun and self._header is not None else None

    def take_over(self, shared: Shared) -> None:
        """Take what lies in a client's shared memory: the whole body, or the data of one whose header was fed.

        Raises as feed(), finish() and shared.check().
        """
        start = 0
        if self.head_bytes is None:
            self.feed(shared.body[:LENGTH_BYTES])
            start = LENGTH_BYTES + len(self.window())
            self.feed(shared.body[LENGTH_BYTES:start])
        self._take_data(shared, start)
        self.finish()

    def _take_data(self, shared: Shared, start: int) -> None:
        """Copy the data of a shared body, which begin at byte ``start``, to where they belong."""
        # Copied by numpy, on many threads and without the interpreter lock; feed() would copy on one thread, with the
        # lock.
        data = shared.body[start:]
        while data and (window := self.window()[:_COPIED_AT_ONCE]):
            count = min(len(window), len(data))
            target, source = array_over(window[:count]), array_over(data[:count])

            def copy(start: int, target: Array = target, source: Array = source) -> None:
                target[start : start + _COPIED_BY_ONE] = source[start : start + _COPIED_BY_ONE]

            deque(shared.helpers.map(copy, range(0, count, _COPIED_BY_ONE)), maxlen=0)
            self.advance(count)
            data = data[count:]
            if shared.passed:
                shared.passed(len(shared.body) - len(data))
        shared.check()

    def surplus(self, count: int) -> MalformedBody:
        """The error of a body that goes on for ``count`` bytes behind its data."""
        return MalformedBody(f"the body is longer than its header says: {count} bytes or more follow the data")

    def finish(self) -> None:
        """Check that the body is complete: the sender has nothing more to send.

        Raises MalformedBody where bytes are missing.
        """
        if not self.complete:
            raise MalformedBody("the body ends before its header says")

    def _begin(self, raw: bytes) -> None:
        self._begin_data(raw)
        self._begun = True
        self._go_on()

    def _go_on(self) -> None:
        """Open the window of what comes next: data, then the digest."""
        self._window = memoryview(b"") if self._data_over else self._next_window()
        if not self._window and not self._data_over:
            self._data_over = True
            self._window = memoryview(self.digest or b"")

    def _is_known(self, raw: bytes) -> bool:  # noqa: ARG002 - a body that knows headers looks
        """Whether the header is one that need not be parsed."""
        return False

    @abstractmethod
    def _begin_data(self, raw: bytes) -> None:
        """Decide where the data belong, by the header (without its length prefix).

        Raises MalformedBody or LayoutMismatch.
        """

    @abstractmethod
    def _next_window(self) -> memoryview:
        """The memory of the next bytes of the data; empty behind the last."""

    def _begin_header(self, prefix: memoryview) -> None:
        """Make room for a header of the length that the prefix says.

        Raises MalformedBody where the length cannot be right.
        """
        length = parse_length(prefix, limit=self._max_header_bytes)
        if self._content_length is not None and LENGTH_BYTES + length > self._content_length:
            raise MalformedBody(f"the header claims {length} bytes, the whole body has {self._content_length}")
        self._header = bytearray(length)
        self._window = memoryview(self._header)

    def _check_length(self, header_bytes: int, data_bytes: int) -> None:
        """Raises MalformedBody where header and data do not add up to the announced length."""
        whole = LENGTH_BYTES + header_bytes + data_bytes + len(self.digest or b"")
        if self._content_length is not None and self._content_length != whole:
            fault = "longer" if self._content_length > whole else "shorter"
            raise MalformedBody(f"the body has {self._content_length} bytes, {fault} than its header says ({whole})")


class UpdateBody(Body):
    """The body of a push that carries every tensor of the run, received into ``staged``."""

    def __init__(self, staged: Staged, content_length: int | None = None) -> None:
        """Raises BodyTooLarge where the announced length is more than any push of this run has."""
        layout = staged.layout
        most = LENGTH_BYTES + layout.max_header_bytes + layout.param_bytes + DIGEST_BYTES
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
        return self._layout.param_bytes if self._data_over else self._filled

    def finish(self) -> None:
        """As Body.finish(); the pass over the parameters then compares their digest with the sender's."""
        super().finish()
        if self.digest is not None:
            self._staged.expected = bytes(self.digest)

    def _is_known(self, raw: bytes) -> bool:
        """Whether the header is that of a canonical push: byte for byte the layout's own."""
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
        """Leave the parameters in the client's memory where a pass can read them there; else copy them to staging."""
        if self._in_order and self._staged.adopt(shared, start):
            self._window = memoryview(b"")
        else:
            super()._take_data(shared, start)
