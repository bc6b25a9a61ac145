"""mlx-lm folders: y = W x + scale (x lora_a) lora_b, computed here as mlx-lm does, and by mlx-lm.

mlx-lm runs in a Python of its own, named by VERATUNE_MLX_PYTHON. Checked with mlx-lm 0.32.2 on CPU.
"""

import json
import os
import subprocess

import numpy as np
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


SCRIPT = """
import json, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, adapter, tokens, out = sys.argv[1:]
loaded = load_adapters(load_model(Path(model))[0], adapter)
np.save(out, np.array(loaded(mx.array(json.loads(tokens))).astype(mx.float32)))
"""


@pytest.mark.clients
def test_mlx_lm_computes_the_same(tmp_path):
    python = os.environ.get("VERATUNE_MLX_PYTHON")
    if not python:
        pytest.skip("VERATUNE_MLX_PYTHON names no Python with mlx-lm")
    base = fakes.folder(fakes.llama(), tmp_path / "base")
    config = vt.VeraConfig(rank=8, targets=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})
    model = scramble(vt.attach(fakes.llama(), config, "a"), "a")
    export(vt.extract(model), "mlx-lm", tmp_path / "out")
    tokens = torch.arange(2, 26).view(3, 8)
    arguments = [base, str(tmp_path / "out"), json.dumps(tokens.tolist()), str(tmp_path / "x.npy")]
    subprocess.run([python, "-c", SCRIPT, *arguments], check=True, timeout=300)
    found = torch.from_numpy(np.load(tmp_path / "x.npy"))
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)
