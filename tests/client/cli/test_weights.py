"""Commands that move or compare weights: pull, push, diff.

Knows torch, as the oracle, and files of weights. Does not know how requests travel.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ema_client import EmaClient

STATE = {"enc.w": torch.arange(6.0).reshape(2, 3), "dec.w": torch.ones(4), "b": torch.zeros(2)}
Ema = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    return run_name


def test_pull_casts_and_selects(ema: Ema, run: str, tmp_path: Path) -> None:
    """--dtype and --prefix are the service's: the file has those tensors alone, cast."""
    path = tmp_path / "w.safetensors"
    assert ema("pull", run, "-o", path, "--dtype", "bf16", "--prefix", "enc.")[0] == 0
    found = load_file(path)

    assert list(found) == ["enc.w"]
    assert torch.equal(found["enc.w"], STATE["enc.w"].bfloat16())
    code, _, err = ema("pull", run, "-o", path, "--dtype", "int8")
    assert (code, err) == (1, "ema: weights cannot be had as 'int8'\n  ask for one of F64, F32, BF16, F16\n")


def test_full_disk(ema: Ema, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """A file that the disk does not take is told in a line, and nothing of the file is left."""
    client.create_run(run_name, {"w": torch.zeros(1 << 19)})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, usual[1]))
    try:
        code, _, err = ema("pull", run_name, "-o", tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)

    assert (code, err, list(tmp_path.iterdir())) == (1, "ema: [Errno 27] File too large\n", [])


def moved(by: float) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in STATE.items()}


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "wrapped"])
def test_push_finds_the_parameters(ema: Ema, run: str, client: EmaClient, tmp_path: Path, kind: str) -> None:
    """The tensors of the run's names are sent as one update: of a plain file, behind a prefix, behind wrappers' names.

    An EMA that stands beside them is not taken.
    """
    path = tmp_path / f"file.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(moved(1) | {"another": torch.ones(1)}, path)
    elif kind == "checkpoint":
        averages = {f"model_ema.{name}": tensor for name, tensor in moved(7).items()}
        state = {f"model.{name}": tensor for name, tensor in moved(1).items()}
        torch.save({"state_dict": state | averages, "optimizer": {"state": {}}}, path)
    else:
        torch.save({f"module._orig_mod.{name}": tensor for name, tensor in moved(1).items()}, path)

    code, out, err = ema("push", path, run, "--step", "5")

    assert (code, err) == (0, "")
    assert "step 5, num_updates -1, version 1.1, decay 0.5" in out
    assert out.splitlines()[-1] == "link: TCP"
    pulled = client.pull(run)
    assert all(torch.equal(pulled[name], tensor + 0.5) for name, tensor in STATE.items())
    assert "was there before" in ema("push", path, run, "--step", "5")[1]


def test_push_that_cannot_be(ema: Ema, run: str, client: EmaClient, tmp_path: Path) -> None:
    """What the file lacks is named, of several places one is asked for; an attached trainer is shut out on demand."""
    save_file({"enc.w": STATE["enc.w"]}, tmp_path / "part.safetensors")
    code, _, err = ema("push", tmp_path / "part.safetensors", run)
    assert code == 1
    assert "of the run's 3 tensors the file lacks b, dec.w" in err

    twice = {f"{side}.{name}": tensor for side in ("one", "two") for name, tensor in moved(1).items()}
    save_file(twice, path := tmp_path / "twice.safetensors")
    assert "give one as --prefix: 'one.', 'two.'" in ema("push", path, run)[2]
    assert "they are behind 'one.', 'two.'" in ema("push", path, run, "--prefix", "three")[2]

    client.attach(run)
    code, _, err = ema("push", path, run, "--prefix", "two")
    assert (code, "--take-over" in err, client.run(run).version) == (1, True, "1.0")
    assert ema("push", path, run, "--prefix", "two", "--take-over")[0] == 0
    assert client.run(run).version == "1.1"


def test_diff(ema: Ema, run: str, client: EmaClient, tmp_path: Path) -> None:
    """Relative L2 distances by tensor, the farthest first, the whole at the end: of runs, snapshots and files."""
    client.snapshot(run, "begin")
    client.push(run, moved(2), step=1)
    found = json.loads(ema("diff", run, f"{run}:ema@begin", "--json")[1])["difference"]

    distances = {each["name"]: each["distance"] for each in found["tensors"]}
    norm = torch.linalg.vector_norm
    assert list(distances) == ["b", "dec.w", "enc.w"]
    assert distances["b"] is None  # infinite: the snapshot's is all zeros
    assert distances["enc.w"] == pytest.approx(float(6**0.5 / norm(STATE["enc.w"])))
    both = torch.cat([tensor.flatten() for tensor in STATE.values()])
    assert found["distance"] == pytest.approx(float(12**0.5 / norm(both)))
    code, out, err = ema("diff", run, f"{run}@begin")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("whole: 0.")

    checkpoint = {f"net.{name}": tensor for name, tensor in moved(1).items()}
    torch.save({"state_dict": checkpoint | {"net.more": torch.ones(1)}}, path := tmp_path / "w.ckpt")
    assert ema("diff", path, run)[1].splitlines()[-1] == "whole: 0 over 3 tensors"
    save_file({"enc.w": torch.ones(4), "dec.w": STATE["dec.w"], "c": STATE["b"]}, other := tmp_path / "o.safetensors")
    out = ema("diff", other, run)[1]
    assert f"only {other} has c\nonly {run} has b\nof other shapes: enc.w\nwhole: " in out
    assert "neither a file that is there nor a run" in ema("diff", "no/such.file", run)[2]
