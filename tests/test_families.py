"""Default targets, output heads, and the steps of docs/families.md on a few families."""

import pytest
import torch
import transformers as hf
from docs.make_families import FAMILIES, STEPS, try_family
from torch import nn

import veratune as vt
from tests import fakes
from veratune.errors import TargetError
from veratune.families import FAMILY_TARGETS, language_tower, output_heads
from veratune.targets import find_sites

QUICK = ["gpt2", "xlnet", "resnet"]


def names(model, **settings):
    return {site.name for site in find_sites(model, vt.VeraConfig(rank=2, **settings))}


@pytest.mark.parametrize("family", QUICK)
def test_a_family_goes_through_every_step(family):
    found = try_family(family, None)
    assert {step: found.get(step) for step in STEPS} == dict.fromkeys(STEPS, "yes")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_silently_wrong(family):
    for targets in (None, "all-linear"):
        found = try_family(family, targets)
        assert not [step for step in STEPS if found.get(step, "yes").startswith("wrong")], found


def test_there_are_eighty_families():
    assert len(set(FAMILIES)) >= 80
    known = hf.models.auto.configuration_auto.CONFIG_MAPPING
    assert set(FAMILIES) <= set(known)
    assert all(isinstance(words, tuple) and words for words in FAMILY_TARGETS.values())


def test_a_default_that_does_not_fit_lists_the_layers():
    with pytest.raises(TargetError, match=r"it has no 'query'; .* Its layers are 0, 2$"):
        names(fakes.perceptron())


def test_t5_and_plain_modules_keep_their_heads():
    config = hf.T5Config(d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=48, vocab_size=99)
    with torch.device("meta"):
        model = hf.T5ForConditionalGeneration(config)
    assert output_heads(model) >= {"lm_head"}
    assert "lm_head" not in names(model, targets="all-linear")

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight
            self.head = nn.Linear(4, 3)

    assert names(Plain(), targets="all-linear") == {"body"}
    assert names(Plain(), targets=["head"]) == {"head"}


def test_a_vision_language_model_is_adapted_in_its_language_tower():
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        ),
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        ),
    )
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(config)
    tower = language_tower(model)
    assert tower
    assert all(name.startswith(tower) for name in names(model))
    assert any(not name.startswith(tower) for name in names(model, targets=["query", "value"]))
    seen = names(model, targets=["vision-tower"])
    assert {name.rpartition(".")[2] for name in seen} == {"q_proj", "v_proj"}
    assert seen == {name for name in names(model, targets=["query", "value"]) if "vision" in name}
    between = names(model, targets=["connector"])
    assert {name.rpartition(".")[2] for name in between} == {"linear_1", "linear_2"}
    assert names(model, targets=["connector", "vision-tower"]) == between | seen


@pytest.mark.parametrize("word", ["vision-tower", "connector"])
def test_a_model_with_one_tower_has_no_words_for_towers(word):
    with pytest.raises(TargetError, match=f"target '{word}' matches no layer of"):
        names(fakes.llama(), targets=[word])
