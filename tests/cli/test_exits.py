"""export, import, merge --to gguf, verify and sign as commands, on tiny models."""

import pytest
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.formats.gguf_files import write_llama
from tests.formats.keys import write_pair
from veratune.cli.main import main
from veratune.formats import native

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
    gguf = write_llama(fakes.llama(), tmp_path / "base.gguf")
    out = tmp_path / "lora"
    words = ("export", file, "--to", "gguf-lora", "--model", base, "--out", out)
    assert run(capsys, *words)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "adapter.gguf"]
    merge = ("merge", "--model", base, "--adapter", file, "--to", "gguf", "--gguf-dtype", "f32")
    status, _, error = run(capsys, *merge, "--out", tmp_path / "m.gguf")
    assert status == 2
    assert "give --gguf-base FILE.gguf" in error
    words = (*merge, "--gguf-base", gguf, "--out", tmp_path / "m.gguf")
    assert run(capsys, *words)[1] == f"{tmp_path / 'm.gguf'}: 4 weights merged, in f32\n"


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


def test_a_file_of_a_newer_version_is_one_line(made, tmp_path, capsys):
    _, file, _ = made
    data = file.read_bytes()
    newer = data.replace(b'\\"version\\":2', b'\\"version\\":3')
    assert newer != data
    file.write_bytes(newer)
    status, _, error = run(capsys, "export", file, "--to", "peft-lora", "--out", tmp_path / "x")
    assert (status, error.count("\n")) == (1, 1)
    assert "its format version is 3; this veratune reads versions 1 and 2" in error
    assert not (tmp_path / "x").exists()
