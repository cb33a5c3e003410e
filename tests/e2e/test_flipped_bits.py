"""Bits that flip between client and server: never averaged, never evaluated, and the transfer is made again.

Knows a relay that flips bits of what it carries, and safetensors' header. Does not know how a digest is worked out.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import DigestMismatch
from ema_client.http.retry import RetryPolicy

ONCE = RetryPolicy(attempts=1)
#: More than two blocks of the digest, not whole ones.
ELEMENTS = 5_000_011


class Flipping:
    """Carries connections to a server, and flips one bit of the ``up``-th or ``down``-th byte of a direction, once."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._to = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        #: Bytes of the next connection until the flip, by direction.
        self.flip: dict[str, int | None] = {"up": None, "down": None}
        self.flipped = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            self._sockets += [near, far]
            for source, target, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._carry, args=(source, target, way), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while raw := bytearray(source.recv(1 << 16)):
                left = self.flip[way]
                if left is not None and left < len(raw):
                    raw[left] ^= 1 << random.randrange(8)
                    self.flip[way], self.flipped = None, self.flipped + 1
                elif left is not None:
                    self.flip[way] = left - len(raw)
                target.sendall(raw)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def way(server: Any) -> Iterator[Flipping]:
    with contextlib.closing(Flipping(server.url)) as made:
        yield made


def state_of(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((ELEMENTS,), value)}


def test_flipped_bits_of_a_push_are_not_averaged(way: Flipping, run_name: str) -> None:
    """Wherever in the parameters a bit flips, in updates, initial weights and parts, the service refuses them."""
    dice = random.Random(7)
    with EmaClient(way.url, retry=ONCE) as client:
        client.create_run(run_name, state_of(1.0), decay=0.5, use_num_updates=False, step=0)
        before = client.pull(run_name)["w"].clone()
        for _ in range(6):
            way.flip["up"] = dice.randrange(2000, 4 * ELEMENTS)
            with pytest.raises(DigestMismatch):
                client.push(run_name, state_of(3.0), step=1)
        half = ELEMENTS // 2
        for part, box in enumerate(((0, half), (half, ELEMENTS))):
            way.flip["up"] = dice.randrange(3000, 4 * half)
            slices = {"w": [(box,)]}
            piece = {"w": state_of(3.0)["w"][box[0] : box[1]]}
            with pytest.raises(DigestMismatch):
                client.push_part(run_name, piece, slices=slices, step=1, part=part, of=2)
        assert way.flipped == 8
        assert torch.equal(client.pull(run_name)["w"], before)

        with EmaClient(way.url) as patient:
            way.flip["up"] = 9_000_000
            assert patient.push(run_name, state_of(3.0), step=1).applied
        assert way.flipped == 9
        assert torch.equal(client.pull(run_name)["w"], torch.full((ELEMENTS,), 2.0))


def test_initial_weights(way: Flipping, run_name: str, client_of: Callable[[str], EmaClient]) -> None:
    """The first shadow is what the trainer has."""
    way.flip["up"] = 9_000_000
    client = client_of(way.url)
    client.create_run(run_name, state_of(1.0))

    assert way.flipped == 1
    assert torch.equal(client.pull(run_name)["w"], state_of(1.0)["w"])


def test_digest_is_not_taken_on_trust(server: Any, way: Flipping, run_name: str) -> None:
    """A flipped bit of the digest itself is a refusal too, and a digest that the service does not know."""
    small = {"w": torch.ones(1000)}
    with EmaClient(way.url, retry=ONCE) as client:
        client.create_run(run_name, small, step=0)
    with server.http() as http:
        answer = http.put(
            f"/v1/runs/{run_name}/updates/1", content=b"x" * 100, headers={"Ema-Digest": "crc32; follows"}
        )
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.fixture
def client_of() -> Iterator[Callable[[str], EmaClient]]:
    made: list[EmaClient] = []

    def make(url: str) -> EmaClient:
        made.append(EmaClient(url))
        return made[-1]

    yield make
    for client in made:
        client.close()
