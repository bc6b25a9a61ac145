"""Adapters as PEFT LoRA, with peft itself as the reader: fused parts, convolutions and heads."""

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import BaseModelError, UnsupportedError
from veratune.formats.lora_matrices import lora_pairs
from veratune.formats.peft_lora import write_lora

TOKENS = {"input_ids": torch.arange(2, 26).view(3, 8)}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
pytestmark = pytest.mark.filterwarnings("ignore")


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        initializer_range=fakes.LIVELY,
        num_labels=3,
    )
    return fakes.seeded(lambda: hf.ViTForImageClassification(config))


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return fakes.seeded(lambda: hf.ResNetForImageClassification(config))


CASES = {
    "bert with a head": (
        lambda: fakes.bert(labels=3),
        {"targets": ["query", "value"], "head": ["classifier"]},
        TOKENS,
    ),
    "gpt2 parts": (fakes.gpt2, {}, TOKENS),
    "gpt2 parts, own A each": (fakes.gpt2, {"sharing": "unique"}, TOKENS),
    "gpt2 parts, two ranks": (fakes.gpt2, {"rank_pattern": {"c_attn.v": 3}}, TOKENS),
    "gpt2 parts and whole layers": (fakes.gpt2, {"targets": ["c_attn.k", "mlp.c_fc"]}, TOKENS),
    "llama, all linear": (fakes.llama, {"targets": "all-linear"}, TOKENS),
    "llama, small blocks": (fakes.llama, {"basis": "monarch", "targets": "all-linear"}, TOKENS),
    "vit with a head": (vit, {"targets": "all-linear", "head": ["classifier"]}, PIXELS),
    "resnet convolutions": (resnet, {"targets": "all-conv", "head": ["classifier"]}, PIXELS),
}


@pytest.mark.parametrize(("make", "settings", "inputs"), CASES.values(), ids=CASES.keys())
def test_peft_computes_the_same(make, settings, inputs, tmp_path):
    model = make()
    plain = model(**inputs).logits
    vt.attach(model, vt.VeraConfig(rank=8, **settings), "a")
    scramble(model, "a")
    with torch.device("meta"):
        empty = make()
    write_lora(vt.extract(model), tmp_path / "out", empty)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out")).eval()
    wanted = model(**inputs).logits
    torch.testing.assert_close(theirs(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-2


@given(
    st.integers(1, 6),
    st.sampled_from(["both", "d", "b"]),
    st.sampled_from(["shared", "per_shape", "unique"]),
    st.sampled_from(["random", "monarch"]),
)
def test_lora_delta_is_the_merged_difference(rank, vectors, sharing, basis):
    model = fakes.perceptron()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = vt.VeraConfig(
        rank=rank, targets=["0", "2"], vectors=vectors, sharing=sharing, basis=basis
    )
    scramble(vt.attach(model, config, "a"), "a")
    pairs = lora_pairs(vt.extract(model))
    vt.detach((vt.merge(model), model)[1], keep_merged=True)
    for layer, pair in pairs.items():
        assert pair.rank == rank
        merged = model.get_submodule(layer).weight - before[f"{layer}.weight"]
        torch.testing.assert_close(pair.delta(), merged, rtol=1e-4, atol=1e-5)


def test_parts_with_one_A_share_its_rows():
    model = scramble(vt.attach(fakes.gpt2(), vt.VeraConfig(rank=8), "a"), "a")
    pairs = lora_pairs(vt.extract(model), fakes.gpt2())
    assert {pair.rank for pair in pairs.values()} == {8}
    assert all(torch.equal(pair.B[32:64], torch.zeros(32, 8)) for pair in pairs.values())  # k


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, **options)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: Net(groups=2), {}, "layer 'conv' cannot be written as LoRA: it has 2 groups; merge"),
        (lambda: Net(dilation=2), {}, r"it has dilation \(2, 2\)"),
        (lambda: Net(padding=1, padding_mode="circular"), {}, "it pads with 'circular'"),
        (Net, {"conv_layout": "loralib"}, "trained with conv_layout='loralib'"),
        (fakes.encoder, {}, "is nn.MultiheadAttention"),
    ],
)  # fmt: skip
def test_layers_that_are_no_lora_are_refused(make, settings, message, tmp_path):
    targets = "all-conv" if isinstance(make(), Net) else "self_attn.q"
    model = vt.attach(make(), vt.VeraConfig(rank=2, targets=[targets], **settings), "a")
    with pytest.raises(UnsupportedError, match=message):
        write_lora(vt.extract(model), tmp_path / "out", make())
    assert not (tmp_path / "out").exists()


def test_the_model_is_asked_for_where_it_is_needed(tmp_path):
    adapter = vt.extract(vt.attach(fakes.gpt2(), vt.VeraConfig(rank=2), "a"))
    with pytest.raises(UnsupportedError, match="is parts of a fused layer; .* give --model"):
        write_lora(adapter, tmp_path / "out")
    with pytest.raises(BaseModelError, match="LlamaForCausalLM has not"):
        write_lora(adapter, tmp_path / "out", fakes.llama())
    with pytest.raises(BaseModelError, match=r"of shape \(32, 32\); GPT2LMHeadModel has q, k, v"):
        write_lora(adapter, tmp_path / "out", fakes.gpt2(width=16))
    convolution = vt.extract(vt.attach(Net(), vt.VeraConfig(rank=2, targets=["conv"]), "a"))
    with pytest.raises(UnsupportedError, match="is a convolution; .* give --model"):
        write_lora(convolution, tmp_path / "out")
    assert not (tmp_path / "out").exists()
