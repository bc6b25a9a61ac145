import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.fakes import draw, sizes
from veratune.errors import ShapeError
from veratune.ops.linear import vera_linear
from veratune.ops.rows import vera_rows


@settings(max_examples=30, deadline=None)
@given(
    sizes,
    sizes,
    sizes,
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.sampled_from([(), (3,), (2, 2)]),
)
def test_each_row_speaks_with_its_own_vectors(m, n, r, index, middle):
    A, B, _, _ = draw(m, n, r)
    d, b = torch.randn(4, r, dtype=torch.float64), torch.randn(4, m, dtype=torch.float64)
    x = torch.randn(len(index), *middle, n, dtype=torch.float64)
    y = vera_rows(x, A, B, d, b, torch.tensor(index), 0.9)
    for i, k in enumerate(index):
        torch.testing.assert_close(y[i], vera_linear(x[i], A, B, d[k], b[k], 0.9))


def test_rows_check_their_index():
    A, B, d, b = draw(6, 8, 4)
    with pytest.raises(
        ShapeError, match=r"index has shape \(3,\); x has 2 rows, so \(2,\) is wanted"
    ):
        vera_rows(
            torch.ones(2, 8, dtype=torch.float64),
            A,
            B,
            d[None],
            b[None],
            torch.zeros(3, dtype=torch.long),
        )


def test_gradients_of_rows():
    A, B, _, _ = draw(5, 7, 3)
    D = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    V = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 0, 1])
    rows = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, D, V: vera_rows(x, A, B, D, V, index, 0.5), (rows, D, V)
    )
