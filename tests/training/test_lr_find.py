import json

import numpy as np
import pytest

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, OutputError
from veratune.training.lr_find import HIGHEST, LOWEST, LR_FILE, choose_lr, find_lr, stored_lr
from veratune.training.settings import TrainSettings

RATES = [float(rate) for rate in np.geomspace(LOWEST, HIGHEST, 40)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lr")
    (folder / "rows.jsonl").write_text('{"prompt": "turn", "completion": "light on"}\n' * 8)
    return TrainSettings(
        model=fakes.folder(fakes.llama(), folder / "model"), task="instruction", data=str(folder / "rows.jsonl"),
        out=str(folder / "run"), batch_size=4, max_length=64, device="cpu", preview=0, find_lr=True,
    )  # fmt: skip


def test_the_chosen_rate_is_where_the_loss_falls_fastest():
    losses = [5 - 3 / (1 + np.exp(-4 * np.log(rate / 1e-2))) for rate in RATES]
    found = choose_lr(RATES, losses)
    assert 1e-2 < found.lr < 4e-2  # the moving average lags behind the steepest step at 1e-2
    risen = [*losses[:35], *(20.0 * (i + 1) for i in range(5))]
    assert choose_lr(RATES, risen).lr == found.lr


def test_noise_at_low_rates_is_not_taken_for_progress():
    losses = [1.0 + 0.1 * (-1) ** i for i in range(25)] + [1.0 - 0.06 * i for i in range(15)]
    assert choose_lr(RATES, losses).lr > RATES[24]


def test_a_fall_within_the_noise_is_refused_and_early_noise_is_not_chosen():
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.5, len(RATES))
    with pytest.raises(ConfigError, match="that is noise; set --lr, or give a larger --batch-size"):
        choose_lr(RATES, list(1.0 + 0.1 * noise))
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.5, len(RATES))
        curve = [3 - 2.5 / (1 + np.exp(-4 * np.log(rate / 3e-2))) for rate in RATES]
        assert choose_lr(RATES, list(np.array(curve) + noise)).lr > 1e-3


def test_a_head_learns_alone_before_the_range_test(tmp_path):
    rows = "".join(json.dumps({"text": t, "label": t}) + "\n" for t in ("on", "off") * 8)
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = TrainSettings(
        model=fakes.folder(fakes.llama(), tmp_path / "model"), task="text-classification",
        data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "run"), batch_size=4, device="cpu", preview=0, find_lr=True,
    )  # fmt: skip
    found = find_lr(settings, vt.VeraConfig(rank=4), steps=8)
    np.testing.assert_allclose(found.rates, np.geomspace(LOWEST, HIGHEST, 8)[: len(found.rates)])
    assert found.losses[0] < 0.5 * np.log(2)  # the head has learned before the first rate


def test_a_loss_that_never_falls_is_refused():
    with pytest.raises(ConfigError, match="found no learning rate between 1e-05 and 1"):
        choose_lr(RATES, [1.0 + rate for rate in RATES])
    with pytest.raises(ConfigError, match="found no learning rate"):
        choose_lr(RATES[:2], [2.0, 1.0])


def test_a_range_test_on_a_model(settings, tmp_path):
    found = find_lr(settings, vt.VeraConfig(rank=4), steps=14)
    assert LOWEST < found.lr <= HIGHEST
    np.testing.assert_allclose(found.rates[:2], np.geomspace(LOWEST, HIGHEST, 14)[:2])
    assert min(found.losses) < found.losses[0]
    found.write(tmp_path)
    assert stored_lr(tmp_path) == found.lr == json.loads((tmp_path / LR_FILE).read_text())["lr"]
    assert (tmp_path / "lr-find.png").stat().st_size > 1000


def test_a_resumed_run_wants_the_rate_that_was_found(tmp_path):
    (tmp_path / LR_FILE).write_text("{")
    with pytest.raises(OutputError, match="no readable lr-find.json"):
        stored_lr(tmp_path)
