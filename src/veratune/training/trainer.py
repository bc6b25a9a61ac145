"""Trainers with adapter-only checkpoints and a learning rate per group."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from veratune.errors import DivergedError, OutputError
from veratune.inference.evaluate import TaskTrainer
from veratune.tasks.base import Task
from veratune.training.methods import LearningRates, Method


class MethodTrainer(Trainer):
    """What every trainer of a run shares, TRL's included: it goes before their class.

    Training ends with DivergedError at the first loss that is not finite.

    Checkpoints hold the method's file, the optimizer and the random states, never the base model.
    """

    stops_when_diverged = True

    def __init__(
        self,
        *args: Any,
        model: nn.Module,
        method: Method,
        rates: LearningRates,
        frozen_norms: Sequence[nn.Module] = (),
        loss_scale: float = 1.0,
        train_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build a Trainer.

        Args:
            args: As for Trainer.
            model: The model, prepared by `method`.
            method: What is trained, and the file that holds it.
            rates: Peak learning rates.
            frozen_norms: Batch normalisations that stay in evaluation mode.
            loss_scale: Factor of the training loss.
            train_collator: Makes the training batches; None for the collator of evaluation.
            kwargs: As for Trainer.
        """
        self.method, self.rates, self.frozen_norms = method, rates, frozen_norms
        self.loss_scale, self.train_collator = loss_scale, train_collator
        # Trainer refuses a quantized model unless this mark says that there is an adapter on it.
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            del model._hf_peft_config_loaded

    @property
    def adapted(self) -> nn.Module:
        """The model that is trained, before Trainer wrapped it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.stops_when_diverged and not torch.isfinite(loss):
            raise DivergedError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()} at a learning "
                f"rate of {self.rates.adapter:g}: give a lower --lr, or --lr find, or look for "
                "values that are not finite in the data"
            )
        if self.state.global_step == 0 and not self.is_deepspeed_enabled:
            idle = [
                name
                for name, p in self.adapted.named_parameters()
                if p.requires_grad and p.grad is None
            ]
            layers = list(dict.fromkeys(name.partition(".vera.")[0] for name in idle))
            if layers:
                warnings.warn(
                    f"{len(layers)} adapted layers, the first '{layers[0]}', took no part in the "
                    "first step: the model does not call them, or reads their weights past the "
                    "adapter. Exclude them, or they train nothing",
                    stacklevel=2,
                )
        return loss

    def get_train_dataloader(self) -> DataLoader:
        """The training batches, by the training collator where there is one."""
        padded = self.data_collator
        self.data_collator = self.train_collator or padded
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for module in self.frozen_norms:
            module.eval()
        loss = super().compute_loss(model, *args, **kwargs)
        # Evaluation asks for a pair (loss, outputs): its loss stays in the targets' own units.
        return loss * self.loss_scale if isinstance(loss, torch.Tensor) else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over what the method trains, each group at its own learning rate."""
        if self.optimizer is None:
            groups = [
                {"params": found, "lr": rate}
                for found, rate in self.method.groups(self.adapted, self.rates)
                if found
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule, whose last step at least is no warm-up: a single step would train nothing.

        Args:
            num_training_steps: Optimizer steps of the run.
            optimizer: As for Trainer.
        """
        rising = self.args.get_warmup_steps(num_training_steps)
        self.args.warmup_steps = min(rising, max(num_training_steps - 1, 0))
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its C++ writer.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise OutputError(
                f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} could "
                f"not be written: {reason}; make room and go on with --resume"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the method's file into a folder; on several processes the first one writes."""
        self.method.write(
            self.adapted, Path(output_dir or self.args.output_dir or "."), self.args.should_save
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.method.read(self.adapted, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.method.read(self.adapted, Path(self.state.best_model_checkpoint))


class VeraTrainer(MethodTrainer, TaskTrainer):
    """Trainer for tasks whose loss is the model's own."""

    def __init__(self, *args: Any, loss_per_token: bool, **kwargs: Any) -> None:
        """Build a Trainer.

        Args:
            args: As for Trainer.
            loss_per_token: `Task.loss_per_token`.
            kwargs: As for `MethodTrainer` and `TaskTrainer`.
        """
        super().__init__(*args, **kwargs)
        # Trainer takes every model with **kwargs for one whose loss is a sum over the whole batch's
        # tokens. A classifier's loss is a mean: it would be multiplied by processes and passes.
        self.model_accepts_loss_kwargs = loss_per_token


class TaskScores(MethodTrainer):
    """A trainer whose evaluation is the task's own scores, such as a word error rate or rewards.

    It goes before the class of a library's trainer.

    Attributes:
        passes_processor: Whether that class takes the processor of the scores too.
    """

    passes_processor: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        task: Task,
        eval_encoded: Dataset | None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build a Trainer.

        Args:
            args: As for `MethodTrainer`.
            task: The task; its `score` is the evaluation.
            eval_encoded: Evaluation examples as the task encoded them; None without.
            processing_class: The processor that `score` takes.
            kwargs: As for `MethodTrainer` and the library's trainer.
        """
        self.task, self.eval_encoded = task, eval_encoded
        self.scoring_processor = processing_class
        if self.passes_processor:
            kwargs["processing_class"] = processing_class
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The task's held-out scores.

        Args:
            eval_dataset: Encoded examples; None for those of the run.
            args: As for Trainer.
            kwargs: As for Trainer.
        """
        encoded = self.eval_encoded if eval_dataset is None else eval_dataset
        assert encoded is not None
        batch_size = self.args.per_device_eval_batch_size
        scores = self.task.score(self.adapted, encoded, self.scoring_processor, batch_size)
        self.adapted.eval()  # TRL files what is logged by the model's mode
        metrics = {f"eval_{name}": value for name, value in (scores or {}).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class ScoredTrainer(TaskScores, VeraTrainer):
    """Trainer for tasks whose loss is the model's own and whose evaluation is their scores."""
