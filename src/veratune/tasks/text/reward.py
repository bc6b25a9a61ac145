"""Reward models: a number for a completion, trained on preference pairs (Bradley-Terry)."""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from veratune.loading import load_pretrained
from veratune.tasks.classes import output_heads
from veratune.tasks.text.preference import PairTask


class RewardModel(PairTask):
    """A scalar reward r(prompt, completion): the loss is -log sigmoid(r(chosen) - r(rejected))."""

    name = "reward"
    metric = "accuracy"
    greater_is_better = True
    head_lr = 1e-2

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForSequenceClassification, model, num_labels=1, **options)

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return output_heads(model)

    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        """Tokenize pairs: chosen_ids and rejected_ids start with the prompt's tokens."""
        rows = self._encode_pairs(examples, processor)
        return Dataset.from_dict(
            {
                "prompt_ids": [row["prompt_ids"] for row in rows],
                **{
                    f"{side}_ids": [row["prompt_ids"] + row[f"{side}_ids"] for row in rows]
                    for side in ("chosen", "rejected")
                },
            }
        )

    def preview(self, encoded: Any, processor: Any) -> list[tuple[str, bool]]:
        start = len(encoded["prompt_ids"])
        completions = {side: encoded[side][start:] for side in ("chosen_ids", "rejected_ids")}
        return super().preview({"prompt_ids": encoded["prompt_ids"], **completions}, processor)

    def score(
        self, model: nn.Module, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float]:
        """Accuracy: the share of pairs whose chosen side gets the higher reward; and the margin."""
        rewards = {
            side: torch.cat(
                [
                    _rewards(model, processor, batch[side])
                    for batch in encoded.iter(batch_size=batch_size)
                ]
            )
            for side in ("chosen_ids", "rejected_ids")
        }
        margin = rewards["chosen_ids"] - rewards["rejected_ids"]
        return {
            "accuracy": (margin > 0).double().mean().item(),
            "margin": margin.double().mean().item(),
        }


def _rewards(model: nn.Module, processor: Any, rows: list[list[int]]) -> torch.Tensor:
    """The reward of each row of token ids, shape (len(rows),)."""
    device = next(model.parameters()).device
    batch = processor.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        rewards: torch.Tensor = model(**batch).logits[:, 0].float().cpu()
    model.train(was_training)
    return rewards
