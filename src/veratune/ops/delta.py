"""ΔW = scale * diag(b) B diag(d) A as a matrix, and the gradients of d and b from it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from veratune.ops.checks import check_adapter
from veratune.ops.matrix import BlockMatrix, Matrix, dense, matmul, rmatmul

VectorGrads = tuple[Tensor | None, Tensor | None]


def is_full_precision(dtype: torch.dtype) -> bool:
    """Whether W + ΔW in this dtype keeps a small ΔW; 16 bits round it away."""
    return dtype in (torch.float32, torch.float64)


def delta_weight(
    A: Float[Tensor, "r n"] | BlockMatrix,
    B: Float[Tensor, "m r"] | BlockMatrix,
    d: Float[Tensor, " r"] | None,
    b: Float[Tensor, " m"] | None,
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    """Compute the weight update ΔW = scale * diag(b) B diag(d) A.

    Args:
        A: Frozen down-projection, shape (r, n).
        B: Frozen up-projection, shape (m, r).
        d: Trained rank scale, shape (r,); None for ones.
        b: Trained output scale, shape (m,); None for ones.
        scale: Factor s of the basis.

    Returns:
        ΔW, shape (m, n), in A's dtype; its rank is at most r. Gradients flow to d and b.

    Raises:
        ShapeError: names the argument, what was found and what was wanted.

    Source: VeRA (arXiv 2310.11454), equation 2.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> delta_weight(A, B, torch.ones(4), torch.ones(6)).shape
    torch.Size([6, 8])
    """
    check_adapter(A, B, d, b)
    up = dense(B).to(A.dtype)
    with torch.autocast(up.device.type, enabled=False):
        return _DeltaWeight.apply(A, up, d, b, scale)


class _DeltaWeight(Function):
    """ΔW; the backward keeps the vectors only. Its backward is differentiable again."""

    @staticmethod
    def forward(
        ctx: Any, A: Matrix, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(B, d, b)
        ctx.A, ctx.scale = A, scale
        return add_delta(None, A, B, d, b, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        B, d, b = ctx.saved_tensors
        grad_d, grad_b = vector_grads(matmul(ctx.A, grad), B, d, b, ctx.scale)
        need_d, need_b = ctx.needs_input_grad[2:4]
        return None, None, grad_d if need_d else None, grad_b if need_b else None, None


def scaled_vector(d: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * d in `dtype`, computed in the higher precision of the two and rounded once."""
    if d.dtype == dtype:
        return d * scale
    return (d.to(torch.promote_types(d.dtype, dtype)) * scale).to(dtype)


def rank_scale(d: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | float:
    """The factor between A and B: scale * d, or the number `scale` where d is ones."""
    return scale if d is None else scaled_vector(d, scale, dtype)


def scaled_up_projection(
    B: Float[Tensor, "m r"],
    d: Float[Tensor, " r"] | None,
    b: Float[Tensor, " m"] | None,
    scale: float,
) -> Float[Tensor, "m r"]:
    """scale * diag(b) B diag(d), in B's dtype."""
    out = B * rank_scale(d, scale, B.dtype)
    return out if b is None else out.mul_(b.to(B.dtype)[:, None])


def add_delta(
    weight: Float[Tensor, "m n"] | None,
    A: Float[Tensor, "r n"] | BlockMatrix,
    B: Float[Tensor, "m r"],
    d: Float[Tensor, " r"] | None,
    b: Float[Tensor, " m"] | None,
    scale: float,
) -> Float[Tensor, "m n"]:
    """W + ΔW, or ΔW alone without W; the result has W's memory layout."""
    up = scaled_up_projection(B, d, b, scale)
    if weight is None:
        return rmatmul(A, up)
    A = dense(A)
    if weight.stride(0) == 1 and weight.stride(1) != 1:
        return torch.addmm(weight.t(), A.t(), up.t()).t()
    return torch.addmm(weight, up, A)


def vector_grads(
    P: Float[Tensor, "m r"],
    B: Float[Tensor, "m r"],
    d: Float[Tensor, " r"] | None,
    b: Float[Tensor, " m"] | None,
    scale: float,
) -> VectorGrads:
    """(grad d, grad b) = scale * (bᵀ (B ∘ P), (B ∘ P) d), for P = Gᵀ (x Aᵀ)."""
    wide = next(torch.promote_types(P.dtype, v.dtype) for v in (d, b) if v is not None)
    Q = P.to(wide) * B.to(wide)
    grad_d = grad_b = None
    if d is not None:
        grad_d = (Q.sum(0) if b is None else b.to(wide) @ Q).mul_(scale).to(d.dtype)
    if b is not None:
        grad_b = (Q.sum(1) if d is None else Q @ d.to(wide)).mul_(scale).to(b.dtype)
    return grad_d, grad_b
