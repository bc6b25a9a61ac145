"""Settings that a method does not read, columns that a task does not read, ranks beyond memory."""

import warnings

import pytest
from datasets import Dataset
from torch import nn

from tests import fakes
from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.tasks.text.classification import TextClassification
from veratune.training.arguments import training_arguments
from veratune.training.methods import build_method
from veratune.training.prepare import (
    EncodedData,
    check_method_settings,
    fields_used,
    load_data,
    load_model,
)
from veratune.training.settings import TrainSettings


def settings(**changes):
    base = {"model": "m", "task": "text-classification", "data": "d", "out": "o"}
    return TrainSettings(**(base | changes))


@pytest.mark.parametrize(
    ("method", "vera", "message"),
    [
        ("peft:lora", {"rank": 8}, r"--rank is set, but method 'peft:lora' does not read it \(its"),
        ("full", {"targets": ("query",)}, "--targets is set, but method 'full' does not read it"),
        ("houlsby", {"targets": ("query",)}, "--targets is set, but method 'houlsby'"),
        ("bitfit", {"d_init": 0.5}, "--d-init is set, but method 'bitfit' does not read it"),
        ("dylora", {"init": "uniform"}, "--init is set, but method 'dylora' does not read it"),
    ],
)
def test_settings_that_a_method_does_not_read_are_refused(method, vera, message):
    with pytest.raises(ConfigError, match=message):
        check_method_settings(settings(method=method), VeraConfig(**vera))


def test_settings_that_a_method_reads_are_taken():
    config = VeraConfig(targets=("query",), exclude=("re:.*0.*",), layers=(1,))
    check_method_settings(settings(method="peft:lora"), config)
    check_method_settings(settings(method="vera"), VeraConfig(rank=8, d_init=0.5))
    check_method_settings(settings(method="full"), VeraConfig(seed=3))
    with pytest.raises(ConfigError, match="--basis-seed is set, but method 'full' has no basis"):
        check_method_settings(settings(method="full", basis_seed=1), VeraConfig())
    assert fields_used("vera") > fields_used("peft:lora") > fields_used("full")


def test_the_best_adapter_needs_evaluation_data():
    task = TextClassification(labels=["a", "b"])
    with pytest.raises(ConfigError, match="keep is 'best', but there is no evaluation data"):
        training_arguments(settings(keep="best"), task, evaluates=False)
    plain = {"device": "cpu", "report_to": []}
    assert not training_arguments(settings(**plain), task, False).load_best_model_at_end
    assert training_arguments(settings(**plain), task, True).load_best_model_at_end
    assert not training_arguments(settings(**plain, ema=0.9), task, True).load_best_model_at_end


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train.csv").write_text("text,label,note,id\ngood,1,x,1\nbad,0,y,2\n")
    return {"model": fakes.folder(fakes.bert(), tmp_path / "bert"), "data": str(tmp_path)}


def test_columns_that_nothing_reads_are_said_in_one_line(data):
    task = TextClassification()
    with pytest.warns(UserWarning, match="reads the columns label, text, not note, id; give a"):
        load_data(settings(**data), task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(settings(**data, ignore_columns=["note", "id"]), task)
    with pytest.raises(ConfigError, match="--ignore-columns names 'nota'.*did you mean 'note'"):
        load_data(settings(**data, ignore_columns=["nota"]), task)
    with pytest.raises(ConfigError, match="--ignore-columns names 'text', which task"):
        load_data(settings(**data, ignore_columns=["text"]), task)


def test_a_head_rate_without_a_head_is_refused():
    class Headless(TextClassification):
        def load_model(self, model, processor, **options):
            return fakes.bert()

        def init_head(self, model, encoded):
            pass

        def heads(self, model):
            return ()

    run, vera = settings(head_lr=0.1), VeraConfig(rank=2)
    nothing = EncodedData(None, Dataset.from_dict({}), None, None)
    with pytest.raises(ConfigError, match="--head-lr is set, but task .* trains no head"):
        load_model(run, vera, Headless(labels=["a"]), build_method("vera", vera, {}), nothing)


def test_a_rank_beyond_memory_is_refused():
    method = build_method("vera", VeraConfig(rank=10**8, targets=("query",)), {})
    with pytest.raises(ConfigError, match="rank 100,000,000 needs 23.8 GiB|needs .* GiB for A and"):
        method.prepare(fakes.bert(), (), {})


def test_bitfit_without_biases_is_refused():
    with pytest.raises(ConfigError, match="Linear has no biases, so method 'bitfit'"):
        build_method("bitfit", VeraConfig(), {}).prepare(nn.Linear(2, 2, bias=False), (), {})
