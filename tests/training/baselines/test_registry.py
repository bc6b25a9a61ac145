"""Adapter layers and LoRA variants: what they compute, where they sit, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from tests import fakes
from veratune.config import VeraConfig
from veratune.errors import ConfigError, TargetError
from veratune.training.baselines.lora import DyLora, LoraFa
from veratune.training.baselines.modules import NAME, Bottleneck
from veratune.training.baselines.registry import add_baseline

QV = VeraConfig(rank=4, targets=("query", "value"))
TOKENS = {"input_ids": torch.arange(12).view(2, 6)}


def random_(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{NAME}." in name:
                p.normal_(std=0.3)
    return model.eval()


def places(model):
    return [
        name.removesuffix(f".{NAME}")
        for name, m in model.named_modules()
        if name.endswith(f".{NAME}")
    ]


def test_houlsby_is_beside_both_halves_of_a_block():
    model = fakes.bert().eval()
    add_baseline("houlsby", model, QV, {"size": 3})
    random_(model)
    assert places(model) == [
        f"encoder.layer.{i}.{n}.dense" for i in range(2) for n in ("attention.output", "output")
    ]
    layer = model.encoder.layer[0].output.dense
    x = torch.randn(2, 6, layer.in_features)
    h = F.linear(x, layer.weight, layer.bias)
    adapter = layer.get_submodule(NAME)
    assert torch.allclose(layer(x), h + adapter.up(F.silu(adapter.down(h))))


def test_pfeiffer_of_a_block_that_ends_in_a_layer_norm():
    model = fakes.bert().eval()
    add_baseline("pfeiffer", model, QV, {"size": 3})
    random_(model)
    end = model.encoder.layer[1].output
    x, residual = torch.randn(2, 6, end.dense.in_features), torch.randn(2, 6, 32)
    s, adapter = end.dense(x) + residual, end.LayerNorm.get_submodule(NAME)
    norm = torch.nn.functional.layer_norm
    first = norm(s, (32,), end.LayerNorm.weight, end.LayerNorm.bias, end.LayerNorm.eps)
    wanted = norm(
        s + adapter.up(F.relu(adapter.down(first))),
        (32,),
        end.LayerNorm.weight,
        end.LayerNorm.bias,
        end.LayerNorm.eps,
    )
    assert torch.allclose(end(x, residual), wanted, atol=1e-6)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "lin", "adapterdrop"])
@pytest.mark.parametrize("make", [fakes.bert, fakes.llama, fakes.gpt2])
def test_adapter_layers_of_each_family_start_near_nothing_and_change_every_block_they_are_in(
    method, make
):
    torch.manual_seed(0)
    model = make().eval()
    before = model(**TOKENS)[0]
    add_baseline(method, model, QV, {"size": 3})
    assert torch.allclose(model(**TOKENS)[0], before, atol=0.02)
    assert not torch.allclose(random_(model)(**TOKENS)[0], before, atol=0.02)
    found = places(model)
    assert len(found) == {"houlsby": 4, "pfeiffer": 2, "lin": 2, "adapterdrop": 1}[method]
    if method == "adapterdrop":
        assert ".1" in found[0]  # the lower half of the blocks stays bare
    model(**TOKENS)[0].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if f".{NAME}." in name)


def test_dylora_is_a_lora_of_a_drawn_rank_in_training_and_of_the_whole_one_after():
    torch.manual_seed(0)
    lora = DyLora(5, 4, 3, alpha=6.0)
    torch.nn.init.normal_(lora.lora_B)
    x = torch.randn(7, 5)
    at = [(6.0 / k) * x @ lora.lora_A[:k].T @ lora.lora_B[:, :k].T for k in (1, 2, 3)]
    drawn = [min(range(3), key=lambda k: (at[k] - lora(x)).abs().max().item()) for _ in range(40)]
    assert set(drawn) == {0, 1, 2}
    lora.eval()
    assert torch.allclose(lora(x), at[2], atol=1e-6)


def test_lora_fa_trains_b_alone():
    lora = LoraFa(5, 4, 3, alpha=3.0)
    assert [name for name, _ in lora.named_parameters()] == ["lora_B"]
    assert set(lora.state_dict()) == {"lora_A", "lora_B"}


def test_a_layer_norm_of_its_own_comes_before_lins_bottleneck():
    adapter = Bottleneck(8, 2, F.relu, layer_norm=True)
    x = torch.randn(3, 8)
    assert torch.allclose(adapter(5 * x + 1), adapter(x), atol=1e-5)


def test_mistakes():
    with pytest.raises(
        ConfigError,
        match="method 'houlsby' has no option 'sise'; it has size, reduction; did you mean 'size'",
    ):
        add_baseline("houlsby", fakes.bert(), QV, {"sise": 3})
    with pytest.raises(ConfigError, match="option size of method 'lin' is 0"):
        add_baseline("lin", fakes.bert(), QV, {"size": 0})
    with pytest.raises(ConfigError, match="drop is 2, but the model has 2 blocks"):
        add_baseline("adapterdrop", fakes.bert(), QV, {"drop": 2})
    with pytest.raises(TargetError, match="has no numbered blocks with one of"):
        add_baseline("pfeiffer", fakes.perceptron(), QV, {})
