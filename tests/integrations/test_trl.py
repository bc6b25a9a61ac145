"""TRL's trainers on a model with an adapter: the loss at the start, and one base in memory."""

import math

import pytest
import torch
import transformers as hf
from datasets import Dataset

import veratune as vt
from tests import fakes
from veratune.integrations.trainer import VeraCallback

trl = pytest.importorskip("trl", reason="needs trl (the extra post)")
pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
    "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
PAIRS = [
    {"prompt": "turn the light", "chosen": " on please", "rejected": " off bad"},
    {"prompt": "set timer", "chosen": " for minutes", "rejected": " awful movie"},
] * 2


@pytest.fixture
def model():
    return vt.attach(fakes.llama(), vt.VeraConfig(rank=8, targets=("query", "value")))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def changed(model):
    return any(b.abs().max() > 0 for b in vt.extract(model).b.values())


def base_storages(*models):
    """Weights of at least 1,000 values, by where they are in memory."""
    return {p.data_ptr() for m in models for p in m.parameters() if p.numel() > 1000}


def test_sft(model, tmp_path):
    rows = Dataset.from_list([{"text": p["prompt"] + p["chosen"]} for p in PAIRS])
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(str(tmp_path), max_length=32, **COMMON), train_dataset=rows,
        processing_class=fakes.tokenizer(), callbacks=[VeraCallback(model)],
    )  # fmt: skip
    trainer.train()
    assert changed(model)
    assert (tmp_path / "adapter.safetensors").is_file()


def test_dpo_starts_at_log_2_with_one_base_in_memory(model, tmp_path):
    reference = vt.reference(model)
    before = base_storages(model)
    trainer = trl.DPOTrainer(
        model, reference, trl.DPOConfig(str(tmp_path), max_length=32, **COMMON),
        train_dataset=Dataset.from_list(PAIRS), processing_class=fakes.tokenizer(),
        callbacks=[VeraCallback(model)],
    )  # fmt: skip
    assert base_storages(model, trainer.ref_model) == before
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert changed(model)


def test_dpo_continues_an_adapter_at_log_2(model, tmp_path):
    """The reference is the policy at the start: its log probabilities are computed beforehand."""
    fakes.scramble(model, "default")
    config = trl.DPOConfig(str(tmp_path), max_length=32, precompute_ref_log_probs=True, **COMMON)
    trainer = trl.DPOTrainer(
        model, None, config, train_dataset=Dataset.from_list(PAIRS),
        processing_class=fakes.tokenizer(), callbacks=[VeraCallback(model)],
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_kto(model, tmp_path):
    rows = [
        {"prompt": p["prompt"], "completion": p[kind], "label": kind == "chosen"}
        for p in PAIRS
        for kind in ("chosen", "rejected")
    ]
    trainer = trl.KTOTrainer(
        model, vt.reference(model), trl.KTOConfig(str(tmp_path), max_length=32, **COMMON),
        train_dataset=Dataset.from_list(rows), processing_class=fakes.tokenizer(),
        callbacks=[VeraCallback(model)],
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-3)  # 1 - sigmoid(0)
    assert changed(model)


def test_grpo(model, tmp_path):
    rows = Dataset.from_list([{"prompt": p["prompt"]} for p in PAIRS])
    config = trl.GRPOConfig(
        str(tmp_path), num_generations=2, max_completion_length=6, beta=0.0, **COMMON
    )

    def reward(completions, **kwargs):
        return [float(len(c) % 5) + i for i, c in enumerate(completions)]

    trainer = trl.GRPOTrainer(
        model, reward, config, train_dataset=rows, processing_class=fakes.tokenizer(),
        callbacks=[VeraCallback(model)],
    )  # fmt: skip
    trainer.train()
    assert changed(model)


def test_reward(tmp_path):
    torch.manual_seed(0)
    config = fakes.llama().config
    config.num_labels = 1
    model = hf.LlamaForSequenceClassification(config)
    vt.attach(model, vt.VeraConfig(rank=8, targets=("query", "value"), head=("score",)))
    rows = [
        {"chosen": p["prompt"] + p["chosen"], "rejected": p["prompt"] + p["rejected"]}
        for p in PAIRS
    ]
    trainer = trl.RewardTrainer(
        model, trl.RewardConfig(str(tmp_path), max_length=32, **COMMON),
        train_dataset=Dataset.from_list(rows), processing_class=fakes.tokenizer(),
        callbacks=[VeraCallback(model)],
    )  # fmt: skip
    trainer.train()
    assert changed(model)
