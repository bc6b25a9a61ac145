"""GRPO rollouts by the serving engine."""

import json

import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError
from veratune.fleet.rollouts import EngineRollouts, register
from veratune.tasks.text.grpo import ROLLOUTS, Grpo
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytest.importorskip("trl", reason="needs trl (the extra post)")
pytestmark = pytest.mark.filterwarnings("ignore")
VERA = vt.VeraConfig(rank=8, targets=("query", "value"))
PROMPTS = [[{"role": "user", "content": text}] for text in ("turn the light on", "off", "in")]
REWARD = """
def letters(completions, **kwargs):
    return [sum(c in "abcdefghijklm" for c in x[-1]["content"]) / 8 for x in completions]
"""


class Trainer:
    def __init__(self, model):
        self.adapted = model


@pytest.fixture
def engine():
    register()
    yield
    del ROLLOUTS["engine"]


def trained(seed):
    """A model whose adapter changes what it says."""
    model = vt.attach(fakes.llama(), VERA)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(5 * torch.randn_like(p))
    return model.eval()


def alone(model, prompts, tokenizer, length):
    """Greedy completions of transformers, each alone, up to the end token."""
    found = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
        )
        found.append((ids[0].tolist(), out[0, ids.shape[1] :].tolist()))
    return found


def test_rollouts_are_those_of_the_model_in_training():
    """Greedy ones equal transformers', also after the adapter's values have changed."""
    model, tokenizer = trained(0), fakes.tokenizer()
    rollouts, task = EngineRollouts(), Grpo(max_length=64, max_completion_length=6, temperature=0.5)
    task.temperature = 0.0  # greedy: not allowed for training, which needs different completions
    parameters = {id(p) for p in model.parameters() if not p.requires_grad}
    rollouts.bind(model, tokenizer, task)
    said = []
    for seed in (0, 1):
        model.load_state_dict(trained(seed).state_dict())
        found = rollouts(PROMPTS, Trainer(model))
        wanted = alone(model, PROMPTS, tokenizer, 6)
        assert list(zip(found["prompt_ids"], found["completion_ids"], strict=True)) == wanted
        said.append(found["completion_ids"])
    assert said[0] != said[1]  # or the values would not matter
    assert {id(p) for p in rollouts.engine.model.parameters()} <= parameters  # no copy of the base
    assert len(rollouts.engine.pool) == 0  # no earlier adapter stays


def test_a_run_with_engine_rollouts(tmp_path, monkeypatch, engine):
    fakes.folder(fakes.llama(), tmp_path / "llama")
    rows = [{"prompt": f"turn the light {x}"} for x in ("on", "off", "in", "for")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "engine_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def settings(out, **changes):
        base = {
            "model": str(tmp_path / "llama"), "task": "grpo", "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / out),
            "lr": 0.1, "batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 4, "save_steps": 2,
            "device": "cpu", "preview": 0, "reward": ["engine_rewards:letters"], "rollouts": "engine",
        }  # fmt: skip
        return TrainSettings(**(base | changes))

    assert train(settings("run", max_steps=2, lr_scheduler="constant"), VERA).steps == 2
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert any(entry.get("reward", 0) > 0 for entry in history)
    with pytest.raises(ConfigError, match="the engine serves adapters of method 'vera'"):
        train(
            settings("lora", method="peft:lora", options={"r": 2}),
            vt.VeraConfig(targets=("query",)),
        )


def test_the_engine_must_be_known():
    with pytest.raises(ConfigError, match=r"engine after a call of veratune.fleet.rollouts"):
        Grpo(rollouts="engine")
    with pytest.raises(ConfigError, match="rollouts is 'vllm'"):
        Grpo(rollouts="vllm")
