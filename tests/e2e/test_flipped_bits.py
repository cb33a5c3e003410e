"""Bits that flip between client and server: never averaged, never evaluated, and the transfer is made again.

Knows a relay that flips bits of what it carries, and safetensors' header. Does not know how a digest is worked out.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import DigestMismatch
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls
from tests.conftest import LitEmaOracle
from tests.relays import Relay

ONCE = RetryPolicy(attempts=1)
#: More than two blocks of the digest, not whole ones.
ELEMENTS = 5_000_011


class Flipping(Relay):
    """Flips one bit of the ``up``-th or ``down``-th byte of a direction, once."""

    def __init__(self, url: str) -> None:
        #: Bytes of the next connection until the flip, by direction.
        self.flip: dict[str, int | None] = {"up": None, "down": None}
        self.flipped = 0
        super().__init__(url)

    def carry(self, source: socket.socket, target: socket.socket, way: str, _: None) -> None:
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


def test_flipped_bits_of_a_trainer_are_not_averaged(way: Flipping, run_name: str, litema: type[LitEmaOracle]) -> None:
    """An update of RemoteEma in which a bit flips is sent again. Too small to be handed over in shared memory."""
    model = nn.Linear(200, 200, bias=False)
    oracle = litema(dict(model.named_parameters()), decay=0.9)
    with RemoteEma(model, 0.9, run=run_name, url=way.url) as ema:
        for flip in (100_000, 30_000):
            with torch.no_grad():
                model.weight.add_(1.0)
            way.flip["up"] = flip
            ema(model)
            ema.flush()
            oracle.update(dict(model.named_parameters()))
        with ema.scope(model):
            assert torch.equal(model.weight, oracle.shadow["weight"])
    assert way.flipped == 2


def test_initial_weights(way: Flipping, run_name: str, client_of: Callable[[str], EmaClient]) -> None:
    """The first shadow is what the trainer has."""
    way.flip["up"] = 9_000_000
    client = client_of(way.url)
    client.create_run(run_name, state_of(1.0))

    assert way.flipped == 1
    assert torch.equal(client.pull(run_name)["w"], state_of(1.0)["w"])


def test_flipped_bits_of_a_pull_are_not_evaluated(way: Flipping, run_name: str) -> None:
    """A pull in which a bit flipped is refused by the client, and made again."""
    expected = torch.full((ELEMENTS,), 2.0)
    with EmaClient(way.url, retry=ONCE) as client, EmaClient(way.url) as patient:
        client.create_run(run_name, state_of(1.0), decay=0.5, use_num_updates=False, step=0)
        client.push(run_name, state_of(3.0), step=1)
        for flip in (2000, 9_000_000, 4 * ELEMENTS):
            way.flip["down"] = flip
            with pytest.raises(DigestMismatch):
                client.pull(run_name)
        way.flip["down"] = 9_000_000
        out = {"w": torch.zeros(ELEMENTS)}
        assert torch.equal(patient.pull(run_name)["w"], expected)
        way.flip["down"] = 9_000_000
        patient.pull(run_name, out=out)

    assert way.flipped == 5
    assert torch.equal(out["w"], expected)


def test_flipped_bits_of_a_file(way: Flipping, run_name: str, tmp_path: Path) -> None:
    """A file appears under its name with the bytes that the service has, or not at all."""
    with EmaClient(way.url, retry=ONCE) as client, EmaClient(way.url) as patient:
        client.create_run(run_name, state_of(1.0), decay=0.5, use_num_updates=False, step=0)
        client.push(run_name, state_of(3.0), step=1)
        way.flip["down"] = 9_000_000
        with pytest.raises(DigestMismatch):
            client.download(run_name, tmp_path / "w.safetensors")
        assert list(tmp_path.iterdir()) == []
        way.flip["down"] = 9_000_000
        patient.download(run_name, tmp_path / "w.safetensors")

    assert way.flipped == 2
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.full((ELEMENTS,), 2.0))


def test_flipped_bits_of_a_half(way: Flipping, run_name: str) -> None:
    """Of large weights that come over two connections, both halves are compared."""
    state = {"a": torch.full((ELEMENTS,), 1.0), "b": torch.full((ELEMENTS,), 1.0)}
    with EmaClient(way.url) as client, contextlib.closing(Transport(way.url, retry=ONCE)) as transport:
        client.create_run(run_name, state, decay=0.5, use_num_updates=False, step=0)
        client.push(run_name, {name: each + 2 for name, each in state.items()}, step=1)
        pulls = Pulls(transport, split_above=1 << 20, check_large=True)
        pulls.pull(Asked(run_name))
        for flip in (2000, 9_000_000, 4 * ELEMENTS):
            way.flip["down"] = flip
            with pytest.raises(DigestMismatch):
                pulls.pull(Asked(run_name))
        weights = pulls.pull(Asked(run_name))

    assert way.flipped == 3
    assert all(torch.equal(each, torch.full((ELEMENTS,), 2.0)) for each in weights.values())


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
