"""Several averages in one body: heads one behind the other, then their data in pieces that take turns.

Knows: the body of ``GET /v1/runs/{run}/sweep``. Does not know: sockets, retries, which averages are wished for and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ema_client import protocol
from ema_client.errors import ProtocolError
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.protocol import HEADER_TARGETS, SWEEP_PIECE_BYTES, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Progress
from ema_client.reading.weights import info_of, read_head
from ema_client.targets import Target

__all__ = ["AskedSweep"]


@dataclass(frozen=True, slots=True)
class AskedSweep:
    """Averages to ask for at once: of one run, kind and time; at most protocol.MAX_SWEPT.

    dtype: as safetensors writes it, None for the shadow's own.
    """

    run: str
    targets: tuple[Target, ...]
    dtype: str | None = None

    def save(
        self, transport: Transport, paths: Sequence[Path], progress: Progress | None = None
    ) -> tuple[WeightsInfo, ...]:
        """Write each average to its path, as a safetensors file; a piece of one of them is in memory at a time.

        progress: called with the bytes of all averages that have come, and in all.

        The files are for the caller to delete, whatever is raised: SynthesisRefused where one of the averages is
        refused, ProtocolError where the body is no sweep or has other averages, what the transport raises once its
        retries are spent, OSError. A broken transfer begins anew.
        """
        first = self.targets[0]
        query = first.query | {first.kind: ",".join(target.said for target in self.targets), "dtype": self.dtype}
        path, seconds = protocol.sweep_path(self.run), Asked(self.run, target=first).work_seconds

        def attempt(_: int) -> tuple[WeightsInfo, ...]:
            with transport.download(path, query=query, patience=seconds) as body, ExitStack() as files:
                return self._receive(body, [files.enter_context(path.open("wb")) for path in paths], progress)

        return transport.retrying(attempt)

    def _receive(self, body: Download, files: Sequence[BinaryIO], progress: Progress | None) -> tuple[WeightsInfo, ...]:
        if body.headers.get(HEADER_TARGETS.lower()) != str(len(self.targets)):
            raise ProtocolError(f"{body.url} sent no sweep of {len(self.targets)} averages")
        left, lengths, infos = body.length, set(), []
        for target, file in zip(self.targets, files, strict=True):
            raw, header = read_head(body, left)
            infos.append(info_of(body.url, header, Asked(self.run, target=target)))
            file.write(raw)
            left -= len(raw)
            lengths.add(header.data_bytes)
        if len(lengths) != 1 or left != lengths.copy().pop() * len(files):
            raise ProtocolError(f"{body.url} sent {body.length} bytes; its headers describe another sweep")
        if len({(info.version, info.num_updates) for info in infos}) != 1:
            raise ProtocolError(f"{body.url} sent averages of several versions as one sweep")
        _part(body, files, lengths.pop(), progress or _nobody)
        return tuple(infos)


def _nobody(_done: int, _total: int) -> None:
    pass


def _part(body: Download, files: Sequence[BinaryIO], length: int, progress: Progress) -> None:
    """Write the data of each average, ``length`` bytes, to its file."""
    piece = memoryview(bytearray(min(SWEEP_PIECE_BYTES, length)))
    for begin in range(0, length, SWEEP_PIECE_BYTES):
        data = piece[: length - begin]
        for file in files:
            body.readinto(data)
            file.write(data)
        progress((begin + len(data)) * len(files), length * len(files))
