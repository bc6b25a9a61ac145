"""Push, pull and hf:// addresses, through huggingface_hub against a local server."""

import huggingface_hub.constants
import pytest
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.formats.hub_server import hub_in_use
from veratune.cli.main import main
from veratune.errors import ConfigError, DataError
from veratune.formats import hub, native

TOKENS = torch.arange(2, 26).view(3, 8)


@pytest.fixture
def server(monkeypatch, tmp_path):
    yield from hub_in_use(monkeypatch, tmp_path / "cache")


@pytest.fixture
def adapted(tmp_path):
    model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=8), "a"), "a")
    vt.save(model, tmp_path / "a.safetensors")
    return model, tmp_path / "a.safetensors"


def test_push_load_and_pull(server, adapted, tmp_path, capsys):
    model, file = adapted
    assert main(["push", str(file), "ann/style", "--private", "--peft-lora", "--dataset", "d"]) == 0
    assert "/ann/style/commit/" in capsys.readouterr().out
    assert server.private["ann/style"]
    files = server.commits["ann/style"][-1]
    assert sorted(files) == [
        "README.md",
        "adapter.safetensors",
        "peft-lora/adapter_config.json",
        "peft-lora/adapter_model.safetensors",
    ]
    assert files["adapter.safetensors"] == file.read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nbase_model: LlamaForCausalLM\n")
    assert 'vt.load(model, "hf://ann/style")' in card
    other = fakes.llama()
    assert vt.load(other, "hf://ann/style") == "style"
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)
    out = tmp_path / "pulled.safetensors"
    assert main(["pull", "hf://ann/style", "--out", str(out)]) == 0
    assert out.read_bytes() == file.read_bytes()


def test_a_revision_is_what_it_was(server, adapted, tmp_path):
    model, file = adapted
    main(["push", str(file), "ann/style"])
    first = file.read_bytes()
    scramble(model, "a", seed=1)
    vt.save(model, file)
    main(["push", str(file), "ann/style"])
    assert hub.download(f"hf://ann/style@{1:040x}").read_bytes() == first
    assert hub.download("hf://ann/style").read_bytes() == file.read_bytes() != first


def test_what_is_missing_is_one_line(server, adapted, monkeypatch, capsys, tmp_path):
    _, file = adapted
    main(["push", str(file), "ann/style", "--private"])
    capsys.readouterr()
    with pytest.raises(DataError, match="hf://ann/gone: no such repository, or it is private"):
        hub.download("hf://ann/gone")
    with pytest.raises(DataError, match="has no such revision"):
        hub.download("hf://ann/style@v9")
    with pytest.raises(DataError, match="has no such file"):
        hub.download("hf://ann/style#other.safetensors")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(DataError, match="no such repository, or it is private"):
        hub.download("hf://ann/style@main")
    assert main(["push", str(file), "ann/more"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("veratune: hf://ann/more: ")
    assert error.count("\n") == 1
    assert main(["pull", "hf://ann/gone", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_a_damaged_file_of_the_hub_is_not_written(server, adapted, tmp_path):
    _, file = adapted
    main(["push", str(file), "ann/style"])
    server.commits["ann/style"][-1]["adapter.safetensors"] = file.read_bytes()[:-1] + b"\1"
    assert main(["pull", "hf://ann/style", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_too_large_for_an_adapter_is_not_downloaded(server, adapted, monkeypatch, tmp_path):
    _, file = adapted
    main(["push", str(file), "ann/style"])
    monkeypatch.setattr(hub, "MAX_DOWNLOAD_BYTES", file.stat().st_size - 1)
    with pytest.raises(
        DataError, match=r"adapter.safetensors has [\d,]+ bytes; an adapter of at mo"
    ):
        hub.download("hf://ann/style")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".safetensors"]


def test_offline_is_one_line(adapted, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="cannot be reached and the file is not in the cache"):
        hub.download("hf://ann/style")


@pytest.mark.parametrize(
    "text", ["hf://style", "hf://a/b/c", "hf://a/../b", "hf://a/b@", "hf://a/b c", "hf://"]
)
def test_bad_addresses(text):
    with pytest.raises(ConfigError, match="is not a hub address; hf://user/repo@revision"):
        hub.parse_address(text)


def test_addresses():
    assert hub.parse_address("hf://a/b@v1.0#x/y.safetensors") == hub.HubAddress(
        "a/b", "v1.0", "x/y.safetensors"
    )
    assert native.SUFFIX in hub.FILE_NAME
