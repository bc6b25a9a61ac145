"""FewRowsLinear: nn.Linear whose product with few rows, as in decoding, is taken as W xᵀ."""

from typing import cast

import torch
from torch import Tensor, nn

from veratune.layers.quantized import is_dense
from veratune.layers.weight_layer import is_plain
from veratune.layers.wrapper import ModuleWrapper, replace_modules
from veratune.ops.few_rows import linear


class FewRowsLinear(ModuleWrapper):
    """Computes what the wrapped nn.Linear computes, y = x Wᵀ + bias; see `ops.few_rows`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return linear(x, cast(Tensor, self.base.weight), cast(Tensor | None, self.base.bias))


def replace_linears(model: nn.Module) -> None:
    """Replace the model's dense float32 linear layers on a CPU by FewRowsLinear.

    Other layers (half precision, quantized, hooked, on a GPU) stay as they are.
    """
    names = {module: name for name, module in model.named_modules()}

    def choose(module: nn.Module) -> nn.Module:
        if type(module) is not nn.Linear or not is_plain(module) or not is_dense(module.weight):
            return module
        if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
            return module
        return FewRowsLinear(module, names[module])

    replace_modules(model, choose)


def wrapped_linear(module: nn.Module) -> nn.Module:
    """Return the layer that a FewRowsLinear wraps, and any other module itself."""
    return module.base if isinstance(module, FewRowsLinear) else module
