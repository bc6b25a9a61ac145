"""The report's counts, exactly, and the definition that it should have had."""

import pytest
import torch
from torch import nn

import veratune as vt
from veratune.config import VeraConfig
from veratune.training.methods import BaselineMethod, VeraMethod
from veratune_lab.paper.conv import BLOCKS, FIFTY, PRINTED, RANK, REPORT, ConvMnist, Loralib, _full
from veratune_lab.paper.networks import Classifier, ResNet

SIDES = VeraConfig(rank=RANK, targets=(BLOCKS,), conv_layout="loralib")


def heads(model):
    return tuple(f"net.{path}" for path in _full(model.net))


def trained(method):
    model = Classifier(
        ResNet(REPORT, 10, shifts=not isinstance(method, BaselineMethod) or method.method != "full")
    )
    method.prepare(model, heads(model), {})
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(
        p.numel() for p in method.adapter_parameters(model)
    )


def test_the_reports_three_counts_and_its_adapters():
    printed = PRINTED["conv-mnist"]
    assert (
        trained(BaselineMethod("full", SIDES, {}))[0] == printed["Fully Trained"][0] == 15_434_314
    )
    assert trained(VeraMethod(SIDES)) == (printed["VeRA"][0], 19_164) == (2_868_390, 19_164)
    assert trained(Loralib(SIDES, RANK)) == (printed["LoRA"][0], 257_280) == (3_106_506, 257_280)


def test_all_convolutions_of_a_resnet_50():
    whole = VeraConfig(rank=RANK, targets=("all-conv",), conv_layout="loralib")
    model = vt.attach(Classifier(ResNet(FIFTY)), whole)
    assert vt.count_trained(model, "default") == 34_860
    assert len(vt.extract(model).shapes) == 53
    other, lora = Classifier(ResNet(FIFTY)), Loralib(whole, RANK)
    lora.prepare(other, ("net.fc",), {})
    assert sum(p.numel() for p in lora.adapter_parameters(other)) == 450_892


def test_a_lora_of_zeros_has_no_gradient_and_one_at_random_has():
    x = torch.randn(2, 3, 32, 32)
    for zeros in (True, False):
        model, method = Classifier(ResNet((1, 1, 1, 1))), Loralib(SIDES, RANK, zeros)
        plain = model.eval()(x)["logits"]
        method.prepare(model, ("net.fc",), {})
        assert torch.equal(model(x)["logits"], plain)
        model(x)["logits"].square().sum().backward()
        moved = [p for p in method.adapter_parameters(model) if p.grad is not None and p.grad.any()]
        assert bool(moved) == (not zeros)


def test_the_page_says_what_was_run():
    line = {
        "cell": "report: VeRA", "trained": 19_164, "head": 2_849_226, "after": {"accuracy": 0.5}, "wall_seconds": 60.0, "device": "x86",
        "threads": 2, "torch": "2", "transformers": "5", "scale": "quick", "seed": 0,
    }  # fmt: skip
    page = ConvMnist().page([line], "quick")
    assert "| report: VeRA | 2,868,390 | 2,868,390 | 19,164 | 50.0 | 95.55 |" in page
    assert "960 of the training and 320 of the test images" in page
    assert "not run" in page


def test_shifts_are_the_biases_that_loralib_adds():
    added = sum(p.numel() for p in ResNet(REPORT, 10, True).parameters()) - 15_434_314
    assert added == sum(
        m.out_channels
        for n, m in ResNet(REPORT, 10).named_modules()
        if isinstance(m, nn.Conv2d) and n[-5:-1] == "conv" and "blocks" in n
    )


@pytest.mark.parametrize("blocks", [REPORT, FIFTY])
def test_it_computes_for_any_side(blocks):
    net = ResNet(blocks).eval()
    assert net(torch.zeros(1, 3, 32, 32)).shape == net(torch.zeros(1, 3, 70, 64)).shape == (1, 10)
