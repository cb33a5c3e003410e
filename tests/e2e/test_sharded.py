"""Sharded trainers: real processes that talk gloo among themselves, and a real server.

Knows the kinds of sharding, the unsharded run to compare with, and how a rank dies. Does not know how slices are found
or travel; what a rank does is in ranks.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ema_client import EmaClient
from tests.e2e.sharded_trainers import WIDTHS, assert_same, at, train, unsharded

if TYPE_CHECKING:
    from tests.conftest import ServerProcess


#: How the model is cut up -> how many of four ranks have something to send.
_KINDS = {"ddp": 1, "fsdp2": 4, "columns": 4, "hsdp": 2, "tp": 4, "fsdp1": 4, "fsdp1-flat": 4}
_WIDE = 40_000


@pytest.fixture(scope="module")
def servers(
    server_class: type[ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """One for all runs, and one whose traffic is counted."""
    arguments = ("--body-timeout", "3")
    kept, counted = (tmp_path_factory.mktemp("server") for _ in range(2))
    # With a disk: averages of any length come from files.
    running = (server_class(kept, arguments, kept / "data").start(), server_class(counted, arguments).start())
    yield running
    for server in running:
        server.stop()


def scene(server: ServerProcess, run: str, how: str, steps: list[int], **more: Any) -> dict[str, Any]:
    return {"url": server.url, "run": run, "how": how, "steps": steps, "width": WIDTHS.get(how, 13), **more}


@pytest.fixture(scope="module")
def four(
    servers: tuple[ServerProcess, ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Four ranks that train one run after the other, until rank 2 is killed in the last one."""
    server, counted = servers
    scenes = [scene(server, kind, kind, [1, 2, 3]) for kind in _KINDS]
    everywhere: dict[str, Any] = {"loaded": 9, "loaded by": None}
    scenes += [scene(server, f"loaded-{how}", how, [1, 2], **everywhere) for how in _KINDS]
    scenes.append(scene(server, "loaded-nothing", "fsdp2", [1, 2], **{**everywhere, "loaded": 0}))
    scenes.append(scene(server, "loaded-by-one", "fsdp2", [1, 2], **{**everywhere, "loaded by": 1}))
    scenes.append(scene(server, "any-length", "fsdp2", [1, 2, 3, 4, 5], wished={"sigma_rel": 0.1}))
    scenes.append(scene(server, "fewer", "fsdp2", [1, 2]))
    scenes.append(scene(server, "otherwise", "hsdp", [1, 2]))
    scenes.append(scene(counted, "wide", "fsdp2", [1], width=_WIDE))
    # Behind the scene of which bytes are counted: from here on small parts go in stretches, too.
    scenes += [scene(server, f"lanes-{how}", how, [1, 2, 3], lanes=2) for how in _KINDS if how != "ddp"]
    scenes.append(scene(server, "killed", "fsdp2", [1, 2], killed=2))
    return train(tmp_path_factory.mktemp("four") / "ranks", 4, scenes, killed=2)


@pytest.fixture(scope="module")
def two(
    servers: tuple[ServerProcess, ServerProcess], four: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Two ranks that go on with what the four left."""
    kinds = {"fewer": "fsdp2", "otherwise": "fsdp1", "killed": "fsdp2"}
    scenes = [scene(servers[0], run, kind, [3, 4], resume=True) for run, kind in kinds.items()]
    assert four
    return train(tmp_path_factory.mktemp("two") / "ranks", 2, scenes)


def test_any_length(four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]) -> None:
    """Each rank gets its own slices of an average that nobody tracked, in copy_to() and scope(): not the run's own."""
    for rank in four["any-length"]:
        assert (rank["inside"], rank["changed"], rank["after"], rank["own"]) == (True,) * 4
    with EmaClient(servers[0].url) as client:
        wished, own = client.pull("any-length", sigma_rel=0.1), client.pull("any-length")
        assert all(not torch.equal(wished[name], own[name]) for name in own)
        assert client.run("any-length").ring is not None


@pytest.mark.parametrize("how", _KINDS)
def test_sharded_equals_unsharded(
    how: str, four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]
) -> None:
    """Four ranks, sharded any way, give the unsharded EMA bit for bit; copy_to() and scope() work on every rank.

    The sizes are such that no rank holds as much as another, and some hold nothing of a tensor.
    """
    with EmaClient(servers[0].url) as client:
        expected = unsharded(client, how, WIDTHS.get(how, 13), [1, 2, 3])
        assert_same(client, how, expected)
        assert client.run(how).num_updates == 3
    for rank in four[how]:
        assert (rank["num_updates"], rank["inside"], rank["changed"], rank["after"], rank["own"]) == (3, *[True] * 4)
    assert [rank["drawn"][-1:] for rank in four[how]] == [[3], [], [], []], "one rank draws the charts"
    assert [rank["sent"] for rank in four[how]] == [3] * _KINDS[how] + [0] * (4 - _KINDS[how])
    assert sum(rank["elements"] for rank in four[how]) == sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("how", [how for how in _KINDS if how != "ddp"])
def test_parts_in_stretches(how: str, four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]) -> None:
    """Ranks with lanes make the same, sharded any way."""
    assert four
    with EmaClient(servers[0].url) as client, servers[0].http() as http:
        assert_same(client, f"lanes-{how}", unsharded(client, f"lanes-{how}", WIDTHS.get(how, 13), [1, 2, 3]))
        assert client.run(f"lanes-{how}").num_updates == 3
        stretches = re.findall(
            r'^ema_stretches_total{result="(?:staged|applied)"} (\S+)$', http.get("/metrics").text, re.M
        )
    assert sum(map(float, stretches)) >= 3 * sum(n for kind, n in _KINDS.items() if kind != "ddp")


@pytest.mark.parametrize("how", _KINDS)
def test_weights_loaded_after_the_constructor(
    how: str, four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]
) -> None:
    """What the ranks load before their first step is the first shadow, as of the same model unsharded.

    Of a model that each rank holds whole, every rank's reads before the first step have the loaded weights, too.
    """
    run = f"loaded-{how}"
    with EmaClient(servers[0].url) as client:
        width = WIDTHS.get(how, 13)
        expected = unsharded(client, run, width, [1, 2], first=at(width, 9))
        assert_same(client, run, expected)
        assert client.run(run).version == "2.2"
    assert [rank["before"] for rank in four[run]] == [how == "ddp"] * 4
    assert [rank["sent"] for rank in four[run]] == [2] * _KINDS[how] + [0] * (4 - _KINDS[how])


def test_weights_loaded_on_one_rank(four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]) -> None:
    """Where one rank alone has other weights, all ranks give theirs, and wait for nobody."""
    before, loaded = at(13, 0), at(13, 9)
    # As FSDP2 cuts: of rows, as torch.chunk() does.
    mixed = {}
    for name, tensor in before.items():
        chunks = [*tensor.chunk(4)]
        chunks[1:2] = loaded[name].chunk(4)[1:2]
        mixed[name] = torch.cat(chunks)
    with EmaClient(servers[0].url) as client:
        assert_same(client, "loaded-by-one", unsharded(client, "loaded-by-one", 13, [1, 2], first=mixed))
        assert client.run("loaded-by-one").version == "2.2"
    assert [rank["sent"] for rank in four["loaded-by-one"]] == [2] * 4


def test_where_nothing_was_loaded(four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]) -> None:
    """Ranks that give the weights of the constructor again change nothing."""
    with EmaClient(servers[0].url) as client:
        assert_same(client, "loaded-nothing", unsharded(client, "loaded-nothing", 13, [1, 2]))
        assert client.run("loaded-nothing").version == "1.2"
    assert [rank["before"] for rank in four["loaded-nothing"]] == [True] * 4


def test_each_rank_moves_a_quarter(four: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]) -> None:
    """Of a large model each of four ranks sends a quarter, and fetches about a quarter in copy_to()."""
    with servers[1].http() as http:
        lines = http.get("/metrics").text.splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    elements = 8 * _WIDE + 10 * _WIDE + 3

    assert float(metrics["ema_received_bytes_total"]) == 2 * 4 * elements  # the initial weights and one update
    assert max(rank["elements"] for rank in four["wide"]) < elements * 0.26 + _WIDE
    # Each rank pulls the whole once, to compare, and copies twice: in scope() and by itself.
    copied = float(metrics["ema_sent_bytes_total"]) - 4 * 4 * elements
    assert copied < 2 * 4 * elements * 1.2


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3(servers: tuple[ServerProcess, ServerProcess], tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3, whose ranks hold flat ranges of each parameter, gives the unsharded EMA bit for bit."""
    said = train(tmp_path / "ranks", 3, [scene(servers[0], "zero3", "zero3", [1, 2])])
    with EmaClient(servers[0].url) as client:
        assert_same(client, "zero3", unsharded(client, "zero3", 13, [1, 2]))
    for rank in said["zero3"]:
        assert (rank["inside"], rank["changed"], rank["after"], rank["own"], rank["sent"]) == (*[True] * 4, 2)


@pytest.mark.parametrize("run", ["fewer", "otherwise"])
def test_resume_with_another_world(
    run: str, two: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]
) -> None:
    """A trainer that comes back with other ranks, or sharded otherwise, goes on with the same EMA, bit for bit."""
    with EmaClient(servers[0].url) as client:
        assert_same(client, run, unsharded(client, run, 13, [1, 2, 3, 4]))
        assert client.run(run).step == 4
    assert [rank["own"] for rank in two[run]] == [True, True]


def test_killed_rank(two: dict[str, list[Any]], servers: tuple[ServerProcess, ServerProcess]) -> None:
    """A rank killed before it sends leaves the EMA as it was, as if that step had not been; the trainer comes back with
    fewer ranks and goes on, and what the others had sent of that step is given back."""
    with EmaClient(servers[0].url) as client:
        assert_same(client, "killed", unsharded(client, "killed", 13, [1, 3, 4]))
    assert [rank["own"] for rank in two["killed"]] == [True, True]
    deadline = time.monotonic() + 30
    with servers[0].http() as http:
        while "ema_staging_bytes 0.0" not in http.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
