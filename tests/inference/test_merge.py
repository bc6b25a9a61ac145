"""Writing a merged model: permissions, and a disk that is full."""

import os

import pytest
import safetensors
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from veratune.errors import OutputError
from veratune.inference.adapted import ADAPTER_NAME, LoadedModel
from veratune.inference.merge import save_merged
from veratune.tasks.text.language import Instruction


@pytest.fixture
def loaded():
    config = vt.VeraConfig(rank=8, targets=("query", "value"))
    model = fakes.scramble(vt.attach(fakes.llama(), config, ADAPTER_NAME), ADAPTER_NAME)
    return LoadedModel(
        model=model, processor=fakes.tokenizer(), task=Instruction(), adapter=vt.extract(model)
    )


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(loaded, tmp_path, umask):
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        wanted = loaded.model(tokens).logits
    former = os.umask(umask)
    try:
        save_merged(loaded, tmp_path / "merged")
    finally:
        os.umask(former)
    files = [path for path in (tmp_path / "merged").iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), safetensors.SafetensorError("No space left on")],
)
def test_a_full_disk_is_one_line(loaded, tmp_path, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(Instruction, "save", full)
    with pytest.raises(OutputError, match="the merged model could not be written: No space left"):
        save_merged(loaded, tmp_path)
