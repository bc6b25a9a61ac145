"""cifar-jpeg: small pretrained CIFAR-10 networks adapted to strongly compressed images, where they lose up to ten points."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veratune.config import VeraConfig
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
from veratune_lab.paper.networks import CifarResNet, CifarViT, load_weights

# name: (network, its last layer, what is adapted)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "cifar_resnet20": (lambda: CifarResNet(3), "linear", "all-conv"),
    "cifar_resnet56": (lambda: CifarResNet(9), "linear", "all-conv"),
    "cifar_vit_small": (CifarViT, "mlp_head", "all-linear"),
}
# name: (method, learning rates by what is adapted, the rest)
METHODS: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "last layer": ("head", {}, {"head_lr": 1e-3}),
    "full": ("full", {"all-conv": 1e-3, "all-linear": 1e-4}, {"head_lr": 1e-3}),
    "VeRA, rank 64": ("vera", {"all-conv": 1e-2, "all-linear": 1e-2}, {}),
    "LoRA, rank 2": (
        "peft:lora",
        {"all-conv": 2e-3, "all-linear": 1e-3},
        {"options": {"r": 2, "lora_alpha": 2}},
    ),
}


class CifarJpeg(Experiment):
    name, about = (
        "cifar-jpeg",
        "ResNet-20, ResNet-56 and a small ViT of CIFAR-10, adapted to JPEG at about 300 bytes an image",
    )
    rows: dict[Scale, dict[str, int]] = {
        "quick": {"train": 1000, "test": 500}, "scaled": {"train": 2000, "test": 1000}, "full": {},
    }  # fmt: skip
    epochs: dict[Scale, int] = {"quick": 1, "scaled": 3, "full": 5}

    def cells(self, scale: Scale) -> list[Cell]:
        names = [(network, method) for network in NETWORKS for method in METHODS]
        if scale == "quick":
            names = [entry for entry in names if entry[0] == "cifar_resnet20"]
        return [
            Cell(
                name=f"{network}: {method}", shown={"network": network, "method": method},
                run=functools.partial(self._run, scale, network, method),
            )
            for network, method in names
        ]  # fmt: skip

    def _run(
        self, scale: Scale, network: str, name: str, place: Place, seed: int, folder: Path
    ) -> Line:
        build, last, targets = NETWORKS[network]
        method, rates, rest = METHODS[name]
        weights = place.model(network)
        task = NetworkTask(
            lambda classes: load_weights(build(), weights),
            lambda net: [last] if method in ("head", "full") else [],
            32,
            self.rows[scale],
        )
        data = place.dataset("cifar10_jpeg")
        settings = {
            "model": network, "data": data, "eval_data": data, "eval_split": "test", "batch_size": 64, "epochs": self.epochs[scale],
            "save_steps": 10**6, "keep": "last", "method": method, "lr": rates.get(targets, 1e-3), **rest,
        }  # fmt: skip
        exclude = (f"net.{last}*",) if targets == "all-linear" else ()
        return fine_tune(
            settings,
            VeraConfig(rank=64, targets=(targets,), exclude=exclude),
            task,
            place,
            seed,
            folder,
        )

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = []
        for network in dict.fromkeys(line["network"] for line in lines):
            before = [line for line in lines if line["network"] == network][:1]
            rows.append(
                [
                    network,
                    "nothing",
                    0,
                    "",
                    spread(before, lambda line: 100 * line["before"]["accuracy"]),
                ]
            )
            for method in METHODS:
                own = [
                    line
                    for line in lines
                    if line["network"] == network and line["method"] == method
                ]
                if own:
                    first = own[0]
                    accuracy = spread(own, lambda line: 100 * line["after"]["accuracy"])
                    rows.append(
                        [
                            network,
                            method,
                            f"{first['trained'] + first['head']:,}",
                            f"{first['bytes']:,}",
                            accuracy,
                        ]
                    )
        sizes = self.rows[scale]
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["network", "trained", "values", "bytes of the file", "accuracy %"], rows),
            f"Run here ({scale}): {sizes.get('train', 'all')} training and {sizes.get('test', 'all')} test images of 32 x 32, {self.epochs[scale]} epochs, "
            "batch 64, the last epoch. VeRA and LoRA adapt every convolution (of the ViT every linear layer but the last) and leave the last "
            "layer alone; batch normalisation stays frozen, but in full fine-tuning. The networks' weights were trained on clean CIFAR-10, "
            "whose training images are these images before compression.", "",
            measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """accuracy.png: accuracy against trained values."""
        from veratune.analysis.pictures import draw_against

        points: dict[str, list[tuple[float, float, str]]] = {}
        for line in lines:
            points.setdefault(line["method"], []).append(
                (line["trained"] + line["head"], 100 * line["after"]["accuracy"], line["network"])
            )
        title = "CIFAR-10 as JPEG: three networks"
        return (
            [
                draw_against(
                    points, place.out / "accuracy.png", "trained values", "accuracy %", title
                )
            ]
            if points
            else []
        )
