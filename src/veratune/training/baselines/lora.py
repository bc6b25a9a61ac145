"""LoRA and its variants that PEFT does not have: DyLoRA and LoRA-FA."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.targets import find_sites
from veratune.training.baselines.modules import NAME, add_module, linear_sizes


class Lora(nn.Module):
    """LoRA's update of a linear layer, alpha / r * B (A x); B starts at zero."""

    def __init__(self, inputs: int, outputs: int, r: int, alpha: float) -> None:
        """Draw A and set B to zero.

        Args:
            inputs: Size n of x; A is (r, n).
            outputs: Size m of the update; B is (m, r).
            r: The rank.
            alpha: The scale's numerator.
        """
        super().__init__()
        self.r, self.alpha = r, alpha
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, inputs), a=5**0.5))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))

    def forward(self, x: Tensor) -> Tensor:
        k = self.current_rank()
        return F.linear(F.linear(x, self.lora_A[:k]), self.lora_B[:, :k]) * (self.alpha / k)

    def current_rank(self) -> int:
        """The rank of this forward pass."""
        return self.r


class DyLora(Lora):
    """LoRA whose rank is drawn from 1 to r in every training step; it is r in evaluation.

    All drawn rows are trained, not the last one alone.

    Source: Valipour et al., "DyLoRA", 2023, algorithm 1.
    """

    def current_rank(self) -> int:
        return int(torch.randint(1, self.r + 1, ())) if self.training else self.r


class LoraFa(Lora):
    """LoRA with A frozen. A is a buffer, so that files hold it.

    Source: Zhang et al., "LoRA-FA", 2023.
    """

    def __init__(self, inputs: int, outputs: int, r: int, alpha: float) -> None:
        super().__init__(inputs, outputs, r, alpha)
        frozen = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", frozen)


def add_lora(
    kind: type[Lora], model: nn.Module, config: VeraConfig, options: Mapping[str, Any]
) -> None:
    """Add a LoRA beside every linear layer that `config.targets` names."""
    r = options["r"]
    for path in dict.fromkeys(site.module for site in find_sites(model, config)):
        layer = model.get_submodule(path)
        lora = kind(*linear_sizes(layer, path), r, options["lora_alpha"] or r)
        add_module(layer, lora, _add_update)


def _add_update(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook: the layer's output plus LoRA's update of its input."""
    return out + module.get_submodule(NAME)(args[0])
