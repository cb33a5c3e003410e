"""Reading a weights stream up to its first tensor. Knows streams as bytes; no socket is open here."""

from __future__ import annotations

import pytest

from ema_client import wire
from ema_client.errors import ProtocolError
from ema_client.protocol import TensorSpec, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.weights import Weights, read_header

INFO = WeightsInfo("r", "ema", "1.3", 3, 3, 0.9998999834060669)
HEADER = wire.build_header(wire.place([TensorSpec("w", (2,), "F32")]), INFO.to_metadata())


class Bytes:
    """A body in memory; ``length`` may lie."""

    def __init__(self, raw: bytes, length: int | None = None) -> None:
        self.url = "http://host/weights"
        self.length = len(raw) if length is None else length
        self._raw = raw

    def readinto(self, view: memoryview) -> None:
        assert len(view) <= len(self._raw), "read beyond the body"
        view[:], self._raw = self._raw[: len(view)], self._raw[len(view) :]


def test_header_and_info_are_read() -> None:
    """Names, shapes and the run's state come before the first tensor."""
    header, info = read_header(Bytes(HEADER + bytes(8)), Asked("r"))

    assert [entry.spec for entry in header.entries] == [TensorSpec("w", (2,), "F32")]
    assert info == INFO


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (Bytes(b"<html>hello, this is a proxy</html>"), "sent no weights: the header claims"),
        (Bytes(b"tiny"), "sent no weights: 4 bytes"),
        (Bytes((1 << 60).to_bytes(8, "little") + b"{}"), "the header claims"),
        (Bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00[]"), "sent no weights: the header does not begin"),
        (Bytes(HEADER + bytes(7)), "its header describes"),
        (Bytes(HEADER + bytes(9)), "its header describes"),
        (Bytes(wire.build_header(wire.place([]), {"format": "pt"})), "without the metadata of a run"),
        (Bytes(wire.build_header(wire.place([]), {**INFO.to_metadata(), "ema_step": "x"})), "without the metadata"),
    ],
)
def test_what_is_no_weights_stream_is_refused(body: Bytes, message: str) -> None:
    """A page, a lie about lengths and a stranger's file are told apart before anything is allocated for them."""
    with pytest.raises(ProtocolError, match=message):
        read_header(body, Asked("r"))


def test_weights_are_a_mapping() -> None:
    """Weights behave as a read-only mapping that knows its version."""
    weights = Weights({"a": 1, "b": 2}, INFO)  # type: ignore[dict-item]

    assert dict(weights) == {"a": 1, "b": 2}
    assert (len(weights), list(weights), "a" in weights, weights.info) == (2, ["a", "b"], True, INFO)
    assert "version 1.3" in repr(weights)
