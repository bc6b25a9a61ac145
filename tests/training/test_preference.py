"""Preference and reward runs: every loss from rows to an adapter file."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, UnsupportedError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate, evaluate_with_base
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytest.importorskip("trl", reason="needs trl (the extra post)")
pytestmark = pytest.mark.filterwarnings("ignore")
VERA = vt.VeraConfig(rank=8, targets=("query", "value"))
PAIRS = [
    {"prompt": f"turn the light {x}", "chosen": f"please {x}", "rejected": f"awful {y}"}
    for x in ("on", "off", "in kitchen", "for minutes")
    for y in ("movie",)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("place")
    fakes.folder(fakes.llama(), out / "llama")
    write(out / "pairs", PAIRS)
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in PAIRS
        for side in ("chosen", "rejected")
    ]
    write(out / "labelled", rows)
    return out


def write(folder: Path, rows: list[dict]) -> None:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def settings(place, out, data="pairs", **changes):
    base = {
        "model": str(place / "llama"), "task": "preference", "data": str(place / data), "out": str(out),
        "lr": 0.05, "batch_size": 2, "epochs": 3, "max_length": 64, "device": "cpu", "preview": 0,
    }  # fmt: skip
    return TrainSettings(**(base | changes))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto", "simpo"])
def test_every_loss_learns_the_pairs(loss, place, tmp_path):
    result = train(settings(place, tmp_path / "run", loss=loss, epochs=4, save_steps=8), VERA)
    adapter = native.read(result.path)
    assert adapter.task["name"] == "preference"
    assert adapter.task["loss"] == loss
    assert result.trained == adapter.trained_values
    assert result.after["rewards/margins"] > result.before["rewards/margins"]
    assert result.after["win_rate"] >= result.before["win_rate"]
    assert result.after["loss"] < result.before["loss"]
    loaded = load_with_adapter(str(place / "llama"), result.path, device="cpu")
    base, after = evaluate_with_base(loaded, str(place / "pairs"))
    assert base["win_rate"] == result.before["win_rate"]
    assert after["win_rate"] == result.after["win_rate"]


def test_dpo_starts_at_log_2_for_every_method_and_reference(place, tmp_path):
    once = {"max_steps": 1, "keep": "last"}
    train(settings(place, tmp_path / "sft", **once | {"max_steps": 4}), VERA)
    start = str(tmp_path / "sft" / "adapter.safetensors")
    runs = {
        "vera": ({}, VERA),
        "lora": ({"method": "peft:lora", "options": {"r": 4}}, vt.VeraConfig(targets=VERA.targets)),
        "start": ({"start_adapter": start, "reference": "start"}, vt.VeraConfig()),
    }
    for name, (changes, config) in runs.items():
        result = train(settings(place, tmp_path / name, **once | changes), config)
        assert result.before["loss"] == pytest.approx(math.log(2), abs=1e-4), name
        assert result.loss == pytest.approx(math.log(2), abs=1e-4), name
    away = train(settings(place, tmp_path / "base", start_adapter=start, **once), vt.VeraConfig())
    assert abs(away.before["loss"] - math.log(2)) > 1e-3  # it has left the base model already


def test_kto_takes_labelled_completions(place, tmp_path):
    result = train(settings(place, tmp_path / "run", "labelled", loss="kto"), VERA)
    assert result.after["loss"] < result.before["loss"]
    assert "win_rate" not in result.after


def test_a_run_is_resumed_to_the_same_bits(place, tmp_path):
    whole = train(settings(place, tmp_path / "whole", keep="last"), VERA)
    cut = tmp_path / "cut"
    train(settings(place, cut, keep="last", epochs=3), VERA)
    for path in ("adapter.safetensors", "results.json"):
        (cut / path).unlink()
    last = max((cut / "checkpoints").iterdir(), key=lambda p: int(p.name.rsplit("-")[-1]))
    (last / "trainer_state.json").unlink()  # as if the run had been cut off while writing it
    resumed = train(settings(place, cut, keep="last", resume=True), VERA)
    assert Path(resumed.path).read_bytes() == Path(whole.path).read_bytes()
    assert resumed.before == whole.before


def test_reward_model(place, tmp_path):
    result = train(settings(place, tmp_path / "run", task="reward", epochs=10, head_lr=5e-2), VERA)
    assert result.head == 32
    assert result.after["accuracy"] == 1.0 >= result.before["accuracy"]
    loaded = load_with_adapter(str(place / "llama"), result.path, device="cpu")
    scores = evaluate(loaded, str(place / "pairs"), batch_size=3)
    assert scores["accuracy"] == result.after["accuracy"]
    assert scores["margin"] == pytest.approx(result.after["margin"], rel=1e-4)


def test_a_start_adapter_is_where_training_begins(place, tmp_path):
    first = train(settings(place, tmp_path / "one"), VERA)
    again = train(
        settings(place, tmp_path / "two", start_adapter=first.path, lr=1e-9, max_steps=1),
        vt.VeraConfig(),
    )
    one, two = native.read(first.path), native.read(again.path)
    assert two.config == dataclasses.replace(one.config)
    for name, d in one.d.items():
        torch.testing.assert_close(two.d[name], d, atol=1e-6, rtol=0)


def test_settings_that_do_not_fit_are_refused(place, tmp_path):
    refusals = [
        ({"loss": "orpo", "reference": "base"}, "has none"),
        ({"simpo_gamma": 1.0}, "simpo_gamma is set"),
        ({"beta": -1.0}, "over 0"),
        ({"loss": "kto", "batch_size": 1}, "at least 2"),
        ({"loss": "kto", "group_by_length": True}, "group_by_length"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"reference": "start"}, "no --start-adapter"),
        ({"start_adapter": "x", "method": "bitfit"}, "starts from no adapter"),
        ({"task": "reward", "loss": "dpo"}, "does not take it"),
    ]
    for changes, message in refusals:
        with pytest.raises(ConfigError, match=message):
            train(settings(place, tmp_path / "run", **changes), VERA)
    with pytest.raises(UnsupportedError, match="lm_head"):
        train(
            settings(place, tmp_path / "head"),
            dataclasses.replace(VERA, targets=("query", "lm_head")),
        )
