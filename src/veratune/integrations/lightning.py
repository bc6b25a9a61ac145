"""VeraLightningCallback: adapter-only checkpoints for Lightning's Trainer."""

from pathlib import Path
from typing import Any

import lightning
from torch import nn

from veratune.adapter import extract
from veratune.formats import native
from veratune.integrations.checkpoints import trained_state


class VeraLightningCallback(lightning.Callback):
    """Make Lightning's checkpoints hold the trained tensors alone, and write the adapter file.

    >>> callback = VeraLightningCallback(module.model, "adapter.safetensors")  # doctest: +SKIP
    >>> lightning.Trainer(callbacks=[callback]).fit(module)  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, path: str | Path | None = None, name: str = "default"
    ) -> None:
        """Bind the callback to an adapter.

        Args:
            model: The model with adapters: the LightningModule or a part of it.
            path: Adapter file to write when fitting ends; None for none.
            name: The adapter that is trained.

        Raises:
            AdapterNotFoundError: The model has no such adapter.
        """
        extract(model, name)
        self.model, self.path, self.name = model, path, name

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        # Checkpoints lack the base weights, which stay as they were loaded.
        pl_module.strict_loading = False

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        checkpoint["state_dict"] = trained_state(pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.path is not None and trainer.is_global_zero:
            native.write(extract(self.model, self.name), Path(self.path))
