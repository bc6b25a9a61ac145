"""What is compared with VeRA trains what it says, and comes back from its file."""

import pytest
import torch
from torch import nn

import veratune as vt
from tests import fakes
from veratune.errors import AdapterFileError, ConfigError
from veratune.training.baselines.registry import BASELINES
from veratune.training.methods import BaselineMethod, VeraMethod, build_method, has_whole_file
from veratune.training.prepare import split_batch_norms
from veratune.training.settings import TrainSettings

EVERY = ("head", "full", "bitfit", "vera", "peft:lora", "peft:vera", *BASELINES)
TARGETS = vt.VeraConfig(rank=4, targets=["query", "value"])


def prepared(name, **peft):
    model = fakes.bert(labels=2)
    method = build_method(name, TARGETS, peft)
    method.prepare(model, ("classifier",), {})
    return model, method


def sizes(model, method):
    return tuple(
        sum(p.numel() for p in found)
        for found in (method.adapter_parameters(model), method.head(model))
    )


def test_each_method_trains_its_own_parameters():
    whole = sum(p.numel() for p in fakes.bert(labels=2).parameters())
    biases = sum(
        p.numel() for n, p in fakes.bert(labels=2).named_parameters() if n.endswith("bias")
    )
    head = 2 * 32 + 2
    assert sizes(*prepared("head")) == (0, head)
    assert sizes(*prepared("full")) == (whole - head, head)
    assert sizes(*prepared("bitfit")) == (biases - 2, head)
    assert sizes(*prepared("vera")) == (4 * (4 + 32), head)
    assert sizes(*prepared("peft:lora", r=3)) == (4 * 3 * (32 + 32), head)
    assert sizes(*prepared("dylora", r=3)) == (4 * 3 * (32 + 32), head)
    assert sizes(*prepared("lora-fa", r=3)) == (4 * 3 * 32, head)
    assert sizes(*prepared("peft:lora", r=3, use_dora=True)) == (
        4 * (3 * (32 + 32) + 32),
        head,
    )  # DoRA: a magnitude for each output
    bottleneck = 2 * 32 * 5 + 32 + 5
    assert sizes(*prepared("houlsby", size=5)) == (4 * bottleneck, head)  # two blocks
    assert sizes(*prepared("pfeiffer", size=5)) == (2 * bottleneck, head)
    assert sizes(*prepared("lin", size=5)) == (2 * (bottleneck + 64), head)
    assert sizes(*prepared("adapterdrop", size=5)) == (bottleneck, head)
    for name in EVERY:
        model, method = prepared(name)
        asked = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert asked == sum(sizes(model, method))


def test_full_leaves_what_came_frozen():
    model = fakes.bert(labels=2)
    model.bert.embeddings.requires_grad_(False)
    BaselineMethod("full", TARGETS, {}).prepare(model, ("classifier",), {})
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in model.bert.encoder.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_what_was_trained_comes_back(tmp_path, name):
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    model, method = prepared(name)
    model.eval()
    with torch.no_grad():
        for parameter in (*method.adapter_parameters(model), *method.head(model)):
            parameter.add_(torch.randn_like(parameter))
    size = method.write(model, tmp_path)
    assert size == (tmp_path / method.file).stat().st_size
    assert has_whole_file(method, tmp_path)
    other, again = prepared(name)
    other.eval()
    assert not torch.allclose(other(**inputs).logits, model(**inputs).logits)
    again.read(other, tmp_path)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    (tmp_path / method.file).write_bytes((tmp_path / method.file).read_bytes()[:50])
    assert not has_whole_file(method, tmp_path)


def test_batch_statistics_go_with_the_head(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, method = net(), BaselineMethod("head", TARGETS, {})
    method.prepare(model, ("1", "2"), {})
    model(torch.randn(16, 3) + 5)
    method.write(model, tmp_path)
    other = net()
    again = BaselineMethod("head", TARGETS, {})
    again.prepare(other, ("1", "2"), {})
    again.read(other, tmp_path)
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert model[1].running_mean.abs().sum() > 0


def test_mistakes():
    with pytest.raises(ConfigError, match="unknown method 'veraa'.*did you mean 'vera'"):
        build_method("veraa", TARGETS, {})
    with pytest.raises(ConfigError, match="PEFT has no method 'lorra'; did you mean"):
        prepared("peft:lorra")
    with pytest.raises(ConfigError, match="PEFT refuses peft:lora with"):
        prepared("peft:lora", nonsense=1)
    with pytest.raises(ConfigError, match="method is 'head', but the task has no output"):
        BaselineMethod("head", TARGETS, {}).prepare(fakes.bert(), (), {})


def test_a_file_of_another_model_is_refused(tmp_path):
    model, method = prepared("peft:lora", r=3)
    method.write(model, tmp_path)
    other, again = prepared("peft:lora", r=2)
    with pytest.raises(
        AdapterFileError, match="its tensors are not those that peft:lora trains on this model"
    ):
        again.read(other, tmp_path)


def test_vera_stores_the_adapter_itself(tmp_path):
    model, method = prepared("vera")
    assert isinstance(method, VeraMethod)
    method.write(model, tmp_path)
    vt.load(fakes.bert(labels=2), tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("method", "at_head"), [("full", ()), ("vera", ("bn",)), ("head", ("bn",))]
)
def test_batch_normalisation_learns_with_the_head_but_in_full_fine_tuning(method, at_head):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "bn": nn.BatchNorm1d(2), "c": nn.Linear(2, 2)})
    settings = TrainSettings(
        model="m", task="t", data="d", out="o", method=method, batch_norm="train"
    )
    heads, frozen_norms = split_batch_norms(settings, model, ("c",))
    assert (heads, frozen_norms) == (("c", *at_head), [])
    frozen = TrainSettings(
        model="m", task="t", data="d", out="o", method=method, batch_norm="frozen"
    )
    assert split_batch_norms(frozen, model, ("c",)) == (("c",), [model["bn"]])
