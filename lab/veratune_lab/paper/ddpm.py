"""ddpm and lora-styles: a denoising model of MNIST, adapted to clothes, and to styles over one LoRA."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image, ImageFilter, ImageOps
from torch import nn

from veratune.config import VeraConfig
from veratune.errors import DataError
from veratune.formats.lora import read_lora
from veratune.tasks.diffusion.generation import Pixels, UnconditionalImage
from veratune.tasks.diffusion.models import Unconditional
from veratune.tasks.vision.images import decode_image, load_image_examples
from veratune.training.methods import BaselineMethod, Method, VeraMethod
from veratune_lab.paper.experiment import (
    Cell,
    Experiment,
    Line,
    Place,
    Scale,
    fine_tune,
    measured_on,
    run_folder,
    some,
    spread,
    table,
)
from veratune_lab.paper.networks import DDPM, load_weights

METHODS: dict[str, dict[str, Any]] = {
    "VeRA, rank 64": {"method": "vera", "lr": 2e-2},
    "LoRA, rank 1": {"method": "peft:lora", "lr": 1e-2, "options": {"r": 1, "lora_alpha": 1}},
    "LoRA, rank 4": {"method": "peft:lora", "lr": 5e-3, "options": {"r": 4, "lora_alpha": 4}},
    "full": {"method": "full", "lr": 1e-3},
}
STEPS = 250  # of the 1000, for samples
# Names of the network's convolutions, transposed ones, and linear layers of time.
ALL = ("all-conv", "all-linear")
# PEFT's LoRA knows no transposed convolution.
KNOWN_TO_PEFT = {"exclude": ("*up1*", "*up2", "*up3")}


def outline(image: Image.Image) -> Image.Image:
    """The edge of the strokes alone."""
    thick, thin = image.filter(ImageFilter.MaxFilter(3)), image.filter(ImageFilter.MinFilter(3))
    return Image.composite(thick, Image.new("L", image.size), ImageOps.invert(thin))


def slanted(image: Image.Image, by: float) -> Image.Image:
    """Sheared around the middle row; by: pixels to the side for each pixel upward."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (1, by, -by * image.height / 2, 0, 1, 0),
        Image.Resampling.BILINEAR,
    )


STYLES = {
    "outline": outline,
    "outline, leaning left": lambda image: outline(slanted(image, -0.6)),
    "outline, leaning right": lambda image: outline(slanted(image, 0.6)),
}


class DigitsTask(UnconditionalImage):
    """The DDPM of 28 x 28 images on MNIST-like rows. rows: how many of each split; style: what is done to every image first."""

    def __init__(self, rows: Mapping[str, int], style: Any = None, **options: Any) -> None:
        super().__init__(sample_steps=STEPS, **options)
        self.rows, self.style = rows, style

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        rows = some(load_image_examples(source, split, config), self.rows.get(split))
        if self.style is None:
            return rows
        styled = [
            self.style(decode_image(value, i).convert("L")) for i, value in enumerate(rows["image"])
        ]
        return Dataset.from_dict({"image": styled})

    def load_processor(self, model: str) -> Pixels:
        return Pixels(28, 1)

    def load_model(self, model: str, processor: Any, **options: Any) -> nn.Module:
        from diffusers import DDPMScheduler

        return Unconditional(load_weights(DDPM(), model), DDPMScheduler(), 1, name="ddpm_mnist")

    def sample(self, model: nn.Module, processor: Pixels, path: Path) -> Path | None:
        return None  # many steps each time would take longer than the training

    def draw(self, model: nn.Module, rows: Dataset, processor: Pixels, folder: Path) -> list[Path]:
        """samples.png: drawn in 250 steps from fixed noise."""
        found = super().sample(model, processor, folder / "samples.png")
        return [found] if found else []


class Ddpm(Experiment):
    name, about = "ddpm", "a DDPM of MNIST adapted to Fashion-MNIST: VeRA, LoRA, full"
    rows: dict[Scale, dict[str, int]] = {
        "quick": {"train": 512, "test": 200}, "scaled": {"train": 6000, "test": 1000}, "full": {"test": 10_000},
    }  # fmt: skip
    epochs: dict[Scale, int] = {"quick": 1, "scaled": 5, "full": 30}
    data = "fashion_mnist"

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            Cell(name=name, shown={"method": name}, run=functools.partial(self._run, scale, name))
            for name in METHODS
        ]

    def _run(self, scale: Scale, name: str, place: Place, seed: int, folder: Path) -> Line:
        task = DigitsTask(self.rows[scale])
        return _adapt(
            task, place.dataset(self.data), METHODS[name], self.epochs[scale], place, seed, folder
        )

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [
                "nothing (the MNIST model)",
                0,
                "",
                spread(lines[:1], lambda line: line["before"]["loss"], "{:.4f}"),
            ]
        ]
        for name in METHODS:
            own = [line for line in lines if line["method"] == name]
            if own:
                loss = spread(own, lambda line: line["after"]["loss"], "{:.4f}")
                rows.append([name, f"{own[0]['trained']:,}", f"{own[0]['bytes']:,}", loss])
        sizes = self.rows[scale]
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["trained", "values", "bytes of the file", "epsilon MSE on the test images"], rows),
            f"Run here ({scale}): {sizes.get('train', 'all')} training and {sizes.get('test', 'all')} test images of 28 x 28, {self.epochs[scale]} epochs, "
            "batch 64, AdamW, linear decay, the last epoch. Base: a U-Net of 507 thousand values trained on MNIST by others; the same network that its "
            "authors trained on Fashion-MNIST in full reaches 0.051 on 1,000 test images. Steps and noise of the test images are fixed. VeRA adapts "
            "every convolution, transposed ones too, and every linear layer; LoRA (PEFT's) leaves out the transposed ones, which it does not know. "
            "samples.png in each run's folder holds 16 samples from the same noise.", "",
            measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """samples.png: what the MNIST model and each method draw from the same noise."""
        base = place.out / "mnist-model"
        if place.models is not None and not (base / "samples.png").is_file():
            task = DigitsTask({})
            task.draw(
                task.load_model(place.model("ddpm_mnist"), None),
                Dataset.from_dict({}),
                task.load_processor(""),
                base,
            )
        scale = lines[0]["scale"] if lines else ""
        runs = {name: run_folder(place, scale, name) for name in METHODS}
        return _sheet({"nothing": base, **runs}, place.out / "samples.png")


class LoraStyles(Experiment):
    """The report's last idea: train a LoRA on a family of styles, freeze it, and train a pair of vectors for each of its styles."""

    name, about = (
        "lora-styles",
        "VeRA inside LoRA: two styles as vectors over one LoRA, against a LoRA for each (VeRA on Images, conclusion)",
    )
    rows: dict[Scale, dict[str, int]] = {
        "quick": {"train": 512, "test": 200}, "scaled": {"train": 4000, "test": 1000}, "full": {"test": 10_000},
    }  # fmt: skip
    epochs: dict[Scale, int] = {"quick": 1, "scaled": 4, "full": 20}
    data = "mnist"
    few = 256  # images of a sub-style: what a family's LoRA is for
    rank = 16
    family: Mapping[str, Any] = {
        "method": "peft:lora",
        "lr": 5e-3,
        "options": {"r": rank, "lora_alpha": rank},
    }

    def cells(self, scale: Scale) -> list[Cell]:
        kinds = (
            "family",
            "vectors over the family's LoRA",
            "VeRA, rank 64",
            "LoRA, rank 1",
            "LoRA, rank 1, last stages only",
        )
        out = [
            Cell(
                name="family: outline",
                shown={"style": "outline", "kind": "family"},
                run=functools.partial(self._run, scale, "outline", "family"),
            )
        ]
        for style in list(STYLES)[1:]:
            for kind in kinds[1:]:
                out.append(
                    Cell(
                        name=f"{style}: {kind}",
                        shown={"style": style, "kind": kind},
                        run=functools.partial(self._run, scale, style, kind),
                    )
                )
        return out

    def _run(
        self, scale: Scale, style: str, kind: str, place: Place, seed: int, folder: Path
    ) -> Line:
        rows = dict(self.rows[scale])
        if kind != "family":
            rows["train"] = self.few
        task = DigitsTask(rows, STYLES[style])
        settings: Mapping[str, Any] = {
            "family": self.family, "vectors over the family's LoRA": {"lr": 5e-2}, "VeRA, rank 64": {"lr": 2e-2},
            "LoRA, rank 1": METHODS["LoRA, rank 1"], "LoRA, rank 1, last stages only": METHODS["LoRA, rank 1"],
        }[kind]  # fmt: skip
        epochs = self.epochs[scale] * (1 if kind == "family" else 10)
        method, vera = None, {}
        if kind.startswith("vectors"):
            family = run_folder(place, scale, "family: outline", seed) / BaselineMethod.file
            if not family.is_file():
                raise DataError(
                    f"{family}: the family's LoRA is not there; run that cell first (without --only)"
                )
            method = VeraMethod(
                VeraConfig(basis="lora"), read_lora(family, Unconditional(DDPM(), None, 1))
            )
        if kind.endswith("last stages only"):
            vera = {"targets": ("re:unet\\.(b5|b_out|conv_out).*conv.*",), "exclude": ()}
        return _adapt(
            task, place.dataset(self.data), settings, epochs, place, seed, folder, method, vera
        )

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = []
        for line in lines:
            before, after = (f"{line[when]['loss']:.4f}" for when in ("before", "after"))
            rows.append(
                [
                    line["style"],
                    line["kind"],
                    f"{line['trained']:,}",
                    f"{line['bytes']:,}",
                    before,
                    after,
                ]
            )
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["style", "trained", "values", "bytes of the file", "epsilon MSE before", "after"], rows),
            f"Run here ({scale}): the MNIST model of the experiment ddpm. A LoRA of rank {self.rank} learns digits in outline from "
            f"{self.rows[scale].get('train', 'all')} images, {self.epochs[scale]} epochs; then each leaning style is learned from {self.few} images in "
            f"{10 * self.epochs[scale]} epochs. Vectors over the LoRA start at d = b = 1, which is that LoRA: their \"before\" is its score on the new style. "
            "The others start at the MNIST model.", "",
            measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """samples.png: what each draws from the same noise."""
        scale = lines[0]["scale"] if lines else ""
        names = [line["cell"] for line in lines if line["seed"] == 0]
        return _sheet(
            {name: run_folder(place, scale, name) for name in names}, place.out / "samples.png"
        )


def _adapt(
    task: DigitsTask, data: str, settings: Mapping[str, Any], epochs: int, place: Place, seed: int, folder: Path,
    method: Method | None = None, vera: Mapping[str, Any] | None = None,
) -> Line:  # fmt: skip
    run = {
        "model": place.model("ddpm_mnist"), "data": data, "eval_data": data, "eval_split": "test", "batch_size": 64, "epochs": epochs,
        "save_steps": 10**6, "keep": "last", **settings,
    }  # fmt: skip
    lora = str(settings.get("method", "")).startswith("peft")
    words: dict[str, Any] = (
        {"rank": 64, "targets": ALL} | (KNOWN_TO_PEFT if lora else {}) | dict(vera or {})
    )
    config = VeraConfig(**words)
    return fine_tune(run, config, task, place, seed, folder, method)


def _sheet(folders: Mapping[str, Path], path: Path) -> list[Path]:
    from veratune.analysis.pictures import draw_grid

    there = {
        name: folder / "samples.png"
        for name, folder in folders.items()
        if (folder / "samples.png").is_file()
    }
    pictures = {}
    for name, file in there.items():
        with Image.open(file) as picture:
            pictures[name] = [picture.copy()]
    return [draw_grid(pictures, path)] if pictures else []
