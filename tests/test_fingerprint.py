"""The base check: a sample of all weights, whatever their dtype, and not of the first layer alone."""

import pytest
import torch
from torch import nn

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import BaseModelError
from veratune.fingerprint import base_fingerprint, differing_weights, fingerprint_shape


def trained(**settings):
    return scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=4, **settings), "a"), "a")


@pytest.mark.parametrize("layer", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_another_weight_far_from_the_adapter_is_seen(tmp_path, layer):
    vt.save(trained(), tmp_path / "a.safetensors")
    other = fakes.llama()
    torch.manual_seed(5)
    nn.init.normal_(other.get_submodule(layer).weight, std=0.2)
    with pytest.raises(BaseModelError, match=r"the adapted layers fit, but \d+% of the weight mat"):
        vt.load(other, tmp_path / "a.safetensors")
    assert vt.adapters(other) == {}
    vt.load(other, tmp_path / "a.safetensors", check_base=False)


def test_a_model_of_fewer_layers_is_seen(tmp_path):
    vt.save(trained(layers=[0]), tmp_path / "a.safetensors")
    short = fakes.llama()
    short.model.layers = short.model.layers[:1]
    with pytest.raises(BaseModelError, match="100% of the weight matrices"):
        vt.load(short, tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_merges_and_fewer_bits_change_nothing(dtype):
    plain = base_fingerprint(fakes.llama(), [])
    model = trained(targets="all-linear")
    assert torch.equal(base_fingerprint(model, []), plain)
    vt.merge(model)
    assert torch.equal(base_fingerprint(model, []), plain)
    assert differing_weights(base_fingerprint(fakes.llama().to(dtype), []), plain) == 0.0


def test_four_bits_are_the_same_model():
    plain, coarse = fakes.llama(), fakes.llama()
    with torch.no_grad():
        for p in coarse.parameters():
            if p.dim() > 1:
                step = p.abs().amax() / 7
                p.copy_((p / step).round() * step)
    assert differing_weights(base_fingerprint(plain, []), base_fingerprint(coarse, [])) == 0.0


def test_the_shape_is_known_without_weights():
    with torch.device("meta"):
        empty = fakes.llama()
    found = base_fingerprint(fakes.llama(), [])
    assert fingerprint_shape(empty, []) == tuple(found.shape)
    assert base_fingerprint(empty, []) is None
    deep = nn.Sequential(*[nn.Linear(3, 3) for _ in range(600)])
    assert base_fingerprint(deep, []).shape == fingerprint_shape(deep, []) == (512, 1)


def test_a_head_that_is_trained_does_not_count():
    model = fakes.bert(labels=3)
    before = base_fingerprint(model, ["classifier"])
    nn.init.normal_(model.classifier.weight)
    assert torch.equal(base_fingerprint(model, ["classifier"]), before)
