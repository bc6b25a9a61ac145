"""GGUF LoRA adapters and merged GGUF models, on a tiny Llama; llama.cpp itself is in test_llama_cpp.py."""

import gguf
import pytest
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.formats.gguf_files import interleaved, weights, write_llama
from veratune.errors import AdapterFileError, BaseModelError, OutputError, UnsupportedError
from veratune.formats.export import export
from veratune.formats.gguf_merge import merge_gguf
from veratune.formats.lora_matrices import lora_pairs

TOKENS = torch.arange(2, 26).view(3, 8)
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapted():
    config = vt.VeraConfig(rank=8, targets=EVERY, rank_pattern={"v_proj": 3})
    return scramble(vt.attach(fakes.llama(), config, "a"), "a")


@pytest.fixture
def base(tmp_path):
    return write_llama(fakes.llama(), tmp_path / "base.gguf")


def test_lora_tensors_are_the_delta_in_ggufs_row_order(adapted, base, tmp_path):
    adapter = vt.extract(adapted)
    written = export(adapter, "gguf-lora", tmp_path / "out", model=fakes.llama(), gguf=base)
    reader = gguf.GGUFReader(str(tmp_path / "out" / "adapter.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    alpha = fields["adapter.lora.alpha"]
    found = weights(tmp_path / "out" / "adapter.gguf")
    pairs = lora_pairs(adapter)
    assert len(found) == 2 * len(pairs)
    for short, layer, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):  # fmt: skip
        A, B = (found[f"blk.1.{short}.weight.lora_{side}"] for side in "ab")
        delta = pairs[f"model.layers.1.self_attn.{layer}"].delta()
        wanted = interleaved(delta, heads) if heads else delta
        torch.testing.assert_close(B @ A * (alpha / A.shape[0]), wanted, rtol=1e-5, atol=1e-5)
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile == f"FROM {base}\nADAPTER ./adapter.gguf\n"
    assert "--lora" in written.command


@pytest.mark.parametrize(("dtype", "error"), [("f32", 1e-5), ("f16", 1e-2), ("q8_0", 1e-1)])
def test_a_merged_gguf_read_by_transformers_computes_the_same(
    adapted, base, dtype, error, tmp_path
):
    adapter = vt.extract(adapted)
    out = tmp_path / "merged.gguf"
    assert merge_gguf(adapter, lora_pairs(adapter), base, out, dtype) == 14
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=out.name,
        dtype=torch.float32,
        quantization_config=hf.GgufConfig(dequantize=True),
    ).eval()
    wanted = adapted(TOKENS).logits
    assert (model(TOKENS).logits - wanted).abs().max() < error * wanted.abs().max()
    assert (wanted - fakes.llama()(TOKENS).logits).abs().max() > 0.1


def test_nothing_is_written_for_what_gguf_cannot_hold(adapted, base, tmp_path):
    adapter = vt.extract(adapted)
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="needs the base model's family .* give --model"):
        export(adapter, "gguf-lora", out)
    bert = fakes.bert()
    other = vt.extract(vt.attach(bert, vt.VeraConfig(rank=2), "a"))
    with pytest.raises(UnsupportedError, match="model family 'bert' has no GGUF name map here"):
        export(other, "gguf-lora", out, model=bert)
    other = write_llama(fakes.llama(hidden_size=16), tmp_path / "other.gguf")
    with pytest.raises(BaseModelError, match=r"'blk.0.attn_q.weight' is \(16, 16\); .* \(32, 32\)"):
        export(adapter, "gguf-lora", out, gguf=other)
    with pytest.raises(BaseModelError, match="the adapter wants"):
        merge_gguf(adapter, lora_pairs(adapter), other, out)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(AdapterFileError, match="not a readable GGUF file"):
        merge_gguf(adapter, lora_pairs(adapter), tmp_path / "bad.gguf", out)
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(OutputError, match="the file exists"):
        merge_gguf(adapter, lora_pairs(adapter), base, out)
    assert out.read_text() == "precious"
