import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veratune.basis.basis import MonarchBasis
from veratune.ops.matrix import dense, grid_rows, matmul, rmatmul

sizes = st.integers(1, 40)
CPU = torch.device("cpu")


def pair(m, n, r, seed=0):
    return MonarchBasis(seed, "kaiming_uniform", "shared").pair(
        "layer", m, n, r, CPU, torch.float64
    )


@given(sizes, sizes, sizes)
def test_products_are_those_of_the_dense_matrix(m, n, r):
    for matrix in pair(m, n, r):
        full = dense(matrix)
        rows, columns = matrix.shape
        assert full.shape == (rows, columns)
        x, y = (
            torch.randn(2, 3, columns, dtype=torch.float64),
            torch.randn(5, rows, dtype=torch.float64),
        )
        torch.testing.assert_close(matmul(matrix, x), x @ full.T)
        torch.testing.assert_close(rmatmul(matrix, y), y @ full)
        torch.testing.assert_close(matmul(matrix, x[0, 0]), full @ x[0, 0])


@given(sizes, sizes)
def test_inner_values_as_rows(n, r):
    A, _ = pair(3, n, r)
    x = torch.randn(2, 5, n, dtype=torch.float64)
    torch.testing.assert_close(A.matmul_columns(x)[:r], dense(A) @ x.view(10, n).T)


@given(sizes, sizes, sizes)
def test_every_output_depends_on_every_input_and_every_d_counts(m, n, r):
    A, B = map(dense, pair(m, n, r))
    q = grid_rows(r, n)
    k = math.ceil(r / q)
    if r == q * k:
        assert ((B != 0).double() @ (A != 0).double() > 0).all()
    assert (A != 0).any(1).sum() == min(r, k * math.ceil(n / math.ceil(n / q)))
    assert (B != 0).any(0).sum() == r if m >= k else True


@pytest.mark.parametrize(
    ("m", "n", "r"), [(768, 768, 768), (768, 768, 1024), (3072, 768, 256), (192, 576, 576)]
)
def test_delta_has_the_size_that_it_has_with_full_matrices(m, n, r):
    basis = MonarchBasis(0, "kaiming_uniform", "shared")
    A, B = map(dense, basis.pair("layer", m, n, r, CPU, torch.float64))
    delta = basis.scale(r, n) * B @ A
    wanted = math.sqrt(
        2 / n * 2 / r * r * m * n
    )  # independent entries of A and B with Kaiming's variances
    assert delta.norm() == pytest.approx(wanted, rel=0.1)


def test_work_and_memory_are_a_root_of_the_dense_ones():
    for n in (384, 768, 1024, 2048):
        A, B = pair(n, n, n)
        assert A.values.numel() / (n * n) <= 1.5 / math.sqrt(n)
        assert B.values.numel() <= 2 * n
