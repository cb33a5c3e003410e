"""The callbacks where a framework shards the model over two processes that talk gloo, beside one that holds all of it.

Knows what each process saw, and that trainings on the same batches are the same, bit for bit. Does not know how shards
travel (tests/e2e/test_sharded.py), or frameworks: what a process does is in programs/.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

from ema_client import EmaClient

pytestmark = [pytest.mark.timeout(240), pytest.mark.soak]

Seen = dict[str, list[dict[str, Any]]]


def run_of(name: str) -> str:
    return f"sharded-{os.getpid()}-{name}"


def scene(name: str, how: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "run": run_of(name), "how": how or name, **more}


# --- Lightning ------------------------------------------------------------------------------------------------------

EPOCHS, STEPS = 2, 8


@pytest.fixture(scope="module")
def lightning_seen(play: Any, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The same training in one process and in two, which then go on from its first checkpoint, test, and fail."""
    if find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install -e '.[integrations]'")
    folder, fsdp2 = tmp_path_factory.mktemp("lightning"), {"how": "fsdp2", "run": run_of("fsdp2")}
    scenes = [
        scene("fsdp2", epochs=EPOCHS),
        scene("tested") | fsdp2 | {"tests": True},
        scene("again", epochs=EPOCHS, checkpoint="fsdp2/epoch=0.ckpt", late=1) | fsdp2,
        scene("fsdp1", epochs=EPOCHS),
        *(scene(f"part-{how}", how, attribute="net") for how in ("fsdp2", "fsdp1")),
        *(scene(f"failing-{how}", how, fails=True) for how in ("fsdp2", "fsdp1")),
    ]
    program = "lightning_sharded.py"
    whole: Seen = play(program, folder, [scene("whole", epochs=EPOCHS)], ranks=1)
    return whole | play(program, folder, scenes, ranks=2)


@pytest.mark.parametrize("how", ["fsdp2", "fsdp1", "again"])
def test_lightning(how: str, lightning_seen: Seen, client: EmaClient, joined: Any, same: Any) -> None:
    """Each rank sends its shards and validates with the EMA's: all that is seen is what one process sees, bit for bit.

    Also in a training that goes on from a checkpoint with the EMA of that step, though the run had gone on since, and
    whichever rank is the last to get there.
    """
    [alone], ranks = lightning_seen["whole"], lightning_seen[how]
    assert [rank["raised"] for rank in ranks] == ["", ""]
    run = client.run(run_of("fsdp2" if how == "again" else how))
    assert (run.num_updates, run.step) == (STEPS, STEPS)
    whole = {name: tensor.clone() for name, tensor in client.pull(run_of("whole")).items()}
    assert same(dict(client.pull(run.run)), whole)

    for at in (-1,) if how == "again" else (-1, -2, -3):
        mine, alones = [rank["evaluated"][at] for rank in ranks], alone["evaluated"][at]
        assert same(joined(mine), joined([alones]))
        assert all(rank["output"].equal(alones["output"]) for rank in mine)
    assert not same(joined([alone["evaluated"][-1]]), joined([alone["after"]]))
    assert same(joined([rank["after"] for rank in ranks]), joined([alone["after"]]))


def test_lightning_tests_later(lightning_seen: Seen, client: EmaClient, joined: Any, same: Any) -> None:
    """trainer.test() of a sharded module that was not trained has each rank's shards of the run, and returns them."""
    first = lightning_seen["whole"][0]["evaluated"][0]
    ranks = lightning_seen["tested"]
    assert [rank["raised"] for rank in ranks] == ["", ""]
    pulled = {name: tensor.reshape(-1) for name, tensor in client.pull(run_of("whole")).items()}
    assert same(joined([rank["evaluated"][-1] for rank in ranks]), pulled)
    assert same(joined([rank["after"] for rank in ranks]), joined([first]))


@pytest.mark.parametrize("how", ["failing-fsdp2", "failing-fsdp1"])
def test_lightning_that_fails(how: str, lightning_seen: Seen, joined: Any, same: Any) -> None:
    """Whatever validation raises, in the middle of a forward pass too, every rank has its training weights again."""
    for rank in lightning_seen[how]:
        assert rank["raised"] == "ZeroDivisionError: "
        assert not same(joined([rank["evaluated"][-1]]), joined([rank["stepped"]]))
        assert same(rank["after"], rank["stepped"])


def test_lightning_part_of_a_module(lightning_seen: Seen, client: EmaClient) -> None:
    """attribute= averages a part that has its own shards; FSDP1 around all of the module says that it has none."""
    assert [rank["raised"] for rank in lightning_seen["part-fsdp2"]] == ["", ""]
    assert set(client.pull(run_of("part-fsdp2"))) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for rank in lightning_seen["part-fsdp1"]:
        assert rank["raised"].startswith("UsageError: FSDP1 around the whole module keeps 'net' in flat parameters")


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_seen(play: Any, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The same training in one process and in two: sharded by transformers, from a checkpoint, and by accelerate."""
    for package in ("transformers", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[integrations]'")
    folder = tmp_path_factory.mktemp("transformers")
    again = scene("again", "fsdp2", checkpoint="fsdp2/checkpoint-2") | {"run": run_of("llama-fsdp2")}
    truncated = {**again, "name": "truncated", "truncates": True}
    scenes = [llama("fsdp2"), again, truncated, llama("accelerate")]
    program = "transformers_sharded.py"
    whole: Seen = play(program, folder, [llama("whole")], ranks=1)
    return whole | play(program, folder, scenes, ranks=2)


def llama(how: str) -> dict[str, Any]:
    return scene(how) | {"run": run_of(f"llama-{how}")}


@pytest.mark.parametrize("how", ["fsdp2", "again", "accelerate"])
def test_transformers(how: str, transformers_seen: Seen, client: EmaClient, joined: Any, same: Any) -> None:
    """Each rank sends its shards and evaluates with the EMA's: all is as in one process, bit for bit.

    Also from a checkpoint, with the EMA of that step, though the run had gone on since; and after an evaluation that
    fails. What accelerate does on the CPU with its FSDP turned on is DDP: then the first process sends.
    """
    [alone], ranks = transformers_seen["whole"], transformers_seen[how]
    assert [rank["raised"] for rank in ranks] == ["ZeroDivisionError: "] * 2
    assert [rank["sharded"] for rank in ranks] == [how != "accelerate"] * 2
    assert [rank["sent"] for rank in ranks] == ([True, False] if how == "accelerate" else [True, True])
    run = client.run(run_of("llama-fsdp2" if how == "again" else f"llama-{how}"))
    assert (run.num_updates, run.step) == (4, 4)
    whole = {name: tensor.clone() for name, tensor in client.pull(run_of("llama-whole")).items()}
    assert same(dict(client.pull(run.run)), whole)

    # Where all hold the whole model it is as if there were one of them.
    holders = ranks if how != "accelerate" else ranks[1:]
    for at in (0, 1):
        evaluated = joined([rank["evaluated"][at] for rank in holders])
        assert same(evaluated, {name: tensor.reshape(-1) for name, tensor in whole.items()})
    for rank in ranks:
        assert not same(rank["evaluated"][0], rank["trained"])
        assert same(rank["after"], rank["trained"])
    assert same(joined([rank["trained"] for rank in holders]), joined([alone["trained"]]))


def test_transformers_with_a_damaged_reference(transformers_seen: Seen) -> None:
    """A checkpoint whose reference the first process cannot read is refused by all, so that none waits for others."""
    for rank in transformers_seen["truncated"]:
        assert rank["raised"].startswith("UsageError: ")
        assert f"fsdp2/checkpoint-2/ema-{run_of('llama-fsdp2')}.json does not say which EMA" in rank["raised"]
