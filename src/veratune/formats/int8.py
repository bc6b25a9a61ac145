"""Int8 storage of vectors: blocks of 64 values share one bfloat16 scale.

    value = code * scale,  code in -127 .. 127,  scale = max |value| of the block / 127

A scale has 8 significant bits and a code 7, so code * scale is exact in float32. Quantizing what
was read gives the same codes and scales again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # values that share a scale
_MAX_CODE = 127


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a vector blockwise.

    Args:
        values: Shape (k,), any float dtype.

    Returns:
        Codes, int8 of shape (k,), and scales, bfloat16 of shape (ceil(k / 64),).
    """
    blocks = F.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = (blocks.abs().amax(1) / _MAX_CODE).bfloat16()
    divisors = scales.float()[:, None]
    codes = torch.where(divisors > 0, blocks / divisors, 0).round().clamp(-_MAX_CODE, _MAX_CODE)
    return codes.to(torch.int8).view(-1)[: len(values)].clone(), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `quantize`, in float32 of shape (k,)."""
    blocks = F.pad(codes.float(), (0, -len(codes) % BLOCK)).view(-1, BLOCK)
    return (blocks * scales.float()[:, None]).view(-1)[: len(codes)].clone()


def block_count(values: int) -> int:
    """The number of scales of a vector."""
    return -(-values // BLOCK)
