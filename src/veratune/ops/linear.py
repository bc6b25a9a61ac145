"""VeRA on a linear layer: y = W x + scale * b * (B (d * (A x))), in the order that is cheapest.

`plans` lists the orders. The gradients are written out here because autograd's own would keep the
result of every step. They can be taken again (`create_graph=True`): then autograd takes the steps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from veratune.errors import UnsupportedError
from veratune.ops.block_linear import BlockLinear
from veratune.ops.checks import check_adapter, check_input
from veratune.ops.delta import (
    add_delta,
    is_full_precision,
    rank_scale,
    scaled_up_projection,
    vector_grads,
)
from veratune.ops.matrix import BlockMatrix, ColumnBlocks, Matrix, RowBlocks, dense
from veratune.ops.plans import PLANNER, Call, PlanChoice, with_memory_policy
from veratune.ops.projection import project
from veratune.ops.views import own_memory


def vera_linear(
    x: Float[Tensor, "*T n"],
    A: Float[Tensor, "r n"] | BlockMatrix,
    B: Float[Tensor, "m r"] | BlockMatrix,
    d: Float[Tensor, " r"] | None,
    b: Float[Tensor, " m"] | None,
    scale: float = 1.0,
    *,
    weight: Float[Tensor, "m n"] | None = None,
    bias: Float[Tensor, " m"] | None = None,
    plan: str = "auto",
    layer_id: int | None = None,
) -> Float[Tensor, "*T m"]:
    """Apply a linear layer's VeRA update: y = scale * b * (B (d * (A x))), plus W x + bias if
    given.

    Args:
        x: Activations, shape (*T, n).
        A: Frozen down-projection, shape (r, n).
        B: Frozen up-projection, shape (m, r).
        d: Trained rank scale, shape (r,); None for ones.
        b: Trained output scale, shape (m,); None for ones.
        scale: Factor s of the basis.
        weight: Frozen W, shape (m, n), in the dtype of the products; None leaves W x out.
        bias: Bias of the layer, shape (m,).
        plan: Order of the products, one of `plans`. "auto" takes the cheapest that the precision
            allows; block matrices have plans of their own (`block_linear`).
        layer_id: Number of the calling layer; layers with the same input share A x (`projection`).

    Returns:
        The output, shape (*T, m). Gradients flow to x, d, b and bias.

    Raises:
        ShapeError: names the argument, what was found and what was wanted.
        UnsupportedError: `weight` requires a gradient.

    Source: VeRA (arXiv 2310.11454), equation 2.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> vera_linear(torch.ones(2, 3, 8), A, B, torch.ones(4), torch.ones(6)).shape
    torch.Size([2, 3, 6])
    """
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():  # type: ignore[attr-defined]
        check_adapter(A, B, d, b)
        check_input(x, A)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "weight asks for a gradient, but vera_linear takes W as frozen; "
            "add the layer's own output instead"
        )
    x = x.to(A.dtype)
    blocks = isinstance(A, RowBlocks) and isinstance(B, ColumnBlocks)
    if not blocks or plan == "dense" or (weight is None and plan in ("projected", "merged")):
        A, B = dense(A), dense(B)
    choice = plan_of(
        x,
        A,
        B,
        (d, b),
        plan,
        in_weight=weight is not None and is_full_precision(weight.dtype),
        own_weight=weight is not None,
        grid_rows=A.values.shape[0] if isinstance(A, RowBlocks) else 0,
    )
    if isinstance(A, RowBlocks) and isinstance(B, ColumnBlocks):
        train = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (d, b))
        y, _ = BlockLinear.apply(x, weight, bias, A, B, d, b, scale, choice.plan, train, layer_id)
        return y
    A, B = dense(A), dense(B)
    if choice.plan == "factored" and choice.keep:
        return _step_by_step(x, weight, bias, A, B, d, b, scale)
    return _VeraLinear.apply(
        x, weight, bias, A, B, d, b, scale, choice.plan, choice.keep, layer_id
    )[0]


def plan_of(
    x: Tensor,
    A: Matrix,
    B: Matrix,
    vectors: tuple[Tensor | None, Tensor | None],
    plan: str,
    *,
    in_weight: bool,
    own_weight: bool,
    T: int | None = None,
    grid_rows: int = 0,
) -> PlanChoice:
    """Choose the order of `vera_linear`'s products for this x, with its memory policy.

    Args:
        x: Activations, shape (*T, n).
        A: Frozen down-projection, shape (r, n).
        B: Frozen up-projection, shape (m, r).
        vectors: d and b.
        plan: "auto", or the plan to take.
        in_weight: Whether ΔW may be added to W.
        own_weight: Whether W x is computed by the same call.
        T: Output positions, where they are not the rows of x (a convolution's).
        grid_rows: q of block matrices that are multiplied as such; 0 for dense ones.

    Returns:
        The plan and whether its intermediate is kept for the backward pass.
    """
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined]
        return PlanChoice("factored", True)  # sizes are tensors there; steps that it can record
    grad = torch.is_grad_enabled()
    call = Call(
        T=x.numel() // x.shape[-1] if T is None else T,
        m=B.shape[0],
        n=A.shape[1],
        r=A.shape[0],
        size=A.dtype.itemsize,
        grad_x=grad and x.requires_grad,
        grad_vectors=grad and any(v is not None and v.requires_grad for v in vectors),
        in_weight=in_weight,
        own_weight=own_weight,
        grid_rows=grid_rows,
    )
    return PLANNER.choose(call, x.device) if plan == "auto" else with_memory_policy(call, plan)


def _step_by_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor | None,
    b: Tensor | None,
    scale: float,
) -> Tensor:
    """Equation 2 with each step known to autograd: the least work where T is small."""
    outer = F.linear(F.linear(x, A) * rank_scale(d, scale, A.dtype), B)
    update = outer if b is None else outer * b.to(outer.dtype)
    return update if weight is None else F.linear(x, weight, bias) + update


class _VeraLinear(Function):
    """Every plan of `plans`, forward and backward.

    The second output is A x (nothing for the plans that keep x). Callers drop it; it is an output
    so that a second backward pass can reach x through it, without x being kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor | None,
        b: Tensor | None,
        scale: float,
        plan: str,
        keep: bool,
        layer_id: int | None,
    ) -> tuple[Tensor, ...]:
        inner = merged = None
        if plan in ("factored", "projected"):
            # Detached: the projection may be shared, and autograd marks the outputs as this call's.
            inner = project(x, A, layer_id).detach()
        if plan == "factored":
            assert inner is not None
            y = _add_product(
                F.linear(x, weight, bias) if weight is not None else None,
                inner,
                scaled_up_projection(B, d, b, scale).t(),
            )
        else:
            merged = add_delta(weight if plan != "dense" else None, A, B, d, b, scale)
            if plan == "dense" and weight is not None:
                y = _add_product(F.linear(x, weight, bias), x, merged.t())
            else:
                y = F.linear(x, merged, bias)
        ctx.save_for_backward(
            x if inner is None else inner, merged if keep else None, weight, A, B, d, b
        )
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.plan = scale, plan
        # No None among the outputs: torch.compile takes each one's gradient for a tensor.
        return (own_memory(y),) if inner is None else (own_memory(y), inner)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_inner: Tensor | None = None
    ) -> tuple[Any, ...]:
        if grad is None or grad_inner is not None or _differentiates_twice():
            return _differentiable_backward(ctx, grad, grad_inner)
        seen, merged, weight, A, B, d, b = ctx.saved_tensors
        scale, plan = ctx.scale, ctx.plan
        need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        seen = seen.reshape(-1, seen.shape[-1])
        grad_x = grad_d = grad_b = None
        if plan == "factored":
            if need_x:
                grad_x = grad.matmul(weight) if weight is not None else None
                grad_x = _add_product(grad_x, grad.matmul(scaled_up_projection(B, d, b, scale)), A)
            if need_d or need_b:
                grad_d, grad_b = vector_grads(flat.t() @ seen, B, d, b, scale)
        else:
            if need_x:
                if merged is None:
                    merged = add_delta(weight if plan != "dense" else None, A, B, d, b, scale)
                grad_x = grad.matmul(merged)
                if plan == "dense" and weight is not None:
                    grad_x = _add_product(grad_x, grad, weight)
            if need_d or need_b:
                product = flat.t() @ seen
                if plan != "projected":
                    product = product @ A.t()
                grad_d, grad_b = vector_grads(product, B, d, b, scale)
        grad_bias = flat.sum(0) if need_bias else None
        grad_d, grad_b = grad_d if need_d else None, grad_b if need_b else None
        return grad_x, None, grad_bias, None, None, grad_d, grad_b, None, None, None, None


def _differentiates_twice() -> bool:
    """Whether the backward pass itself is recorded (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiable_backward(
    ctx: Any, grad: Tensor | None, grad_inner: Tensor | None
) -> tuple[Any, ...]:
    """The same gradients in steps that autograd knows, and those of A x; any plan."""
    seen, _, weight, A, B, d, b = ctx.saved_tensors
    need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
    grad_x = grad_bias = grad_d = grad_b = None
    if need_x and grad_inner is not None:
        grad_x = grad_inner.matmul(A)
    if grad is not None:
        flat = grad.reshape(-1, grad.shape[-1])
        if need_x:
            factor = rank_scale(d, ctx.scale, B.dtype)
            outer = grad if b is None else grad * b.to(grad.dtype)
            through = (outer.matmul(B) * factor).matmul(A)
            grad_x = through if grad_x is None else grad_x + through
            grad_x = grad_x if weight is None else grad_x + grad.matmul(weight)
        if need_d or need_b:
            inner = seen if ctx.plan in ("factored", "projected") else F.linear(seen, A)
            product = flat.t() @ inner.reshape(-1, inner.shape[-1])
            grad_d, grad_b = vector_grads(product, B, d, b, ctx.scale)
        grad_bias = flat.sum(0) if need_bias else None
    grad_d, grad_b = grad_d if need_d else None, grad_b if need_b else None
    return grad_x, None, grad_bias, None, None, grad_d, grad_b, None, None, None, None


def _add_product(y: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """y + left @ right, in y's memory; left: (*T, k), right: (k, columns)."""
    if y is None:
        return left.matmul(right)
    flat = y.view(-1, y.shape[-1])
    torch.addmm(flat, left.reshape(-1, left.shape[-1]), right, out=flat)
    return y
