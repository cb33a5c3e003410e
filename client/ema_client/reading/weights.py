"""Weights as they come from the service: a version of an average, and the head of the safetensors stream.

Knows: the stream's header, the metadata in the header, and that the stream's length must add up. Does not know:
sockets, torch (but as a type), where the tensors are to go.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ema_client import wire
from ema_client.errors import MalformedBody, ProtocolError
from ema_client.protocol import MAX_HEADER_BYTES, WeightsInfo
from ema_client.reading.asked import Asked

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Into", "Source", "Weights", "info_of", "read_head", "read_header"]

#: Gives the tensors to receive weights in, by name; asked once for each try, when the header has come. Raises
#: UsageError where the weights do not fit.
Into = Callable[[tuple[wire.Entry, ...]], "Mapping[str, Tensor]"]


class Weights(dict[str, "Tensor"]):
    """Pulled weights: a dict from name to tensor, all of one version, with the version's ``info``.

    The caller owns the tensors, which nothing else refers to; after ``pull(out=...)``, the tensors of ``out``.

    torch.save() and pickle write a plain OrderedDict, without ``info``, as a module's state dict is: whoever loads the
    file needs nothing of this client, nor weights_only=False.
    """

    def __init__(self, tensors: Mapping[str, Tensor], info: WeightsInfo) -> None:
        super().__init__(tensors)
        self.info = info

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __copy__(self) -> Weights:
        return Weights(self, self.info)

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return Weights({name: copy.deepcopy(tensor, memo) for name, tensor in self.items()}, self.info)

    def __repr__(self) -> str:
        return f"<Weights {self.info.run}/{self.info.average} version {self.info.version}: {len(self)} tensors>"


class Source(Protocol):
    """A body of ``length`` bytes, read from its beginning: a Download or a file."""

    url: str
    length: int

    def readinto(self, view: memoryview) -> None: ...


def read_header(source: Source, asked: Asked) -> tuple[wire.Header, WeightsInfo]:
    """The header of a weights stream, and the run's state in the header; ``source`` then stands at the first tensor.

    Raises ProtocolError if the source is no weights stream, its length does not add up, or the weights are others than
    those asked for.
    """
    raw, header = read_head(source, source.length)
    expected = len(raw) + header.data_bytes
    if expected != source.length:
        raise ProtocolError(f"{source.url} sent {source.length} bytes; its header describes {expected}")
    return header, info_of(source.url, header, asked)


def read_head(source: Source, room: int) -> tuple[bytes, wire.Header]:
    """The head of a safetensors stream, as its bytes and parsed; ``room``: bytes that the source has left.

    Raises ProtocolError where there is no such head.
    """
    if room < wire.LENGTH_BYTES:
        raise ProtocolError(f"{source.url} sent no weights: {room} bytes")
    try:
        prefix = bytearray(wire.LENGTH_BYTES)
        source.readinto(memoryview(prefix))
        length = wire.parse_length(bytes(prefix), limit=min(MAX_HEADER_BYTES, room - wire.LENGTH_BYTES))
        raw = bytearray(length)
        source.readinto(memoryview(raw))
        return bytes(prefix + raw), wire.parse_header(memoryview(raw))
    except MalformedBody as fault:
        raise ProtocolError(f"{source.url} sent no weights: {fault.detail}") from None


def info_of(url: str, header: wire.Header, asked: Asked) -> WeightsInfo:
    """The run's state in a header. Raises ProtocolError, naming ``url``, unless the weights are those asked for."""
    info = _info(url, header.metadata)
    asked.check(url, info)
    return info


def _info(url: str, metadata: Mapping[str, str]) -> WeightsInfo:
    try:
        return WeightsInfo.from_metadata(dict(metadata))
    except (KeyError, ValueError) as fault:
        raise ProtocolError(f"{url} sent weights without the metadata of a run: {fault}") from None
