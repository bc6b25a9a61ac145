import warnings

import pytest
from optuna.trial import FixedTrial
from transformers import TrainerControl, TrainerState

import veratune as vt
from tests import fakes
from veratune.cli.train_ import sweep_grid, with_find_lr
from veratune.errors import ConfigError
from veratune.formats import native
from veratune.training.search import PruningCallback, search
from veratune.training.settings import Range, TrainSettings


def test_a_study_is_resumed_and_the_best_adapter_copied(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "turn", "completion": "light on"}\n' * 4)
    settings = TrainSettings(
        model=fakes.folder(fakes.llama(), tmp_path / "model"), task="instruction", data=str(rows), eval_data=str(rows),
        out=str(tmp_path / "out"), batch_size=4, max_length=64, device="cpu", preview=0, epochs=2,
    )  # fmt: skip
    space = {"lr": Range(1e-4, 1e-1), "rank": [2, 4]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's own
        first = search(settings, vt.VeraConfig(), space, 1)
        both = search(settings, vt.VeraConfig(), space, 2)
    assert len(first) == 1
    assert len(both) == 2
    assert both[0][1].after["loss"] <= both[1][1].after["loss"]
    assert first[0][0] in [chosen for chosen, _ in both]
    best = native.read(tmp_path / "out" / "adapter.safetensors")
    assert best.config.rank == both[0][0]["rank"]
    assert 1e-4 <= both[0][0]["lr"] <= 1e-1


class Pruned(FixedTrial):
    def should_prune(self):
        return True


def test_a_trial_is_pruned_between_the_first_and_the_last_evaluation():
    state, control = TrainerState(max_steps=10), TrainerControl()
    callback = PruningCallback(Pruned({}), "loss")
    for step in (0, 10):
        state.global_step = step
        callback.on_evaluate(None, state, control, {"eval_loss": 1.0})
    assert not callback.pruned
    state.global_step = 5
    callback.on_evaluate(None, state, control, {"eval_loss": 1.0})
    assert callback.pruned
    assert control.should_training_stop


def test_how_a_search_is_written():
    assert sweep_grid("lr=1e-3..1e-1;rank=16..64", ranges=True) == {
        "lr": Range(1e-3, 1e-1),
        "rank": Range(16, 64),
    }
    for text, ranges in [("lr=1e-3..1e-1", False), ("lr=1..0", True), ("lr=a..b", True)]:
        with pytest.raises(ConfigError, match="low..high is wanted, with --sweep-trials"):
            sweep_grid(text, ranges)
    assert with_find_lr(["--lr", "find", "--rank", "4"]) == ["--find-lr", "--rank", "4"]
    assert with_find_lr(["--lr=find"]) == ["--find-lr"]
