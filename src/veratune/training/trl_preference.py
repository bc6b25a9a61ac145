"""TRL's preference and reward trainers, on the project's data, files and learning rates."""

import os
from typing import Any

from datasets import Dataset
from torch import nn

from veratune.errors import UnsupportedError
from veratune.tasks.text.language import IGNORED
from veratune.tasks.text.preference import PairTask
from veratune.training.trainer import MethodTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO warn when they are imported

from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

# Evaluation figures of TRL that no table wants.
_LEFT_OUT = ("num_tokens", "entropy", "mean_token_accuracy", "logits/", "min_reward", "max_reward")


class TRLTrainer(MethodTrainer):
    """What every trainer of TRL needs: the trained values as they are, and no model card."""

    def __init__(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Build TRL's trainer.

        Args:
            args: As for `MethodTrainer`.
            model: The model, prepared by the method.
            kwargs: As for `MethodTrainer` and TRL's trainer.
        """
        check_output_layer(model)
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(*args, model=model, **kwargs)
        # TRL casts the adapter of a quantized model to bfloat16, which rounds d = 0.1.
        for name, p in model.named_parameters():
            if name in trained:
                p.data = trained[name].to(p.device)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the adapter's card is written when it is published."""


class PairTrainer(TRLTrainer):
    """A trainer on pairs that are tokenized already, which adds the task's held-out scores."""

    def __init__(
        self, *args: Any, task: PairTask, eval_encoded: Dataset | None = None, **kwargs: Any
    ) -> None:
        """Build TRL's trainer.

        Args:
            args: As for `TRLTrainer`.
            task: The task; its `score` is a part of every evaluation.
            eval_encoded: Evaluation examples as the task encoded them.
            kwargs: As for `TRLTrainer`.
        """
        self.task, self.eval_encoded = task, eval_encoded
        super().__init__(*args, **kwargs)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        """TRL would tokenize text; the task has done so."""
        return dataset

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.eval_encoded is not None:
            batch_size = self.args.per_device_eval_batch_size
            scores = self.task.score(
                self.adapted, self.eval_encoded, self.processing_class, batch_size
            )
            named = {f"eval_{name}": value for name, value in (scores or {}).items()}
            self.log(dict(named))
            metrics |= named
        return {
            name: value
            for name, value in metrics.items()
            if not name.removeprefix("eval_").startswith(_LEFT_OUT)
        }


class VeraDPOTrainer(PairTrainer, DPOTrainer):
    """DPO and IPO."""


class VeraRewardTrainer(PairTrainer, RewardTrainer):
    """A reward model."""


class VeraKTOTrainer(PairTrainer, KTOTrainer):
    """KTO. Each batch also pairs every prompt with its neighbour's completion, for the KL term."""

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        # The order is fixed from here on: each batch's KL term belongs to its examples.
        shuffled = dataset.shuffle(seed=args.seed, keep_in_memory=True)
        return shuffled.map(
            _with_kl_completions,
            batched=True,
            batch_size=args.per_device_train_batch_size,
            keep_in_memory=True,
        )


class VeraCPOTrainer(PairTrainer, CPOTrainer):
    """SimPO, as a loss of CPO."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """The columns that CPO reads, from token ids."""
        return _concatenated_columns(feature)


class VeraORPOTrainer(PairTrainer, ORPOTrainer):
    """ORPO."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """The columns that ORPO reads, from token ids."""
        return _concatenated_columns(feature)


TRAINERS: dict[str, tuple[type[MethodTrainer], type]] = {
    "dpo": (VeraDPOTrainer, DPOConfig),
    "ipo": (VeraDPOTrainer, DPOConfig),
    "kto": (VeraKTOTrainer, KTOConfig),
    "simpo": (VeraCPOTrainer, CPOConfig),
    "orpo": (VeraORPOTrainer, ORPOConfig),
    "reward": (VeraRewardTrainer, RewardConfig),
}


def check_output_layer(model: nn.Module) -> None:
    """Refuse an adapter on the output embeddings, whose weight TRL multiplies past the layer.

    Raises:
        UnsupportedError: The layer holds trained parameters beside its weight and bias.
    """
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    if layer is None:
        return
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    if any(name not in ("weight", "bias") for name in trained):
        raise UnsupportedError(
            "the output embeddings (lm_head) have an adapter, which TRL's losses would leave out; "
            "exclude them with --exclude lm_head"
        )


def _with_kl_completions(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Mismatched completions of a batch: each prompt gets the completion before it."""
    completions = batch["completion_ids"]
    return {"KL_completion_ids": [completions[-1], *completions[:-1]]}


def _concatenated_columns(row: dict[str, Any]) -> dict[str, list[int]]:
    """Whole sequences with their labels, as CPOTrainer and ORPOTrainer read them."""
    prompt: list[int] = row["prompt_ids"]
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer: list[int] = row[f"{side}_ids"]
        columns |= {
            f"{side}_input_ids": prompt + answer,
            f"{side}_attention_mask": [1] * (len(prompt) + len(answer)),
            f"{side}_labels": [IGNORED] * len(prompt) + answer,
        }
    return columns
