"""The mathematics of VeRA on tensors, and nothing else.

Throughout: T is any number of leading dimensions, n = in_features, m = out_features, r = rank. A (r, n)
and B (m, r) are frozen, full or made of blocks; d (r,) and b (m,) are trained, and None stands for a vector of ones. `scale`
is the basis' factor s. Products run in the dtype of x (of autocast, where it is on).

The orders in which the products can be taken are in `plans`. Most gradients are written out here, since autograd's own
would keep a result of every step; those can be taken once, not twice.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from veratune.errors import ShapeError, UnsupportedError
from veratune.ops.matrix import BlockMatrix, Matrix, RowBlocks, dense, matmul, rmatmul
from veratune.ops.plans import Call, PlanChoice, choose_plan, with_memory_policy
from veratune.ops.projection import project


def delta_weight(
    A: Matrix, B: Matrix, d: Tensor | None, b: Tensor | None, scale: float = 1.0
) -> Tensor:
    """ΔW = scale * diag(b) B diag(d) A

    Returns (m, n) in A's dtype; its rank is at most r. Gradients flow to d and b.
    Raises ShapeError naming the argument, what was found and what was wanted.
    Source: VeRA, arXiv 2310.11454, equation 2.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> delta_weight(A, B, torch.ones(4), torch.ones(6)).shape
    torch.Size([6, 8])
    """
    _check(A, B, d, b)
    left = dense(B).to(A.dtype)
    with torch.autocast(left.device.type, enabled=False):
        return _DeltaWeight.apply(A, left, d, b, scale)


def vera_linear(
    x: Tensor,
    A: Matrix,
    B: Matrix,
    d: Tensor | None,
    b: Tensor | None,
    scale: float = 1.0,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    plan: str = "auto",
    layer_id: int | None = None,
) -> Tensor:
    """Y = scale * b * (B (d * (A x))), and W x + bias before it where a weight is given

    x: (*T, n) activations; weight: W (m, n), frozen, in the dtype of the products, and bias: (m,).
    plan: the order of the products, one of `plans`; "auto" takes the cheapest that the precision allows. A and B of
    blocks are always cheapest one after the other.
    layer_id: the number of a layer that may share A x with others that read the same x (see `projection`).
    Returns (*T, m). Gradients flow to x, d, b and bias.
    Raises ShapeError naming the argument, what was found and what was wanted.
    Source: VeRA, arXiv 2310.11454, equation 2.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> vera_linear(torch.ones(2, 3, 8), A, B, torch.ones(4), torch.ones(6)).shape
    torch.Size([2, 3, 6])
    """
    _check(A, B, d, b)
    _check_x(x, A)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "weight asks for a gradient, but vera_linear takes W as frozen; add the layer's own output instead"
        )
    x = x.to(A.dtype)
    if isinstance(A, RowBlocks) and isinstance(B, BlockMatrix) and plan in ("auto", "factored"):
        return _VeraBlocks.apply(x, weight, bias, A, B, d, b, scale)
    A, B = dense(A), dense(B)
    choice = plan_of(
        x,
        A,
        B,
        (d, b),
        plan,
        in_weight=weight is not None and is_full_precision(weight.dtype),
        own_weight=weight is not None,
    )
    if choice.plan == "factored" and choice.keep:
        return _step_by_step(x, weight, bias, A, B, d, b, scale)
    return _VeraLinear.apply(x, weight, bias, A, B, d, b, scale, choice.plan, choice.keep, layer_id)


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
) -> PlanChoice:
    """The order in which `vera_linear` takes its products for this x, with its memory policy.

    T: places of the output, where they are not the rows of x (a convolution's).
    """
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
    )
    return choose_plan(call, x.device) if plan == "auto" else with_memory_policy(call, plan)


def is_full_precision(dtype: torch.dtype) -> bool:
    """Whether W + ΔW in this dtype keeps a small ΔW; 16 bits round it away."""
    return dtype in (torch.float32, torch.float64)


def vera_rows(
    x: Tensor,
    A: Matrix,
    B: Matrix,
    d: Tensor | None,
    b: Tensor | None,
    index: Tensor | None,
    scale: float = 1.0,
    *,
    projected: Tensor | None = None,
) -> Tensor:
    """y[i] = scale * b[index[i]] * (B (d[index[i]] * (A x[i])))

    x: (N, *T, n), a batch of N rows; d: (k, r) and b: (k, m), the vectors of k adapters on one basis;
    index: (N,) integers in [0, k), or None where d and b are those of the rows already, (N, r) and (N, m);
    projected: A x, where it is known already. Returns (N, *T, m). Gradients flow to x, d and b.
    Raises ShapeError naming the argument, what was found and what was wanted.

    >>> A, B = torch.ones(4, 8), torch.ones(6, 4)
    >>> vera_rows(torch.ones(2, 8), A, B, torch.ones(3, 4), torch.ones(3, 6), torch.tensor([2, 0])).shape
    torch.Size([2, 6])
    """
    _check(A, B, None if d is None else d[0], None if b is None else b[0])
    _check_x(x, A)
    if index is not None and index.shape != x.shape[:1]:
        raise ShapeError(
            f"index has shape {tuple(index.shape)}; x has {x.shape[0]} rows, so ({x.shape[0]},) is wanted"
        )
    middle = (1,) * (x.dim() - 2)

    def spread(vectors: Tensor) -> Tensor:
        own = vectors if index is None else vectors.index_select(0, index)
        return own.view(x.shape[0], *middle, vectors.shape[1])

    z = matmul(A, x) if projected is None else projected
    z = z * scale if d is None else z * _scaled(spread(d), scale, z.dtype)
    y = matmul(B, z)
    return y if b is None else y * spread(b).to(y.dtype)


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
    """Equation 2 as it stands, each step known to autograd: the least to do where T is small."""
    outer = F.linear(F.linear(x, A) * _scaled(d, scale, A.dtype), B)
    share = outer if b is None else outer * b.to(outer.dtype)
    return share if weight is None else F.linear(x, weight, bias) + share


def vera_conv(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    d: Tensor | None,
    b: Tensor | None,
    scale: float = 1.0,
    *,
    convolve: Callable[[Tensor, Tensor], Tensor],
    kernel: tuple[int, ...],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Y = scale * b * (B (d * (A patch))) for each place of a convolution's output, with the patch of x that it sees

    x: (N, in, *places); A: (r, in / groups * kernel), B: (out, r); convolve(x, weight): the layer's own convolution, without
    bias, which takes A as its weight; B follows as one of kernel 1. kernel: its size in each dimension. Each group of
    outputs has its own rows of B and its own part of x, and all have A.
    Returns (N, out, *places'). Gradients flow to x, d and b.
    Raises ShapeError naming the argument, what was found and what was wanted.
    Source: VeRA, arXiv 2310.11454, equation 2, with a convolution as the matrix (out, in / groups * kernel).

    >>> A, B = torch.ones(4, 3 * 9), torch.ones(6, 4)
    >>> convolve = torch.nn.functional.conv2d
    >>> vera_conv(torch.ones(2, 3, 5, 5), A, B, torch.ones(4), torch.ones(6), convolve=convolve, kernel=(3, 3)).shape
    torch.Size([2, 6, 3, 3])
    """
    _check(A, B, d, b)
    if A.shape[1] % math.prod(kernel):
        raise ShapeError(
            f"A {tuple(A.shape)} does not fit; A is (r, in / groups * {math.prod(kernel)}) for the kernel {kernel}"
        )
    factor = _scaled(d, scale, A.dtype)
    first = (A * factor if d is None else A * factor[:, None]).view(A.shape[0], -1, *kernel)
    if transposed:
        first = first.transpose(0, 1)
    z = convolve(x, torch.cat([first] * groups))
    last = B if b is None else B * b.to(B.dtype)[:, None]
    return _CONV[len(kernel) - 1](z, last.view(*B.shape, *(1 for _ in kernel)), groups=groups)


_CONV = (F.conv1d, F.conv2d, F.conv3d)


class _VeraLinear(Function):
    """Every plan of `plans`, forward and backward."""

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
    ) -> Tensor:
        kept: list[Tensor | None]
        if plan == "factored":
            inner = project(x, A, layer_id)
            y = _add_product(
                F.linear(x, weight, bias) if weight is not None else None,
                inner,
                _trained(B, d, b, scale).t(),
            )
            kept = [inner, None]
        else:
            inside = _with_delta(weight if plan != "dense" else None, A, B, d, b, scale)
            if plan == "dense" and weight is not None:
                y = _add_product(F.linear(x, weight, bias), x, inside.t())
            else:
                y = F.linear(x, inside, bias)
            kept = [project(x, A, layer_id) if plan == "projected" else x, inside if keep else None]
        ctx.save_for_backward(*kept, weight, A, B, d, b)
        ctx.scale, ctx.plan = scale, plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        seen, kept, weight, A, B, d, b = ctx.saved_tensors
        scale, plan = ctx.scale, ctx.plan
        need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        seen = seen.reshape(-1, seen.shape[-1])
        grad_x = grad_d = grad_b = None
        if plan == "factored":
            if need_x:
                grad_x = grad.matmul(weight) if weight is not None else None
                grad_x = _add_product(grad_x, grad.matmul(_trained(B, d, b, scale)), A)
            if need_d or need_b:
                grad_d, grad_b = _from_product(flat.t() @ seen, B, d, b, scale)
        else:
            if need_x:
                inside = (
                    kept
                    if kept is not None
                    else _with_delta(weight if plan != "dense" else None, A, B, d, b, scale)
                )
                grad_x = grad.matmul(inside)
                if plan == "dense" and weight is not None:
                    grad_x = _add_product(grad_x, grad, weight)
            if need_d or need_b:
                product = flat.t() @ seen
                grad_d, grad_b = _from_product(
                    product if plan == "projected" else product @ A.t(), B, d, b, scale
                )
        vectors = (grad_d if need_d else None, grad_b if need_b else None)
        return (
            grad_x,
            None,
            flat.sum(0) if need_bias else None,
            None,
            None,
            *vectors,
            None,
            None,
            None,
            None,
        )


class _VeraBlocks(Function):
    """A and B made of blocks. Their products take little more time than new memory for the results, so they are taken for
    some rows at a time, nothing but x is kept, and they are taken again in the backward.
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
        first = A if d is None else A.scaled(_scaled(d, scale, A.dtype))
        outer_scale = scale if d is None else 1.0
        y = x.new_zeros(*x.shape[:-1], B.shape[0]) if weight is None else F.linear(x, weight, bias)
        last = torch.ones((), dtype=x.dtype, device=x.device) if b is None else b.to(x.dtype)
        for own_y, own_x in _some_rows(y, x):
            own_y.addcmul_(B.matmul(first.matmul(own_x)), last, value=outer_scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, d, b = ctx.saved_tensors
        A, B, scale = ctx.A, ctx.B, ctx.scale
        need_x, _, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        factor = _scaled(d, scale, A.dtype)
        first = A if d is None else A.scaled(factor)
        grad_x = grad.new_zeros(x.shape) if weight is None or not need_x else grad.matmul(weight)
        sums: list[list[Tensor]] = [[], []]
        for own_grad_x, own_x, own_grad in _some_rows(grad_x, x, grad):
            inner = A.matmul(own_x)
            if need_b:
                sums[1].append(_summed(B.matmul(inner * factor), own_grad, b))
            if need_x or need_d:
                middle = B.rmatmul(own_grad if b is None else own_grad * b.to(own_grad.dtype))
                if need_d:
                    sums[0].append(_summed(middle, inner, d))
                if need_x:
                    own_grad_x.add_(first.rmatmul(middle), alpha=scale if d is None else 1)
        grad_d, grad_b = (torch.stack(found).sum(0) if found else None for found in sums)
        vectors = (None if grad_d is None else grad_d.mul_(scale), grad_b)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return grad_x if need_x else None, None, grad_bias, None, None, *vectors, None


_ROWS = 2**20


def _some_rows(into: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time of each tensor (*T, columns); those of `into` are views, to be written to."""
    flat = [into.view(-1, into.shape[-1]), *(t.reshape(-1, t.shape[-1]) for t in tensors)]
    rows = (
        flat[0].shape[0]
        if torch.compiler.is_compiling()
        else _ROWS // max(t.shape[1] for t in flat)
    )
    return zip(*(t.split(max(1, rows)) for t in flat), strict=True)


class _DeltaWeight(Function):
    """ΔW, of which nothing but the vectors is kept."""

    @staticmethod
    def forward(
        ctx: Any, A: Matrix, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(B, d, b)
        ctx.A, ctx.scale = A, scale
        return _with_delta(None, A, B, d, b, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        B, d, b = ctx.saved_tensors
        grad_d, grad_b = _from_product(matmul(ctx.A, grad), B, d, b, ctx.scale)
        return (
            None,
            None,
            grad_d if ctx.needs_input_grad[2] else None,
            grad_b if ctx.needs_input_grad[3] else None,
            None,
        )


def _trained(B: Tensor, d: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Scale * diag(b) B diag(d), in B's dtype."""
    out = B * _scaled(d, scale, B.dtype)
    return out if b is None else out.mul_(b.to(B.dtype)[:, None])


def _with_delta(
    weight: Tensor | None, A: Matrix, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    """W + ΔW, or ΔW alone; laid out in memory as W is."""
    left = _trained(B, d, b, scale)
    if weight is None:
        return rmatmul(A, left)
    A = dense(A)
    if weight.stride(0) == 1 and weight.stride(1) != 1:
        return torch.addmm(weight.t(), A.t(), left.t()).t()
    return torch.addmm(weight, left, A)


def _add_product(y: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Y + left @ right, in y's memory; left: (*T, k), right: (k, columns)."""
    if y is None:
        return left.matmul(right)
    flat = y.view(-1, y.shape[-1])
    torch.addmm(flat, left.reshape(-1, left.shape[-1]), right, out=flat)
    return y


def _from_product(
    P: Tensor, B: Tensor, d: Tensor | None, b: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """(grad d, grad b) = scale * (bᵀ (B ∘ P), (B ∘ P) d)"""
    wide = next(torch.promote_types(P.dtype, v.dtype) for v in (d, b) if v is not None)
    Q = P.to(wide) * B.to(wide)
    grad_d = (
        None if d is None else (Q.sum(0) if b is None else b.to(wide) @ Q).mul_(scale).to(d.dtype)
    )
    grad_b = (
        None if b is None else (Q.sum(1) if d is None else Q @ d.to(wide)).mul_(scale).to(b.dtype)
    )
    return grad_d, grad_b


def _summed(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
    """The sum of left * right over rows, in the precision of the vector that it is the gradient of."""
    wide = torch.promote_types(left.dtype, vector.dtype)
    terms = left.reshape(-1, left.shape[-1]) * right.reshape(-1, right.shape[-1])
    return terms.sum(0, dtype=wide).to(vector.dtype)


def _scaled(d: Tensor | None, scale: float, dtype: torch.dtype) -> Any:
    """Scale * d in `dtype`: the scale goes to the small vector, at the higher precision of the two, rounded once."""
    if d is None:
        return scale
    return (
        d * scale
        if d.dtype == dtype
        else (d.to(torch.promote_types(d.dtype, dtype)) * scale).to(dtype)
    )


def _check(A: Matrix, B: Matrix, d: Tensor | None, b: Tensor | None) -> None:
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        raise ShapeError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit; A is (r, n) and B is (m, r)"
        )
    if d is not None and d.shape != A.shape[:1]:
        raise ShapeError(
            f"d has shape {tuple(d.shape)}; A is (r, n) = {tuple(A.shape)}, so ({A.shape[0]},) is wanted"
        )
    if b is not None and b.shape != B.shape[:1]:
        raise ShapeError(
            f"b has shape {tuple(b.shape)}; B is (m, r) = {tuple(B.shape)}, so ({B.shape[0]},) is wanted"
        )


def _check_x(x: Tensor, A: Matrix) -> None:
    if x.dim() < 1 or x.shape[-1] != A.shape[1]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; A is (r, n) = {tuple(A.shape)}, so (..., {A.shape[1]}) is wanted"
        )
