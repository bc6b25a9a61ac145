import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

import veratune as vt
from veratune.errors import DivergedError, UnsupportedError
from veratune.training.methods import LearningRates, VeraMethod
from veratune.training.trainer import VeraTrainer


class Reader(nn.Module):
    """Calls one of its layers and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x, labels=None):
        y = nn.functional.linear(self.called(x), self.read.weight)
        return {"loss": (y - labels[:, None]).square().mean(), "logits": y}


class Idle(nn.Module):
    """Calls one of its layers and never the other."""

    def __init__(self):
        super().__init__()
        self.called, self.idle = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x, labels=None):
        y = self.called(x)
        return {"loss": (y - labels[:, None]).square().mean(), "logits": y}


def trainer(model, folder, **more):
    rows = Dataset.from_dict({"x": torch.randn(4, 4).tolist(), "labels": [0.0, 1.0, 0.0, 1.0]})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )
    method = VeraMethod(vt.VeraConfig())
    return VeraTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        method=method,
        rates=LearningRates(0.1, 0.1),
        loss_per_token=False,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_layer_that_is_passed_by_is_named(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(UnsupportedError, match="'read' cannot be adapted: Reader.forward reads"):
        vt.attach(Reader(), vt.VeraConfig(rank=2, targets=["called", "read"]))
    model = vt.attach(Idle(), vt.VeraConfig(rank=2, targets=["called", "idle"]))
    with pytest.warns(
        UserWarning, match="1 adapted layers, the first 'idle', took no part in the first step"
    ):
        trainer(model, tmp_path).train()
    model = vt.attach(Reader(), vt.VeraConfig(rank=2, targets=["called"]))
    before = vt.extract(model).b["called"].clone()
    trainer(model, tmp_path).train()  # no warning: warnings are errors here
    assert not torch.equal(vt.extract(model).b["called"], before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = vt.attach(Reader(), vt.VeraConfig(rank=2, targets=["called"]))
    run = trainer(model, tmp_path)
    run.train_dataset = Dataset.from_dict({"x": [[1.0] * 4] * 4, "labels": [float("inf")] * 4})
    with pytest.raises(DivergedError, match="the loss of step 1 is inf at a learning rate of 0.1"):
        run.train()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("warmup", [0.06, 1, 5])
def test_a_single_step_trains_whatever_the_warm_up(warmup, tmp_path):
    model = vt.attach(Reader(), vt.VeraConfig(rank=2, targets=["called"]))
    before = vt.extract(model).b["called"].clone()
    trainer(model, tmp_path, warmup_steps=warmup).train()
    assert not torch.equal(vt.extract(model).b["called"], before)
