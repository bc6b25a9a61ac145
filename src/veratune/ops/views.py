"""Outputs of custom autograd functions that callers may write to in place."""

import torch
from torch import Tensor

_unsafe_view = torch.ops.aten._unsafe_view.default


def own_memory(y: Tensor) -> Tensor:
    """y as a tensor that is no view, so that callers may write to it in place (ReLU, +=).

    torch computes (*T, m) products as a view of (T, m); autograd forbids writing to a view that a
    custom function returns.
    """
    return y if torch.compiler.is_compiling() else _unsafe_view(y, y.shape)
