"""VeRA on a linear layer with A and B made of blocks (`matrix`)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veratune.ops.delta import rank_scale, scaled_vector
from veratune.ops.matrix import BlockMatrix, RowBlocks
from veratune.ops.views import own_memory

CHUNK_VALUES = 2**20  # values of the largest tensor that are computed at a time


class BlockLinear(Function):
    """y = W x + scale * b * (B (d * (A x))) for block matrices A and B.

    Block products take little more time than the memory for their results. They are computed for
    some rows at a time and again in the backward pass; only x is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: RowBlocks,
        B: BlockMatrix,
        d: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, d, b)
        ctx.A, ctx.B, ctx.scale = A, B, scale
        down = A if d is None else A.scaled(scaled_vector(d, scale, A.dtype))
        outer_scale = scale if d is None else 1.0
        y = x.new_zeros(*x.shape[:-1], B.shape[0]) if weight is None else F.linear(x, weight, bias)
        output_scale = (
            torch.ones((), dtype=x.dtype, device=x.device) if b is None else b.to(x.dtype)
        )
        for y_rows, x_rows in _chunks(y, x):
            y_rows.addcmul_(B.matmul(down.matmul(x_rows)), output_scale, value=outer_scale)
        return own_memory(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad)
        x, weight, d, b = ctx.saved_tensors
        A, B, scale = ctx.A, ctx.B, ctx.scale
        need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        factor = rank_scale(d, scale, A.dtype)
        down = A if d is None else A.scaled(scaled_vector(d, scale, A.dtype))
        grad_x = grad.new_zeros(x.shape) if weight is None or not need_x else grad.matmul(weight)
        sums_d: list[Tensor] = []
        sums_b: list[Tensor] = []
        for grad_x_rows, x_rows, grad_rows in _chunks(grad_x, x, grad):
            inner = A.matmul(x_rows)
            if need_b:
                sums_b.append(_sum_products(B.matmul(inner * factor), grad_rows, b))
            if need_x or need_d:
                middle = B.rmatmul(grad_rows if b is None else grad_rows * b.to(grad_rows.dtype))
                if need_d:
                    sums_d.append(_sum_products(middle, inner, d))
                if need_x:
                    grad_x_rows.add_(down.rmatmul(middle), alpha=scale if d is None else 1)
        grad_d = torch.stack(sums_d).sum(0).mul_(scale) if sums_d else None
        grad_b = torch.stack(sums_b).sum(0) if sums_b else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return grad_x if need_x else None, None, grad_bias, None, None, grad_d, grad_b, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The same gradients in steps that autograd knows (create_graph=True)."""
    x, weight, d, b = ctx.saved_tensors
    A, B, scale = ctx.A, ctx.B, ctx.scale
    need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
    inner = A.matmul(x)
    factor = rank_scale(d, scale, A.dtype)
    middle = B.rmatmul(grad if b is None else grad * b.to(grad.dtype))
    grad_x = grad_d = grad_b = None
    if need_x:
        grad_x = A.rmatmul(middle * factor)
        grad_x = grad_x if weight is None else grad_x + grad.matmul(weight)
    if need_d:
        grad_d = _sum_products(middle, inner, d) * scale
    if need_b:
        grad_b = _sum_products(B.matmul(inner * factor), grad, b)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
    return grad_x, None, grad_bias, None, None, grad_d, grad_b, None


def _chunks(into: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time of each tensor (*T, columns); those of `into` are views, to write to."""
    flat = [into.view(-1, into.shape[-1]), *(t.reshape(-1, t.shape[-1]) for t in tensors)]
    if torch.compiler.is_compiling():
        rows = flat[0].shape[0]
    else:
        rows = CHUNK_VALUES // max(t.shape[1] for t in flat)
    return zip(*(t.split(max(1, rows)) for t in flat), strict=True)


def _sum_products(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
    """The sum of left * right over rows, in the precision of the vector whose gradient it is."""
    wide = torch.promote_types(left.dtype, vector.dtype)
    terms = left.reshape(-1, left.shape[-1]) * right.reshape(-1, right.shape[-1])
    return terms.sum(0, dtype=wide).to(vector.dtype)
