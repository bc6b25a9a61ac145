"""Adapters of experts as PEFT LoRA (target_parameters), with peft itself as the reader."""

import json

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import BaseModelError, UnsupportedError
from veratune.formats.expert_lora import expert_stacks
from veratune.formats.export import export
from veratune.formats.lora_matrices import LoraPair, lora_pairs

TOKENS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
EXPERTS = ["gate_up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")


def mixtral():
    return fakes.seeded(fakes.mixtral)


def qwen3_moe():
    return fakes.seeded(fakes.qwen3_moe)


def gpt_oss():
    return fakes.seeded(fakes.gpt_oss)


def dbrx():
    config = hf.DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        vocab_size=60,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    )
    config.attn_config.rope_theta = 10000.0
    return fakes.seeded(lambda: hf.DbrxForCausalLM(config))


FAMILIES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
SETTINGS = {
    "all experts": {"targets": EXPERTS},
    "experts and attention": {"targets": [*EXPERTS, "q_proj"]},
    "some experts": {"targets": ["gate_up_proj.0", "gate_up_proj.2", "v_proj"]},
    "ranks of their own": {"targets": EXPERTS, "rank_pattern": {"down_proj": 3}},
    "d alone": {"targets": EXPERTS, "vectors": "d"},
}


def adapted(make, **settings):
    config = vt.VeraConfig(**{"rank": 4, "targets": EXPERTS, **settings})
    return scramble(vt.attach(make(), config, "a"), "a")


def peft_model(make, folder):
    return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_peft_computes_the_same(make, settings, tmp_path):
    model = adapted(make, **settings)
    export(vt.extract(model), "peft-lora", tmp_path / "out", model=make())
    wanted = model(TOKENS).logits
    found = peft_model(make, tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - make()(TOKENS).logits).abs().max() > 1e-3


def test_peft_saves_the_very_same_tensors(tmp_path):
    export(vt.extract(adapted(mixtral)), "peft-lora", tmp_path / "ours", model=mixtral())
    peft_model(mixtral, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert len(config["target_parameters"]) == 4


def test_experts_are_reduced_each_alone(tmp_path):
    model = adapted(mixtral)
    adapter = vt.extract(model)
    errors = export(adapter, "peft-lora", tmp_path / "out", model=mixtral(), rank=2).errors
    assert len(errors) == 16  # 2 layers, 2 weights, 4 experts
    assert all(0 < entry.error < 1 and entry.rank == 2 for entry in errors)
    peft_layer = peft_model(mixtral, tmp_path / "out").base_model.model.model.layers[0].mlp.experts
    found = peft_layer.get_delta_weight("default")[3]
    pair = lora_pairs(adapter)["model.layers.0.mlp.experts.down_proj:3"]
    lost = float(torch.linalg.vector_norm(found - pair.delta()))
    entry = next(e for e in errors if e.layer == "model.layers.0.mlp.experts.down_proj:3")
    assert lost == pytest.approx(entry.error * entry.norm, rel=1e-4)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("peft", "PEFT's VeRA adapts linear layers, and '.*:0' is one expert of a fused weight"),
        ("vllm", "vLLM adapts linear layers, and '.*:0' is one expert of a fused weight; merge"),
        ("mlx-lm", "mlx-lm adapts linear layers, and '.*:0' is one expert of a fused weight"),
        ("gguf-lora", "model family 'mixtral' has no GGUF name map here"),
        ("diffusers", "is not of a U-Net or a text encoder"),
    ],
)
def test_programs_without_experts_refuse_them(to, message, tmp_path):
    adapter = vt.extract(adapted(mixtral))
    with pytest.raises(UnsupportedError, match=message) as caught:
        export(adapter, to, tmp_path / "out", model=mixtral())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_peft_cannot_hold_is_refused(tmp_path):
    adapter = vt.extract(adapted(mixtral))
    with pytest.raises(UnsupportedError, match="is one expert of a fused weight; .* give --model"):
        export(adapter, "peft-lora", tmp_path / "out")
    with pytest.raises(BaseModelError, match=r"has experts of 'model.layers.0.mlp.experts.gate_up"):
        export(adapter, "peft-lora", tmp_path / "out", model=fakes.llama())
    flat = vt.extract(adapted(dbrx, targets=["w1"]))
    with pytest.raises(UnsupportedError, match=r"w1' keeps its experts in one 2-D weight"):
        export(flat, "peft-lora", tmp_path / "out", model=dbrx())
    wide = LoraPair(torch.zeros(1, 5), torch.zeros(24, 1))
    with pytest.raises(
        BaseModelError, match=r"expert 9 of .* \(24, 5\); the model has 4 experts of"
    ):
        expert_stacks({"model.layers.0.mlp.experts.gate_up_proj:9": wide}, mixtral())
    assert not list(tmp_path.iterdir())


def test_a_lora_of_experts_is_not_read_as_one_of_layers(tmp_path):
    export(vt.extract(adapted(mixtral)), "peft-lora", tmp_path / "out", model=mixtral())
    with pytest.raises(UnsupportedError, match=r"weights of experts \(target_parameters\)"):
        vt.read_lora(tmp_path / "out", mixtral())
