"""A mix is the adapter whose ΔW is the weighted sum; other sums are refused with the reason."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.serving.fakes import QV, adapter, headed_adapter, small_llama
from veratune.basis.lora import LoraBasis
from veratune.errors import BaseModelError, ConfigError, UnsupportedError, VeratuneError
from veratune.formats import native
from veratune.layers.wrapper import VeraLayer

ONLY_D = dataclasses.replace(QV, vectors="d")
ONLY_B = dataclasses.replace(QV, vectors="b")
WEIGHTS = st.floats(-4, 4)


def deltas(made):
    """ΔW of each layer, in float64, as the model computes it."""
    model = small_llama()
    base = {name: p.detach().double() for name, p in model.named_parameters()}
    vt.install(model, made, "x")
    vt.merge(model, "x")
    merged = {
        name: module.base.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, VeraLayer)
    }
    return {name: weight - base[f"{name}.weight"] for name, weight in merged.items()}


@given(weights=st.lists(WEIGHTS, min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("config", [ONLY_D, ONLY_B], ids=["d", "b"])
def test_the_update_of_a_mix_is_the_weighted_sum_of_the_updates(config, weights):
    made = [adapter(small_llama, config, i) for i in range(len(weights))]
    parts = [vt.MixPart(str(i), a, w) for i, (a, w) in enumerate(zip(made, weights, strict=True))]
    if config.vectors == "d":
        found = deltas(vt.mix(parts))
        for layer, delta in found.items():
            wanted = sum(w * deltas(a)[layer] for a, w in zip(made, weights, strict=True))
            torch.testing.assert_close(delta, wanted, atol=3e-6, rtol=1e-4)
    else:
        mixed = vt.mix(parts)
        for layer, vector in mixed.b.items():
            wanted = sum(w * a.b[layer].double() for a, w in zip(made, weights, strict=True))
            torch.testing.assert_close(vector, wanted.float(), atol=0, rtol=0)


def test_adapters_with_the_same_b_are_mixed_in_d():
    one = adapter(small_llama, QV, 0)
    other = dataclasses.replace(one, d={k: 2 * v for k, v in one.d.items()})
    found = vt.mix([vt.MixPart("a", one, 0.5), vt.MixPart("b", other, 0.25)])
    assert all(torch.equal(found.d[k], one.d[k]) for k in one.d)
    assert all(torch.equal(found.b[k], one.b[k]) for k in one.b)


def test_a_mix_is_saved_and_read_as_any_adapter():
    a, b = (adapter(small_llama, ONLY_D, i) for i in range(2))
    a = dataclasses.replace(a, task={"system": "Be brief.", "epochs": 3}).to(torch.bfloat16)
    b = dataclasses.replace(b, task={"system": "Be brief.", "epochs": 4})
    found = vt.mix([vt.MixPart("a", a, 0.7), vt.MixPart("b", b, 0.3)])
    assert found.task == {"system": "Be brief."}
    assert found.config.dtype == "float32"
    again = native.decode(native.encode(found))
    assert all(torch.equal(again.d[k], found.d[k]) for k in found.d)
    assert again.fingerprint == a.fingerprint


def changed(**fields):
    return adapter(small_llama, dataclasses.replace(ONLY_D, **fields), 1)


def with_task(**task):
    return dataclasses.replace(adapter(small_llama, ONLY_D, 1), task=task)


def lora():
    """An adapter that brings matrices of its own."""
    layer = "model.layers.0.self_attn.q_proj"
    size = small_llama().get_submodule(layer).weight.shape
    basis = LoraBasis({layer: (torch.randn(3, size[1]), torch.randn(size[0], 3))})
    model = vt.attach(small_llama(), vt.VeraConfig(rank=3, basis="lora"), "a", basis=basis)
    return dataclasses.replace(vt.extract(model), bound=basis)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda: changed(seed=3), "'b' and 'a' cannot be mixed: seed is 3 in the one and 0"),
        (lambda: changed(rank=5), "ranks differ"),
        (lambda: changed(targets=("query",)), "adapt different layers"),
        (lambda: changed(sharing="unique"), "sharing is 'unique'"),
        (lambda: changed(basis="principal"), "basis is 'principal'"),
        (lora, "'b' cannot be mixed: it has LoRA matrices of its own"),
        (lambda: changed(vectors="both"), "vectors is 'both'"),
        (lambda: with_task(system="Be brief."), "different system messages"),
        (lambda: with_task(chat_template="{{ x }}"), "different chat templates"),
        (lambda: headed_adapter(vt.VeraConfig(rank=6, head=("classifier",)), 0), "'b' .* head"),
    ],
)
def test_what_has_no_exact_mix_is_refused_with_the_reason(other, why):
    parts = [vt.MixPart("a", adapter(small_llama, ONLY_D, 0), 0.5), vt.MixPart("b", other(), 0.5)]
    with pytest.raises(UnsupportedError, match=why):
        vt.mix(parts)


def test_trained_b_is_refused_unless_it_is_the_same():
    parts = [vt.MixPart(str(i), adapter(small_llama, QV, i), 0.5) for i in range(2)]
    with pytest.raises(UnsupportedError, match=r"b is trained in both .* --vectors d"):
        vt.mix(parts)


def test_another_base_model_is_refused():
    def other():
        return fakes.llama(num_hidden_layers=2, initializer_range=0.5)

    one = adapter(small_llama, ONLY_D, 0)
    model = vt.attach(other(), ONLY_D, "x")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    parts = [vt.MixPart("a", one, 0.5), vt.MixPart("b", vt.extract(model, "x"), 0.5)]
    with pytest.raises(BaseModelError, match="another base model"):
        vt.mix(parts)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39])
def test_weights_that_overflow_are_refused(weight):
    with pytest.raises(VeratuneError, match=r"finite|float32"):
        vt.mix([vt.MixPart("a", adapter(small_llama, ONLY_D, 0), weight)])


def test_an_empty_mix_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        vt.mix([])
