"""PEFT checkpoints both ways, with peft itself on the other side."""

import json

import peft
import pytest
import safetensors.torch
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import AdapterFileError, BaseModelError, UnsupportedError
from veratune.formats import peft as own
from veratune.formats.peft_files import CONFIG_NAME, WEIGHTS_NAME
from veratune.formats.peft_lora import write_lora

TOKENS = torch.arange(2, 26).view(3, 8)
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model):
    return model(input_ids=TOKENS).logits


def trained_by_peft(base, folder, seed=0, **settings):
    """Train a PEFT VeRA adapter for real, save it, and return its model."""
    config = peft.VeraConfig(
        **{"r": 8, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 5, **settings}
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        labels = (
            {"labels": TOKENS} if base.config.num_labels == 2 and hasattr(base, "lm_head") else {}
        )
        out = model(input_ids=TOKENS, **labels)
        loss = out.loss if out.loss is not None else out.logits.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (fakes.llama, {}),
        (fakes.llama, {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 12}),
        (fakes.llama, {"target_modules": r".*layers\.1.*_proj"}),
        (fakes.llama, {"target_modules": "all-linear"}),
        (fakes.llama, {"layers_to_transform": [1]}),
        (fakes.llama, {"save_projection": False, "vera_dropout": 0.1}),
        (fakes.gpt2, {"target_modules": ["c_attn"]}),
        (
            lambda: fakes.bert(labels=3),
            {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        ),
    ],
)
def test_what_peft_trained_loads_here(make, settings, tmp_path):
    theirs = trained_by_peft(make(), tmp_path / "peft", **settings)
    model = make()
    plain = logits(model)
    vt.load(model, tmp_path / "peft", "a")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - plain).abs().max() > 1e-3
    vt.save(model, tmp_path / "a.safetensors")  # and its kilobytes alone give it again
    again = make()
    vt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("write", [own.write_vera, write_lora])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (fakes.llama, {"targets": "all-linear"}),
        (fakes.llama, {"init": "kaiming_normal", "seed": 3}),
        (fakes.llama, {"basis": "peft", "targets": ["q_proj", "up_proj"]}),
        (fakes.llama, {"vectors": "b"}),
        (fakes.llama, {"vectors": "d"}),
        (fakes.gpt2, {"fused": "whole", "targets": ["c_attn"]}),
        (lambda: fakes.bert(labels=3), {"head": ["classifier"]}),
    ],
)
def test_what_is_saved_here_loads_in_peft(make, settings, write, tmp_path):
    model = vt.attach(make(), vt.VeraConfig(rank=8, **settings), "a")
    plain = logits(model)
    scramble(model, "a")
    write(vt.extract(model), tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(model) - plain).abs().max() > 1e-2


def test_there_and_back(tmp_path):
    model = scramble(
        vt.attach(fakes.llama(), vt.VeraConfig(rank=8, basis="peft", seed=4), "a"), "a"
    )
    own.write_vera(vt.extract(model), tmp_path / "out")
    again = fakes.llama()
    vt.load(again, tmp_path / "out", "a")
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (fakes.gpt2, {}, "adapts whole layers, and 'transformer.h.0.attn.c_attn:q' is part of one"),
        (
            fakes.llama,
            {"rank_pattern": {"v_proj": 3}},
            "PEFT's VeRA has one rank; this adapter has the ranks 3, 8",
        ),
        (
            fakes.llama,
            {"sharing": "unique"},
            r"one pair \(A, B\) for all layers; this adapter has sharing='unique'",
        ),
    ],
)
def test_what_peft_cannot_express_is_refused(make, settings, message, tmp_path):
    model = vt.attach(make(), vt.VeraConfig(rank=8, **settings), "a")
    with pytest.raises(UnsupportedError, match=message):
        own.write_vera(vt.extract(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_adapter_of_a_peft_model_is_told_apart(tmp_path):
    """PEFT lets it share the first one's matrices, which its own seed and targets would not draw."""
    model = peft.get_peft_model(
        fakes.llama(), peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj"]), "first"
    )
    model.add_adapter("second", peft.VeraConfig(r=8, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        AdapterFileError, match="PEFT lets a second adapter share the first one's matrices"
    ):
        vt.load(fakes.llama(), tmp_path / "second")


def edit(folder, **entries):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_bad_checkpoints(tmp_path):
    folder = tmp_path / "peft"
    trained_by_peft(fakes.llama(), folder)
    with pytest.raises(
        BaseModelError,
        match="it adapts 'model.layers.0.self_attn.[qv]_proj', which GPT2LMHeadModel does not have",
    ):
        vt.load(fakes.gpt2(), folder)
    edit(folder, projection_prng_key=6)
    with pytest.raises(AdapterFileError, match="are not what seed 6 draws"):
        vt.load(fakes.llama(), folder)
    edit(folder, projection_prng_key=5, bias="all")
    with pytest.raises(UnsupportedError, match="bias='all'"):
        vt.load(fakes.llama(), folder)
    edit(folder, bias="none", r=0)
    with pytest.raises(AdapterFileError, match="rank is 0"):
        vt.load(fakes.llama(), folder)
    edit(folder, r=8, peft_type="LORA")
    with pytest.raises(AdapterFileError, match="a PEFT LORA checkpoint; only VERA can be read"):
        vt.load(fakes.llama(), folder)
    edit(folder, peft_type="VERA")
    weights = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(weights[:-100])
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        vt.load(fakes.llama(), folder)
    tensors = safetensors.torch.load(weights)
    key = next(k for k in tensors if k.endswith("lambda_b"))
    safetensors.torch.save_file(tensors | {key: tensors[key] * float("nan")}, folder / WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match="b holds NaN or infinity"):
        vt.load(fakes.llama(), folder)
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="a pickle, which is never read"):
        vt.load(fakes.llama(), folder)
    (folder / CONFIG_NAME).write_text("{")
    with pytest.raises(AdapterFileError, match="is not JSON"):
        vt.load(fakes.llama(), folder)
    with pytest.raises(AdapterFileError, match="a folder without adapter_config.json"):
        vt.load(fakes.llama(), tmp_path)


def test_an_output_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=8), "a")
    with pytest.raises(OSError, match="the output folder is not empty"):
        own.write_vera(vt.extract(model), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
