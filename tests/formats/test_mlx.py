"""mlx-lm folders: y = W x + scale (x lora_a) lora_b, computed here as mlx-lm does."""

import json

import pytest
import safetensors.torch
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import UnsupportedError
from veratune.formats.export import export
from veratune.formats.lora_matrices import lora_pairs


def test_the_folder_is_the_adapter(tmp_path):
    config = vt.VeraConfig(rank=8, targets=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})
    adapter = vt.extract(scramble(vt.attach(fakes.llama(), config, "a"), "a"))
    export(adapter, "mlx-lm", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    parameters = settings["lora_parameters"]
    assert parameters["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    assert (parameters["rank"], parameters["scale"]) == (8, 1.0)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapters.safetensors")
    for layer, pair in lora_pairs(adapter).items():
        a, b = tensors[f"{layer}.lora_a"], tensors[f"{layer}.lora_b"]
        assert a.shape == (pair.A.shape[1], 8)
        torch.testing.assert_close((a @ b).T, pair.delta())


def test_other_layers_are_refused(tmp_path):
    adapter = vt.extract(vt.attach(fakes.bert(), vt.VeraConfig(rank=2), "a"))
    with pytest.raises(UnsupportedError, match="mlx-lm adapts layers under 'model.layers'"):
        export(adapter, "mlx-lm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
