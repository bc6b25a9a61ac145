"""Adapters are read from allowed folders and hub addresses, and from nowhere else."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.serving.http.fakes import FILES, RunningServer
from veratune.errors import AdapterFileError, DataError, UnsupportedError
from veratune.formats.lora_file import is_lora_file
from veratune.serving import sources
from veratune.serving.sources import read_source

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
LIMIT = 10**6


def checkpoint(folder, rank=4):
    """A PEFT LoRA checkpoint of the tiny Llama, written without PEFT."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(rank)
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(rank, 32, generator=generator),
        f"{LAYER}.lora_B.weight": torch.randn(32, rank, generator=generator),
    }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def root(tmp_path):
    made = tmp_path / "allowed"
    checkpoint(made / "style")
    (made / "alice.safetensors").write_bytes(FILES["alice"])
    checkpoint(tmp_path / "secret")
    (made / "link").symlink_to(tmp_path / "secret")
    return made


def test_a_checkpoint_and_a_file_are_read(root):
    assert is_lora_file(read_source(str(root / "style"), [str(root)], LIMIT))
    assert read_source(str(root / "alice.safetensors"), [str(root)], LIMIT) == FILES["alice"]
    with pytest.raises(AdapterFileError, match=r"^adapter_model\.safetensors has over 100 bytes"):
        read_source(str(root / "style"), [str(root)], 100)
    with pytest.raises(AdapterFileError, match=r"^adapter\.safetensors cannot be read"):
        read_source(str(root), [str(root)], LIMIT)


@pytest.mark.parametrize(
    "path", ["../secret", "link", "nowhere", "/etc", "style\0", "a" * 5000, "hf://ann/style"]
)
def test_other_paths_are_refused_in_the_same_words(root, path):
    whole = path if path.startswith("hf:") else str(root / path)
    with pytest.raises(UnsupportedError, match="--adapter-sources"):
        read_source(whole, [str(root), "hf://ben/"], LIMIT)
    with pytest.raises(UnsupportedError, match="--adapter-sources"):
        read_source(whole, [], LIMIT)


def test_a_relative_path_is_refused(root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(UnsupportedError, match="--adapter-sources"):
        read_source("style", [str(root)], LIMIT)


def test_the_hub_is_asked_for_a_lora_first_and_for_our_file_then(root, monkeypatch):
    asked = []

    def download(address):
        asked.append((address.repo, address.revision, address.file))
        found = {"ann/style": root / "style", "ann/vera": root}[address.repo] / address.file
        if address.file == "adapter.safetensors":
            return root / "alice.safetensors"
        if not Path(found).exists():
            raise DataError("the repository has no such file")
        return found

    monkeypatch.setattr(sources, "download", download)
    assert is_lora_file(read_source("hf://ann/style@v2", ["hf://ann/"], LIMIT))
    assert read_source("hf://ann/vera", ["hf://"], LIMIT) == FILES["alice"]
    assert asked[0] == ("ann/style", "v2", "adapter_config.json")
    assert asked[-1] == ("ann/vera", None, "adapter.safetensors")


def test_both_calls_store_a_lora_for_the_caller(root, tmp_path):
    served = RunningServer(tmp_path, adapter_sources=(str(root),))
    try:
        files = {
            name: (root / "style" / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        with served.http() as http, served.openai() as client:
            assert http.put("/v1/adapters/sent", files=files).status_code == 201
            call = {"lora_name": "read", "lora_path": str(root / "style")}
            assert http.post("/v1/load_lora_adapter", json=call).status_code == 200
            assert http.post("/v1/load_lora_adapter", json=call).status_code == 200
            assert len(http.get("/v1/adapters/read/versions").json()["data"]) == 1
            sent, read, base = (
                client.completions.create(
                    model=model, prompt="turn the light", temperature=0, max_tokens=8
                )
                .choices[0]
                .text
                for model in ("sent", "read", "base")
            )
            assert sent == read != base
            for bad in (files | {"x": b""}, dict(list(files.items())[:1]), {"a": b"", "b": b""}):
                assert http.put("/v1/adapters/bad", files=bad).status_code == 400
            call["lora_path"] = str(tmp_path / "secret")
            refused = http.post("/v1/load_lora_adapter", json=call)
            assert refused.status_code == 400
            assert str(tmp_path) not in refused.text
        with served.http("ben") as http:
            assert http.get("/v1/adapters/read").status_code == 404
    finally:
        served.stop()
