"""Group wire: one gigabyte from process to process, ours beside the machine's own limit and beside other ways.

Every way of ours and of others is driven by the same client code over a warm connection; all of them take turns.

Knows which ways there are and what is demanded of ours. Does not know how a round is timed or shown.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import sleep

import torch
from scale import Scale

from ema_client import EmaClient
from ema_client.http.transport import Transport
from ema_client.tensors.body import encode
from ema_service.bench.ceiling import RAW_TCP, RAW_UNIX, Ceiling
from ema_service.bench.children import BenchFailed, Child, Service
from ema_service.bench.rounds import PAUSE, Operation, interleave, timed
from ema_service.bench.rows import Group, Need, rate_row
from ema_service.bench.sizes import show_size
from ema_service.bench.traffic import Traffic

__all__ = ["PROCESSES", "measure"]

PROCESSES = Path(__file__).parent / "processes"

WHOLE_BODY = "FastAPI, await request.body()"
STREAMED = "stock uvicorn, request.stream()"
TORCHFT = {1: "torchft pull, 1 chunk", 4: "torchft pull, 4 chunks"}
COPY = "copy_ of every tensor"
SHARED_ALREADY = "push, state in shared memory"
SHARED = "push, copied to shared memory first"

#: Rows in the order of the table, and what is demanded of them.
NEEDS: dict[str, tuple[Need, ...]] = {
    RAW_TCP: (),
    RAW_UNIX: (),
    COPY: (Need(against=RAW_TCP),),
    "push, TCP": (Need(0.90, RAW_TCP), Need(3, STREAMED), Need(10, WHOLE_BODY)),
    "push, Unix": (Need(0.85, RAW_UNIX),),
    # As the other pushes, of parameters that lie where they lie; the copy of a trainer is a row of the group trainer.
    SHARED_ALREADY: (Need(2.5, RAW_TCP), Need(against=COPY)),
    SHARED: (Need(against=RAW_TCP), Need(against=COPY)),
    "pull into tensors, TCP": (Need(0.95, RAW_TCP), *(Need(1, name) for name in TORCHFT.values())),
    "pull into tensors, Unix": (Need(0.85, RAW_UNIX),),
    "pull, new tensors, TCP": (Need(0.7, RAW_TCP),),
    "pull, new tensors, Unix": (Need(against=RAW_UNIX),),
    WHOLE_BODY: (Need(against=RAW_TCP),),
    STREAMED: (Need(against=RAW_TCP),),
    **{name: (Need(against=RAW_TCP),) for name in TORCHFT.values()},
}


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed, and what the client raises."""
    nbytes, notes = scale.wire_bytes, dict[str, str]()
    with contextlib.ExitStack() as stack:
        on_step("starting five processes")
        ceiling = stack.enter_context(Ceiling(nbytes))
        service = stack.enter_context(Service())
        traffic = Traffic("wire", nbytes)
        copy = {COPY: timed(partial(_copy, traffic))}
        ours = _ours(traffic, stack, service)
        others = _uploads(traffic, stack) | _torchft(nbytes, stack, notes)
        seconds = interleave({**ceiling.operations(), **copy, **ours, **others}, scale.rounds, on_step=on_step)
    rows = [rate_row(name, nbytes, seconds, needs, notes.get(name, "")) for name, needs in NEEDS.items()]
    return Group("wire", f"wire: {show_size(nbytes)} of float32 in {len(traffic.state)} tensors", tuple(rows), _facts())


def _ours(traffic: Traffic, stack: contextlib.ExitStack, service: Service) -> dict[str, Operation]:
    operations: dict[str, Operation] = {}
    clients = {"TCP": EmaClient(service.url), "Unix": EmaClient(service.uds)}
    traffic.create(clients["TCP"])
    for link, client in clients.items():
        stack.enter_context(client)
        traffic.push(client)
        traffic.check(client)
        operations |= {
            f"push, {link}": timed(partial(traffic.push, client)),
            f"pull into tensors, {link}": timed(partial(traffic.pull_into, client)),
            f"pull, new tensors, {link}": timed(partial(traffic.pull_fresh, client)),
        }
    return operations | _shared(traffic, clients["TCP"])


def _shared(traffic: Traffic, client: EmaClient) -> dict[str, Operation]:
    shared = client.shared_state(traffic.state)

    def fill_and_push() -> None:
        shared.fill(traffic.state)
        traffic.push(client, shared)

    fill_and_push()
    if client.link != "shared memory":
        raise BenchFailed(f"pushes travel by {client.link}")
    traffic.check(client)
    push, both = timed(partial(traffic.push, client, shared)), timed(fill_and_push)

    def warm(operation: Operation) -> Operation:
        """Behind another push, as a trainer's are: between two rounds the service lets go of the memory's pages."""

        def again() -> float:
            push()
            sleep(PAUSE)
            return operation()

        return again

    return {SHARED_ALREADY: warm(push), SHARED: warm(both)}


def _copy(traffic: Traffic) -> None:
    for name, tensor in traffic.state.items():
        traffic.out[name].copy_(tensor)


def _uploads(traffic: Traffic, stack: contextlib.ExitStack) -> dict[str, Operation]:
    """The same body, sent by the same code, to the servers that others would write."""
    # Without the digest, which those servers would take for data.
    body = replace(encode(traffic.state), digest=None)
    operations: dict[str, Operation] = {}
    for name, module in {WHOLE_BODY: "whole_body", STREAMED: "streamed"}.items():
        child = stack.enter_context(Child(module, path=PROCESSES))
        transport = Transport(child.said)
        stack.callback(transport.close)
        operations[name] = timed(partial(transport.upload, "/push", body))
    return operations


def _torchft(nbytes: int, stack: contextlib.ExitStack, notes: dict[str, str]) -> dict[str, Operation]:
    """Pulls of torchft's; a note for each row where it is not here or does not run."""
    if find_spec("torchft") is None:
        notes.update(dict.fromkeys(TORCHFT.values(), "not installed: pip install torchft"))
        return {}
    try:
        child = stack.enter_context(Child("torchft_source", [str(nbytes), *map(str, TORCHFT)], path=PROCESSES))
    except BenchFailed as failure:
        notes.update(dict.fromkeys(TORCHFT.values(), f"does not run here: {str(failure).splitlines()[-1]}"))
        return {}
    addresses = zip(TORCHFT.items(), child.said.split(","), strict=True)
    return {name: timed(_torchft_pull(chunks, address, stack)) for (chunks, name), address in addresses}


def _torchft_pull(chunks: int, address: str, stack: contextlib.ExitStack) -> Callable[[], None]:
    from processes.torchft_source import STEP, TIMEOUT
    from torchft.checkpointing.http_transport import HTTPTransport

    transport = HTTPTransport(TIMEOUT, num_chunks=chunks)
    stack.callback(transport.shutdown)
    # The host's name in the address may resolve to nothing; loopback is what everybody else uses here.
    scheme, _, rest = address.partition("://")
    metadata = f"{scheme}://127.0.0.1:{rest.rpartition(':')[2]}"

    def pull() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the way torchft reads
            transport.recv_checkpoint(0, metadata, STEP, TIMEOUT)

    return pull


def _facts() -> tuple[str, ...]:
    return (
        "raw: sendall from one warm buffer to a process that only receives, with one byte back; "
        "service: --memory, its own process, as is every other server",
        f"{COPY}: within this process, {torch.get_num_threads()} threads; {SHARED}: this copy and the push together; "
        f"{STREAMED} copies the body into a buffer made beforehand and averages nothing",
        "torchft receives into new tensors; a pull of ours that is compared with it fills tensors that are there",
    )
