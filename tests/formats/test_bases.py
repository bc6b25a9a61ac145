"""Every basis and choice of vectors, in every format: the same ΔW in the target, or one refusal."""

import dataclasses
import json

import gguf
import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.formats.gguf_files import interleaved, weights, write_llama
from veratune.adapter import install
from veratune.basis.lora import LoraBasis
from veratune.errors import UnsupportedError
from veratune.formats import native
from veratune.formats.export import export
from veratune.formats.gguf_merge import merge_gguf
from veratune.formats.lora_matrices import lora_pairs

TOKENS = torch.arange(2, 18).view(2, 8)
TARGETS = ["q_proj", "v_proj", "down_proj"]
BASES = ("random", "monarch", "peft", "principal", "lora")
VECTORS = ("both", "d", "b")
ONE_PAIR = {"random", "peft"}  # bases with one (A, B) for all layers, as PEFT's VeRA has
pytestmark = pytest.mark.filterwarnings("ignore")


def llama() -> nn.Module:
    return fakes.llama(num_hidden_layers=1)


def image_model() -> nn.Module:
    """Two layers under the names of a pipeline's components."""
    nets = {"unet": fakes.perceptron(), "text_encoder": fakes.perceptron()}
    return nn.ModuleDict({name: nn.ModuleDict({"net": net}) for name, net in nets.items()})


def a_lora(model: nn.Module, targets: list[str]) -> LoraBasis:
    pairs = {
        name: (torch.randn(3, module.in_features), torch.randn(module.out_features, 3) / 3)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(targets))
    }
    return LoraBasis(pairs)


def adapted(model: nn.Module, targets: list[str], basis: str, vectors: str):
    """(adapted model, its adapter with A and B, ΔW of each layer by merging)."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    config = vt.VeraConfig(
        rank=4,
        targets=None if basis == "lora" else targets,
        basis=basis,
        vectors=vectors,
    )
    lora = a_lora(model, targets) if basis == "lora" else None
    scramble(vt.attach(model, config, "a", basis=lora), "a")
    adapter = vt.extract(model)
    if lora is not None:
        adapter = dataclasses.replace(adapter, bound=lora)
    vt.merge(model)
    deltas = {
        layer: (model.get_submodule(layer).base.weight - before[f"{layer}.weight"]).detach()
        for layer in adapter.shapes
    }
    vt.unmerge(model)
    assert all(delta.abs().max() > 1e-3 for delta in deltas.values())
    return model, adapter, deltas


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for layer, delta in wanted.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("basis", BASES)
def test_peft_and_vllm_folders_compute_the_same(basis, vectors, tmp_path):
    model, adapter, _ = adapted(llama(), TARGETS, basis, vectors)
    wanted = model(TOKENS).logits
    assert (wanted - llama()(TOKENS).logits).abs().max() > 1e-2
    for to in ("peft", "peft-lora", "vllm"):
        if to == "peft" and basis not in ONE_PAIR:
            with pytest.raises(UnsupportedError, match="Export with --to peft-lora") as caught:
                export(adapter, to, tmp_path / to)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / to).exists()
            continue
        export(adapter, to, tmp_path / to)
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / to)).eval()
        torch.testing.assert_close(theirs(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("basis", BASES)
def test_the_own_file_comes_back(basis, vectors, tmp_path):
    model, adapter, _ = adapted(llama(), TARGETS, basis, vectors)
    other = llama()
    export(adapter, "safetensors", tmp_path / "a.safetensors")
    install(other, native.read(tmp_path / "a.safetensors"), "a", basis=adapter.bound)
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("basis", BASES)
def test_gguf_and_mlx_hold_the_delta(basis, vectors, tmp_path):
    _, adapter, deltas = adapted(llama(), TARGETS, basis, vectors)
    base = write_llama(llama(), tmp_path / "base.gguf")
    names = {
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down.weight",
    }
    stored = {
        names[layer]: interleaved(delta, 4) if "q_proj" in layer else delta
        for layer, delta in deltas.items()
    }
    export(adapter, "gguf-lora", tmp_path / "lora", gguf=base)
    file = tmp_path / "lora" / "adapter.gguf"
    alpha = gguf.GGUFReader(str(file)).get_field("adapter.lora.alpha").contents()
    found = weights(file)
    pairs = {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in stored}
    same({name: B @ A * (alpha / A.shape[0]) for name, (A, B) in pairs.items()}, stored)

    merge_gguf(adapter, lora_pairs(adapter), base, tmp_path / "merged.gguf", "f32")
    before, after = weights(base), weights(tmp_path / "merged.gguf")
    same({name: after[name] - before[name] for name in stored}, stored)

    export(adapter, "mlx-lm", tmp_path / "mlx")
    tensors = safetensors.torch.load_file(tmp_path / "mlx" / "adapters.safetensors")
    settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    scale = settings["lora_parameters"]["scale"]
    products = {layer: tensors[f"{layer}.lora_a"] @ tensors[f"{layer}.lora_b"] for layer in deltas}
    same({layer: scale * product.T for layer, product in products.items()}, deltas)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("basis", BASES)
def test_image_files_hold_the_delta(basis, vectors, tmp_path):
    _, adapter, deltas = adapted(image_model(), ["net.0", "net.2"], basis, vectors)
    for to in ("diffusers", "kohya"):
        file = tmp_path / f"{to}.safetensors"
        export(adapter, to, file)
        model = image_model()
        if to == "kohya":  # its names of a text encoder have a level that transformers 5 dropped
            encoder = nn.ModuleDict({"text_model": model["text_encoder"]})
            model = nn.ModuleDict({"unet": model["unet"], "text_encoder": encoder})
        read = vt.read_lora(file, model).pairs
        found = {layer.replace("text_model.", ""): B @ A for layer, (A, B) in read.items()}
        same(found, deltas)
