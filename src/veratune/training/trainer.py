"""VeraTrainer: Hugging Face's Trainer, with learning rates for vectors and head, and adapters as checkpoints."""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from veratune.inference.evaluate import TaskTrainer
from veratune.tasks.base import Task
from veratune.training.methods import LearningRates, Method, has_whole_file

_STATE = "trainer_state.json"


class VeraTrainer(TaskTrainer):
    """Trainer for what a method trains of a model.

    rates: peak learning rates; loss_per_token: see Task; frozen_norms: modules that stay in
    evaluation mode while the model is trained, such as frozen batch normalisation; loss_scale: factor of the
    training loss.
    Checkpoints hold the method's file, the optimizer and the random states, never the base model.
    """

    def __init__(
        self,
        *args: Any,
        model: nn.Module,
        method: Method,
        rates: LearningRates,
        loss_per_token: bool,
        frozen_norms: Sequence[nn.Module] = (),
        loss_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.method, self.rates, self.frozen_norms = method, rates, frozen_norms
        self.loss_scale = loss_scale
        # Trainer refuses a quantized model unless this mark says that there is an adapter on it.
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            del model._hf_peft_config_loaded
        # Trainer takes every model with **kwargs for one whose loss is a sum over tokens, divided by their number
        # in the whole batch. A classifier's loss is a mean: so taken, it is multiplied by processes and accumulation.
        self.model_accepts_loss_kwargs = loss_per_token

    @property
    def adapted(self) -> nn.Module:
        """The model that is trained, before Trainer wrapped it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 0 and not self.is_deepspeed_enabled:
            idle = [
                name
                for name, p in self.adapted.named_parameters()
                if p.requires_grad and p.grad is None
            ]
            layers = list(dict.fromkeys(name.partition(".vera.")[0] for name in idle))
            if layers:
                warnings.warn(
                    f"{len(layers)} adapted layers, the first '{layers[0]}', took no part in the first step: the model does "
                    "not call them, or reads their weights past the adapter. Exclude them, or they train nothing",
                    stacklevel=2,
                )
        return loss

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


class ProgressLogger(ProgressCallback):
    """Trainer's progress bar, with its lines on standard error too: standard output is for results."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {
                k: v
                for k, v in (logs or {}).items()
                if k in ("epoch", "loss") or k.startswith("eval_")
            }
            shown = {
                k: v for k, v in shown.items() if not k.endswith(("_second", "_time", "_runtime"))
            }
            line = "  ".join(
                f"{k.removeprefix('eval_') if k != 'eval_loss' else k} {v:.4g}"
                for k, v in shown.items()
            )
            if "loss" in shown or "eval_loss" in shown:
                tqdm.write(line, file=sys.stderr)


class SampleCallback(TrainerCallback):
    """A picture of what the model makes, beside every checkpoint: samples/STEP.png in the run's folder."""

    def __init__(self, task: Task, model: nn.Module, processor: Any, folder: Path) -> None:
        self.task, self.model, self.processor, self.folder = task, model, processor, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.on_save(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with torch.random.fork_rng():
                self.task.sample(
                    self.model,
                    self.processor,
                    self.folder / "samples" / f"{state.global_step:06d}.png",
                )


def last_checkpoint(folder: Path, method: Method) -> Path | None:
    """The latest whole checkpoint: Trainer writes its state last, so one that was cut off has none."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]), reverse=True
    )
    for checkpoint in found:
        try:
            json.loads((checkpoint / _STATE).read_text())
        except (OSError, ValueError):
            continue
        if has_whole_file(method, checkpoint):
            return checkpoint
    return None
