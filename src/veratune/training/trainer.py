"""VeraTrainer: Hugging Face's Trainer, with learning rates for vectors and head, and adapters as checkpoints."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from veratune.adapter import extract, update
from veratune.attach import heads_of, vectors_of
from veratune.errors import VeratuneError
from veratune.formats import native

ADAPTER = "adapter.safetensors"
_STATE = "trainer_state.json"


class VeraTrainer(Trainer):
    """Trainer for one adapter of a model.

    adapter: its name; lr, head_lr: peak learning rates of vectors and head; loss_per_token: see Task.
    Checkpoints hold the adapter's file, the optimizer and the random states, never the base model.
    """

    def __init__(
        self, *args: Any, model: nn.Module, adapter: str, lr: float, head_lr: float, loss_per_token: bool, **kwargs: Any
    ) -> None:
        self.adapter, self.lr, self.head_lr = adapter, lr, head_lr
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
        """The model that holds the adapter."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 0 and not self.is_deepspeed_enabled:
            passed_by = [
                v.layer
                for v in vectors_of(self.adapted, self.adapter)
                if any(p.requires_grad and p.grad is None for p in v.parameters())
            ]
            if passed_by:
                warnings.warn(
                    f"{len(passed_by)} adapted layers, the first '{passed_by[0]}', took no part in the first step: the model does "
                    "not call them, or reads their weights past the adapter. Exclude them, or they train nothing",
                    stacklevel=2,
                )
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over two groups: d and b of every layer at lr, the head at head_lr."""
        if self.optimizer is None:
            vectors = [p for v in vectors_of(self.adapted, self.adapter) for p in v.parameters()]
            head = [p for module in heads_of(self.adapted, self.adapter).values() for p in module.parameters()]
            groups = [{"params": vectors, "lr": self.lr}, {"params": head, "lr": self.head_lr}]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.args.weight_decay)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter's file into a folder; on several processes the first one writes."""
        adapter = extract(self.adapted, self.adapter)  # every process: a sharded adapter is gathered here
        if self.args.should_save:
            native.write(adapter, Path(output_dir or self.args.output_dir or ".") / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        update(self.adapted, native.read(Path(resume_from_checkpoint) / ADAPTER), self.adapter)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        update(self.adapted, native.read(Path(self.state.best_model_checkpoint) / ADAPTER), self.adapter)


class Progress(ProgressCallback):
    """Trainer's progress bar, with its lines on standard error too: standard output is for results."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {k: v for k, v in (logs or {}).items() if k in ("epoch", "loss") or k.startswith("eval_")}
            shown = {k: v for k, v in shown.items() if not k.endswith(("_second", "_time", "_runtime"))}
            line = "  ".join(f"{k.removeprefix('eval_') if k != 'eval_loss' else k} {v:.4g}" for k, v in shown.items())
            if "loss" in shown or "eval_loss" in shown:
                tqdm.write(line, file=sys.stderr)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint: Trainer writes its state last, so one that was cut off has none."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / _STATE).read_text())
            native.read(checkpoint / ADAPTER)
        except (OSError, ValueError, VeratuneError):
            continue
        return checkpoint
    return None
