"""Connections under TLS that go from the event loop to a thread and back, in the middle of records, bodies and answers.

Bodies cut anywhere in plain bytes are in test_filling.py, flags and certificates in test_tls.py. Knows a real server,
TLS between two buffers, openssl's command. Does not know HTTP beyond what is sent here.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import select
import shutil
import socket
import ssl
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load, save

from ema_service.api.transfer.tls_transport import SecureTransport, accept_secure
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import Certificate, PlainRun, ServerProcess

#: 12 MiB: a thread receives it, and a thread sends it. Whole numbers: an average at decay 0 is exactly what was pushed.
STATE = {"w": torch.randint(1000, (3 << 20,), generator=torch.Generator().manual_seed(7)).float()}
NEXT = {"w": STATE["w"] + 1}
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: As --body-timeout: no shorter, for on a busy machine a sender may get no turn for seconds.
PATIENCE_SECONDS = 5


@pytest.fixture(scope="module")
def secure(
    tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess], certificate: Certificate
) -> Iterator[ServerProcess]:
    flags = (*certificate.flags, "--body-timeout", str(PATIENCE_SECONDS))
    running = server_class(tmp_path_factory.mktemp("secure"), flags).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log


@pytest.fixture
def run(secure: ServerProcess, plain_run: Callable[..., PlainRun], trusting: ssl.SSLContext) -> PlainRun:  # noqa: ARG001
    """A run whose shadow is what was pushed last."""
    return plain_run(secure, STATE, decay=0.0, use_num_updates=False)


@pytest.fixture
def trusting(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    return ssl.create_default_context()


class Peer:
    """A client whose encrypted bytes are in the test's hands."""

    def __init__(self, server: ServerProcess, context: ssl.SSLContext) -> None:
        host, port = server.url.rpartition("/")[2].split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self._received = bytearray()
        self._until(self.tls.do_handshake)
        self.socket.sendall(self.outgoing.read())

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def encrypted(self, plain: bytes) -> bytes:
        self.tls.write(plain)
        return self.outgoing.read()

    def send(self, plain: bytes) -> None:
        self.socket.sendall(self.encrypted(plain))

    def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head = bytes(self._received).partition(b"\r\n\r\n")[0]
        del self._received[: len(head) + 4]
        length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))[15:])
        while len(self._received) < length:
            self._receive()
        body = bytes(self._received[:length])
        del self._received[:length]
        return int(head.split()[1]), body

    def ended(self) -> bool:
        """Whether the server breaks off or says goodbye, and says nothing else before."""
        try:
            return not self._until(lambda: self.tls.read(1))
        except (ssl.SSLError, OSError):
            return True

    def _receive(self) -> None:
        more = self._until(lambda: self.tls.read(1 << 20))
        assert more, "the server ended the connection"
        self._received += more

    def _until(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.socket.sendall(self.outgoing.read())
                data = self.socket.recv(1 << 18)
                self.incoming.write(data) if data else self.incoming.write_eof()


def put(run: PlainRun, step: int, state: dict[str, torch.Tensor]) -> bytes:
    body = save(state)
    return (
        f"PUT {run.path}/updates/{step} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def get(run: PlainRun) -> bytes:
    return f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def staging(run: PlainRun) -> float:
    return float(run.http.get("/metrics").text.split("\nema_staging_bytes ")[1].split()[0])


def is_state(body: bytes, state: dict[str, torch.Tensor]) -> bool:
    return torch.equal(load(body)["w"], state["w"])


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_records_cut_at_a_change_of_hands(
    secure: ServerProcess, run: PlainRun, trusting: ssl.SSLContext, newest: ssl.TLSVersion
) -> None:
    """One connection: pushes whose records break off for longer than a thread waits, small requests and weights in
    between. Not a byte is lost where loop and thread take turns, by either version of TLS."""
    trusting.maximum_version = newest
    with Peer(secure, trusting) as peer:
        for step, state in enumerate((NEXT, STATE), start=1):
            encrypted = peer.encrypted(put(run, step, state) + HEALTH)
            middle = len(encrypted) // 2
            # Within the first record, at a record's fifth byte, and one byte before the end, which is within the next
            # request.
            at = 0
            for cut in (100, middle, middle + 1, 9 << 20, len(encrypted) - 1):
                peer.socket.sendall(encrypted[at:cut])
                at = cut
                time.sleep(0.05)
            peer.socket.sendall(encrypted[at:])
            assert peer.answer()[0] == 200
            assert peer.answer() == (200, b'{"status":"alive"}')
            peer.send(get(run) + HEALTH)
            status, body = peer.answer()
            assert (status, is_state(body, state)) == (200, True)
            assert peer.answer()[0] == 200
        assert peer.tls.version() == newest.name.replace("_", ".")


@pytest.mark.soak
def test_records_cut_anywhere(secure: ServerProcess, run: PlainRun, trusting: ssl.SSLContext) -> None:
    """The long form: random places and pauses, shorter and longer than a thread waits."""
    random = Random(18)
    with Peer(secure, trusting) as peer:
        for step in range(1, 41):
            state = {"w": STATE["w"] + step}
            encrypted = peer.encrypted(put(run, step, state) + HEALTH + get(run))
            cuts = sorted(random.randrange(len(encrypted)) for _ in range(random.randrange(12)))
            for start, stop in pairwise([0, *cuts, len(encrypted)]):
                peer.socket.sendall(encrypted[start:stop])
                time.sleep(random.choice((0, 0.001, 0.02, 0.05)))
            assert [peer.answer()[0] for _ in range(2)] == [200, 200]
            assert is_state(peer.answer()[1], state)


def test_a_reader_that_pauses(secure: ServerProcess, run: PlainRun, trusting: ssl.SSLContext) -> None:
    """Records that the socket does not take go out first once it does, whoever sends then."""
    with Peer(secure, trusting) as peer:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        peer.send(get(run) + get(run))
        for _ in range(2):
            time.sleep(0.1)  # longer than a thread waits for room
            assert is_state(peer.answer()[1], STATE)


@pytest.mark.parametrize("how", ["altered", "cut off", "ended"])
def test_a_body_that_breaks_off_on_the_thread(
    secure: ServerProcess, run: PlainRun, trusting: ssl.SSLContext, how: str
) -> None:
    """A flipped bit, a connection cut within a record, and a farewell in the middle: nothing changes, nothing is
    held, and the step can come again."""
    with Peer(secure, trusting) as peer:
        half = bytearray(peer.encrypted(put(run, 1, NEXT)[: 6 << 20]))
        if how == "altered":
            half[5 << 20] ^= 1
        peer.socket.sendall(half[:-7] if how == "cut off" else half)
        if how == "ended":
            with pytest.raises(ssl.SSLWantReadError):
                peer.tls.unwrap()
            peer.socket.sendall(peer.outgoing.read())
        if how == "cut off":
            wait_until(lambda: staging(run) > 0)
        else:
            assert peer.ended()
    wait_until(lambda: staging(run) == 0)
    assert torch.equal(run.weights()["w"], STATE["w"])
    assert run.push(1, NEXT).json()["applied"]


def test_those_who_stand_still(secure: ServerProcess, run: PlainRun, trusting: ssl.SSLContext) -> None:
    """A sender that stops within a record gets 408, as without TLS; a reader that takes nothing is cut off."""
    before = float(run.http.get("/metrics").text.split("\nema_slow_readers_total ")[1].split()[0])
    with Peer(secure, trusting) as sender, Peer(secure, trusting) as reader:
        sender.socket.sendall(sender.encrypted(put(run, 1, NEXT)[: 6 << 20])[:-5])
        reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reader.send(get(run))
        status, body = sender.answer()
        assert (status, json.loads(body)["code"]) == (408, "request_timeout")
        wait_until(lambda: f"\nema_slow_readers_total {before + 1}" in run.http.get("/metrics").text)
    wait_until(lambda: staging(run) == 0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl's command, which can ask for new keys")
def test_new_keys_within_a_body(secure: ServerProcess, run: PlainRun, certificate: Certificate) -> None:
    """A client of TLS 1.3 that asks for new keys while a thread receives its body is understood, and understands."""
    message = put(run, 1, {"w": torch.zeros_like(STATE["w"])})  # no line of it begins with a letter of openssl's
    address, authority = secure.url.rpartition("/")[2], str(certificate.authority)
    command = ["openssl", "s_client", "-connect", address, "-tls1_3", "-brief", "-CAfile", authority]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "-verify_return_error"], **pipes) as client:

        def say(data: bytes) -> None:
            client.stdin.write(data)
            client.stdin.flush()
            wait_until(lambda: not _unread(client.stdin.fileno()))  # read alone, a letter is a command

        say(message[: 4 << 20])
        say(b"K\n")  # new keys of both sides
        say(message[4 << 20 : 8 << 20])
        say(b"K\n")
        say(message[8 << 20 :])
        assert client.stdout.readline().split()[1] == b"200"
        client.kill()
    assert not run.weights()["w"].any()


def _unread(descriptor: int) -> int:
    """Bytes in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))[0])


def test_the_event_loop_neither_decrypts_nor_encrypts(secure: ServerProcess, run: PlainRun) -> None:
    """The main thread, which runs the event loop, spends the smaller part of the CPU time of pushes and pulls: what a
    reader leaves who takes nothing for a moment. Without threads for TLS it spends nine tenths."""
    before = _cpu(secure.process.pid)
    for step in range(1, 6):
        assert run.push(step, NEXT).json()["applied"]
        run.weights()
    spent = {thread: seconds - before.get(thread, 0) for thread, seconds in _cpu(secure.process.pid).items()}

    assert spent[secure.process.pid] < 0.5 * sum(spent.values())


def _cpu(pid: int) -> dict[int, int]:
    """Nanoseconds of CPU time of each thread of a process."""
    return {
        int(task.name): int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    }


# --- the transport alone, between two ends of a socket pair


class Recorder(asyncio.Protocol):
    """Keeps what it is given. opened: done with the transport."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[SecureTransport] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, SecureTransport)
        self.opened.set_result(transport)

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


@pytest.fixture
def server_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


async def connected(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[Recorder, SecureTransport, asyncio.StreamReader, asyncio.StreamWriter]:
    # TCP, not a pair of Unix sockets: the goodbye of asyncio's client to a server that has closed is a broken pipe
    # there, and is told in place of what the client received.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = socket.create_connection(listening.getsockname())
        here, _ = listening.accept()
    here.setblocking(False)
    recorder = Recorder()
    begun = asyncio.create_task(accept_secure(here, server, lambda: recorder, 30))
    reader, writer = await asyncio.open_connection(sock=there, ssl=client, server_hostname="localhost")
    await begun
    return recorder, await recorder.opened, reader, writer


def test_what_is_asked_of_a_connection_that_is_lent(server_context: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """While a thread has the connection the loop reads nothing of it; what is written, and the closing, come after."""

    async def scene() -> None:
        recorder, transport, reader, writer = await connected(server_context, trusting)
        stream = transport.lend()
        assert stream
        transport.write(b"answer")
        transport.close()
        assert transport.is_closing()
        assert transport.get_write_buffer_size() == 6
        writer.write(b"body")
        view = memoryview(bytearray(8))

        def work() -> int:
            arrival = select.poll()
            arrival.register(stream, select.POLLIN)
            arrival.poll(30_000)
            time.sleep(0.05)  # time for the loop to read what it should not
            count = stream.read_into(view)
            stream.write(memoryview(b"the thread's "))
            stream.close()
            return count

        assert await asyncio.to_thread(work) == 4
        assert view[:4] == b"body"
        assert await reader.read() == b"the thread's answer"
        assert await recorder.lost is None
        assert recorder.data == b""
        writer.close()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_breaking_off_a_connection_that_is_lent(server_context: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """The thread that waits on it finds the end at once; the protocol hears of it when the thread is done."""

    async def scene() -> None:
        recorder, transport, _, writer = await connected(server_context, trusting)
        stream = transport.lend()
        assert stream
        waiting, found = threading.Event(), []

        def work() -> None:
            arrival = select.poll()
            arrival.register(stream, select.POLLIN)
            waiting.set()
            found.append((bool(arrival.poll(30_000)), stream.read_into(memoryview(bytearray(8)))))
            stream.close()

        working = asyncio.get_running_loop().run_in_executor(None, work)
        await asyncio.to_thread(waiting.wait)
        transport.abort()
        assert not recorder.lost.done()
        await working
        await recorder.lost
        assert found == [(True, 0)]
        writer.close()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_handshakes_that_come_to_nothing(server_context: ssl.SSLContext) -> None:
    """What is no TLS is told so by an alert, and who says nothing is left after the time for it; both are closed."""

    async def scene() -> None:
        for said, fault, alert in (
            (b"\x16\x03\x01\x00\x05hello", ssl.SSLError, b"\x15"),
            (b"\x16\x03\x01", TimeoutError, b""),
        ):
            here, there = socket.socketpair()
            here.setblocking(False)
            there.sendall(said)
            with there, there.makefile("rb") as answer:
                with pytest.raises(fault):
                    await accept_secure(here, server_context, Recorder, 0.3)
                assert (await asyncio.to_thread(answer.read))[:1] == alert

    asyncio.run(asyncio.wait_for(scene(), 60))
