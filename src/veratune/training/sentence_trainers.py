"""sentence-transformers' trainers, on the project's files and learning rates."""

from collections.abc import Mapping
from typing import Any

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
from veratune.training.trainer import MethodTrainer, TaskScores


class SentenceTrainer(TaskScores):
    """What both trainers share: the model has its own tokenizer."""

    passes_processor = False


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
