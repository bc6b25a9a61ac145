"""sentence-transformers' trainers, on the project's files and learning rates."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from transformers import TrainingArguments

from veratune.tasks.text.embedding import Embedding, SentenceTask
from veratune.training.trainer import MethodTrainer


class SentenceTrainer(MethodTrainer):
    """What both trainers share: the task's scores are the evaluation."""

    def __init__(
        self,
        *args: Any,
        task: SentenceTask,
        eval_encoded: Dataset | None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build the library's trainer.

        Args:
            args: As for `MethodTrainer`.
            task: The task; its `score` is the evaluation.
            eval_encoded: Evaluation examples as the task encoded them; None without.
            processing_class: The tokenizer, for the task's scores; the model has its own.
            kwargs: As for `MethodTrainer` and the library's trainer.
        """
        self.task, self.eval_encoded, self.tokenizer = task, eval_encoded, processing_class
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The task's held-out scores."""
        assert self.eval_encoded is not None
        batch_size = self.args.per_device_eval_batch_size
        scores = self.task.score(self.adapted, self.eval_encoded, self.tokenizer, batch_size)
        metrics = {f"eval_{name}": value for name, value in (scores or {}).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class VeraSentenceTransformerTrainer(SentenceTrainer, SentenceTransformerTrainer):
    """Embeddings."""


class VeraCrossEncoderTrainer(SentenceTrainer, CrossEncoderTrainer):
    """Rerankers."""


def trainer_of(task: SentenceTask) -> tuple[type[MethodTrainer], type[TrainingArguments]]:
    """The trainer of a task, and the class of its arguments."""
    if isinstance(task, Embedding):
        return VeraSentenceTransformerTrainer, SentenceTransformerTrainingArguments
    return VeraCrossEncoderTrainer, CrossEncoderTrainingArguments


def options(task: SentenceTask) -> Mapping[str, Any]:
    """Arguments of a task's trainer alone: no text is its own negative in a batch."""
    in_batch = isinstance(task, Embedding) and not task.scored
    return {"batch_sampler": "no_duplicates"} if in_batch else {}


def loss_of(task: SentenceTask, model: Any) -> nn.Module:
    """The loss of a task."""
    loss: nn.Module
    if not isinstance(task, Embedding):
        loss = BinaryCrossEntropyLoss(model)
    elif task.scored:
        loss = CoSENTLoss(model)
    else:
        loss = MultipleNegativesRankingLoss(model)
    return loss
