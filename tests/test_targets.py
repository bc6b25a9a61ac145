import pytest
import torch
import transformers as hf
from torch import nn

from tests import fakes
from veratune.config import VeraConfig
from veratune.errors import TargetError
from veratune.targets import find_heads, find_sites

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}


def on_meta(auto, config):
    with torch.device("meta"):
        return auto.from_config(config)


def names(model, **settings):
    return [s.name for s in find_sites(model, VeraConfig(rank=4, **settings))]


# Model family -> its configuration, and the last words of the two layers a block that the defaults must find.
FAMILIES = {
    "bert": (hf.BertConfig(**SMALL), ("query", "value")),
    "roberta": (hf.RobertaConfig(**SMALL), ("query", "value")),
    "distilbert": (hf.DistilBertConfig(dim=32, n_heads=4, n_layers=2, hidden_dim=48, vocab_size=99), ("q_lin", "v_lin")),
    "deberta-v2": (hf.DebertaV2Config(**SMALL), ("query_proj", "value_proj")),
    "deberta": (hf.DebertaConfig(**SMALL), ("in_proj",)),
    "gpt2": (hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99), ("c_attn:q", "c_attn:v")),
    "llama": (hf.LlamaConfig(**DECODER), ("q_proj", "v_proj")),
    "qwen2": (hf.Qwen2Config(**DECODER), ("q_proj", "v_proj")),
    "qwen3": (hf.Qwen3Config(**DECODER), ("q_proj", "v_proj")),
    "mistral": (hf.MistralConfig(**DECODER), ("q_proj", "v_proj")),
    "gemma": (hf.GemmaConfig(**DECODER, head_dim=8), ("q_proj", "v_proj")),
    "gemma2": (hf.Gemma2Config(**DECODER, head_dim=8), ("q_proj", "v_proj")),
    "phi": (hf.PhiConfig(**DECODER), ("q_proj", "v_proj")),
    "phi3": (hf.Phi3Config(**DECODER), ("qkv_proj:q", "qkv_proj:v")),
    "gpt_neox": (hf.GPTNeoXConfig(**SMALL), ("query_key_value",)),
    "vit": (hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}), None),
    "dinov2": (hf.Dinov2Config(**{k: v for k, v in SMALL.items() if k != "vocab_size"}), None),
    "clip_text": (hf.CLIPTextConfig(**SMALL, eos_token_id=1), ("q_proj", "v_proj")),
    "modernbert": (hf.ModernBertConfig(**SMALL, pad_token_id=0, eos_token_id=0, bos_token_id=0, cls_token_id=0, sep_token_id=0),
                   ("Wqkv:q", "Wqkv:v")),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_query_and_value_of_every_block(family):
    config, words = FAMILIES[family]
    found = names(on_meta(hf.AutoModel, config))
    blocks = 2
    if words is None:  # these families renamed their projections between versions of transformers
        assert len(found) == 2 * blocks
        return
    assert len(found) == len(words) * blocks
    for word in words:
        assert sum(name.endswith(word) for name in found) == blocks


def test_t5_has_two_attentions_in_a_decoder_block():
    model = on_meta(
        hf.AutoModel,
        hf.T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=99),
    )
    found = names(model)
    assert len(found) == 2 * (2 + 4)
    assert {name.rsplit(".", 1)[-1] for name in found} == {"q", "v"}


def test_phi3_parts_follow_the_head_counts():
    sites = find_sites(
        on_meta(hf.AutoModel, FAMILIES["phi3"][0]), VeraConfig(rank=4, targets=["qkv_proj"])
    )
    assert [(s.part.name, s.part.start, s.part.stop) for s in sites[:3]] == [
        ("q", 0, 32),
        ("k", 32, 48),
        ("v", 48, 64),
    ]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["self_attn.q_proj", "mlp.up_proj"], 4),
        (["query", "key", "value"], 6),
        (["*.0.*_proj"], 7),
        ([r"re:.*\.(gate|up)_proj"], 4),
        ("all-linear", 14),
        (["model.layers.1.mlp.down_proj"], 1),
    ],
)
def test_the_target_language(targets, count):
    assert len(names(fakes.llama(), targets=targets)) == count


def test_exclude_layers_and_rank_pattern():
    model = fakes.llama()
    assert (
        len(names(model, targets="all-linear", exclude=["mlp.*_proj", "*.mlp.*"][1:], layers=[1]))
        == 4
    )
    sites = find_sites(model, VeraConfig(rank=4, rank_pattern={"v_proj": 9, "*.0.*": 5}))
    assert [s.rank for s in sites] == [5, 9, 4, 9]


def test_all_linear_leaves_the_output_alone():
    assert not any("lm_head" in n for n in names(fakes.gpt2(), targets="all-linear"))
    assert not any("classifier" in n for n in names(fakes.bert(labels=3), targets="all-linear"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert names(model, targets="all-linear") == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ["quary"]},
            "target 'quary' matches no layer of LlamaForCausalLM; did you mean 'query'?",
        ),
        (
            {"targets": ["q_prj"]},
            "target 'q_prj' matches no layer of LlamaForCausalLM; did you mean 'q_proj'",
        ),
        (
            {"exclude": ["zzz"]},
            "exclude 'zzz' matches no layer of LlamaForCausalLM; its layers are called down_proj, gate_proj",
        ),
        (
            {"rank_pattern": {"up_proj": 3}},
            "rank_pattern 'up_proj' matches no layer of LlamaForCausalLM",
        ),
        ({"layers": [7]}, r"layers names the blocks \[7\]; the model's are 0 to 1"),
        (
            {"targets": ["embed_tokens"]},
            "target 'embed_tokens' is a Embedding of LlamaForCausalLM; only linear layers and convolutions can be adapted",
        ),
        (
            {"exclude": ["query", "value"]},
            r"exclude \['query', 'value'\] leaves none of the layers that \['query', 'value'\] matched",
        ),
        (
            {"head": ["lm_haed"]},
            "head 'lm_haed' is no module of LlamaForCausalLM; did you mean 'lm_head'?",
        ),
    ],
)
def test_what_matches_nothing_is_an_error_with_near_names(settings, message):
    with pytest.raises(TargetError, match=message):
        names(fakes.llama(), **settings)


def test_a_broken_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression"):
        names(fakes.llama(), targets=["re:("])


def test_a_model_without_linear_layers():
    with pytest.raises(TargetError, match="Sequential has no linear layer"):
        names(nn.Sequential(nn.ReLU()))


def test_heads_are_full_paths_or_ends_lists_are_what_is_in_them_and_none_is_inside_another():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    lists = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Tanh()])
    model = nn.ModuleDict(
        {"conv1": nn.Linear(2, 2), "block": nn.ModuleDict({"conv1": inner}), "heads": lists}
    )

    def paths(*names):
        return [path for path, _ in find_heads(model, names)]

    assert paths("conv1") == ["conv1"]  # the full path goes before the ends
    assert paths("block.conv1.0", "block.conv1") == ["block.conv1"]
    assert paths("heads") == ["heads.0.0", "heads.1"]  # lists are not called
