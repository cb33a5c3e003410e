"""Clients of the real service; servers that misbehave on purpose, on real ports: early answers, resets, lost answers.

What a real service never does, and a proxy or a dying machine does. Knows HTTP/1.1 as bytes, and how clients are made
and closed. Does not know what a test asks.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.cli import main

PATIENCE = 20.0


@dataclass(frozen=True)
class Request:
    """The head of a request; ``headers`` with lower-case names."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", "0"))


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock

    def request(self) -> Request | None:
        """The head of the next request, None where the client hung up."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self.sock.recv(1)
            if not byte:
                return None
            head += byte
        line, *fields = head.decode("latin-1").rstrip().split("\r\n")
        method, target, _ = line.split(" ")
        pairs = (field.split(": ", 1) for field in fields)
        return Request(method, target, {name.lower(): value for name, value in pairs})

    def body(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length and (chunk := self.sock.recv(min(1 << 20, length - len(received)))):
            received += chunk
        return bytes(received)

    def send(self, raw: bytes) -> None:
        self.sock.sendall(raw)

    def answer(
        self, status: int, body: bytes | dict[str, Any] = b"", kind: str = "application/json", **headers: str
    ) -> None:
        """A whole answer; a dict is sent as JSON. Underscores in header names become dashes."""
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        fields = {"Content-Type": kind, "Content-Length": str(len(raw))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"HTTP/1.1 {status} Something", *(f"{name}: {value}" for name, value in fields.items())]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)

    def problem(self, status: int, code: str, **headers: str) -> None:
        body = {"code": code, "status": status, "detail": f"the detail of {code}", "hint": "the hint"}
        self.answer(status, body, "application/problem+json", **headers)

    def reset(self) -> None:
        """Close with RST, as a killed process with unread data does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Script = Callable[[Peer], None]


class Scripted:
    """Plays the n-th script on the n-th connection, and the last one on all that follow."""

    def __init__(self, *scripts: Script, path: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.scripts = scripts
        self._tls = tls
        self.connections = 0
        self.faults: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._peers: list[Peer] = []
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self._listener.listen()
            self.url = f"unix://{path}"
        self._listener.settimeout(0.05)
        self._closing = threading.Event()
        self._start(self._accept)

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            self.connections += 1
            peer = Peer(sock)
            self._peers.append(peer)
            self._start(lambda script=script, peer=peer: self._play(script, peer))  # type: ignore[misc]

    def _play(self, script: Script, peer: Peer) -> None:
        try:
            if self._tls:
                peer.sock = self._tls.wrap_socket(peer.sock, server_side=True)
            script(peer)
        except (ConnectionError, ssl.SSLError):
            pass  # the client hung up: what that means is for the test to say
        except BaseException as fault:  # noqa: BLE001 - told to the test when it ends
            self.faults.append(fault)
        finally:
            peer.sock.close()

    def close(self) -> None:
        self._closing.set()
        for peer in list(self._peers):
            # Wakes a script that waits for a request that will not come.
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()
        assert not any(thread.is_alive() for thread in self._threads)


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    """Make servers that play scripts; a fault in a script fails the test."""
    made: list[Scripted] = []

    def make(*scripts: Script, **options: Any) -> Scripted:
        made.append(Scripted(*scripts, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()
    assert [fault for server in made for fault in server.faults] == []


def _forward(url: str, request: Request, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    address = urlsplit(url)
    upstream = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
    try:
        hop = {"host", "expect", "connection", "content-length"}
        headers = {name: value for name, value in request.headers.items() if name not in hop}
        upstream.request(request.method, request.target, body, headers)
        response = upstream.getresponse()
        return response, response.read()
    finally:
        upstream.close()


@pytest.fixture
def relay(scripted: Callable[..., Scripted], server: Any) -> Callable[..., Scripted]:
    """A way to the real service that loses answers: the service has done what was asked, and the caller is not told.

    ``loses`` says of each request whether its answer is lost; ``after`` is how many bytes of its body come through.
    """

    def make(loses: Callable[[Request], bool], *, after: int | None = None) -> Scripted:
        def script(peer: Peer) -> None:
            while request := peer.request():
                if "expect" in request.headers:
                    peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                response, raw = _forward(server.url, request, peer.body(request.length))
                lost = loses(request)
                if not lost or after is not None:
                    head = [f"HTTP/1.1 {response.status} Relayed"]
                    skipped = {"transfer-encoding", "connection"}
                    head += [f"{name}: {value}" for name, value in response.getheaders() if name.lower() not in skipped]
                    peer.send("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + raw[: after if lost else None])
                if lost:
                    return

        return scripted(script)

    return make


@pytest.fixture
def free_url() -> str:
    """The URL of a port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    """A client of the real service."""
    with EmaClient(server.url) as made:
        yield made


@pytest.fixture
def make_ema(server: Any, run_name: str) -> Iterator[Callable[..., RemoteEma]]:
    """Make RemoteEmas of one run on the real service, closed after the test; models are the same at each run of it."""
    torch.manual_seed(0)
    made: list[RemoteEma] = []

    def make_ema(model: nn.Module, *args: Any, **options: Any) -> RemoteEma:
        made.append(RemoteEma(model, *args, **{"run": run_name, "url": server.url, **options}))
        return made[-1]

    yield make_ema
    for ema in made:
        ema.close()


@pytest.fixture
def ema(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command ``ema`` in this process: exit code, stdout, stderr. typed: what the user answers."""
    monkeypatch.setenv("EMA_SERVICE_URL", server.url)

    def run(*words: str | Path, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ema", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (int(code) if code else 0, *capsys.readouterr())

    return run
