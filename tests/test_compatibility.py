"""What attach refuses before it touches a model."""

import pytest
import torch
import transformers as hf
from torch import nn

import veratune as vt
from tests import fakes
from veratune.compatibility import bypassed_layers
from veratune.errors import AdapterStateError, ConfigError, UnsupportedError
from veratune.model_state import vectors_of
from veratune.targets import find_sites

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99}


def meta(make):
    with torch.device("meta"):
        return make()


def wavlm():
    config = hf.WavLMConfig(
        **SMALL, num_attention_heads=4, intermediate_size=48, conv_dim=(8,), conv_kernel=(4,),
        conv_stride=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return hf.WavLMModel(config)


def mamba():
    return hf.MambaModel(hf.MambaConfig(**SMALL, state_size=4))


def test_attention_that_reads_weights_past_the_layer_is_refused():
    model = wavlm()
    with pytest.raises(
        UnsupportedError,
        match=r"[qv]_proj' cannot be adapted: WavLMAttention\.\w+ reads its weight",
    ):
        vt.attach(model, vt.VeraConfig(rank=2, targets=["query", "value"]))
    assert vt.adapters(model) == {}
    vt.attach(model, vt.VeraConfig(rank=2))  # the family's default: its feed-forward layers
    assert all("feed_forward" in v.layer for v in vectors_of(model, "default"))


def test_all_linear_leaves_out_what_is_not_called_and_says_so():
    model = mamba()
    with pytest.warns(UserWarning, match="leaves out 1 layers such as 'layers.0.mixer.dt_proj'"):
        vt.attach(model, vt.VeraConfig(rank=2, targets="all-linear"))
    with pytest.raises(UnsupportedError, match="dt_proj' cannot be adapted"):
        vt.attach(model, vt.VeraConfig(rank=2, targets=["dt_proj"]), "b")


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.T5Model(hf.T5Config(d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=48)),
        lambda: hf.DebertaModel(
            hf.DebertaConfig(**SMALL, num_attention_heads=4, intermediate_size=48)
        ),
        lambda: hf.LlamaModel(hf.LlamaConfig(**SMALL, num_attention_heads=4, intermediate_size=48)),
    ],
)
def test_questions_about_a_weight_are_no_reads(make):
    model = meta(make)
    assert bypassed_layers(model, find_sites(model, vt.VeraConfig(targets="all-linear"))) == {}


def test_a_plain_dict_is_no_config():
    with pytest.raises(ConfigError, match=r"config is a dict; a VeraConfig is wanted: attach"):
        vt.attach(fakes.llama(), {"rank": 4})
    with pytest.raises(ConfigError, match="config is a str; a VeraConfig is wanted"):
        vt.attach(fakes.llama(), "alice")


def test_a_part_with_adapters_of_its_own():
    model = fakes.llama()
    vt.attach(model.model, vt.VeraConfig(rank=2), "a")
    with pytest.raises(AdapterStateError, match="the module 'model' of LlamaForCausalLM has"):
        vt.attach(model, vt.VeraConfig(rank=2), "b")
    two = nn.ModuleList([fakes.perceptron(), fakes.perceptron()])
    for part in two:
        vt.attach(part, vt.VeraConfig(rank=2, targets="all-linear"), "a")
    with pytest.raises(AdapterStateError, match="holds 2 models with adapters"):
        vt.use(two, "a")
