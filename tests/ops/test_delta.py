import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.fakes import block_pair, draw, sizes
from veratune.ops.delta import delta_weight
from veratune.ops.linear import vera_linear


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from(["both", "d", "b"]))
def test_the_factored_and_the_merged_form_agree(m, n, r, vectors):
    A, B, d, b = draw(m, n, r)
    d, b = (d if vectors != "b" else None), (b if vectors != "d" else None)
    x = torch.randn(4, n, dtype=torch.float64)
    delta = delta_weight(A, B, d, b, 1.3)
    torch.testing.assert_close(vera_linear(x, A, B, d, b, 1.3), x @ delta.T)
    assert torch.linalg.matrix_rank(delta) <= r


def test_gradients_of_a_delta():
    A, B, d, b = draw(5, 7, 3)
    d.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, b: delta_weight(A, B, d, b, 0.5), (d, b))
    assert torch.autograd.gradgradcheck(lambda d, b: delta_weight(A, B, d, b, 0.5), (d, b))


def test_gradients_of_a_delta_of_blocks():
    A, B = block_pair(5, 7, 4)
    d, b = (torch.randn(k, dtype=torch.float64, requires_grad=True) for k in (4, 5))
    assert torch.autograd.gradcheck(lambda d, b: delta_weight(A, B, d, b, 0.5), (d, b))
