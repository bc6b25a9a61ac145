"""Table 2: six GLUE tasks, VeRA beside full fine-tuning, BitFit, the head alone, LoRA and PEFT's VeRA."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veratune.config import VeraConfig
from veratune_lab.paper.experiment import Cell, Line, Place, Scale, measured_on, spread, table
from veratune_lab.paper.glue import (
    BASE,
    EVALUATED,
    GLUE,
    LARGE,
    GlueTable,
    Trial,
    paper_trial,
    score_of,
)

QV = ("query", "value")
RANK = 192  # 6,912 values on MiniLM's query and value: a tenth of LoRA's 73,728 at rank 8
# Four trials each: three learning rates at one rate of the head, and the middle one at another.
RATES = {
    "Full": (5e-5, 1e-4, 3e-4), "BitFit": (1e-3, 3e-3, 1e-2), "LoRA": (5e-4, 2e-3, 5e-3), "VeRA": (1e-2, 3e-2, 1e-1),
    "VeRA (PEFT)": (1e-2, 3e-2, 1e-1), "VeRA, only d, all linear": (5e-3, 2e-2, 5e-2),
}  # fmt: skip
HEADS = (5e-3, 2e-2)
SETTINGS: dict[str, dict[str, Any]] = {
    "Full": {"method": "full"}, "BitFit": {"method": "bitfit"}, "LoRA": {"method": "peft:lora", "options": {"r": 8, "lora_alpha": 8}},
    "VeRA": {}, "VeRA, only d, all linear": {}, "VeRA (PEFT)": {"method": "peft:vera", "options": {"r": RANK, "d_initial": 0.1, "projection_prng_key": 0}},
}  # fmt: skip
METHODS = ("Head", *RATES)

# As printed: RoBERTa-base and -large, in the order of GLUE's tasks, and the average.
PRINTED: dict[str, dict[str, tuple[float, ...]]] = {
    BASE: {
        "Full": (94.8, 90.2, 63.6, 92.8, 78.7, 91.2, 85.2), "BitFit": (93.7, 92.7, 62.0, 91.8, 81.5, 90.8, 85.4),
        "AdapterDrop 0.3M": (94.2, 88.5, 60.8, 93.1, 71.5, 89.7, 83.0), "AdapterDrop 0.9M": (94.7, 88.4, 62.6, 93.0, 75.9, 90.3, 84.2),
        "LoRA": (95.1, 89.7, 63.4, 93.3, 86.6, 91.5, 86.6), "VeRA": (94.6, 89.5, 65.6, 91.8, 78.7, 90.7, 85.2),
    },
    LARGE: {
        "Pfeiffer 3M": (96.1, 90.2, 68.3, 94.8, 83.8, 92.1, 87.6), "Pfeiffer 0.8M": (96.6, 89.7, 67.8, 94.8, 80.1, 91.9, 86.8),
        "Houlsby 6M": (96.2, 88.7, 66.5, 94.7, 83.4, 91.0, 86.8), "Houlsby 0.8M": (96.3, 87.7, 66.3, 94.7, 72.9, 91.5, 84.9),
        "LoRA-FA": (96.0, 90.0, 68.0, 94.4, 86.1, 92.0, 87.7), "LoRA": (96.2, 90.2, 68.2, 94.8, 85.2, 92.3, 87.8),
        "VeRA": (96.1, 90.9, 68.0, 94.4, 85.9, 91.7, 87.8),
    },
}  # fmt: skip


def trials(method: str) -> list[Trial]:
    """The four trials of a method."""
    if method == "Head":
        return [
            Trial(settings={"method": "head", "head_lr": rate}, vera=VeraConfig())
            for rate in (1e-3, 5e-3, 2e-2, 5e-2)
        ]
    low, middle, high = RATES[method]
    pairs = ((low, HEADS[0]), (middle, HEADS[0]), (high, HEADS[0]), (middle, HEADS[1]))
    vera = VeraConfig(rank=RANK, targets=QV)
    if method == "VeRA, only d, all linear":
        vera = VeraConfig(rank=RANK, targets=("all-linear",), vectors="d")
    return [
        Trial(settings={**SETTINGS[method], "lr": lr, "head_lr": head_lr}, vera=vera)
        for lr, head_lr in pairs
    ]


class Table2(GlueTable):
    name = "table2"
    about = (
        "GLUE: Head, Full, BitFit, LoRA rank 8, VeRA and PEFT's VeRA on six tasks (VeRA, table 2)"
    )
    seeds = {"quick": 1, "scaled": 3, "full": 5}

    def cells(self, scale: Scale) -> list[Cell]:
        if scale == "full":
            return [
                self.cell(scale, task, method, paper_trial(task, model, method), model)
                for model in (BASE, LARGE) for task in GLUE for method in ("Head", "LoRA", "VeRA")
            ]  # fmt: skip
        return [
            self.cell(scale, task, method, trial)
            for task in GLUE for method in METHODS for trial in (trials(method)[1:2] if scale == "quick" else trials(method))
        ]  # fmt: skip

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        out = [f"# {self.name}: {self.about}", ""]
        for model in dict.fromkeys(line["model"] for line in lines):
            own = [
                line
                for of in self.chosen([line for line in lines if line["model"] == model]).values()
                for line in of
            ]
            common = _common(own)
            rows = []
            for method in METHODS:
                found = [
                    [line for line in own if line["method"] == method and line["task"] == task]
                    for task in GLUE
                ]
                if any(found):
                    first = next(line for of in found for line in of)
                    mean = _mean(own, method, common)
                    rows.append([
                        method, "-" if method == "Head" else f"{first['trained']:,}",
                        *(spread(of, score_of, center=statistics.median) for of in found), "-" if mean is None else f"{mean:.1f}",
                    ])  # fmt: skip
            title = model or "all-MiniLM-L6-v2"
            out += [
                f"**{title}**",
                "",
                table(
                    [
                        "method",
                        "trained, the head apart",
                        *(g.title for g in GLUE.values()),
                        "mean",
                    ],
                    rows,
                ),
                "",
            ]
        for model, printed in PRINTED.items():
            out += [
                f"Printed in the paper for {model} (other weights, all rows: not to be compared with the above):", "",
                table(["method", *(g.title for g in GLUE.values()), "mean"], [[name, *values] for name, values in printed.items()]), "",
            ]  # fmt: skip
        return "\n".join([*out, NOTE, "", measured_on(lines), ""])

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """scores.png: the mean score over the tasks that every method has, against the trained values, the head too."""
        from veratune.analysis.pictures import draw_against

        own = [
            line
            for of in self.chosen([line for line in lines if not line["model"]]).values()
            for line in of
        ]
        tasks = _common(own)
        points: dict[str, list[tuple[float, float, str]]] = {}
        for method in METHODS:
            mean = _mean(own, method, tasks)
            if mean is not None:
                first = next(line for line in own if line["method"] == method)
                points[method] = [(first["trained"] + first["head"], mean, "")]
        return (
            [
                draw_against(
                    points, place.out / "scores.png", "trained values, the head too", "mean score"
                )
            ]
            if points
            else []
        )


def _mean(lines: Sequence[Line], method: str, tasks: set[str]) -> float | None:
    """A method's mean over tasks of the median over seeds; None if it has not run all of them."""
    found = [
        [score_of(line) for line in lines if (line["method"], line["task"]) == (method, task)]
        for task in sorted(tasks)
    ]
    return statistics.mean(map(statistics.median, found)) if found and all(found) else None


def _common(lines: Sequence[Line]) -> set[str]:
    """The tasks that every method has run."""
    have = [{line["task"] for line in lines if line["method"] == method} for method in METHODS]
    return set.intersection(*[tasks for tasks in have if tasks] or [set()])


NOTE = (
    "Median ± standard deviation over the seeds, the mean over those tasks that every method has run; Matthews correlation for CoLA, Pearson for STS-B, accuracy else, times 100. Scaled: "
    "MiniLM (22.7 million values, all-MiniLM-L6-v2), query and value, AdamW, linear decay, 6% warmup, batch 32, no weight decay, bfloat16 autocast; "
    + "; ".join(f"{g.title} {g.rows} rows, {g.epochs:g} epochs" for g in GLUE.values())
    + f"; scored on {EVALUATED} of the validation rows after the last epoch. Every method had four trials of its learning rates on seed 0, which "
    "counts among the seeds. Full scale: the paper's table 8 (VeRA) and LoRA's own settings, best epoch of each seed, median of five."
)
