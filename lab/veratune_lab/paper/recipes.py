"""What makes VeRA better at equal or twice its values: every idea with the same trials on three tasks."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.training.methods import Method, VeraMethod
from veratune_lab.paper.experiment import (
    Cell,
    Line,
    Place,
    Scale,
    Tuned,
    fine_tune,
    measured_on,
    shared_folder,
    spread,
    table,
)
from veratune_lab.paper.glue import Trial, scaled_run, score_of
from veratune_lab.paper.language_models import smollm2
from veratune_lab.paper.table3 import E2e, Size

# Scaled runs: by task, the base adapter, two learning rates, and that of the head.
BASE: dict[str, dict[str, Any]] = {
    "sst2": {"rank": 192, "targets": ("query", "value")},
    "stsb": {"rank": 192, "targets": ("query", "value")},
    "e2e": {"rank": 256, "targets": ("query", "value")},
}
RATES = {"sst2": (2e-2, 5e-2), "stsb": (2e-2, 5e-2), "e2e": (3e-2, 1e-1)}
HEAD = {"sst2": 5e-3, "stsb": 2e-2, "e2e": 5e-3}
TITLES = {"sst2": "SST-2", "stsb": "STS-B", "e2e": "E2E loss"}
E2E_SIZE = Size(96, 48, 0, {})


class WithMagnitude(VeraMethod):
    """VeRA with a trained scale of every output: m * (W x + ΔW x + bias), m from 1.

    DVoRA's magnitude with the norms of W + ΔW's rows taken into m. Its scores are measured in the run; the file has no place for m.
    """

    def prepare(self, model: nn.Module, heads: tuple[str, ...], task: Mapping[str, Any]) -> None:
        super().prepare(model, heads, task)
        for layer in [m for m in model.modules() if isinstance(m, VeraWeightLayer)]:
            # Beside the vectors, so that it is found with them and frozen with nothing else.
            layer.register_parameter(
                "magnitude", nn.Parameter(torch.ones(layer.base.get_parameter("weight").shape[0]))
            )
            layer.register_forward_hook(_scaled)

    def adapter_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        scales = [
            m.get_parameter("magnitude") for m in model.modules() if isinstance(m, VeraWeightLayer)
        ]
        return [*super().adapter_parameters(model), *scales]


def _scaled(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * layer.get_parameter("magnitude")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One idea. vera: settings of the adapter for the encoder tasks; language: for the language model; b: the
    learning rate of b as a multiple of d's; method: another class than Vera.
    """

    vera: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    language: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    b: float | None = None
    method: type[VeraMethod] | None = None


_TOP = {f"re:.*layer\\.{i}\\..*": 64 for i in (0, 1, 2)} | {
    f"re:.*layer\\.{i}\\..*": 320 for i in (3, 4, 5)
}
_TOP_LLAMA = {r"re:.*layers\.([0-9]|1[0-4])\..*": 64}
RECIPES = {
    "VeRA": Recipe(),
    "b four times as fast": Recipe(b=4.0),
    "b a quarter as fast": Recipe(b=0.25),
    "d from 1": Recipe({"d_init": 1.0}, {"d_init": 1.0}),
    "more rank in the upper half": Recipe({"rank_pattern": _TOP}, {"rank": 448, "rank_pattern": _TOP_LLAMA}),
    "twice the values: rank": Recipe({"rank": 768}, {"rank": 896}),
    "twice the values: more layers": Recipe(
        {"targets": ("query", "value", "output.dense")}, {"targets": ("query", "value", "o_proj"), "rank": 256}
    ),
    "twice the values: norms too": Recipe({"head": ("classifier", "output.LayerNorm")}, {"head": ("re:.*layernorm",)}),
    "only d, all linear layers": Recipe(
        {"targets": ("all-linear",), "vectors": "d"}, {"targets": ("all-linear",), "vectors": "d"}
    ),
    "a magnitude": Recipe(method=WithMagnitude),
}  # fmt: skip
# What it is held against; the first two at about VeRA's size.
OTHERS: dict[str, dict[str, Any]] = {
    "IA3": {"method": "peft:ia3", "options": {"feedforward_modules": []}},
    "LoRA rank 8": {"method": "peft:lora", "options": {"r": 8, "lora_alpha": 8}},
}
OTHER_RATES = {"IA3": (5e-3, 2e-2), "LoRA rank 8": (2e-3, 5e-3)}


class Recipes(Tuned):
    name = "recipes"
    about = "what makes VeRA better at equal or twice its values, on three tasks with equal trials"
    seeds = {"quick": 1, "scaled": 1, "full": 3}

    def cells(self, scale: Scale) -> list[Cell]:
        tasks = ("sst2",) if scale == "quick" else tuple(BASE)
        cells = []
        for task in tasks:
            for name, recipe in RECIPES.items():
                for lr in RATES[task][-1:] if scale == "quick" else RATES[task]:
                    cells.append(self._cell(scale, task, name, lr, recipe, None))
            for name in OTHERS:
                for lr in OTHER_RATES[name][:1] if scale == "quick" else OTHER_RATES[name]:
                    cells.append(self._cell(scale, task, name, lr, Recipe(), OTHERS[name]))
        return cells

    def _cell(
        self,
        scale: Scale,
        task: str,
        name: str,
        lr: float,
        recipe: Recipe,
        other: Mapping[str, Any] | None,
    ) -> Cell:
        changes = recipe.language if task == "e2e" else recipe.vera
        vera = VeraConfig(**{**BASE[task], **changes})
        settings: dict[str, Any] = {"lr": lr, "head_lr": HEAD[task], **(other or {})}
        if recipe.b is not None:
            settings["b_lr"] = lr * recipe.b
        group = f"{TITLES[task]}: {name}"
        return Cell(
            name=f"{group}, lr {lr:g}", shown={"group": group, "task": task, "method": name},
            run=functools.partial(self._run, scale, task, Trial(settings=settings, vera=vera), recipe.method),
        )  # fmt: skip

    @staticmethod
    def _run(
        scale: Scale,
        task: str,
        trial: Trial,
        kind: type[VeraMethod] | None,
        place: Place,
        seed: int,
        folder: Path,
    ) -> Line:
        method: Method | None = kind(trial.vera) if kind else None
        if task != "e2e":
            return scaled_run(task, trial, scale, place, seed, method)
        settings = {
            "model": smollm2(place.out.parent / "smollm2"), "data": place.dataset("e2e_nlg"), "keep": "last", "save_steps": 10**6, "batch_size": 8,
            "epochs": 1, "mixed_precision": "bf16", "group_by_length": True, **trial.settings,
        }  # fmt: skip
        if not trial.vera.head:
            del settings["head_lr"]  # a language model has no head to train
        key = {
            **trial.settings,
            "task": "recipe-e2e",
            "rows": E2E_SIZE.rows,
            "kind": kind.__name__ if kind else "",
        }
        where = shared_folder(place, key, trial.vera, seed)
        return fine_tune(settings, trial.vera, E2e(E2E_SIZE, 128), place, seed, where, method) | {
            "rows": E2E_SIZE.rows,
            "run": where.name,
        }

    def score(self, line: Line) -> float:
        if line["task"] == "e2e":
            return -float(line["after"]["loss"])
        return score_of(line)

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        chosen = self.chosen(lines)
        rows = []
        for name in (*RECIPES, *OTHERS):
            of = {task: chosen.get(f"{TITLES[task]}: {name}", []) for task in BASE}
            if any(of.values()):
                sizes = [
                    f"{of[task][0]['trained'] + _norms_in(of[task][0], task):,}"
                    if of[task]
                    else "-"
                    for task in ("sst2", "e2e")
                ]
                scores = [
                    spread(of[task], self.score, "{:.1f}")
                    if task != "e2e"
                    else spread(of[task], lambda line: -self.score(line), "{:.3f}")
                    for task in BASE
                ]
                rows.append([name, *sizes, *scores])
        head = [
            "recipe",
            "trained (encoder)",
            "trained (language)",
            *(TITLES[task] for task in BASE),
        ]
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(head, rows),
            "SST-2: accuracy; STS-B: Pearson, times 100 (MiniLM, rows and epochs as in table2's scaled runs, query and value, rank 192); E2E: the loss after "
            f"{E2E_SIZE.rows} rows (SmolLM2, query and value, rank 256; less is better). Every row had two learning rates, and shows "
            "the better one. One seed a cell: differences under a point mean nothing.", "", measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """gains.png: points over plain VeRA by recipe, the mean over the encoder tasks."""
        from veratune.analysis.pictures import draw_bars

        chosen = self.chosen(lines)
        gains: dict[str, list[float]] = {}
        for task in ("sst2", "stsb"):
            base = chosen.get(f"{TITLES[task]}: VeRA")
            for name in (*RECIPES, *OTHERS):
                of = chosen.get(f"{TITLES[task]}: {name}")
                if base and of and name != "VeRA":
                    gains.setdefault(name, []).append(
                        statistics.mean(map(self.score, of))
                        - statistics.mean(map(self.score, base))
                    )
        means = {
            name: statistics.mean(values) for name, values in gains.items() if len(values) == 2
        }
        return (
            [draw_bars(means, place.out / "gains.png", "points over VeRA, mean of SST-2 and STS-B")]
            if means
            else []
        )


def _norms_in(line: Line, task: str) -> int:
    """Values that are trained with the head but are not the task's own: the norms'."""
    own = {"sst2": 2 * 384 + 2, "stsb": 384 + 1, "e2e": 0}[task]
    return int(line["head"]) - own
