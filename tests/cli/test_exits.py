"""export, import, merge --to gguf, verify and sign as commands, on tiny models."""

import re

import gguf
import peft
import pytest
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.formats.gguf_files import weights, write_llama
from tests.formats.keys import write_pair
from veratune.cli.main import main
from veratune.formats import native
from veratune.model_state import vectors_of

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(2, 26).view(3, 8)


@pytest.fixture
def made(tmp_path):
    """(base folder, adapter file, adapted model)."""
    base = fakes.folder(fakes.llama(), tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    scramble(vt.attach(model, vt.VeraConfig(rank=8, seed=3), "a"), "a")
    vt.save(model, tmp_path / "a.safetensors")
    return base, tmp_path / "a.safetensors", model


def run(capsys, *words):
    status = main([str(word) for word in words])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_vllm_and_reduction(made, tmp_path, capsys):
    _, file, _ = made
    status, out, _ = run(capsys, "export", file, "--to", "vllm", "--out", tmp_path / "alice")
    assert status == 0
    assert out.splitlines()[-1].startswith("vllm serve base --enable-lora --max-lora-rank 8 ")
    words = ("export", file, "--to", "peft-lora", "--reduce", 2, "--out", tmp_path / "two")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "rank    2  relative error" in out
    assert "all layers" in out
    words = ("export", file, "--to", "peft", "--reduce", 2, "--out", tmp_path / "x")
    status, _, error = run(capsys, *words)
    assert (status, error.count("\n")) == (2, 1)
    assert "--reduce and --tolerance are for LoRA formats; peft keeps the vectors" in error


def test_gguf_lora_and_merged(made, tmp_path, capsys):
    base, file, _ = made
    base_gguf = write_llama(fakes.llama(), tmp_path / "base.gguf")
    out = tmp_path / "lora"
    words = ("export", file, "--to", "gguf-lora", "--model", base, "--out", out)
    assert run(capsys, *words)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "adapter.gguf"]
    merge = ("merge", "--model", base, "--adapter", file, "--to", "gguf", "--gguf-dtype", "f32")
    status, _, error = run(capsys, *merge, "--out", tmp_path / "m.gguf")
    assert status == 2
    assert "give --gguf-base FILE.gguf" in error
    words = (*merge, "--gguf-base", base_gguf, "--out", tmp_path / "m.gguf")
    assert run(capsys, *words)[1] == f"{tmp_path / 'm.gguf'}: 4 weights merged, in f32\n"
    # The GGUF alone is enough: its configuration names the layers.
    alone = (
        "merge",
        "--model",
        base_gguf,
        "--adapter",
        file,
        "--to",
        "gguf",
        "--gguf-dtype",
        "f32",
    )
    assert run(capsys, *alone, "--out", tmp_path / "n.gguf")[0] == 0
    assert (tmp_path / "n.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    words = ("export", file, "--to", "gguf-lora", "--model", base_gguf, "--out", tmp_path / "lora2")
    assert run(capsys, *words)[0] == 0
    assert (tmp_path / "lora2" / "adapter.gguf").read_bytes() == (out / "adapter.gguf").read_bytes()


def test_a_lora_comes_back(made, tmp_path, capsys):
    base, file, model = made
    run(capsys, "export", file, "--to", "peft-lora", "--out", tmp_path / "lora")
    back = tmp_path / "back.safetensors"
    words = ("import", tmp_path / "lora", "--model", base, "--rank", 8, "--seed", 3, "--out", back)
    status, out, error = run(capsys, *words)
    assert status == 0, error
    assert "relative error" in out
    other = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    vt.load(other, back)
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_difference_of_checkpoints(made, tmp_path, capsys):
    base, _, model = made
    wanted = model(TOKENS).logits.detach()
    vt.merge(model)
    vt.detach(model, keep_merged=True).save_pretrained(tmp_path / "tuned")
    back = tmp_path / "back.safetensors"
    words = ("import", tmp_path / "tuned", "--from-delta", "--model", base, "--rank", 8)
    status, out, error = run(capsys, *words, "--seed", 3, "--out", back)
    assert status == 0, error
    assert "all layers" in out
    other = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    vt.load(other, back)
    torch.testing.assert_close(other(TOKENS).logits, wanted, rtol=1e-3, atol=1e-3)
    fakes.folder(fakes.llama(hidden_size=16), tmp_path / "narrow")
    capsys.readouterr()  # transformers' progress
    words = ("import", tmp_path / "narrow", "--from-delta", "--model", base, "--out", back)
    status, _, error = run(capsys, *words)
    assert (status, error.count("\n")) == (1, 1)
    assert "both must be of one architecture" in error


def test_verify(made, tmp_path, capsys):
    base, file, _ = made
    private, public = write_pair(tmp_path, "ann")
    assert run(capsys, "sign", file, "--key", private)[0] == 0
    words = ("verify", file, "--model", base, "--public-key", public)
    status, out, _ = run(capsys, *words)
    assert status == 0, out
    assert out.splitlines() == [
        "ok           digest, form and basis",
        "ok           base model",
        "ok           signature",
        f"{file}: verified",
    ]
    other = fakes.llama()
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)
    fakes.folder(other, tmp_path / "other")
    status, out, _ = run(capsys, "verify", file, "--model", tmp_path / "other")
    assert status == 1
    assert "FAILED       base model: " in out
    assert "not checked  signature" in out
    assert out.splitlines()[-1] == f"{file}: NOT VERIFIED"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    status, out, _ = run(capsys, *words)
    assert status == 1
    assert "FAILED       digest, form and basis" in out
    assert len(out.splitlines()) == 2


def test_int8_storage(made, tmp_path, capsys):
    _, file, _ = made
    out = tmp_path / "small.safetensors"
    assert run(capsys, "export", file, "--to", "safetensors", "--dtype", "int8", "--out", out)[0] == 0  # fmt: skip
    assert out.stat().st_size < file.stat().st_size
    assert native.read(out).config == native.read(file).config


def refused(capsys, place, message, *words):
    """Run a command that must end with one line on standard error and write nothing."""
    before = set(place.rglob("*"))
    capsys.readouterr()
    status, out, error = run(capsys, *words)
    assert status in (1, 2)
    assert not out
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert set(place.rglob("*")) == before


def adapter_of(model, path, **settings):
    """The file of an adapter of a model."""
    scramble(vt.attach(model, vt.VeraConfig(**{"rank": 4, **settings}), "a"), "a")
    vt.save(model, path)
    return path


def test_a_rank_or_layer_that_the_target_cannot_hold(tmp_path, capsys):
    wide = adapter_of(fakes.llama(), tmp_path / "wide.safetensors", rank=600)
    message = "has rank 600; vLLM takes at most 512: give --reduce 512 or --tolerance"
    refused(capsys, tmp_path, message, "export", wide, "--to", "vllm", "--out", tmp_path / "x")
    two = {"rank_pattern": {"v_proj": 2}}
    mixed = adapter_of(fakes.llama(), tmp_path / "mixed.safetensors", **two)
    message = "PEFT's VeRA has one rank; this adapter has the ranks 2, 4"
    refused(capsys, tmp_path, message, "export", mixed, "--to", "peft", "--out", tmp_path / "x")
    bert = adapter_of(fakes.bert(), tmp_path / "bert.safetensors")
    message = "mlx-lm adapts layers under 'model.layers', and the adapter has 'encoder.layer.0"
    refused(capsys, tmp_path, message, "export", bert, "--to", "mlx-lm", "--out", tmp_path / "x")
    for to in ("diffusers", "kohya"):
        message = "'encoder.layer.0.* is not of a U-Net or a text encoder"
        out = tmp_path / "x.safetensors"
        refused(capsys, tmp_path, message, "export", bert, "--to", to, "--out", out)
    headed = tmp_path / "headed.safetensors"
    adapter_of(fakes.bert(labels=3), headed, head=["classifier"])
    for to, program in (("vllm", "vLLM"), ("mlx-lm", "mlx-lm")):
        message = f"{program} loads no trained head, and the adapter has classifier"
        refused(capsys, tmp_path, message, "export", headed, "--to", to, "--out", tmp_path / "x")


def test_a_family_without_a_gguf_map(tmp_path, capsys):
    base = fakes.folder(fakes.bert(), tmp_path / "bert")
    file = adapter_of(fakes.bert(), tmp_path / "a.safetensors")
    message = "model family 'bert' has no GGUF name map here; there are llama, mistral"
    words = ("--to", "gguf-lora", "--model", base, "--out", tmp_path / "x")
    refused(capsys, tmp_path, message, "export", file, *words)
    other = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    other.add_block_count(2)
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    message = "architecture 'bert' has no name map here"
    words = ("--gguf-base", tmp_path / "bert.gguf", "--out", tmp_path / "x.gguf")
    merge = ("merge", "--model", base, "--adapter", file, "--to", "gguf")
    refused(capsys, tmp_path, message, *merge, *words)


def test_a_layer_that_the_name_map_lacks(made, tmp_path, capsys):
    base, file, _ = made
    short = write_llama(fakes.llama(num_hidden_layers=1), tmp_path / "short.gguf")
    out = tmp_path / "x"
    message = r"layer 'model.layers.1.self_attn.[qv]_proj' has no tensor in a GGUF of architecture"
    merge = ("merge", "--model", base, "--adapter", file, "--to", "gguf", "--gguf-base", short)
    refused(capsys, tmp_path, message, *merge, "--out", tmp_path / "x.gguf")
    message = r"the adapter has layer 'model.layers.0.self_attn.q_proj', .* has not"
    bert = fakes.folder(fakes.bert(), tmp_path / "bert")
    words = ("--to", "peft-lora", "--model", bert, "--out", out)
    refused(capsys, tmp_path, message, "export", file, *words)
    assert run(capsys, "export", file, "--to", "peft-lora", "--out", tmp_path / "lora")[0] == 0
    message = r"the LoRA has layer 'model.layers.0.self_attn.q_proj', .* has not"
    words = ("--model", bert, "--out", tmp_path / "y.safetensors")
    refused(capsys, tmp_path, message, "import", tmp_path / "lora", *words)


def test_a_file_of_a_newer_version(made, tmp_path, capsys):
    base, file, _ = made
    data = file.read_bytes()
    newer = data.replace(b'\\"version\\":2', b'\\"version\\":3')
    assert newer != data
    file.write_bytes(newer)
    private, _ = write_pair(tmp_path, "ann")
    message = "its format version is 3; this veratune reads versions 1 and 2"
    out = tmp_path / "x"
    for words in (
        ("export", file, "--to", "peft-lora", "--out", out),
        ("import", file, "--out", tmp_path / "x.safetensors"),
        ("merge", "--model", base, "--adapter", file, "--out", out),
        ("inspect", file),
        ("push", file, "ann/style"),
        ("sign", file, "--key", private),
        ("eval", "--model", base, "--adapter", file, "--data", tmp_path / "rows.jsonl"),
    ):
        refused(capsys, tmp_path, message, *words)


def test_an_adapter_over_a_lora_is_exported_with_that_lora(made, tmp_path, capsys):
    base, file, _ = made
    assert run(capsys, "export", file, "--to", "peft-lora", "--out", tmp_path / "lora")[0] == 0
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    basis = vt.read_lora(tmp_path / "lora", model)
    vt.attach(model, vt.VeraConfig(basis="lora"), "over", basis=basis)
    over = tmp_path / "over.safetensors"
    vt.save(scramble(model, "over"), over)
    words = ("export", over, "--to", "peft-lora", "--out", tmp_path / "out")
    message = "whose matrices it does not hold; give that LoRA and the base model: --lora, --model"
    refused(capsys, tmp_path, message, *words)
    refused(capsys, tmp_path, message, *words, "--lora", tmp_path / "lora")
    assert (
        run(capsys, "export", file, "--to", "vllm", "--reduce", 1, "--out", tmp_path / "o")[0] == 0
    )
    message = "the adapter was trained over another LoRA"
    refused(capsys, tmp_path, message, *words, "--lora", tmp_path / "o", "--model", base)
    message = (
        "--lora is for an adapter with basis lora and a LoRA format; this is peft-lora of basis"
    )
    other = ("export", file, *words[2:], "--lora", tmp_path / "lora")
    refused(capsys, tmp_path, message, *other)
    assert run(capsys, *words, "--lora", tmp_path / "lora", "--model", base)[0] == 0
    theirs = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "out")).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_principal_adapter_is_merged_into_gguf(made, tmp_path, capsys):
    base, _, _ = made
    base_gguf = write_llama(fakes.llama(), tmp_path / "base.gguf")
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    file = adapter_of(model, tmp_path / "p.safetensors", basis="principal", vectors="d")
    words = ("--to", "gguf", "--gguf-base", base_gguf, "--gguf-dtype", "f32")
    merge = ("merge", "--model", base, "--adapter", file, *words, "--out", tmp_path / "p.gguf")
    status, _, error = run(capsys, *merge)
    assert status == 0, error
    before, after = weights(base_gguf), weights(tmp_path / "p.gguf")
    layer = next(v for v in vectors_of(model, "a") if v.layer == "model.layers.0.self_attn.v_proj")
    wanted = layer.delta_weight(torch.device("cpu"), torch.float32).detach()
    found = after["blk.0.attn_v.weight"] - before["blk.0.attn_v.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_peft_lora_of_experts(tmp_path, capsys):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    config = hf.MixtralConfig(**sizes, **heads, initializer_range=fakes.LIVELY)
    base = fakes.folder(fakes.seeded(lambda: hf.MixtralForCausalLM(config)), tmp_path / "moe")
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    file = adapter_of(model, tmp_path / "a.safetensors", targets=["gate_up_proj", "down_proj"])
    words = ("export", file, "--to", "peft-lora", "--out", tmp_path / "out")
    refused(capsys, tmp_path, "one expert of a fused weight; its LoRA needs .* --model", *words)
    assert run(capsys, *words, "--model", base)[0] == 0
    theirs = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "out")).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
