"""VeraCallback under transformers' Trainer: checkpoints hold the adapter alone and resume exactly."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import veratune as vt
from tests import fakes
from veratune.errors import AdapterNotFoundError
from veratune.integrations.trainer import VeraCallback

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = vt.VeraConfig(rank=8, targets=("query", "value"))


def adapted():
    return vt.attach(fakes.llama(), CONFIG)


def trainer(model, folder, **changes):
    tokens = torch.randint(2, 300, (8, 12), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    options = {
        "max_steps": 4, "save_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **(options | changes))
    return Trainer(model, arguments, train_dataset=data, callbacks=[VeraCallback(model)])


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    model = adapted()
    trainer(model, tmp_path).train()
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(stored) == trained
    vt.load(vt.attach(fakes.llama(), CONFIG, name="other"), tmp_path / "adapter.safetensors")
    assert "save_pretrained" not in model.__dict__
    assert "_hf_peft_config_loaded" not in model.__dict__


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path):
    whole, broken, resumed = adapted(), adapted(), adapted()
    trainer(whole, tmp_path / "whole", lr_scheduler_type="constant").train()
    trainer(broken, tmp_path / "broken", lr_scheduler_type="constant", max_steps=2).train()
    run = trainer(resumed, tmp_path / "broken", lr_scheduler_type="constant")
    run.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    a, b = vt.extract(whole), vt.extract(resumed)
    assert all(torch.equal(a.d[name], b.d[name]) for name in a.d)
    assert all(torch.equal(a.b[name], b.b[name]) for name in a.b)


def test_an_adapter_that_is_not_there_is_named():
    with pytest.raises(AdapterNotFoundError, match="other"):
        VeraCallback(adapted(), "other")
