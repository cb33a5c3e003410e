"""Several averages in one body: how it is parted into files, and what is no such body.

Knows the wire form of a sweep, written here by hand. Does not know how averages are worked out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from ema_client.errors import ConnectionLost, ProtocolError, SynthesisRefused
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.protocol import SWEEP_PIECE_BYTES, WeightsInfo
from ema_client.reading.swept import AskedSweep
from ema_client.targets import Target

WIDTHS = (0.05, 0.1, 0.2)
ASKED = AskedSweep("r", tuple(Target("sigma_rel", width) for width in WIDTHS))


def stream(width: float, numel: int, **changed: Any) -> tuple[bytes, bytes]:
    """Head and data of one average."""
    fields: dict[str, Any] = {"run": "r", "average": "posthoc", "version": "1.9", "step": 9, "num_updates": 9}
    fields |= {"decay": 1.0, "schedule": "power", "sigma_rel": width, "target": f"sigma_rel {width}"}
    tensors = {"w": torch.full((numel,), width), "b": torch.arange(3.0) * width}
    whole = save(tensors, WeightsInfo(**(fields | changed)).to_metadata())
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    return whole[:end], whole[end:]


def body_of(streams: list[tuple[bytes, bytes]]) -> bytes:
    """Heads, then pieces of the data that take turns."""
    pieces = [
        [data[at : at + SWEEP_PIECE_BYTES] for at in range(0, len(data), SWEEP_PIECE_BYTES)] for _, data in streams
    ]
    return b"".join(head for head, _ in streams) + b"".join(chain.from_iterable(zip_longest(*pieces, fillvalue=b"")))


def fetched(scripted: Callable[..., Any], folder: Path, *scripts: Any) -> list[Path]:
    paths = [folder / f"{width}.safetensors" for width in WIDTHS]
    transport = Transport(scripted(*scripts).url, retry=RetryPolicy(attempts=2, base=0.01))
    try:
        infos = ASKED.save(transport, paths)
        assert [info.sigma_rel for info in infos] == list(WIDTHS)
    finally:
        transport.close()
    return paths


def answering(body: bytes, targets: int | None = 3) -> Any:
    def script(peer: Any) -> None:
        request = peer.request()
        assert request.target == "/v1/runs/r/sweep?sigma_rel=0.05%2C0.1%2C0.2"
        counted = {} if targets is None else {"Ema_Targets": str(targets)}
        peer.answer(200, body, "application/octet-stream", **counted)

    return script


@pytest.mark.parametrize("numel", [1, SWEEP_PIECE_BYTES // 4 - 3, SWEEP_PIECE_BYTES // 4 + 1, 600_000])
def test_each_average_is_a_file(scripted: Callable[..., Any], tmp_path: Path, numel: int) -> None:
    """The heads and the pieces of each average make its safetensors file, whatever the last piece's length."""
    streams = [stream(width, numel) for width in WIDTHS]
    paths = fetched(scripted, tmp_path, answering(body_of(streams)))

    assert [path.read_bytes() for path in paths] == [head + data for head, data in streams]
    assert [float(load_file(path)["w"][-1]) for path in paths] == pytest.approx(WIDTHS)


def test_a_broken_transfer_begins_anew(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """What came of a broken transfer is replaced, not added to."""
    streams = [stream(width, 600_000) for width in WIDTHS]

    def breaks(peer: Any) -> None:
        peer.request()
        body = body_of(streams)
        peer.send(
            b"HTTP/1.1 200 OK\r\nEma-Targets: 3\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2]
        )
        peer.reset()

    paths = fetched(scripted, tmp_path, breaks, answering(body_of(streams)))
    assert [path.read_bytes() for path in paths] == [head + data for head, data in streams]
    with pytest.raises(ConnectionLost):
        fetched(scripted, tmp_path, breaks)


@pytest.mark.parametrize(
    ("body", "targets", "says"),
    [
        (lambda s: body_of(s), None, "no sweep of 3"),
        (lambda s: body_of(s), 2, "no sweep of 3"),
        (lambda s: body_of(s[:2]), 3, "no weights"),
        (lambda s: body_of(s) + b"x", 3, "another sweep"),
        (lambda s: body_of(s)[:-1], 3, "another sweep"),
        (lambda _: b"", 3, "no weights"),
        (lambda s: struct.pack("<Q", 2**62) + body_of(s), 3, "no weights"),
        (lambda s: body_of([s[0], s[1], stream(0.2, 11)]), 3, "another sweep"),
        (lambda s: body_of([s[1], s[0], s[2]]), 3, "instead of sigma_rel 0.05"),
        (lambda s: body_of([*s[:2], stream(0.2, 10, version="1.10")]), 3, "several versions"),
        (lambda s: body_of([*s[:2], stream(0.2, 10, num_updates=10)]), 3, "several versions"),
        (lambda s: body_of([*s[:2], stream(0.2, 10, run="other")]), 3, "run 'other'"),
        (lambda s: body_of([*s[:2], stream(0.2, 10, target=None)]), 3, "instead of sigma_rel 0.2"),
    ],
)
def test_what_is_no_sweep(
    scripted: Callable[..., Any], tmp_path: Path, body: Callable[[Any], bytes], targets: int | None, says: str
) -> None:
    """A body that is cut, longer, of other averages or of several versions is refused before its data are read."""
    streams = [stream(width, 10) for width in WIDTHS]

    with pytest.raises(ProtocolError, match=says):
        fetched(scripted, tmp_path, answering(body(streams), targets))


def test_a_refusal(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """Where the service refuses, its error is raised."""

    def refuses(peer: Any) -> None:
        peer.request()
        peer.problem(422, "synthesis_refused")

    with pytest.raises(SynthesisRefused):
        fetched(scripted, tmp_path, refuses)
