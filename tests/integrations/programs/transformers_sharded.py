"""Processes train one model, sharded by transformers or not, with the callback, and each notes what it saw.

Every process gets the same batches, so that however many there are the training is the same, bit for bit. Knows
transformers. Run as ``transformers_sharded.py SCENES.json`` in each of the processes that torchrun starts, or in one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from ema_client.integrations.transformers import RemoteEmaCallback
from ema_client.training.sharding import is_sharded, shards_of

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def copies(model: nn.Module) -> dict[str, Tensor]:
    """This rank's own memory of what is averaged."""
    if is_sharded(model):
        return {name: shard.local.detach().clone() for name, shard in shards_of(model).items()}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Watched(Trainer):
    """Takes the batches in their order, notes what it evaluates with, and fails there if it is told to.

    Its model comes with the checkpoint's weights: transformers would not load them into one it has sharded, which
    is what happens where accelerate shards it, on a GPU.
    """

    evaluated: list[dict[str, Tensor]]
    fails = False

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        pass

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.evaluated.append(copies(model))
        result = super().prediction_step(model, *args, **kwargs)
        if self.fails:
            raise ZeroDivisionError
        return result


def a_model(folder: Path, how: str) -> nn.Module:
    """The same weights in every process."""
    options: dict[str, Any] = {}
    if how == "fsdp2":
        plan = {"model.layers.*": "free_full_weight"}
        options["distributed_config"] = DistributedConfig(fsdp_size=WORLD, fsdp_plan=plan)
    made: nn.Module = LlamaForCausalLM.from_pretrained(folder, **options)
    return made


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def a_trainer(scene: dict[str, Any], folder: Path) -> Watched:
    arguments = TrainingArguments(
        output_dir=str(folder / scene["name"]),
        per_device_train_batch_size=1,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        # What accelerate makes of this on the CPU is DDP.
        **({"fsdp": True, "fsdp_config": {"fsdp_version": 2}} if scene["how"] == "accelerate" else {}),
    )
    rows = [{"input_ids": torch.arange(4) + row, "labels": torch.arange(4) + row} for row in range(8)]
    trainer = Watched(
        a_model(folder / scene.get("checkpoint", "model"), scene["how"]),
        arguments,
        # Batches are dealt out to the processes in turn.
        train_dataset=[row for row in rows for _ in range(WORLD)],
        eval_dataset=rows[:WORLD],
    )
    trainer.evaluated = []
    return trainer


def play(scene: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, from ``checkpoint`` if one is given, then evaluate, and evaluate again and fail."""
    trainer = a_trainer(scene, folder)
    if scene.get("truncates") and RANK == 0:
        reference = folder / scene["checkpoint"] / f"ema-{scene['run']}.json"
        reference.write_text(reference.read_text()[:-10])
    ema = RemoteEmaCallback(0.9, run=scene["run"]).attach(trainer)
    raised = ""
    trained: dict[str, Tensor] = {}
    try:
        checkpoint = scene.get("checkpoint")
        trainer.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else None)
        trained = copies(trainer.model)
        trainer.evaluate()
        trainer.fails = True
        trainer.evaluate()
    except Exception as error:  # noqa: BLE001 - told to the test
        raised = f"{type(error).__name__}: {error}"
    seen = {
        "raised": raised,
        "sharded": is_sharded(trainer.model),
        "sent": ema.ema is not None,
        "trained": trained,
        "evaluated": trainer.evaluated,
        "after": copies(trainer.model),
    }
    ema.close()
    return seen


if __name__ == "__main__":
    path = Path(sys.argv[1])
    if WORLD == 1:
        save_model(path.parent / "model")
    for scene in json.loads(path.read_text()):
        torch.save(play(scene, path.parent), path.parent / f"{scene['name']}.{RANK}.pt")
