"""Small random matrices, vectors and layers for the tests of the mathematics."""

import torch
from hypothesis import strategies as st

from veratune.basis.basis import MonarchBasis

sizes = st.integers(1, 24)
PLANS = ["factored", "projected", "merged", "dense"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def draw(m, n, r, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    A, B = (
        (torch.rand(r, n, dtype=torch.float64) - 0.5),
        (torch.rand(m, r, dtype=torch.float64) - 0.5),
    )
    return (
        A.to(dtype),
        B.to(dtype),
        torch.randn(r, dtype=torch.float64),
        torch.randn(m, dtype=torch.float64),
    )


def reference(x, A, B, d, b, scale):
    """Equation 2, value by value in float64."""
    out = torch.zeros(*x.shape[:-1], B.shape[0], dtype=torch.float64)
    for i in range(B.shape[0]):
        row = sum(B[i, k].double() * d[k].double() * A[k].double() for k in range(A.shape[0]))
        out[..., i] = scale * b[i].double() * (x.double() @ row)
    return out


def layer(m, n, r, dtype=torch.float64):
    A, B, d, b = draw(m, n, r, dtype)
    W, bias = (
        torch.randn(m, n, dtype=torch.float64).to(dtype),
        torch.randn(m, dtype=torch.float64).to(dtype),
    )
    return A, B, d.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), W, bias


def block_pair(m, n, r, dtype=torch.float64):
    """(A, B) of small blocks."""
    basis = MonarchBasis(0, "kaiming_uniform", "shared")
    return basis.pair("", m, n, r, torch.device("cpu"), dtype)
