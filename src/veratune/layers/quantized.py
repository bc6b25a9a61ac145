"""Quantized linear layers: their weights as floating-point matrices.

VeraLinear calls the linears of bitsandbytes and torchao as any other linear. What differs is that
their stored weight is not the matrix W.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_dense(weight: Tensor) -> bool:
    """Whether a stored weight is W itself: floating point, not packed, not sharded."""
    return (
        weight.is_floating_point()
        and type(weight.data) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
    )


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """Return W of a layer in floating point, dequantized where needed; None if unknown here."""
    weight: Any = module.get_parameter(parameter)
    if is_dense(weight):
        return weight.data
    kind = type(module).__name__
    if kind == "Linear4bit" and getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if (
        kind == "Linear8bitLt"
        and weight.dtype == torch.int8
        and getattr(weight, "SCB", None) is not None
    ):
        return weight.data.float() * (weight.SCB.float()[:, None] / 127)
    return None
