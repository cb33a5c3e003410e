"""Weights into files, over connections that break. Knows scripts of raw HTTP (conftest.py) and the file system."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_client import EmaClient, RetryPolicy, wire
from ema_client.errors import ConnectionLost, ProtocolError, RunNotFound
from ema_client.protocol import TensorSpec, WeightsInfo

INFO = WeightsInfo("r", "ema", "1.3", 3, 3, 0.5)
QUICK = RetryPolicy(attempts=4, base=0.01, cap=0.02)
SIZE = 3 << 20


def stream(seed: int) -> bytes:
    entries = wire.place([TensorSpec("w", (SIZE // 4,), "F32")])
    return wire.build_header(entries, INFO.to_metadata()) + random.Random(seed).randbytes(SIZE)


def part(raw: bytes, start: int, stop: int, etag: str, *, announced: int | None = None) -> Callable[[Any], None]:
    """Answers one request with raw[start:stop] of what it says is raw[start:], and hangs up."""

    def script(peer: Any) -> None:
        request = peer.request()
        status = "206 Partial Content" if start else "200 OK"
        head = [f"HTTP/1.1 {status}", f"Content-Length: {(announced or len(raw)) - start}", f"ETag: {etag}"]
        if start:
            assert request.headers["range"].startswith(f"bytes={start}-")
            assert request.headers["if-range"] == etag
            head.append(f"Content-Range: bytes {start}-{len(raw) - 1}/{len(raw)}")
        peer.send("\r\n".join(head).encode() + b"\r\n\r\n" + raw[start:stop])

    return script


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_whole_and_progress_is_told(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """The file is the body, byte for byte; progress grows to the whole; no other file is left."""
    raw, seen = stream(1), []
    server = scripted(part(raw, 0, len(raw), '"1.3"'))

    with EmaClient(server.url, retry=QUICK) as client:
        info = client.download("r", tmp_path / "w.safetensors", progress=lambda *both: seen.append(both))

    assert info == INFO
    assert (tmp_path / "w.safetensors").read_bytes() == raw
    assert seen[-1] == (len(raw), len(raw))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert left_over(tmp_path) == ["w.safetensors"]


def test_broken_transfer_goes_on_where_it_stopped(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """After a break only the missing bytes are asked for, as long as the body is the same one."""
    raw = stream(1)
    server = scripted(
        part(raw, 0, 1_000_000, '"1.3"'),
        part(raw, 1_000_000, 2_500_000, '"1.3"'),
        part(raw, 2_500_000, len(raw), '"1.3"'),
    )

    with EmaClient(server.url, retry=QUICK) as client:
        client.download("r", tmp_path / "w.safetensors")

    assert (tmp_path / "w.safetensors").read_bytes() == raw
    assert server.connections == 3


def test_new_version_begins_anew(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """If the weights moved on meanwhile, the file is of the new version alone."""
    old, new = stream(1), stream(2)
    server = scripted(part(old, 0, 1_000_000, '"1.2"'), part(new, 0, len(new), '"1.3"'))

    with EmaClient(server.url, retry=QUICK) as client:
        client.download("r", tmp_path / "w.safetensors")

    assert (tmp_path / "w.safetensors").read_bytes() == new


def test_weak_etag_begins_anew(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """A weak ETag promises no equal bytes: nothing is pieced together by it."""
    old, new = stream(1), stream(2)
    server = scripted(part(old, 0, 1_000_000, 'W/"1"'), part(new, 0, len(new), 'W/"1"'))

    with EmaClient(server.url, retry=QUICK) as client:
        client.download("r", tmp_path / "w.safetensors")

    assert (tmp_path / "w.safetensors").read_bytes() == new


def test_part_that_was_not_asked_for_is_refused(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """A server that sends other bytes than asked for does not get them into the file."""
    raw = stream(1)

    def wrong_part(peer: Any) -> None:
        peer.request()
        peer.answer(206, raw[5:], "application/octet-stream", ETag='"1.3"', Content_Range=f"bytes 5-{len(raw) - 1}/9")

    server = scripted(part(raw, 0, 1_000_000, '"1.3"'), wrong_part)

    with EmaClient(server.url, retry=QUICK) as client, pytest.raises(ProtocolError, match="asked from byte 1000000"):
        client.download("r", tmp_path / "w.safetensors")
    assert left_over(tmp_path) == []


def test_file_that_was_there_stays_until_the_new_one_is_whole(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """A download that fails leaves the old file as it was, and nothing beside it."""
    raw = stream(1)
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"old")
    server = scripted(part(raw, 0, 10, '"1.3"'), part(raw, 10, 20, '"1.3"'), lambda peer: peer.request())

    with EmaClient(server.url, retry=RetryPolicy(attempts=2, base=0.01)) as client, pytest.raises(ConnectionLost):
        client.download("r", target)

    assert target.read_bytes() == b"old"
    assert left_over(tmp_path) == ["w.safetensors"]


def test_what_is_no_weights_file_is_not_kept(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """A page with status 200 does not become a file of weights."""

    def page(peer: Any) -> None:
        peer.request()
        peer.answer(200, b"<html>please log in</html>", "text/html")

    with EmaClient(scripted(page).url, retry=QUICK) as client, pytest.raises(ProtocolError):
        client.download("r", tmp_path / "w.safetensors")
    assert left_over(tmp_path) == []


def test_refusal_leaves_no_file(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """An error of the service is raised, and the folder stays empty."""

    def refuse(peer: Any) -> None:
        peer.request()
        peer.problem(404, "run_not_found")

    with EmaClient(scripted(refuse).url, retry=QUICK) as client, pytest.raises(RunNotFound):
        client.download("r", tmp_path / "w.safetensors")
    assert left_over(tmp_path) == []


def test_folder_that_is_not_there_is_told_before_asking(free_url: str, tmp_path: Path) -> None:
    """A path that cannot be written is an OSError, and nothing is downloaded for it."""
    with EmaClient(free_url, retry=QUICK) as client, pytest.raises(FileNotFoundError):
        client.download("r", tmp_path / "none" / "w.safetensors")
