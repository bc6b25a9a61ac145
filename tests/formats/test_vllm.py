"""Folders for vLLM, against the rules of vllm 0.33.0 (config/lora.py, lora/peft_helper.py, lora/utils.py)."""

import json

import peft
import pytest
import safetensors.torch
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import UnsupportedError
from veratune.formats.export import export

TOKENS = torch.arange(2, 26).view(3, 8)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks
FIELDS_REFUSED = ("use_dora", "lora_bias", "layer_replication", "use_bdlora", "use_qalora")
pytestmark = pytest.mark.filterwarnings("ignore")


def adapter(**settings):
    model = vt.attach(fakes.llama(), vt.VeraConfig(**{"rank": 8, **settings}), "a")
    return model, vt.extract(scramble(model, "a"))


def test_vllms_rules_hold_and_peft_computes_the_same(tmp_path):
    model, made = adapter(rank_pattern={"v_proj": 5}, targets=["q_proj", "v_proj", "down_proj"])
    written = export(made, "vllm", tmp_path / "alice")
    config = json.loads((tmp_path / "alice" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["r"] > 0
    assert config["lora_alpha"] == config["r"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert not config["rank_pattern"] and not config["alpha_pattern"]  # noqa: PT018
    assert not any(config.get(field) for field in FIELDS_REFUSED)
    tensors = safetensors.torch.load_file(tmp_path / "alice" / "adapter_model.safetensors")
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, tensor in tensors.items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-2] in ("lora_A", "lora_B")
        assert parts[-1] == "weight"
        assert parts[-3] in expected
        assert tensor.shape[parts[-2] == "lora_B"] == config["r"]
    assert written.command == (
        f"vllm serve LlamaForCausalLM --enable-lora --max-lora-rank 8 --lora-modules "
        f"alice={tmp_path / 'alice'}"
    )
    theirs = peft.PeftModel.from_pretrained(fakes.llama(), str(tmp_path / "alice")).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_the_serve_line_has_an_allowed_rank(tmp_path):
    for rank, limit in ((1, 1), (3, 8), (40, 64), (257, 320)):
        assert limit in RANKS
        line = export(adapter(rank=rank)[1], "vllm", tmp_path / str(rank)).command
        assert f"--max-lora-rank {limit} " in line


def test_what_vllm_cannot_hold_is_refused_and_reduction_is_on_request(tmp_path):
    _, wide = adapter(rank=600)
    with pytest.raises(UnsupportedError, match="has rank 600; vLLM takes at most 512: give --redu"):
        export(wide, "vllm", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    errors = export(wide, "vllm", tmp_path / "y", rank=32).errors
    assert len(errors) == 4
    assert max(entry.error for entry in errors) < 1e-5  # the layers are 32 wide
    headed = scramble(
        vt.attach(fakes.bert(labels=3), vt.VeraConfig(rank=4, head=["classifier"]), "a"), "a"
    )
    with pytest.raises(UnsupportedError, match="vLLM loads no trained head"):
        export(vt.extract(headed), "vllm", tmp_path / "z")
