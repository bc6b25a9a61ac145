"""Kinds of layers that can be adapted, their sizes, and how they store their weight."""

import sys
from typing import cast

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether this is nn.Linear, a subclass (quantized ones too), or Hugging Face's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_attention(module: nn.Module) -> bool:
    """Whether this is torch's nn.MultiheadAttention."""
    return isinstance(module, nn.MultiheadAttention)


def is_conv(module: nn.Module) -> bool:
    """Whether this is a Conv1d to Conv3d or a transposed one (Hugging Face's Conv1D is linear)."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, asked without importing transformers."""
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return cast(int, module.nf), cast(int, module.nx)


def stores_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores Wᵀ (in_features, out_features), as Conv1D does."""
    return is_conv1d(module)


def weight_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """W (out_features, in_features) of a linear layer's stored weight, or the reverse."""
    return weight.t() if stores_transposed(module) else weight
