import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.fakes import PLANS, TOLERANCE, block_pair, draw, layer, reference, sizes
from veratune.errors import ShapeError, UnsupportedError
from veratune.ops import block_linear
from veratune.ops.delta import delta_weight, is_full_precision
from veratune.ops.linear import plan_of, vera_linear
from veratune.ops.matrix import dense


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


def test_b_of_zero_is_the_identity():
    A, B, d, _ = draw(6, 8, 4)
    assert not vera_linear(torch.randn(3, 8, dtype=torch.float64), A, B, d, torch.zeros(6)).any()


def test_gradients():
    A, B, d, b = draw(5, 7, 3)
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    d.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d, b: vera_linear(x, A, B, d, b, 0.5), (x, d, b))


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
    A, B = block_pair(m, n, r)
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
    expected = torch.autograd.grad(wanted, inputs, G)
    for plan in ["auto", *PLANS]:
        y = vera_linear(x, A, B, d, b, 1.3, plan=plan, **options)
        for a, e in zip(torch.autograd.grad(y, inputs, G), expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", ["factored", "projected", "merged"])
@pytest.mark.parametrize("vectors", ["both", "d", "b"])
@pytest.mark.parametrize(("m", "n", "r"), [(6, 4, 4), (5, 7, 3)])  # whole blocks, and cut ones
def test_gradients_of_blocks(plan, vectors, m, n, r):
    A, B = block_pair(m, n, r)
    _, _, d, b, W, bias = layer(m, n, r)
    d, b = (d if vectors != "b" else None), (b if vectors != "d" else None)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, d, b, bias.requires_grad_()) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *_: vera_linear(x, A, B, d, b, 0.5, plan=plan, weight=W, bias=bias), inputs
    )


@pytest.mark.parametrize("plan", ["factored", "projected", "merged"])
@pytest.mark.parametrize(("m", "n", "r"), [(96, 64, 64), (192, 576, 576), (130, 70, 100)])
def test_blocks_in_float32_equal_the_dense_reference(plan, m, n, r):
    A, B = block_pair(m, n, r, torch.float32)
    _, _, d, b, W, bias = layer(m, n, r, torch.float32)
    x = torch.randn(300, n, requires_grad=True)
    y = vera_linear(x, A, B, d, b, 0.1, plan=plan, weight=W, bias=bias)
    G = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in (x, d, b)]
    delta = 0.1 * (exact[2][:, None] * dense(B).double() * exact[1]) @ dense(A).double()
    wanted = exact[0] @ (W.double() + delta).T + bias.double()
    for found, expected in zip(
        (y, *torch.autograd.grad(y, (x, d, b), G)),
        (wanted, *torch.autograd.grad(wanted, exact, G.double())),
        strict=True,
    ):
        assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("T", [64, 2048])
@pytest.mark.parametrize(("m", "n", "r"), [(96, 96, 96), (48, 96, 128), (96, 256, 64)])
def test_blocks_keep_no_more_than_lora_does(T, m, n, r):
    A, B = block_pair(m, n, r, torch.float32)
    _, _, d, b, W, _ = layer(m, n, r, torch.float32)
    x, kept = torch.randn(T, n, requires_grad=True), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vera_linear(x, A, B, d, b, weight=W)
    assert sum(kept.values()) - 4 * (W.numel() + r + m) <= 4 * T * n  # LoRA keeps x, and T * 8


def test_layers_of_one_input_share_the_product_of_blocks():
    A, B = block_pair(8, 12, 12, torch.float32)
    _, _, d, b, W, _ = layer(8, 12, 12, torch.float32)
    x, kept = torch.randn(64, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for layer_id in (1, 2, 3):
            vera_linear(x, A, B, d, b, weight=W, plan="projected", layer_id=layer_id)
    products = [t.data_ptr() for t in kept if t.shape == (12, 64)]
    assert len(products) == 3
    assert len(set(products)) == 1


@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("blocks", [False, True])
def test_inputs_and_gradients_of_any_layout(plan, blocks, monkeypatch):
    monkeypatch.setattr(
        block_linear, "CHUNK_VALUES", 30
    )  # several rows at a time, and some left over
    A, B, d, b, W, bias = layer(5, 7, 3)
    if blocks:
        A, B = block_pair(5, 7, 3)
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64).transpose(0, 2).requires_grad_()
    G = torch.randn(5, 5, 3, 2, dtype=torch.float64).permute(2, 1, 3, 0)
    y = vera_linear(x, A, B, d, b, weight=W, bias=bias, plan=plan)
    wanted = x @ (W + delta_weight(A, B, d, b)).T + bias
    torch.testing.assert_close(y, wanted)
    for a, e in zip(
        torch.autograd.grad(y, (x, d, b), G), torch.autograd.grad(wanted, (x, d, b), G), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("blocks", [False, True])
def test_nothing_as_large_as_the_output_is_kept(plan, blocks):
    T, m, n, r = 512, 96, 16, 8
    A, B, d, b, W, bias = layer(m, n, r, torch.float32)
    if blocks:
        A, B = block_pair(m, n, r, torch.float32)
    x = torch.randn(T, n, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        vera_linear(x, A, B, d, b, weight=W, bias=bias, plan=plan)
    assert kept
    assert all(shape.numel() <= T * n for shape in kept)


@pytest.mark.parametrize("plan", [*PLANS, "auto", "blocks"])
@pytest.mark.parametrize("vectors", ["both", "d", "b"])
@pytest.mark.parametrize("own", [True, False])
def test_second_derivatives(plan, vectors, own):
    A, B, d, b, W, bias = layer(6, 4, 3)
    if plan == "blocks":
        A, B = block_pair(6, 4, 3)
    d, b = (d if vectors != "b" else None), (b if vectors != "d" else None)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    options = {"weight": W, "bias": bias.requires_grad_()} if own else {}
    inputs = [t for t in (x, d, b, bias if own else None) if t is not None]

    def run(*_):
        order = "auto" if plan == "blocks" else plan
        return vera_linear(x, A, B, d, b, 0.5, plan=order, layer_id=1, **options)

    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("plan", [*PLANS, "blocks"])
def test_a_gradient_penalty_trains_the_vectors(plan):
    """The incoming gradient needs no gradient itself, and the penalty depends on d and b all the same."""
    A, B, d, b, W, bias = layer(64, 8, 4)
    if plan == "blocks":
        A, B = block_pair(64, 8, 4)
    x = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    options = {"weight": W, "bias": bias}

    def penalty(y):
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (d, b))

    order = "auto" if plan == "blocks" else plan
    found = penalty(vera_linear(x, A, B, d, b, plan=order, **options))
    wanted = penalty(x @ (W + torch.diag(b) @ dense(B) @ torch.diag(d) @ dense(A)).T + bias)
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", [*PLANS, "blocks"])
def test_the_output_may_be_written_to_in_place(plan):
    A, B, d, b, W, bias = layer(6, 6, 4)
    if plan == "blocks":
        A, B = block_pair(6, 6, 4)
    order = "auto" if plan == "blocks" else plan
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def run(in_place):
        y = vera_linear(x, A, B, d, b, weight=W, bias=bias, plan=order)
        if in_place:
            y += x
            torch.relu_(y)
        else:
            y = torch.relu(y + x)
        return torch.autograd.grad(y.sum(), (x, d, b))

    for a, e in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, e)


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
