"""quality: score against stored bytes, by one protocol on the full training sets."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veratune.basis.lora import LoraBasis
from veratune.config import VeraConfig
from veratune.targets import find_sites
from veratune.training.methods import VeraMethod
from veratune_lab.paper.experiment import (
    Cell,
    Line,
    Place,
    Scale,
    Tuned,
    fine_tune,
    load_trained,
)
from veratune_lab.paper.glue import GLUE
from veratune_lab.paper.language_models import minilm
from veratune_lab.quality.methods import CONTESTANTS, Contestant
from veratune_lab.quality.protocol import (
    DEV,
    SCORED,
    TASKS,
    majority,
    pack,
    predict,
    scores_of,
    task_of,
)


class ExactPrincipal(VeraMethod):
    """d alone on the exact leading singular vectors: ΔW = 2 sqrt(m/r) U_r diag(d) V_rᵀ."""

    def prepare(self, model: nn.Module, heads: tuple[str, ...], task: Mapping[str, Any]) -> None:
        modules = dict(model.named_modules())
        pairs = {}
        for site in find_sites(model, self.config):
            weight: Any = modules[site.module].weight
            u, _, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
            rank = min(self.config.rank, u.shape[1])
            scale = 2 * (weight.shape[0] / rank) ** 0.5
            pairs[site.module] = (vt[:rank].float(), (scale * u[:, :rank]).float())
        self.basis = LoraBasis(pairs)
        super().prepare(model, heads, task)


class Quality(Tuned):
    """Every method on every task: three rates on seed 0, the best one by held-out rows on all seeds."""

    name = "quality"
    about = "score against stored bytes: VeRA, LoRA and PEFT's small methods, equally tuned"
    seeds = {"quick": 1, "scaled": 3, "full": 5}

    def cells(self, scale: Scale) -> list[Cell]:
        tasks = ("stsb-1500",) if scale == "quick" else tuple(TASKS)
        out = []
        for task in tasks:
            for name, own in CONTESTANTS.items():
                rates = own.rates[1:2] if scale == "quick" else own.rates
                out += [self._cell(scale, task, name, own, rate) for rate in rates]
        return out

    def _cell(self, scale: Scale, task: str, name: str, own: Contestant, rate: float) -> Cell:
        group = f"{task}: {name}"
        return Cell(
            name=f"{group}, lr {rate:g}",
            shown={"group": group, "task": task, "method": name, "rate": rate},
            run=functools.partial(_run, scale, task, own, rate),
        )

    def score(self, line: Line) -> float:
        """The score on the held-out training rows, times 100; the scored rows choose nothing."""
        return 100 * line["after"][GLUE[TASKS[line["task"]].glue].score]

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        from veratune_lab.quality.report import page

        return "\n\n".join([f"{self.about}.", page(self, lines)])

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        from veratune_lab.quality.report import draw

        return draw(self, lines, place.out)


def _run(
    scale: Scale, name: str, own: Contestant, rate: float, place: Place, seed: int, folder: Path
) -> Line:
    """Train one cell, and score the run's adapter once on the rows that chose nothing."""
    protocol = TASKS[name]
    head = own.settings.get("method") == "head"
    settings = {
        "model": minilm(),
        "data": place.dataset(f"glue_{protocol.glue}"),
        "eval_split": DEV,
        **protocol.settings,
        **own.settings,
        ("head_lr" if head else "lr"): rate,
    }
    if scale == "quick":
        settings |= {"max_steps": 2}
    vera = own.vera
    if own.exact:
        vera = dataclasses.replace(vera, basis="lora", d_init=0.0)
    task = task_of(protocol)
    line = fine_tune(settings, vera, task, place, seed, folder, _method(own, vera))
    task.fit_labels(task.load_examples(settings["data"]))
    model, processor = load_trained(settings, vera, task, place, folder, _method(own, vera))
    encoded = task.encode(task.load_examples(settings["data"], SCORED), processor)
    logits = predict(model, task, encoded, processor)
    return line | {
        "scored": scores_of(task, logits, encoded["labels"]),
        "predicted": pack(logits),
        "constant": majority(encoded["labels"], GLUE[protocol.glue].score),
    }


def _method(own: Contestant, vera: VeraConfig) -> VeraMethod | None:
    return ExactPrincipal(vera) if own.exact else None
