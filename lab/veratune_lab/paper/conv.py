"""conv-mnist and conv-intel: the report "VeRA on Images" (ResNet on MNIST and Intel scenes), as it was counted and as VeRA is.

The report trains a ResNet from scratch with its convolutions frozen and adapted. Its network has bottleneck blocks (3, 3, 3, 2), ten
outputs, and biases behind the adapted convolutions; stem, shortcuts, batch normalisation, biases and the last layer are trained in
full. Its LoRA started with A = B = 0, which gives no gradient: those rows are a control with frozen convolutions.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from veratune.config import VeraConfig
from veratune.training.methods import BaselineMethod, Method
from veratune_lab.paper.experiment import (
    Cell,
    Experiment,
    Line,
    Place,
    Scale,
    fine_tune,
    measured_on,
    spread,
    table,
)
from veratune_lab.paper.nets import NetworkTask
from veratune_lab.paper.networks import ResNet, Shift

REPORT, FIFTY = (3, 3, 3, 2), (3, 4, 6, 3)
RANK = 4
BLOCKS = "re:net\\.blocks\\..*conv[123]"
METHODS = {
    # name: (network, what is trained, the report's name for it)
    "report: full": (REPORT, "full", "Fully Trained"),
    "report: VeRA": (REPORT, "vera", "VeRA"),
    "report: LoRA of zeros (frozen convolutions)": (REPORT, "zeros", "LoRA"),
    "report: LoRA that trains": (REPORT, "lora", None),
    "ResNet-50: full": (FIFTY, "full", None),
    "ResNet-50: VeRA, all 53 convolutions": (FIFTY, "vera", None),
    "ResNet-50: LoRA, all 53 convolutions": (FIFTY, "lora", None),
    "ResNet-50: head and batch norm": (FIFTY, "head", None),
}
PRINTED = {
    "conv-mnist": {
        "Fully Trained": (15_434_314, 96.01),
        "VeRA": (2_868_390, 95.55),
        "LoRA": (3_106_506, 95.57),
    },
    "conv-intel": {
        "Fully Trained": (15_434_314, 85.12),
        "VeRA": (2_868_390, 81.21),
        "LoRA": (3_106_506, 81.28),
    },
}


class Loralib(BaselineMethod):
    """LoRA on convolutions as loralib has it: W + (B A) in W's shape, A (r k, n k) at random and B (m k, r k) zero.

    zeros: A zero too, which never trains. Source: github.com/microsoft/LoRA, ConvLoRA.
    """

    def __init__(self, targets: VeraConfig, rank: int, zeros: bool = False) -> None:
        super().__init__("head", targets, {})
        self.rank, self.zeros = rank, zeros

    def prepare(self, model: nn.Module, heads: tuple[str, ...], task: Any) -> None:
        from veratune.targets import find_sites

        super().prepare(model, heads, task)
        for site in find_sites(model, self.config):
            conv: Any = model.get_submodule(site.module)
            parametrize.register_parametrization(conv, "weight", _Pair(conv, self.rank, self.zeros))
            conv.parametrizations.weight.original.requires_grad_(False)


class _Pair(nn.Module):
    def __init__(self, conv: Any, rank: int, zeros: bool) -> None:
        super().__init__()
        k = conv.kernel_size[0]
        self.A = nn.Parameter(torch.zeros(rank * k, conv.in_channels * k))
        self.B = nn.Parameter(torch.zeros(conv.out_channels // conv.groups * k, rank * k))
        if not zeros:
            nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A).view(weight.shape)


class ConvExperiment(Experiment):
    """One data set of the report, at three sizes."""

    data: str
    split = "test"
    side: dict[Scale, int]
    rows: dict[Scale, dict[str, int]]
    epochs: dict[Scale, int]
    outputs = 10  # in the report's network, whatever the data

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            Cell(
                name=name,
                shown={
                    "data": self.data,
                    "method": name,
                    "printed": PRINTED[self.name].get(printed) if printed else None,
                },
                run=functools.partial(self._run, scale, blocks, what),
            )
            for name, (blocks, what, printed) in METHODS.items()
        ]

    def _run(
        self,
        scale: Scale,
        blocks: tuple[int, ...],
        what: str,
        place: Place,
        seed: int,
        folder: Path,
    ) -> Line:
        report = blocks == REPORT
        task = NetworkTask(
            lambda classes: ResNet(blocks, classes, shifts=report and what != "full"), _full if report else _head, self.side[scale],
            self.rows[scale], self.outputs if report else None,
        )  # fmt: skip
        targets = (BLOCKS,) if report else ("all-conv",)
        vera = VeraConfig(rank=RANK, targets=targets, conv_layout="loralib")
        method: Method | None = (
            Loralib(vera, RANK, what == "zeros") if what in ("lora", "zeros") else None
        )
        settings = {
            "model": "resnet", "data": place.dataset(self.data), "eval_data": place.dataset(self.data), "eval_split": self.split,
            "method": what if what in ("full", "head", "vera") else "head", "batch_norm": "train", "batch_size": 32,
            "epochs": self.epochs[scale], "lr": {"vera": 2e-2, "lora": 2e-3}.get(what, 1e-3), "head_lr": 1e-3, "weight_decay": 0.0,
        }  # fmt: skip
        return fine_tune(settings, vera, task, place, seed, folder, method)

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = []
        for name, (_, what, printed) in METHODS.items():
            own = [line for line in lines if line["cell"] == name]
            claimed = PRINTED[self.name].get(printed or "")
            count = own[0]["trained"] + own[0]["head"] if own else None
            adapter = f"{own[0]['trained']:,}" if own and what in ("vera", "lora", "zeros") else ""
            rows.append([
                name, f"{count:,}" if count else "", f"{claimed[0]:,}" if claimed else "", adapter,
                spread(own, lambda line: 100 * line["after"]["accuracy"]), f"{claimed[1]}" if claimed else "",
            ])  # fmt: skip
        sizes = self.rows[scale]
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["network: what is trained", "trained", "printed", "of it in the adapter", "accuracy %", "printed"], rows),
            f"Run here ({scale}): images of {self.side[scale]} x {self.side[scale]}, {sizes.get('train', 'all')} of the training and "
            f"{sizes.get(self.split, 'all')} of the test images, {self.epochs[scale]} epochs, batch 32, AdamW, linear decay, the best epoch by "
            "test accuracy (as the report, which stopped when it no longer rose). The report: all images, at most 10 epochs.", "",
            "What the report says and what is so. Its parameter counts are exact for its own network. Its LoRA has A = B = 0 and no gradient, "
            "so its LoRA row measures frozen random convolutions with all else trained; the row \"LoRA that trains\" is what it meant. Its "
            "\"19% fewer\" is a fall to 18.6%. All of its networks start from random weights: nothing pretrained is adapted. The adapter is "
            "19,164 values of its 2,868,390. On a standard ResNet-50 with all 53 convolutions adapted at rank 4 VeRA's vectors are 34,860 "
            "values and LoRA's matrices 450,892.", "",
            measured_on(lines), "",
        ])  # fmt: skip


class ConvMnist(ConvExperiment):
    name, about, data = (
        "conv-mnist",
        "VeRA on convolutions, MNIST (VeRA on Images, table 1)",
        "mnist",
    )
    side = {"quick": 32, "scaled": 32, "full": 32}
    rows = {
        "quick": {"train": 960, "test": 320},
        "scaled": {"train": 6000, "test": 2000},
        "full": {},
    }
    epochs = {"quick": 2, "scaled": 3, "full": 10}


class ConvIntel(ConvExperiment):
    name, about, data = (
        "conv-intel",
        "VeRA on convolutions, Intel scenes (VeRA on Images, table 2)",
        "intel_scenes_64",
    )
    side = {"quick": 32, "scaled": 64, "full": 64}
    rows = {
        "quick": {"train": 960, "test": 320},
        "scaled": {"train": 2000, "test": 1000},
        "full": {},
    }
    epochs = {"quick": 2, "scaled": 3, "full": 10}


def _full(net: nn.Module) -> list[str]:
    """What the report trains beside the adapter: all but the convolutions of the blocks."""
    kinds = (nn.BatchNorm2d, nn.Linear, Shift)
    return [
        p
        for p, m in net.named_modules()
        if isinstance(m, kinds) or p == "conv1" or p.endswith("downsample.0")
    ]


def _head(net: nn.Module) -> list[str]:
    return ["fc"]
