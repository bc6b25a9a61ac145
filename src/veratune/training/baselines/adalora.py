"""AdaLoRA's orthogonality penalty in the loss, and its rank budget, updated after every step.

Source: Zhang et al., "Adaptive budget allocation for parameter-efficient fine-tuning", 2023; the
layers and the allocation are PEFT's.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class AdaLoraCallback(TrainerCallback):
    """Tell PEFT's allocator how long the run is, and let it prune after every step; add the penalty
    to the model's loss.

    The penalty is orth_reg_weight times the mean of |P Pᵀ - 1| and |Qᵀ Q - 1| over all layers.
    Ranks are pruned between a tenth and eight tenths of the run, unless tinit and tfinal are given.
    """

    def __init__(self, model: nn.Module, tuner: Any, given: bool) -> None:
        """tuner: PEFT's AdaLoraModel; given: whether the user chose tinit and tfinal."""
        self.tuner, self.given = tuner, given
        self.config = tuner.peft_config["default"]
        model.register_forward_hook(self._penalise)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.total_step = state.max_steps
        if not self.given:
            self.config.tinit, self.config.tfinal = state.max_steps // 10, state.max_steps // 5
        self.tuner.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tuner.update_and_allocate(state.global_step + 1)

    def _penalise(self, model: nn.Module, args: Any, out: Any) -> Any:
        if model.training and torch.is_grad_enabled() and out.get("loss") is not None:
            off = [
                torch.linalg.matrix_norm(
                    (p @ p.T if "lora_A" in name else p.T @ p)
                    - torch.eye(min(p.shape), device=p.device)
                )
                for name, p in model.named_parameters()
                if ("lora_A" in name or "lora_B" in name) and p.requires_grad
            ]
            out["loss"] = out["loss"] + self.config.orth_reg_weight * torch.stack(off).mean()
        return out
