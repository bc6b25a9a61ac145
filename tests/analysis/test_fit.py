"""Least-squares fits: a LoRA that is a VeRA gives its vectors back; any other has its error told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.analysis.fit import (
    Difference,
    as_difference,
    difference_of_weights,
    fit_adapter,
    fit_vectors,
)
from veratune.errors import ConfigError
from veratune.formats.lora_matrices import lora_pairs


@settings(max_examples=20)
@given(
    st.integers(1, 8), st.integers(8, 12), st.integers(3, 12), st.booleans(), st.integers(0, 999)
)
def test_a_vera_gives_its_vectors_back(r, n, m, stacked, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(s, generator=generator).double() for s in ((r, n), (m, r)))
    d, b = (torch.randn(k, generator=generator).double() for k in (r, m))
    left = b[:, None] * B * d
    target = Difference(left, A) if stacked else difference_of_weights(left @ A * 0, left @ A)
    d_fit, b_fit, error = fit_vectors(target, A, B, 0.1)
    assert error < 1e-6
    torch.testing.assert_close(torch.outer(b_fit, d_fit), torch.outer(b, d), rtol=1e-4, atol=1e-5)
    assert float(d_fit.square().mean().sqrt()) == pytest.approx(0.1)


def test_the_error_is_that_of_the_fit_and_no_step_away_is_better():
    generator = torch.Generator().manual_seed(0)
    A, B, delta = (torch.randn(s, generator=generator).double() for s in ((6, 9), (7, 6), (7, 9)))
    d, b, error = fit_vectors(difference_of_weights(delta * 0, delta), A, B, 0.1)

    def at(d, b):
        return float((b[:, None] * B * d @ A - delta).norm() / delta.norm())

    assert error == pytest.approx(at(d, b))
    for _ in range(20):
        assert at(d + 1e-3 * torch.randn(6) * d.norm(), b) >= error - 1e-6
        assert at(d, b + 1e-3 * torch.randn(7) * b.norm()) >= error - 1e-6


@pytest.mark.parametrize("basis", ["random", "peft"])
def test_an_exported_adapter_comes_back(basis):
    config = vt.VeraConfig(rank=8, targets=["q_proj", "down_proj"], basis=basis, seed=3)
    model = scramble(vt.attach(fakes.llama(), config, "a"), "a")
    pairs = lora_pairs(vt.extract(model))
    differences = {layer: as_difference(pair) for layer, pair in pairs.items()}
    adapter, errors = fit_adapter(differences, fakes.llama(), config)
    assert max(entry.error for entry in errors) < 1e-5
    again = fakes.llama()
    vt.install(again, adapter, "a")
    tokens = torch.arange(2, 26).view(3, 8)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_no_difference_is_the_identity():
    zero = {"model.layers.0.self_attn.q_proj": Difference(torch.zeros(32, 1).double(), torch.ones(1, 32).double())}  # fmt: skip
    adapter, errors = fit_adapter(zero, fakes.llama(), vt.VeraConfig(rank=4))
    assert errors[0].error == 0
    assert not adapter.b["model.layers.0.self_attn.q_proj"].any()
    with pytest.raises(ConfigError, match="fitting takes basis random, peft or monarch"):
        fit_adapter(zero, fakes.llama(), vt.VeraConfig(vectors="d"))
