import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veratune.errors import ShapeError
from veratune.functional import delta_weight, vera_linear, vera_rows

sizes = st.integers(1, 24)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def draw(m, n, r, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    A, B = (torch.rand(r, n, dtype=torch.float64) - 0.5), (torch.rand(m, r, dtype=torch.float64) - 0.5)
    return A.to(dtype), B.to(dtype), torch.randn(r, dtype=torch.float64), torch.randn(m, dtype=torch.float64)


def reference(x, A, B, d, b, scale):
    """Equation 2, value by value in float64."""
    out = torch.zeros(*x.shape[:-1], B.shape[0], dtype=torch.float64)
    for i in range(B.shape[0]):
        row = sum(B[i, k].double() * d[k].double() * A[k].double() for k in range(A.shape[0]))
        out[..., i] = scale * b[i].double() * (x.double() @ row)
    return out


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from(list(TOLERANCE)), st.sampled_from([(), (3,), (2, 5)]))
def test_vera_linear_is_equation_2(m, n, r, dtype, batch):
    A, B, d, b = draw(m, n, r, dtype)
    x = torch.randn(*batch, n).to(dtype)
    y = vera_linear(x, A, B, d.to(dtype), b.to(dtype), 0.7)
    wanted = reference(x, A, B, d, b, 0.7)
    assert y.dtype == dtype
    assert y.shape == (*batch, m)
    assert (y.double() - wanted).norm() <= TOLERANCE[dtype] * (wanted.norm() + 1)


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from(["both", "d", "b"]))
def test_the_factored_and_the_merged_form_agree(m, n, r, vectors):
    A, B, d, b = draw(m, n, r)
    d, b = (d if vectors != "b" else None), (b if vectors != "d" else None)
    x = torch.randn(4, n, dtype=torch.float64)
    delta = delta_weight(A, B, d, b, 1.3)
    torch.testing.assert_close(vera_linear(x, A, B, d, b, 1.3), x @ delta.T)
    assert torch.linalg.matrix_rank(delta) <= r


def test_b_of_zero_is_the_identity():
    A, B, d, _ = draw(6, 8, 4)
    assert not vera_linear(torch.randn(3, 8, dtype=torch.float64), A, B, d, torch.zeros(6)).any()


def test_gradients():
    A, B, d, b = draw(5, 7, 3)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    d.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d, b: vera_linear(x, A, B, d, b, 0.5), (x, d, b))
    assert torch.autograd.gradcheck(lambda d, b: delta_weight(A, B, d, b, 0.5), (d, b))
    D, V = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 5, dtype=torch.float64, requires_grad=True),
    )
    index = torch.tensor([1, 0, 1])
    rows = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, D, V: vera_rows(x, A, B, D, V, index, 0.5), (rows, D, V))


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, sizes, st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from([(), (3,), (2, 2)]))
def test_each_row_speaks_with_its_own_vectors(m, n, r, index, middle):
    A, B, _, _ = draw(m, n, r)
    d, b = torch.randn(4, r, dtype=torch.float64), torch.randn(4, m, dtype=torch.float64)
    x = torch.randn(len(index), *middle, n, dtype=torch.float64)
    y = vera_rows(x, A, B, d, b, torch.tensor(index), 0.9)
    for i, k in enumerate(index):
        torch.testing.assert_close(y[i], vera_linear(x[i], A, B, d[k], b[k], 0.9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": torch.ones(5)}, "d has shape (5,); A is (r, n) = (4, 8), so (4,) is wanted"),
        ({"b": torch.ones(4)}, "b has shape (4,); B is (m, r) = (6, 4), so (6,) is wanted"),
        ({"B": torch.ones(6, 3)}, "A (4, 8) and B (6, 3) do not fit; A is (r, n) and B is (m, r)"),
        ({"x": torch.ones(2, 7)}, "x has shape (2, 7); A is (r, n) = (4, 8), so (..., 8) is wanted"),
    ],
)
def test_shapes_are_checked(change, message):
    given = {"x": torch.ones(2, 8), "A": torch.ones(4, 8), "B": torch.ones(6, 4), "d": torch.ones(4), "b": torch.ones(6)}
    with pytest.raises(ShapeError) as caught:
        vera_linear(**(given | change))
    assert str(caught.value) == message


def test_rows_check_their_index():
    A, B, d, b = draw(6, 8, 4)
    with pytest.raises(ShapeError, match=r"index has shape \(3,\); x has 2 rows, so \(2,\) is wanted"):
        vera_rows(torch.ones(2, 8, dtype=torch.float64), A, B, d[None], b[None], torch.zeros(3, dtype=torch.long))
