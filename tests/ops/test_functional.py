import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veratune.basis.basis import MonarchBasis
from veratune.errors import ShapeError, UnsupportedError
from veratune.ops import functional
from veratune.ops.functional import delta_weight, is_full_precision, plan_of, vera_linear, vera_rows
from veratune.ops.matrix import dense

sizes = st.integers(1, 24)
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
    assert torch.autograd.gradcheck(
        lambda x, D, V: vera_rows(x, A, B, D, V, index, 0.5), (rows, D, V)
    )


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": torch.ones(5)}, "d has shape (5,); A is (r, n) = (4, 8), so (4,) is wanted"),
        ({"b": torch.ones(4)}, "b has shape (4,); B is (m, r) = (6, 4), so (6,) is wanted"),
        ({"B": torch.ones(6, 3)}, "A (4, 8) and B (6, 3) do not fit; A is (r, n) and B is (m, r)"),
        (
            {"x": torch.ones(2, 7)},
            "x has shape (2, 7); A is (r, n) = (4, 8), so (..., 8) is wanted",
        ),
    ],
)
def test_shapes_are_checked(change, message):
    given = {
        "x": torch.ones(2, 8),
        "A": torch.ones(4, 8),
        "B": torch.ones(6, 4),
        "d": torch.ones(4),
        "b": torch.ones(6),
    }
    with pytest.raises(ShapeError) as caught:
        vera_linear(**(given | change))
    assert str(caught.value) == message


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


PLANS = ["factored", "projected", "merged", "dense"]


def layer(m, n, r, dtype=torch.float64):
    A, B, d, b = draw(m, n, r, dtype)
    W, bias = (
        torch.randn(m, n, dtype=torch.float64).to(dtype),
        torch.randn(m, dtype=torch.float64).to(dtype),
    )
    return A, B, d.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), W, bias


@settings(max_examples=60)
@given(
    sizes, sizes, sizes, st.integers(0, 40), st.sampled_from([torch.float64, torch.float32]), st.sampled_from([*PLANS, "auto"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_plan_is_equation_2_and_has_its_gradients(
    m, n, r, T, dtype, plan, transposed, input_wants
):
    A, B, d, b, W, bias = layer(m, n, r, dtype)
    W = W.T.contiguous().T if transposed else W
    x = torch.randn(T, n, dtype=dtype).requires_grad_(input_wants)
    y = vera_linear(x, A, B, d, b, 0.7, weight=W, bias=bias, plan=plan)
    G = torch.randn_like(y)
    y.backward(G)

    xs, ds, bs = (t.detach().double().requires_grad_() for t in (x, d, b))
    wanted = (
        xs @ W.double().T + bias.double() + 0.7 * bs * ((ds * (xs @ A.double().T)) @ B.double().T)
    )
    wanted.backward(G.double())
    tolerance = TOLERANCE[dtype]
    assert (y.double() - wanted).norm() <= tolerance * (wanted.norm() + 1)
    for found, exact in (
        (x.grad if input_wants else xs.grad, xs.grad),
        (d.grad, ds.grad),
        (b.grad, bs.grad),
    ):
        assert (found.double() - exact).norm() <= 10 * tolerance * (exact.norm() + 1)


@settings(max_examples=30)
@given(
    st.sampled_from(PLANS),
    st.sampled_from(["both", "d", "b"]),
    st.booleans(),
    st.sampled_from([(3,), (2, 3)]),
)
def test_gradients_of_every_plan(plan, vectors, own, batch):
    A, B, d, b, W, bias = layer(5, 7, 3)
    d, b = (d if vectors != "b" else None), (b if vectors != "d" else None)
    x = torch.randn(*batch, 7, dtype=torch.float64, requires_grad=True)
    options = {"weight": W, "bias": bias.requires_grad_()} if own else {}
    inputs = [t for t in (x, d, b, bias if own else None) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *_: vera_linear(x, A, B, d, b, 0.5, plan=plan, **options), inputs
    )


@settings(max_examples=15)
@given(sizes, sizes, sizes, st.sampled_from(["both", "d", "b"]), st.booleans())
def test_blocks_compute_what_their_dense_matrices_do(m, n, r, vectors, own):
    A, B = MonarchBasis(0, "kaiming_uniform", "shared").pair(
        "", m, n, r, torch.device("cpu"), torch.float64
    )
    _, _, d, b, W, bias = layer(m, n, r)
    d, b = (d if vectors != "b" else None), (b if vectors != "d" else None)
    x = torch.randn(4, n, dtype=torch.float64, requires_grad=True)
    options = {"weight": W, "bias": bias.requires_grad_()} if own else {}
    wanted = vera_linear(x, dense(A), dense(B), d, b, 1.3, **options)
    for plan in ["auto", *PLANS]:
        torch.testing.assert_close(vera_linear(x, A, B, d, b, 1.3, plan=plan, **options), wanted)
    torch.testing.assert_close(
        delta_weight(A, B, d, b, 1.3), delta_weight(dense(A), dense(B), d, b, 1.3)
    )
    inputs = [t for t in (x, d, b, bias if own else None) if t is not None]
    G = torch.randn_like(wanted)
    found = torch.autograd.grad(vera_linear(x, A, B, d, b, 1.3, **options), inputs, G)
    for a, e in zip(found, torch.autograd.grad(wanted, inputs, G), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("blocks", [False, True])
def test_inputs_and_gradients_of_any_layout(plan, blocks, monkeypatch):
    monkeypatch.setattr(functional, "_ROWS", 30)  # several rows at a time, and some left over
    A, B, d, b, W, bias = layer(5, 7, 3)
    if blocks:
        A, B = MonarchBasis(0, "kaiming_uniform", "shared").pair(
            "", 5, 7, 3, torch.device("cpu"), torch.float64
        )
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64).transpose(0, 2).requires_grad_()
    G = torch.randn(5, 5, 3, 2, dtype=torch.float64).permute(2, 1, 3, 0)
    y = vera_linear(x, A, B, d, b, weight=W, bias=bias, plan=plan)
    wanted = x @ (W + delta_weight(A, B, d, b)).T + bias
    torch.testing.assert_close(y, wanted)
    for a, e in zip(
        torch.autograd.grad(y, (x, d, b), G), torch.autograd.grad(wanted, (x, d, b), G), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_gradients_of_a_delta_of_blocks():
    A, B = MonarchBasis(0, "kaiming_uniform", "shared").pair(
        "", 5, 7, 4, torch.device("cpu"), torch.float64
    )
    d, b = (torch.randn(k, dtype=torch.float64, requires_grad=True) for k in (4, 5))
    assert torch.autograd.gradcheck(lambda d, b: delta_weight(A, B, d, b, 0.5), (d, b))


@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("blocks", [False, True])
def test_nothing_as_large_as_the_output_is_kept(plan, blocks):
    T, m, n, r = 512, 96, 16, 8
    A, B, d, b, W, bias = layer(m, n, r, torch.float32)
    if blocks:
        A, B = MonarchBasis(0, "kaiming_uniform", "shared").pair(
            "", m, n, r, torch.device("cpu"), torch.float32
        )
    x = torch.randn(T, n, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        vera_linear(x, A, B, d, b, weight=W, bias=bias, plan=plan)
    assert kept
    assert all(shape.numel() <= T * n for shape in kept)


@pytest.mark.parametrize("plan", [*PLANS, "blocks"])
def test_a_second_derivative_is_refused(plan):
    A, B, d, b, W, bias = layer(64, 8, 4)
    if plan == "blocks":
        A, B = MonarchBasis(0, "kaiming_uniform", "shared").pair(
            "", 64, 8, 4, torch.device("cpu"), torch.float64
        )
    x = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    y = vera_linear(x, A, B, d, b, weight=W, bias=bias, plan="auto" if plan == "blocks" else plan)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="differentiate twice a function .* @once_differentiable"
    ):
        grad.sum().backward()


def test_a_trained_weight_is_refused():
    A, B, d, b, W, _ = layer(4, 6, 2)
    with pytest.raises(
        UnsupportedError, match="weight asks for a gradient, but vera_linear takes W as frozen"
    ):
        vera_linear(torch.ones(2, 6, dtype=torch.float64), A, B, d, b, weight=W.requires_grad_())


def test_low_precision_never_puts_delta_into_the_weight():
    A, B, d, b, W, _ = layer(768, 768, 64, torch.bfloat16)
    assert (
        plan_of(
            torch.ones(4096, 768),
            A,
            B,
            (d, b),
            "auto",
            in_weight=is_full_precision(W.dtype),
            own_weight=True,
        ).plan
        == "factored"
    )
    assert (
        plan_of(torch.ones(4096, 768), A, B, (d, b), "auto", in_weight=True, own_weight=True).plan
        == "projected"
    )
