"""The recipe of docs/exits.md for ONNX: a merged model computes the same in onnxruntime."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "exits.md"
CASES = {
    "AutoModelForCausalLM": (fakes.llama, {}),
    "AutoModelForSequenceClassification": (
        lambda: fakes.bert(labels=3),
        {"targets": ["query", "value"], "head": ["classifier"]},
    ),
}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def recipe() -> str:
    """The Python block of the page's section on ONNX."""
    section = PAGE.read_text().partition("## ONNX\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


@pytest.mark.parametrize(("kind", "case"), CASES.items(), ids=CASES.keys())
def test_a_merged_model_computes_the_same(kind, case, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    make, settings = case
    monkeypatch.chdir(tmp_path)
    model = make()
    fakes.folder(model, tmp_path / "base")
    scramble(vt.attach(model, vt.VeraConfig(rank=8, **settings), "a"), "a")
    if kind == "AutoModelForCausalLM":
        vt.save(model, tmp_path / "a.safetensors")
        assert (
            main(["merge", "--model", "base", "--adapter", "a.safetensors", "--out", "merged"]) == 0
        )
    else:
        plain = scramble(vt.attach(make(), vt.VeraConfig(rank=8, **settings), "a"), "a")
        vt.merge(plain, "a")
        vt.detach(plain, keep_merged=True).save_pretrained(tmp_path / "merged")
    exec(recipe().replace("AutoModelForCausalLM", kind), {})
    session = onnxruntime.InferenceSession("model.onnx")
    tokens = torch.arange(3, 63).view(5, 12)  # another batch and length than the recipe's
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    (found,) = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        wanted = model(input_ids=tokens, attention_mask=mask).logits.numpy()
    if found.ndim == 3:
        found, wanted = found[mask.bool().numpy()], wanted[mask.bool().numpy()]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted).max() > 0.1
