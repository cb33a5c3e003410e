"""Engines that make their RemoteEma before there is a process group, under launchers of their own.

Knows what each process saw. Does not know frameworks: what a process does is in programs/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import RunExists

pytestmark = pytest.mark.timeout(240)

#: Of 16 samples in batches of two, dealt out to two processes.
STEPS = 4


@pytest.fixture
def play_engine(play: Any, tmp_path: Path) -> Any:
    """Train an engine, launched by Lightning (ranks=1) or by torchrun (ranks=2): what both processes saw."""
    if find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install -e '.[integrations]'")

    def run(name: str, run: str, *, ranks: int, resume: bool) -> list[Any]:
        play("lightning_engine.py", tmp_path, [{"name": name, "run": run, "resume": resume}], ranks=ranks)
        return [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in (0, 1)]

    return run


@pytest.mark.soak
def test_the_line_in_the_constructor(play_engine: Any, client: EmaClient, run_name: str) -> None:
    """The seed's line trains under DDP, launched by Lightning or torchrun, first and with resume=True.

    One process sends, both evaluate the same EMA and have their weights again.
    """
    for count, (name, ranks) in enumerate((("first", 1), ("again", 2)), 1):
        seen = play_engine(name, run_name, ranks=ranks, resume=count == 2)
        run = client.run(run_name)
        assert (run.num_updates, run.step) == (count * STEPS, count * STEPS)
        assert [rank["updates"] for rank in seen] == [run.num_updates] * 2
        pulled = dict(client.pull(run_name))
        for rank in seen:
            assert all(torch.equal(rank["validated"][name], tensor) for name, tensor in pulled.items())
            assert not torch.equal(rank["after"]["weight"], pulled["weight"])


@pytest.mark.soak
def test_what_one_rank_raises_ends_all(client: EmaClient, server: Any, run_name: str, tmp_path: Path) -> None:
    """A name that is taken: the first process says so, and the others end with it instead of waiting."""
    if find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install -e '.[integrations]'")
    client.create_run(run_name, {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)})
    scenes = tmp_path / "scenes.json"
    scenes.write_text(f'[{{"name": "taken", "run": "{run_name}", "resume": false}}]')
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, str(Path(__file__).parent / "programs" / "lightning_engine.py"), str(scenes)]
    env = {**os.environ, "EMA_SERVICE_URL": server.url, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert f"run '{run_name}'" in done.stderr
    assert "RunExists" in done.stderr
    assert client.run(run_name).num_updates == 0


# --- a launcher's numbers without a group ---------------------------------------------------------------------------


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_a_process_on_its_own(
    client: EmaClient, run_name: str, litema: Any, same: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of processes that train apart, as a sweep of SLURM's, each has its own run: LitEma's numbers, bit for bit.

    A process with a number joins with its first use, with the weights of the constructor as the first shadow.
    """
    monkeypatch.setenv(name, "3")
    model = nn.Linear(3, 1)
    oracle = litema(trained(model), 0.9, True)
    with RemoteEma(model, 0.9, run=run_name) as ema:
        assert (ema.pending, ema.stats.sent) == (0, 0)
        for _ in range(3):
            with torch.no_grad():
                model.weight.add_(1)
            ema(model)
            oracle.update(trained(model))
        assert ema.num_updates == 3
        assert same(dict(client.pull(run_name)), oracle.shadow)
    other = RemoteEma(model, 0.9, run=run_name)
    with pytest.raises(RunExists, match=run_name):
        other(model)
    other.close()


@pytest.mark.usefixtures("client")
def test_made_before_the_model_is_sharded(run_name: str, tmp_path: Path) -> None:
    """A model that is sharded after its RemoteEma was made is refused with what to do, before a byte is sent."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ema_client.errors import UsageError

    model = nn.Linear(3, 1)
    ema = RemoteEma(model, run=run_name)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for use in (ema.update, ema.copy_to):
            with pytest.raises(UsageError, match="Linear was sharded after its RemoteEma was made"):
                use(model)
    finally:
        dist.destroy_process_group()
    assert ema.num_updates == 0
    ema.close()
