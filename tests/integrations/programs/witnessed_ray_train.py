"""The example of Ray Train, its code unchanged, with LitEma in process beside its EMA: the last act of worker 0 is to
compare the two, bit for bit.

Run as ``witnessed_ray_train.py RUN FILE``; RAY_ADDRESS says which Ray. FILE is given the verdict. The example's module
and the witness travel to the workers by value, for neither can be imported there.

Knows torch and the example's names. Does not know how the service is reached.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ema_client import EmaClient, RemoteEma
from ema_service.demo.litema import InProcessEma
from ema_service.demo.proof import compare

EXAMPLE = Path(__file__).resolve().parents[3] / "client" / "examples" / "ray_train_fsdp2.py"


class Witnessed(RemoteEma):
    """RemoteEma with a witness. verdict: the file that the witness writes."""

    verdict = Path()

    def __init__(self, model: nn.Module, decay: float, *, run: str, url: str) -> None:
        super().__init__(model, decay, run=run, url=url)
        self._asked = run, url
        self._witness = InProcessEma(nn.Module(), decay)
        self._witness.shadow = {name: tensor.clone() for name, tensor in whole(model).items()}

    def __call__(self, model: nn.Module) -> None:
        super().__call__(model)
        self._witness.update(whole(model))

    def __exit__(self, *words: Any) -> None:
        super().__exit__(*words)
        if dist.get_rank() == 0:
            run, url = self._asked
            with EmaClient(url) as client:
                pulled = client.pull(run)
            steps = int(self._witness.num_updates)
            proof = compare("pulled EMA = in-process EMA", steps, self._witness.shadow, pulled)
            same = "differing" if proof.differing or pulled.info.num_updates != steps else "bit-identical"
            self.verdict.write_text(f"{steps} updates, {proof.tensors} tensors: {same}")


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they would be without sharding, on every worker."""
    return {
        name: each.full_tensor() if isinstance(each, DTensor) else each.detach()
        for name, each in model.named_parameters()
    }


def example() -> ModuleType:
    """The example's module, in no table of modules: what is in none is pickled by value."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    Witnessed.verdict = Path(sys.argv[2])
    played = example()
    played.RemoteEma = Witnessed
    played.main(sys.argv[1])
