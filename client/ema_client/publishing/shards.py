"""A safetensors stream cut into shards as it comes: each shard a whole safetensors file, written as its bytes pass.

The service sends tensors in the order in which safetensors files have them, so that a shard is a stretch of the stream
behind a head of its own: nothing is sorted, and nothing is held but the piece that passes.

Knows: the format of safetensors, sizes of shards. Does not know: where shards go, HTTP, torch.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import BinaryIO, Protocol

from ema_client import wire
from ema_client.errors import ProtocolError, UsageError

__all__ = ["Cutter", "Shard", "Sink", "bytes_of", "cut"]

_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]?)(i?)B?\Z", re.IGNORECASE)


def bytes_of(size: int | str) -> int:
    """A size in bytes: a number, or a text such as "5GiB" or "500MB" (a GB is 10^9 bytes, a GiB 2^30).

    Raises UsageError for another text, and for less than one byte.
    """
    found = _SIZE.match(str(size).strip())
    count = 0
    if found:
        number, unit, binary = found.groups()
        count = int(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    if count < 1:
        raise UsageError(f"{size!r} is no size of a shard", hint="give bytes, or a text such as 5GiB or 500MB")
    return count


@dataclass(frozen=True, slots=True)
class Shard:
    """A stretch of a stream's data as a file: ``entries`` have their places in the file, from 0 on."""

    entries: tuple[wire.Entry, ...]

    @property
    def data_bytes(self) -> int:
        return self.entries[-1].end


def cut(entries: Sequence[wire.Entry], most: int) -> tuple[Shard, ...]:
    """Entries of a stream in shards of at most ``most`` bytes of data each; a tensor that is larger has one alone."""
    shards: list[list[wire.Entry]] = []
    begin = 0
    for entry in entries:
        if not shards or entry.end - begin > most:
            shards.append([])
            begin = entry.begin
        shards[-1].append(replace(entry, begin=entry.begin - begin, end=entry.end - begin))
    return tuple(Shard(tuple(each)) for each in shards)


class Sink(Protocol):
    """Opens the file of a shard by the shard's name; the file is there when the block ends, and not if it raises."""

    def __call__(self, name: str, size: int) -> AbstractContextManager[BinaryIO]: ...


class Cutter:
    """Takes a safetensors stream by write(), and writes its shards; use ``with``.

    The last shard appears with finish(), the others as soon as they are whole. A block that raises leaves the last one
    out, so that weights in one file are not there before everything else is.

    Args:
        sink: opens the file of a shard.
        names: gives so many shards their names.
        most: bytes of data in a shard.
        module: what stands in front of each tensor's name, with a dot behind, and is taken off.

    files: the shards by name, once the stream's head has come. metadata: the stream's own.
    """

    def __init__(self, sink: Sink, names: Callable[[int], Sequence[str]], most: int, module: str | None) -> None:
        self._sink = sink
        self._names = names
        self._most = most
        self._front = f"{module}." if module else ""
        self._head = bytearray()
        self._coming: Iterator[tuple[str, Shard]] | None = None
        self._file: BinaryIO = io.BytesIO()
        self._left = 0
        self._opened = ExitStack()
        self.files: dict[str, Shard] = {}
        self.metadata: Mapping[str, str] = {}

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.data_bytes for shard in self.files.values())

    def write(self, piece: bytes | memoryview) -> int:
        """Take the next bytes of the stream. Raises what the sink raises; ProtocolError where no tensor comes."""
        data = memoryview(piece) if self._coming else self._take_head(memoryview(piece))
        while data and (self._left or self._open_next()):
            part, data = data[: self._left], data[self._left :]
            self._file.write(part)
            self._left -= len(part)
        return len(piece)

    def flush(self) -> None:
        """Do nothing: a shard is there when it is whole."""

    def finish(self) -> None:
        """Let the last shard appear, after the stream's last byte."""
        while self._open_next():
            pass  # tensors without elements have no bytes that would open their shard
        self._opened.close()

    def index(self) -> bytes:
        """The index of the shards, as transformers and diffusers read it; the weights' identity stands beside sizes."""
        weight_map = {entry.name: name for name, shard in self.files.items() for entry in shard.entries}
        metadata = {"total_size": self.data_bytes, **self.metadata}
        return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True).encode() + b"\n"

    def __enter__(self) -> Cutter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, raised, trace)

    def _take_head(self, piece: memoryview) -> memoryview:
        """Gather the stream's head, and plan the shards when the head is whole; the data behind the head."""
        self._head += piece
        length = int.from_bytes(self._head[: wire.LENGTH_BYTES], "little") + wire.LENGTH_BYTES
        if len(self._head) < max(length, wire.LENGTH_BYTES + 1):
            return memoryview(b"")
        header = wire.parse_header(bytes(self._head[wire.LENGTH_BYTES : length]))
        if not header.entries:
            raise ProtocolError("weights without a tensor came")
        entries = [replace(entry, name=entry.name.removeprefix(self._front)) for entry in header.entries]
        shards = cut(entries, self._most)
        self.metadata = header.metadata
        self.files = dict(zip(self._names(len(shards)), shards, strict=True))
        self._coming = iter(self.files.items())
        return memoryview(bytes(self._head[length:]))

    def _open_next(self) -> bool:
        """Let the shard that is open appear, and open the next one; whether there is one."""
        if (coming := next(self._coming or iter(()), None)) is None:
            return False
        self._opened.close()
        name, shard = coming
        head = wire.build_header(shard.entries, self.metadata)
        self._file = self._opened.enter_context(self._sink(name, len(head) + shard.data_bytes))
        self._file.write(head)
        self._left = shard.data_bytes
        return True
