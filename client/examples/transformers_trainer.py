"""transformers: one line after the Trainer is made, and it evaluates with EMA weights that are kept on the service.

ema-service serve --memory &
python transformers_trainer.py my-run
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from ema_client.integrations.transformers import RemoteEmaCallback


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Sentences of which half begin with word 1: label 1."""
    generator = torch.Generator().manual_seed(count)
    words = torch.randint(2, 30, (count, 8), generator=generator)
    labels = torch.arange(count) % 2
    words[:, 0] = labels
    return [{"input_ids": w, "labels": label} for w, label in zip(words, labels, strict=True)]


def main(run: str) -> None:
    """Train for an epoch, evaluating twice, and say what was evaluated."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=10,
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=examples(64), eval_dataset=examples(32))
        ema = RemoteEmaCallback(0.99, run=run).attach(trainer)
        trainer.train()
        print(f"loss of the EMA: {trainer.evaluate()['eval_loss']:.4f}")
        ema.close()


if __name__ == "__main__":
    main(sys.argv[1])
