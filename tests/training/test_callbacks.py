from types import SimpleNamespace

import pytest
import torch
from torch import nn

from veratune.errors import ConfigError
from veratune.training.callbacks import EMACallback
from veratune.training.settings import TrainSettings


def test_the_average_is_the_formula_and_survives_a_checkpoint(tmp_path):
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    start = model.weight.detach().clone()
    average, wanted = EMACallback(model, 0.9), start.clone()
    for step in range(1, 4):
        with torch.no_grad():
            model.weight += 1
        average.on_step_end(None, None, None)
        wanted = 0.9 * wanted + 0.1 * (start + step)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    average.on_save(SimpleNamespace(output_dir=tmp_path), state, None)
    resumed = EMACallback(model, 0.9, tmp_path / "checkpoint-3")
    resumed.on_train_end(None, None, None)
    torch.testing.assert_close(model.weight.detach(), wanted)


def test_it_is_no_companion_of_the_best_step():
    run = {"model": "m", "task": "t", "data": "d", "out": "o"}
    with pytest.raises(
        ConfigError, match="ema keeps an average of all steps, keep='best' one of them"
    ):
        TrainSettings(**run, ema=0.9, keep="best")
    with pytest.raises(ConfigError, match="ema is 1.0; it is a decay"):
        TrainSettings(**run, ema=1.0, keep="last")
