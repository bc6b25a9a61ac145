import json

import pytest
import torch
import transformers as hf
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, UnsupportedError
from veratune.training.packing import PackedDataset, PackingCollator, best_fit, check_packing
from veratune.training.run import train
from veratune.training.settings import TrainSettings

TINY = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2,
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **HEADS)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TINY, **HEADS, head_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
    ),
    "sliding window": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**TINY, **HEADS, sliding_window=4)
    ),
}


def examples(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(3, 13, (count,), generator=generator).tolist():
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def token_losses(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@given(st.lists(st.integers(1, 40), max_size=60))
def test_every_example_is_in_one_bin_and_no_bin_is_over_full(lengths):
    bins = best_fit(lengths, 40)
    assert sorted(index for found in bins for index in found) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in found) <= 40 for found in bins)
    # No two bins would fit into one: their sums are over the capacity.
    sums = sorted(sum(lengths[i] for i in found) for found in bins)
    assert len(sums) < 2 or sums[0] + sums[1] > 40


def test_an_example_longer_than_a_bin_is_refused():
    with pytest.raises(ConfigError, match="example 1 has 9 tokens, but a packed row holds 8"):
        best_fit([3, 9], 8)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_example_has_the_loss_that_it_has_alone(kind, implementation):
    model = fakes.seeded(MODELS[kind]).eval()
    model.set_attn_implementation(implementation)
    vt.attach(model, vt.VeraConfig(rank=4, targets=("all-linear",)), name="a")
    fakes.scramble(model, "a")
    check_packing(model)
    rows = examples()
    packed = PackedDataset(Dataset.from_list(rows), 24)
    assert max(len(found) for found in packed.bins) > 1
    batch = PackingCollator(0)([packed[i] for i in range(len(packed))])
    losses = token_losses(model, batch)
    for number, found in enumerate(packed.bins):
        at = 0
        for i in found:
            alone = token_losses(model, {k: torch.tensor([v]) for k, v in rows[i].items()})
            length = len(rows[i]["input_ids"])
            torch.testing.assert_close(
                losses[number, at : at + length], alone[0], rtol=1e-5, atol=1e-5
            )
            at += length


def test_a_batch_packed_within_itself_has_the_loss_of_the_padded_batch():
    model = fakes.seeded(MODELS["llama"]).eval()
    rows = examples(16)
    packed = PackingCollator(0)(rows)
    assert packed["input_ids"].shape[0] < len(rows)
    assert (packed["position_ids"] == 0).sum() >= len(rows)
    width = max(len(row["input_ids"]) for row in rows)
    padded = {
        "input_ids": torch.tensor(
            [r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows]
        ),
        "labels": torch.tensor([r["labels"] + [-100] * (width - len(r["labels"])) for r in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(r["labels"]) + [0] * (width - len(r["labels"])) for r in rows]
        ),
    }
    assert (packed["labels"] != -100).sum() == (padded["labels"] != -100).sum()
    torch.testing.assert_close(
        model(**packed, use_cache=False).loss, model(**padded).loss, rtol=1e-5, atol=1e-5
    )


def test_flash_attention_gets_one_row_with_its_boundaries():
    batch = PackingCollator(0, flatten=True)(examples(3))
    lengths = sorted(len(row["input_ids"]) for row in examples(3))
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert sorted(batch["cu_seq_lens_q"].diff().tolist()) == lengths
    assert batch["max_length_q"] == lengths[-1]
    assert "attention_mask" not in batch


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: hf.MambaForCausalLM(
                hf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
            ),
            "MambaForCausalLM takes no position_ids",
        ),
        (
            lambda: hf.BloomForCausalLM(
                hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
            ),
            "BloomForCausalLM takes no position_ids",
        ),
        (
            lambda: hf.Qwen3NextForCausalLM(
                hf.Qwen3NextConfig(
                    **TINY,
                    **HEADS,
                    head_dim=8,
                    linear_num_key_heads=2,
                    linear_num_value_heads=2,
                    linear_key_head_dim=8,
                    linear_value_head_dim=8,
                    num_experts=2,
                    num_experts_per_tok=1,
                    moe_intermediate_size=16,
                    shared_expert_intermediate_size=16,
                    layer_types=["linear_attention", "full_attention"],
                )
            ),
            "Qwen3NextForCausalLM mixes packed examples",
        ),
    ],
)
def test_a_model_that_cannot_keep_examples_apart_is_refused(model, message):
    with pytest.raises(UnsupportedError, match=message):
        check_packing(fakes.seeded(model))


def rows_file(path):
    words = ["turn", "the light on", "off please", "turn the light off please " * 3]
    rows = [{"prompt": words[i % 4], "completion": words[(i * 3 + 1) % 4]} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def run(tmp_path, name, **options):
    model = fakes.folder(fakes.llama(), tmp_path / "model")
    data = rows_file(tmp_path / "rows.jsonl")
    settings = TrainSettings(
        model=model, task="instruction", data=data, eval_data=data, out=str(tmp_path / name), batch_size=8,
        device="cpu", preview=0, max_length=96, **{"epochs": 1, **options},
    )  # fmt: skip
    return train(settings, vt.VeraConfig(rank=4))


def test_a_padding_free_run_is_the_padded_run(tmp_path):
    padded, free = run(tmp_path, "padded"), run(tmp_path, "free", padding_free=True)
    assert free.steps == padded.steps == 3
    assert free.before == padded.before
    assert free.loss == pytest.approx(padded.loss, rel=1e-5)
    assert free.after["loss"] == pytest.approx(padded.after["loss"], rel=1e-4)


def test_a_packed_run_has_fewer_steps_and_learns(tmp_path):
    packed = run(tmp_path, "packed", packing=True, attn_implementation="eager", epochs=4)
    assert packed.steps == 4  # of rows of several examples; one pass over the padded ones has 3
    assert packed.after["loss"] < packed.before["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True, "padding_free": True}, "leave out padding_free"),
        ({"packing": True, "group_by_length": True}, "group_by_length saves padding"),
        ({"packing": True, "task": "causal-lm"}, "examples of task 'causal-lm' are not packed"),
        ({"mixed_precision": "fp16"}, "'fp16', which needs a GPU"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, options, message):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "turn the light on", "prompt": "turn", "completion": "on"}\n')
    model = fakes.folder(fakes.llama(), tmp_path / "model")
    given = {"task": "instruction", "data": str(data), "model": model, "device": "cpu", **options}
    unread = ["text"] if given["task"] == "instruction" else ["prompt", "completion"]
    given["ignore_columns"] = unread
    with pytest.raises(ConfigError, match=message):
        train(TrainSettings(out=str(tmp_path / "run"), **given), vt.VeraConfig(rank=2))
