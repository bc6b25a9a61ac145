"""GRPO runs: rewards from flags to an adapter file."""

import json

import pytest
from transformers import TrainerState

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, DataError, RewardError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.training.callbacks import FlatRewardWarning
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytest.importorskip("trl", reason="needs trl (the extra post)")
pytestmark = pytest.mark.filterwarnings("ignore")
VERA = vt.VeraConfig(rank=8, targets=("query", "value"))
MODULE = """
def letters(completions, **kwargs):
    return [sum(c in "abcdefghijklm" for c in x[-1]["content"]) / 8 for x in completions]

def broken(completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("place")
    fakes.folder(fakes.llama(), out / "llama")
    (out / "data").mkdir()
    rows = [{"prompt": f"turn the light {x}", "answer": x} for x in ("on", "off", "in", "for")]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "data" / f"{split}.jsonl").write_text(text)
    return out


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "grpo_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def settings(place, out, **changes):
    base = {
        "model": str(place / "llama"), "task": "grpo", "data": str(place / "data"), "out": str(out), "lr": 0.1,
        "batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 6, "save_steps": 3,
        "device": "cpu", "preview": 0, "reward": ["grpo_rewards:letters"],
    }  # fmt: skip
    return TrainSettings(**(base | changes))


def test_a_run_learns_from_a_function_and_shipped_rewards(place, tmp_path):
    changes = {"reward": ["grpo_rewards:letters", "regex"], "reward_weights": [1.0, 0.5]}
    options = {"reward_options": {"pattern": "[a-z ]*"}, "beta": 0.01}
    result = train(settings(place, tmp_path / "run", **changes, **options), VERA)
    assert result.trained == native.read(result.path).trained_values
    assert set(result.after) == {"reward", "rewards/grpo_rewards:letters", "rewards/regex"}
    assert result.after["reward"] == pytest.approx(
        result.after["rewards/grpo_rewards:letters"] + 0.5 * result.after["rewards/regex"]
    )
    task = native.read(result.path).task
    assert task["reward"] == ["regex"]  # a file must not name code that reading it would import
    assert task["reward_weights"] == [0.5]
    loaded = load_with_adapter(str(place / "llama"), result.path, device="cpu")
    scores = evaluate(loaded, str(place / "data"))
    assert scores["rewards/regex"] == result.after["rewards/regex"]


def test_a_run_is_resumed(place, tmp_path):
    whole = train(settings(place, tmp_path / "whole", keep="last"), VERA)
    cut = tmp_path / "cut"
    train(settings(place, cut, keep="last"), VERA)
    (cut / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = train(settings(place, cut, keep="last", resume=True), VERA)
    assert resumed.steps == whole.steps == 6
    assert resumed.before == whole.before


def test_a_reward_that_fails_stops_the_run_or_is_skipped(place, tmp_path):
    both = {"reward": ["grpo_rewards:letters", "grpo_rewards:broken"], "max_steps": 1}
    with pytest.raises(RewardError, match=r"'grpo_rewards:broken' returned nan for the completion"):
        train(settings(place, tmp_path / "stop", **both), VERA)
    with pytest.warns(UserWarning, match="counts as no reward"):
        train(settings(place, tmp_path / "skip", on_reward_error="skip", **both), VERA)


def test_what_does_not_fit_is_refused(place, tmp_path):
    refusals = [
        ({"reward": None}, ConfigError, "has no reward"),
        ({"reward": ["exact-mach"]}, ConfigError, "exact-match"),
        ({"reward": ["regex"]}, DataError, "reads the column 'pattern'"),
        ({"reward": ["exact-match"], "reward_options": {"answer": "x"}}, DataError, "column"),
        ({"batch_size": 6}, ConfigError, "a multiple of num_generations = 4"),
        ({"num_generations": 1}, ConfigError, "at least 2"),
        ({"reward_weights": [1.0, 2.0]}, ConfigError, "2 values for 1 rewards"),
        ({"temperature": 0.0}, ConfigError, "over 0"),
        ({"on_overflow": "truncate"}, ConfigError, "use drop"),
        ({"on_overflow": "fail", "max_length": 3}, DataError, "row 0"),
        ({"method": "bitfit", "beta": 0.1}, ConfigError, "no reference policy"),
    ]
    for changes, error, message in refusals:
        plain = vt.VeraConfig() if "method" in changes else VERA
        with pytest.raises(error, match=message):
            train(settings(place, tmp_path / "run", **changes), plain)


def test_eval_does_not_import_a_reward_that_a_file_names(place, tmp_path):
    result = train(settings(place, tmp_path / "run", max_steps=1), VERA)
    loaded = load_with_adapter(str(place / "llama"), result.path, device="cpu")
    with pytest.raises(ConfigError, match="reading a file must not import code"):
        evaluate(loaded, str(place / "data"))


def test_rewards_that_never_differ_are_reported(place, tmp_path, monkeypatch):
    monkeypatch.setattr("veratune.training.callbacks.FLAT_STEPS", 2)
    changes = {"reward": ["regex"], "reward_options": {"pattern": "[0-9]{9}"}, "max_steps": 2}
    with pytest.warns(UserWarning, match="in 2 steps in a row, all completions of each prompt"):
        train(settings(place, tmp_path / "run", **changes), VERA)


def test_one_step_of_different_rewards_starts_the_count_again():
    state, warning = TrainerState(is_world_process_zero=True), FlatRewardWarning()
    for flat in (1.0,) * 9 + (0.5,) + (1.0,) * 9:
        warning.on_log(None, state, None, {"frac_reward_zero_std": flat})
    assert warning.flat == 9
