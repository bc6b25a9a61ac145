"""FewRowsLinear in a model: the same outputs, and layers that stay as they are."""

import torch
from torch import nn

from tests import fakes
from veratune.layers.few_rows import FewRowsLinear, replace_linears, wrapped_linear

TOKENS = torch.arange(3)[:, None]


def test_a_model_gives_the_same_logits():
    model, other = fakes.llama().eval(), fakes.llama().eval()
    replace_linears(other)
    assert isinstance(other.lm_head, FewRowsLinear)
    assert other.lm_head.name == "lm_head"
    assert other.lm_head.weight is other.get_input_embeddings().weight or (
        other.lm_head.weight is wrapped_linear(other.lm_head).weight
    )
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, other(TOKENS).logits, atol=1e-5)


def test_hooked_half_precision_and_derived_layers_stay():
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(2, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(hooked, nn.Linear(2, 4).bfloat16(), Own(2, 4), nn.Conv1d(2, 4, 1))
    before = list(model)
    replace_linears(model)
    assert list(model) == before
    assert all(wrapped_linear(module) is module for module in before)
