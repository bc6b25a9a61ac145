"""VeraLinear in four parts: the float64 reference, its merged form, the identity at the start, bad input."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import veratune as vt
from tests.fakes import scramble
from veratune.errors import ShapeError, UnsupportedError
from veratune.model_state import vectors_of
from veratune.ops.matrix import dense

sizes = st.integers(1, 20)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def build(kind, m, n, r, dtype=torch.float64, **settings):
    torch.manual_seed(1)
    layer = Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m, bias=kind == "linear")
    model = nn.Sequential(layer).to(dtype)
    vt.attach(model, vt.VeraConfig(rank=r, targets=["0"], **settings), "a")
    return model


def reference(model, x, scramble_to=None):
    """(W + ΔW) x in float64, straight from equation 2 and the layer's own vectors."""
    layer = model[0]
    weight = (layer.base.weight.T if isinstance(layer.base, Conv1D) else layer.base.weight).double()
    for v in vectors_of(model, "a"):
        m, n = v.part.out_features, v.part.in_features
        A, B = v.basis.pair(v.layer, m, n, v.rank, x.device, torch.float64)
        d = torch.ones(v.rank) if v.d is None else v.d
        b = torch.ones(m) if v.b is None else v.b
        delta = torch.diag(b.double()) @ B @ torch.diag(d.double()) @ A
        gains = {
            "kaiming_uniform": (6 / n) ** 0.5 * (6 / v.rank) ** 0.5,
            "kaiming_normal": 2 / (n * v.rank) ** 0.5,
            "uniform": 0.01,
        }
        weight = weight.clone()
        weight[v.part.start : v.part.stop] += gains[v.config.init] * delta
    bias = 0 if layer.base.bias is None else layer.base.bias.double()
    return x.double() @ weight.T + bias


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["linear", "bare", "conv1d"]), sizes, sizes, sizes, st.sampled_from(list(TOLERANCE)),
    st.sampled_from(["both", "d", "b"]), st.sampled_from(["kaiming_uniform", "kaiming_normal", "uniform"]),
)  # fmt: skip
def test_equals_the_float64_reference(kind, m, n, r, dtype, vectors, init):
    if kind == "conv1d" and dtype == torch.float16:
        dtype = torch.float32  # torch has no fp16 addmm for it on every CPU
    model = scramble(build(kind, m, n, r, dtype, vectors=vectors, init=init), "a")
    x = torch.randn(2, 3, n).to(dtype)
    y, wanted = model(x), reference(model, x)
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() <= TOLERANCE[dtype] * (wanted.norm() + 1)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["linear", "bare", "conv1d"]), sizes, sizes, sizes)
def test_equals_its_own_merged_form(kind, m, n, r):
    model = scramble(build(kind, m, n, r), "a")
    x = torch.randn(5, n, dtype=torch.float64)
    before = model[0].base.weight.clone()
    y = model(x)
    vt.merge(model)
    torch.testing.assert_close(model(x), y)
    vt.unmerge(model)
    assert torch.equal(model[0].base.weight, before)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["linear", "bare", "conv1d"]),
    sizes,
    sizes,
    sizes,
    st.sampled_from(["both", "d"]),
)
def test_is_the_identity_at_the_start(kind, m, n, r, vectors):
    model = build(kind, m, n, r, torch.float32, vectors=vectors)
    x = torch.randn(5, n)
    assert torch.equal(model(x), model[0].base(x))


def test_bad_input_is_refused_with_the_sizes():
    model = scramble(build("linear", 4, 6, 2, torch.float32), "a")
    model[0].base.forward = lambda x: torch.zeros(*x.shape[:-1], 4)
    with pytest.raises(ShapeError) as caught:
        model(torch.ones(2, 5))
    assert str(caught.value) == "x has shape (2, 5); A is (r, n) = (2, 6), so (..., 6) is wanted"


def test_gradients_reach_the_vectors_and_the_input_only():
    model = scramble(build("linear", 4, 6, 2), "a")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "0.vera.a.whole.d",
        "0.vera.a.whole.b",
    }
    assert x.grad is not None


def test_dropout_acts_in_training_on_the_adapter_alone():
    model = scramble(build("linear", 40, 60, 8, torch.float32, dropout=0.5), "a")
    x = torch.randn(3, 60)
    torch.testing.assert_close(model.eval()(x), reference(model, x).float(), rtol=1e-4, atol=1e-5)
    noisy = model.train()(x)
    assert not torch.allclose(noisy, model.eval()(x))
    vt.use(model, None)
    assert torch.equal(model.train()(x), model[0].base(x))


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.qkv = nn.Linear(n, 3 * n)

    def forward(self, x):
        return self.qkv(x)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([["q"], ["qkv.k"], ["query", "value"], ["q", "k", "v"], ["qkv"]]),
)
def test_parts_of_a_fused_projection(n, r, targets):
    torch.manual_seed(1)
    model = nn.Sequential(Attention(n)).double()
    vt.attach(model, vt.VeraConfig(rank=r, targets=targets), "a")
    scramble(model, "a")
    x = torch.randn(2, 3, n, dtype=torch.float64)
    y, inner = model(x), nn.Sequential(model[0].qkv)
    wanted = x @ inner[0].base.weight.T + inner[0].base.bias
    for v in vectors_of(model, "a"):
        A, B = v.basis.pair(v.layer, n, n, r, x.device, torch.float64)
        delta = v.scale * torch.diag(v.b.double()) @ B @ torch.diag(v.d.double()) @ A
        wanted[..., v.part.start : v.part.stop] += x @ delta.T
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    assert len(vectors_of(model, "a")) == (
        3 if targets in (["q", "k", "v"], ["qkv"]) else len(targets)
    )
    vt.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)


def test_a_base_that_offloads_or_hooks_keeps_doing_so():
    model = build("linear", 4, 6, 2, torch.float32)
    seen = []
    model[0].base.register_forward_hook(lambda *a: seen.append(1))
    model(torch.ones(2, 6))
    assert seen == [1]
    assert model[0].in_features == 6
    assert model[0].weight is model[0].base.weight
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model[0].nonsense


@settings(max_examples=40)
@given(
    st.sampled_from(["linear", "bare", "conv1d"]), sizes, sizes, sizes, st.sampled_from(["auto", "factored", "projected", "merged", "dense"]),
    st.sampled_from(["random", "monarch", "peft"]),
)  # fmt: skip
def test_every_plan_and_basis_is_its_own_merged_form_and_the_identity_at_the_start(
    kind, m, n, r, plan, basis
):
    model = build(kind, m, n, r, plan=plan, basis=basis)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(model(x), model[0].base(x))
    (v,) = vectors_of(scramble(model, "a"), "a")
    y = model(x)
    A, B = map(dense, v.pair(x.device, torch.float64))
    weight = model[0].base.weight.T if kind == "conv1d" else model[0].base.weight
    delta = v.scale * torch.diag(v.b.double()) @ B @ torch.diag(v.d.double()) @ A
    bias = 0 if model[0].base.bias is None else model[0].base.bias
    torch.testing.assert_close(y, x @ (weight + delta).T + bias)
    vt.merge(model)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("plan", ["projected", "merged"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda model: model[0].base.register_forward_hook(lambda *a: None),
            "something hooks into its forward",
        ),
        (lambda model: model.bfloat16(), "torch.bfloat16 would round a small ΔW away"),
        (lambda model: model[0].base.weight.requires_grad_(), "it is trained itself"),
        (
            lambda model: setattr(model[0], "base", Special(6, 4)),
            "it is a Special, whose product only it can take",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_not_passed_over(plan, spoil, reason):
    model = build("linear", 4, 6, 2, torch.float32, plan=plan)
    spoil(model)
    with pytest.raises(
        UnsupportedError, match=f"plan='{plan}' puts ΔW into the weight of layer '0', but {reason}"
    ):
        model(torch.ones(2, 6, dtype=model[0].base.weight.dtype))


class Special(nn.Linear):
    pass


def test_autocast_uses_no_weight_of_few_bits():
    model = scramble(build("linear", 40, 60, 8, torch.float32), "a").eval()
    x = torch.randn(300, 60)
    with torch.no_grad():
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - wanted).norm() <= 2e-2 * wanted.norm()
    model = build("linear", 4, 6, 2, torch.float32, plan="merged")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedError, match="torch.float32 and the product torch.bfloat16"),
    ):
        model(torch.ones(2, 6))


class Residual(nn.Module):
    """In-place operations on a linear layer's output, as DeBERTa and Swin have them."""

    def __init__(self, n):
        super().__init__()
        self.linear, self.relu = nn.Linear(n, n), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.linear(x)
        y += x
        return self.relu(y)


@pytest.mark.parametrize("plan", ["auto", "factored", "projected", "merged", "dense"])
@pytest.mark.parametrize("basis", ["random", "monarch"])
def test_the_output_may_be_written_to_in_place(plan, basis):
    model = nn.Sequential(Residual(6))
    vt.attach(model, vt.VeraConfig(rank=4, targets=["linear"], plan=plan, basis=basis), "a")
    x = torch.randn(2, 3, 6, requires_grad=True)
    scramble(model, "a")(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rows", [2, 400])
def test_a_gradient_penalty_trains_the_vectors(rows):
    model = scramble(build("linear", 7, 6, 3), "a")
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    (v,) = vectors_of(model, "a")
    found = v.d.grad, v.b.grad
    d, b = (t.detach().clone().requires_grad_() for t in (v.d, v.b))
    A, B = v.basis.pair(v.layer, 7, 6, 3, x.device, torch.float64)
    weight = model[0].base.weight + v.scale * b.double()[:, None] * ((B * d.double()) @ A)
    (rows * weight.sum(0).square().sum()).backward()
    torch.testing.assert_close(found, (d.grad, b.grad), rtol=1e-5, atol=1e-5)


def test_a_model_loaded_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.inference_mode():
        vt.attach(model, vt.VeraConfig(rank=3, targets=["0"], seed=77), "a")
        model(torch.ones(2, 6))
    model(torch.ones(2, 6, requires_grad=True)).sum().backward()
    assert vectors_of(model, "a")[0].b.grad is not None


def test_an_adapted_model_can_be_pickled_by_its_user():
    model = scramble(build("linear", 4, 6, 2, torch.float32), "a")
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))
    assert "matrices" not in str(vectors_of(model, "a")[0].basis.__getstate__())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes become constants
def test_an_adapted_model_can_be_traced():
    model = scramble(build("linear", 4, 6, 2, torch.float32), "a").eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
        torch.testing.assert_close(traced(x), model(x))
        x = torch.randn(2, 6)
        torch.testing.assert_close(traced(x), model(x))
