"""torch's own attention and encoder blocks, which read weights without calling layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import veratune as vt
from tests.fakes import encoder, scramble
from veratune.errors import ConfigError, UnsupportedError
from veratune.layers.attention import VeraMultiheadAttention


def block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, **options)).to(dtype).eval()


def reference(model, base, q, k, v, **options):
    """The base block with W + ΔW written into a copy of its weights, in float64."""
    state = {name: p.double().clone() for name, p in base.named_parameters()}
    for name, delta in model[0].deltas("a").items():
        state[name] += delta.double()
    copy = (
        type(base)(
            8,
            2,
            batch_first=True,
            kdim=base.kdim,
            vdim=base.vdim,
            bias=base.in_proj_bias is not None,
        )
        .double()
        .eval()
    )
    copy.load_state_dict(state)
    return copy(q.double(), k.double(), v.double(), **options)[0]


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.sampled_from([None, (6, 4)]), st.booleans(),
    st.sampled_from([["q", "v"], ["query", "value", "out_proj"], "all-linear"]),
)  # fmt: skip
def test_equals_the_float64_reference_and_its_merged_form(dtype, kv, bias, targets):
    kdim, vdim = kv or (8, 8)
    model = block(dtype, kdim=kdim, vdim=vdim, bias=bias)
    base = model[0]
    vt.attach(model, vt.VeraConfig(rank=5, targets=targets), "a")
    scramble(model, "a")
    q, k, v = (
        torch.randn(2, 3, 8).to(dtype),
        torch.randn(2, 4, kdim).to(dtype),
        torch.randn(2, 4, vdim).to(dtype),
    )
    out = model[0](q, k, v)[0]
    wanted = reference(model, base, q, k, v)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    assert (out.double() - wanted).norm() <= tolerance * wanted.norm()
    if dtype != torch.bfloat16:
        vt.merge(model)
        torch.testing.assert_close(model[0](q, k, v)[0], out)
        vt.unmerge(model)
    vt.use(model, None)
    assert torch.equal(model[0](q, k, v)[0], base(q, k, v)[0])


def test_a_small_delta_survives_a_bf16_base():
    model = block(torch.bfloat16)
    vt.attach(model, vt.VeraConfig(rank=5, targets="all-linear"), "a")
    scramble(model, "a", size=3e-3)
    x = torch.randn(2, 3, 8).bfloat16()
    shift = model[0](x, x, x)[0].double() - model[0].base(x, x, x)[0].double()
    wanted = (
        reference(model, model[0].base, x, x, x)
        - model[0].base.double()(x.double(), x.double(), x.double())[0]
    )
    assert torch.cosine_similarity(shift.flatten(), wanted.flatten(), dim=0) > 0.5


def test_gradients_flow():
    model = scramble(vt.attach(block(), vt.VeraConfig(rank=5, targets=["q", "out_proj"]), "a"), "a")
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    model[0](x, x, x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_rows_with_every_kind_of_mask():
    model = block()
    vt.attach(model, vt.VeraConfig(rank=5, targets="all-linear"), "a")
    vt.attach(model, vt.VeraConfig(rank=3, seed=4), "b")
    scramble(scramble(model, "a"), "b", seed=1)
    n, length = (
        4,
        4,
    )  # as many rows as tokens: a mask of (L, S) must not be taken for one of the rows
    x = torch.randn(n, length, 8, dtype=torch.float64)
    causal = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    padding = torch.zeros(n, length, dtype=torch.bool)
    padding[2, 2:] = True
    by_head = torch.rand(n * 2, length, length) > 0.7
    by_head[..., 0] = False
    names = ["b", None, "a", "b"]
    for options in (
        {},
        {"attn_mask": causal},
        {"key_padding_mask": padding},
        {"attn_mask": by_head},
    ):
        alone = {}
        for name in ("a", "b", None):
            vt.use(model, name)
            alone[name] = model[0](x, x, x, **options)
        with vt.rows(model, names):
            out, weights = model[0](x, x, x, **options)
        for i, name in enumerate(names):
            torch.testing.assert_close(out[i], alone[name][0][i])
            torch.testing.assert_close(weights[i], alone[name][1][i])


@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["query"]])
def test_the_fused_kernel_of_evaluation_does_not_pass_the_adapter_by(targets):
    model = encoder()
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    plain = model(x, src_key_padding_mask=padding)
    vt.attach(model, vt.VeraConfig(rank=6, targets=targets), "a")
    scramble(model, "a")
    slow = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = model.eval()(x, src_key_padding_mask=padding)
    keep = ~padding
    torch.testing.assert_close(fast[keep], slow[keep])
    assert not torch.allclose(fast[keep], plain[keep], atol=1e-3)
    vt.detach(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.use_nested_tensor
    assert torch.equal(model(x, src_key_padding_mask=padding), plain)


def test_dropout_is_refused_before_anything_changes():
    model = encoder()
    with pytest.raises(
        ConfigError,
        match=r"dropout is 0.1, but TransformerEncoder is adapted inside nn.MultiheadAttention",
    ):
        vt.attach(model, vt.VeraConfig(dropout=0.1))
    assert not any(isinstance(m, VeraMultiheadAttention) for m in model.modules())


def test_rows_want_the_batch_first():
    model = vt.attach(encoder(batch_first=False), vt.VeraConfig(rank=4), "a")
    with (
        pytest.raises(UnsupportedError, match="rows need the batch first, but 'layers.0.self_attn"),
        vt.rows(model, ["a"]),
    ):
        pass
