"""VeraCallback: adapter-only checkpoints for transformers' Trainer and every trainer of TRL."""

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from veratune.adapter import extract
from veratune.errors import UnsupportedError
from veratune.formats import native
from veratune.formats.atomic import write_atomic
from veratune.integrations.checkpoints import trained_state

ADAPTER_FILE = "adapter.safetensors"


class VeraCallback(TrainerCallback):
    """Make Trainer's checkpoints hold the adapter alone, so that it can resume from them.

    A checkpoint's model.safetensors holds the trained tensors, which Trainer loads into the model
    on resume and at the end (load_best_model_at_end). adapter.safetensors beside it is the adapter
    file. The output folder gets adapter.safetensors when training ends.

    Build it before the Trainer: it marks a quantized model as trainable, which Trainer checks.

    >>> model = veratune.attach(model, veratune.VeraConfig(rank=256))  # doctest: +SKIP
    >>> callback = VeraCallback(model)  # doctest: +SKIP
    >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        """Mark the model for Trainer.

        Args:
            model: The model with adapters that the Trainer will get.
            name: The adapter that is trained.

        Raises:
            AdapterNotFoundError: The model has no such adapter.
        """
        extract(model, name)
        self.model, self.name = model, name
        # Trainer refuses a quantized model unless this mark says that there is an adapter on it.
        model._hf_peft_config_loaded = True  # type: ignore[assignment]

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.__dict__.pop("_hf_peft_config_loaded", None)
        for option in ("fsdp", "deepspeed"):
            if getattr(args, option, None):
                raise UnsupportedError(
                    f"VeraCallback writes checkpoints of one process or of DDP; with {option}, "
                    "leave it out and write the adapter with veratune.save"
                )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained = self._save_pretrained  # type: ignore[assignment]

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self._write(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.__dict__.pop("save_pretrained", None)
        if state.is_world_process_zero:
            native.write(extract(self.model, self.name), Path(str(args.output_dir)) / ADAPTER_FILE)

    def _save_pretrained(
        self, folder: str | Path, is_main_process: bool = True, **options: Any
    ) -> None:
        """Stand-in for the model's save_pretrained while Trainer trains."""
        if is_main_process:
            self._write(Path(folder))

    def _write(self, folder: Path) -> None:
        """Write the trained tensors as Trainer reads them, and the adapter file."""
        data = safetensors.torch.save(trained_state(self.model), {"format": "pt"})
        write_atomic(folder / SAFE_WEIGHTS_NAME, data)
        native.write(extract(self.model, self.name), folder / ADAPTER_FILE)
