"""EMACallback: an exponential moving average of what is trained, kept through checkpoints."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from veratune.formats.atomic import write_atomic

FILE = "average.safetensors"


class EMACallback(TrainerCallback):
    """a <- decay * a + (1 - decay) * p after every optimizer step; a takes p's place when training ends.

    decay: in (0, 1). model: whose trained parameters are averaged. checkpoint: to go on from.
    """

    def __init__(self, model: nn.Module, decay: float, checkpoint: Path | None = None) -> None:
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in self._trained.items()
        }
        if checkpoint is not None and (checkpoint / FILE).is_file():
            self._average = safetensors.torch.load_file(checkpoint / FILE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for name, p in self._trained.items():
                self._average[name] = self._average[name].to(p.device).lerp_(p, 1 - self.decay)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            held = {name: value.cpu().contiguous() for name, value in self._average.items()}
            write_atomic(folder / FILE, safetensors.torch.save(held))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for name, p in self._trained.items():
                p.copy_(self._average[name])
