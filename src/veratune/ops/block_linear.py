"""VeRA on a linear layer whose A and B are made of blocks (`matrix`).

With the grids of `matrix`, each entry of ΔW is one product, not a sum of r:

    ΔW[a k + j, i c + l] = scale * b[a k + j] * B[a, i] * d[i k + j] * A[i, j, l]

so W + ΔW costs one pass over W. Both vector gradients come from one batched product of z = A x and
the gradient G of the output, P[j, i, a] = Σ_t z[i k + j, t] G[t, a k + j]:

    grad d[i k + j] = scale * Σ_a b[a k + j] B[a, i] P[j, i, a]
    grad b[a k + j] = scale * Σ_i d[i k + j] B[a, i] P[j, i, a]

z and Gᵀ have the rows of x as their columns, so that no product copies its inputs. Of z and x, the
smaller one is kept for the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veratune.ops.delta import VectorGrads, rank_scale, scaled_vector
from veratune.ops.matrix import ColumnBlocks, RowBlocks, pad_to
from veratune.ops.projection import project
from veratune.ops.views import own_memory

CHUNK_VALUES = 2**20  # values of the largest tensor that the backward pass computes at a time


class BlockLinear(Function):
    """y = W x + scale * b * (B (d * (A x))) for block matrices A and B.

    plan: "factored" multiplies A and B one after the other; "projected" and "merged" multiply by
    W + ΔW and keep z or x. "factored" keeps the smaller one. The second output is z where it is
    kept, so that a second backward pass can reach x through it; callers drop it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: RowBlocks,
        B: ColumnBlocks,
        d: Tensor | None,
        b: Tensor | None,
        scale: float,
        plan: str,
        train_vectors: bool,
        layer_id: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        keep_inner = train_vectors and (
            plan == "projected" or (plan == "factored" and A.shape[0] <= A.shape[1])
        )
        inner = None
        if plan == "factored" or keep_inner:
            # Detached: it may be shared, and autograd marks the outputs as this call's.
            inner = project(x, A, layer_id, RowBlocks.matmul_columns).detach()
        if plan == "factored":
            assert inner is not None
            y = _factored(x, weight, bias, inner, B, _grid_scale(A, d, scale), b)
        else:
            assert weight is not None
            y = F.linear(x, add_block_delta(weight, A, B, d, b, scale), bias)
        inner = inner if keep_inner else None
        seen = (x if inner is None else inner) if train_vectors else None
        ctx.save_for_backward(seen, weight, d, b)
        ctx.set_materialize_grads(False)
        ctx.A, ctx.B, ctx.scale, ctx.plan, ctx.keeps_inner = A, B, scale, plan, keep_inner
        ctx.x_shape = x.shape
        return own_memory(y), inner

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_inner: Tensor | None) -> tuple[Any, ...]:
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if grad is None or grad_inner is not None or twice:
            return _differentiable_backward(ctx, grad, grad_inner)
        seen, weight, d, b = ctx.saved_tensors
        A, B = ctx.A, ctx.B
        need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        factored = ctx.plan == "factored"
        grad_x = None
        if need_x and not factored:
            grad_x = grad.matmul(add_block_delta(weight, A, B, d, b, ctx.scale))
        elif need_x:
            grad_x = grad.new_zeros(ctx.x_shape) if weight is None else grad.matmul(weight)
        flat = grad.reshape(-1, grad.shape[-1])
        factor = _grid_scale(A, d, ctx.scale)
        output_scale = None if b is None else _grid(b.to(A.dtype), B.values.shape[0], B.columns)
        P = None
        for rows in _chunks(flat.shape[0], max(A.values.numel() // A.values.shape[2], *B.shape)):
            columns = _columns(flat[rows], B)
            if need_d or need_b:
                z = seen[:, rows] if ctx.keeps_inner else A.matmul_columns(_flat(seen)[rows])
                P = _add_vector_product(P, z, columns, A)
            if factored and grad_x is not None:
                columns = columns if output_scale is None else columns.mul_(output_scale[..., None])
                _add_input_grad(_flat(grad_x)[rows], columns, A, B, factor)
        grad_d, grad_b = _vector_grads(P, A, B, d, b, ctx.scale) if P is not None else (None, None)
        grad_bias = flat.sum(0) if need_bias else None
        grad_d, grad_b = grad_d if need_d else None, grad_b if need_b else None
        return grad_x, None, grad_bias, None, None, grad_d, grad_b, None, None, None, None


def add_block_delta(
    weight: Tensor,
    A: RowBlocks,
    B: ColumnBlocks,
    d: Tensor | None,
    b: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute W + ΔW in one pass over W, shape (m, n), in W's memory layout."""
    (q, k, c), s = A.values.shape, B.values.shape[0]
    factor = _grid_scale(A, d, scale)
    up = B.values.unsqueeze(1) * (factor.t() if isinstance(factor, Tensor) else factor)
    up = up.expand(s, k, q)
    if b is not None:
        up = up * _grid(b.to(A.dtype), s, k).unsqueeze(2)
    up, down = up.unsqueeze(3), A.values.transpose(0, 1)
    if weight.shape == (s * k, q * c):
        return torch.addcmul(weight.view(s, k, q, c), up, down).flatten(2).flatten(0, 1)
    delta = (up * down).reshape(s * k, q * c)
    return weight + delta[: weight.shape[0], : weight.shape[1]]


def _factored(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    inner: Tensor,
    B: ColumnBlocks,
    factor: Tensor | float,
    b: Tensor | None,
) -> Tensor:
    """W x + b * (B (factor * z)), some rows at a time; inner: z, shape (q k, T)."""
    m, (s, q) = B.shape[0], B.values.shape
    y = x.new_zeros(*x.shape[:-1], m) if weight is None else F.linear(x, weight, bias)
    one = torch.ones((), dtype=x.dtype, device=x.device) if b is None else b.to(x.dtype)
    y_rows = _flat(y)
    for rows in _chunks(inner.shape[1], max(inner.shape[0], s * B.columns)):
        z = inner[:, rows].unflatten(0, (q, -1))
        z = z * (factor.unsqueeze(2) if isinstance(factor, Tensor) else factor)
        update = B.values.matmul(z.flatten(1)).view(s * B.columns, -1)
        y_rows[rows].addcmul_(update[:m].t(), one)
    return y


def _add_input_grad(
    grad_x: Tensor, columns: Tensor, A: RowBlocks, B: ColumnBlocks, factor: Tensor | float
) -> None:
    """grad_x += ((G b) B * factor) A; columns: (G b)ᵀ, shape (s, k, T)."""
    (q, k, c), T = A.values.shape, columns.shape[2]
    middle = B.values.t().matmul(columns.flatten(1)).view(q, k, T)
    middle = middle.mul_(factor.unsqueeze(2) if isinstance(factor, Tensor) else factor)
    update = middle.transpose(1, 2).bmm(A.values).transpose(0, 1)
    if q * c == grad_x.shape[1]:
        grad_x.view(T, q, c).add_(update)
    else:
        grad_x.add_(update.reshape(T, q * c)[:, : grad_x.shape[1]])


def _add_vector_product(P: Tensor | None, z: Tensor, columns: Tensor, A: RowBlocks) -> Tensor:
    """P (k, q, s) plus that of some rows; z: (q k, T), columns: Gᵀ, shape (s, k, T)."""
    q, k, _ = A.values.shape
    product = z.unflatten(0, (q, k)).transpose(0, 1).bmm(columns.permute(1, 2, 0))
    wide = torch.promote_types(product.dtype, torch.float32)  # 16 bits would lose later rows
    return product.to(wide) if P is None else P.add_(product)


def _vector_grads(
    P: Tensor,
    A: RowBlocks,
    B: ColumnBlocks,
    d: Tensor | None,
    b: Tensor | None,
    scale: float,
) -> VectorGrads:
    """(grad d, grad b) from P, in the precision of the vectors."""
    wide = next(torch.promote_types(P.dtype, v.dtype) for v in (d, b) if v is not None)
    Q = P.to(wide) * B.values.t().to(wide)
    grad_d = grad_b = None
    if d is not None:
        if b is not None:
            output_scale = _grid(b.to(wide), B.values.shape[0], B.columns)
            sums = Q.bmm(output_scale.t().unsqueeze(2)).squeeze(2)
        else:
            sums = Q.sum(2)
        grad_d = sums.t().reshape(-1)[: len(d)].mul(scale).to(d.dtype)
    if b is not None:
        factor = _grid_scale(A, d, scale, wide)
        if isinstance(factor, Tensor):
            sums = Q.transpose(1, 2).bmm(factor.t().unsqueeze(2)).squeeze(2)
        else:
            sums = Q.sum(1).mul_(factor)
        grad_b = sums.t().reshape(-1)[: len(b)].to(b.dtype)
    return grad_d, grad_b


def _differentiable_backward(
    ctx: Any, grad: Tensor | None, grad_inner: Tensor | None
) -> tuple[Any, ...]:
    """The same gradients in steps that autograd knows (create_graph=True), and those of z."""
    seen, weight, d, b = ctx.saved_tensors
    A, B, scale = ctx.A, ctx.B, ctx.scale
    need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
    grad_x = grad_bias = grad_d = grad_b = None
    if need_x and grad_inner is not None:
        grad_x = A.rmatmul(grad_inner[: A.shape[0]].t()).view(ctx.x_shape)
    if grad is not None:
        if need_x:
            outer = grad if b is None else grad * b.to(grad.dtype)
            through = A.rmatmul(B.rmatmul(outer) * rank_scale(d, scale, A.dtype))
            grad_x = through if grad_x is None else grad_x + through
            grad_x = grad_x if weight is None else grad_x + grad.matmul(weight)
        flat = grad.reshape(-1, grad.shape[-1])
        if need_d or need_b:
            z = seen if ctx.keeps_inner else A.matmul_columns(_flat(seen))
            P = _add_vector_product(None, z, _columns(flat, B), A)
            grad_d, grad_b = _vector_grads(P, A, B, d, b, scale)
        grad_bias = flat.sum(0) if need_bias else None
    grad_d, grad_b = grad_d if need_d else None, grad_b if need_b else None
    return grad_x, None, grad_bias, None, None, grad_d, grad_b, None, None, None, None


def _grid_scale(
    A: RowBlocks, d: Tensor | None, scale: float, dtype: torch.dtype | None = None
) -> Tensor | float:
    """scale * d as the grid (q, k) of inner values, 0 where the grid is larger than r."""
    q, k, _ = A.values.shape
    if d is None:
        if q * k == A.shape[0]:
            return scale
        d = torch.ones(A.shape[0], dtype=A.dtype, device=A.values.device)
    return _grid(scaled_vector(d, scale, dtype or A.dtype), q, k)


def _grid(vector: Tensor, rows: int, columns: int) -> Tensor:
    return pad_to(vector, rows * columns).view(rows, columns)


def _columns(grad: Tensor, B: ColumnBlocks) -> Tensor:
    """Gᵀ as a grid (s, k, T), in memory of its own."""
    padded = pad_to(grad, B.values.shape[0] * B.columns)
    return padded.t().clone(memory_format=torch.contiguous_format).view(-1, B.columns, len(grad))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _chunks(T: int, width: int) -> Iterator[slice]:
    """Slices of some of T rows, whose tensors of `width` columns stay small."""
    step = T if torch.compiler.is_compiling() else max(1, CHUNK_VALUES // width)
    return (slice(start, start + step) for start in range(0, T, max(1, step)))
