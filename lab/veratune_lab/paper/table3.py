"""Table 3: E2E NLG, restaurants described from their attributes, by beam search and five scores."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from veratune.config import VeraConfig
from veratune.inference.generate import generate_completions
from veratune.scoring.nlg import nlg_scores
from veratune.tasks.text.language import Instruction
from veratune_lab.paper.experiment import (
    Cell,
    Experiment,
    Line,
    Place,
    Scale,
    fine_tune,
    load_trained,
    measured_on,
    some,
    spread,
    table,
)
from veratune_lab.paper.language_models import smollm2

COLUMNS = {"prompt": "mr", "completion": "ref"}
MEDIUM, LARGE = "openai-community/gpt2-medium", "openai-community/gpt2-large"
_COMMON: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 8,
    "weight_decay": 0.01,
    "warmup_steps": 500,
    "label_smoothing": 0.1,
}
TABLE10: dict[str, dict[str, Any]] = {
    MEDIUM: {"rank": 1024, "lr": 1e-1, **_COMMON},
    LARGE: {"rank": 1024, "lr": 2e-2, **_COMMON},
}
# LoRA as Hu et al. 2022, table 11, have it.
LORA: dict[str, Any] = {
    "lr": 2e-4,
    **_COMMON,
    "method": "peft:lora",
    "options": {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1},
}
# Of the generation, from microsoft/LoRA's examples.
BEAMS: dict[str, Any] = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4}
SCORES = ("bleu", "nist", "meteor", "rouge_l", "cider")
PRINTED: dict[str, dict[str, tuple[str, float, float, float, float, float]]] = {
    MEDIUM: {
        "Full": ("354.92M", 68.2, 8.62, 46.2, 71.0, 2.47), "Lin 0.37M": ("0.37M", 66.3, 8.41, 45.0, 69.8, 2.40),
        "Lin 11M": ("11.09M", 68.9, 8.71, 46.1, 71.3, 2.47), "Houlsby": ("11.09M", 67.3, 8.50, 46.0, 70.7, 2.44),
        "DyLoRA": ("0.39M", 69.2, 8.75, 46.3, 70.8, 2.46), "AdaLoRA": ("0.38M", 68.2, 8.58, 44.1, 70.7, 2.35),
        "LoRA": ("0.35M", 68.9, 8.69, 46.4, 71.3, 2.51), "VeRA": ("0.098M", 70.1, 8.81, 46.6, 71.5, 2.50),
    },
    LARGE: {
        "Full": ("774.03M", 68.5, 8.78, 46.0, 69.9, 2.45), "Lin 0.88M": ("0.88M", 69.1, 8.68, 46.3, 71.4, 2.49),
        "Lin 23M": ("23.00M", 68.9, 8.70, 46.1, 71.3, 2.45), "LoRA": ("0.77M", 70.1, 8.80, 46.7, 71.9, 2.52),
        "VeRA": ("0.17M", 70.3, 8.85, 46.9, 71.6, 2.54),
    },
}  # fmt: skip
# Scaled: (settings, rank) by method.
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "VeRA": ({"lr": 1e-1}, 576),
    "LoRA": ({"lr": 2e-3, "method": "peft:lora", "options": {"r": 4, "lora_alpha": 32}}, 4),
    "Lin": ({"lr": 1e-3, "method": "lin", "options": {"size": 8}}, 1),
    "DyLoRA": ({"lr": 2e-3, "method": "dylora", "options": {"r": 4, "lora_alpha": 32}}, 4),
}
QV = ("query", "value")


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows to train on, rows for the loss, and inputs to describe (None: all), beams, and tokens of a description."""

    rows: int | None
    losses: int | None
    inputs: int | None
    beams: Mapping[str, Any]


SIZES: dict[Scale, Size] = {
    "quick": Size(32, 16, 8, {**BEAMS, "num_beams": 2}),
    "scaled": Size(200, 48, 40, {**BEAMS, "num_beams": 4}),
    "full": Size(None, None, None, BEAMS),
}


class E2e(Instruction):
    """E2E on some of its rows."""

    def __init__(self, size: Size, max_length: int = 512) -> None:
        super().__init__(COLUMNS, max_length)
        self.size = size

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        rows = super().load_examples(source, split, config)
        return some(rows, {"train": self.size.rows, "validation": self.size.losses}.get(split))

    def inputs(self, source: str) -> tuple[list[str], list[list[str]]]:
        """The test split's inputs, each once, and their references."""
        groups: dict[str, list[str]] = {}
        for row in super().load_examples(source, "test"):
            groups.setdefault(row["mr"], []).append(row["ref"])
        # Every so many of them: their order goes from short to long.
        step = max(1, len(groups) // (self.size.inputs or len(groups)))
        kept = list(groups)[::step][: self.size.inputs]
        return kept, [groups[mr] for mr in kept]


class Table3(Experiment):
    name = "table3"
    about = "E2E NLG: BLEU, NIST, METEOR, ROUGE-L, CIDEr (VeRA, table 3)"
    seeds = {"quick": 1, "scaled": 1, "full": 5}

    def cells(self, scale: Scale) -> list[Cell]:
        models = tuple(TABLE10) if scale == "full" else ("",)
        methods = ("VeRA", "LoRA") if scale == "full" else ("nothing", *SMALL)
        return [
            Cell(
                name=f"{model.rpartition('/')[2]} {method}".strip(), shown={"model": model, "method": method},
                run=functools.partial(self._run, scale, model, method),
            )
            for model in models for method in methods
        ]  # fmt: skip

    @staticmethod
    def _run(scale: Scale, model: str, method: str, place: Place, seed: int, folder: Path) -> Line:
        source, size = place.dataset("e2e_nlg"), SIZES[scale]
        task = E2e(size, max_length=512 if model else 128)
        settings: dict[str, Any] = {"data": source, "keep": "last", "save_steps": 10**6}
        if model:
            settings |= {
                "model": place.model(model.rpartition("/")[2], model),
                **(TABLE10[model] if method == "VeRA" else LORA),
            }
            rank = int(settings.pop("rank", 4))
        else:
            own, rank = SMALL.get(method, ({"method": "head"}, 1))
            settings |= {
                "model": smollm2(place.out.parent / "smollm2"), "batch_size": 8, "epochs": 1, "warmup_ratio": 0.06, "mixed_precision": "bf16",
                "group_by_length": True, **own,
            }  # fmt: skip
        vera = VeraConfig(rank=rank, targets=QV)
        line: Line = (
            {} if method == "nothing" else fine_tune(settings, vera, task, place, seed, folder)
        )
        net, tokenizer = load_trained(
            settings, vera, task, place, None if method == "nothing" else folder
        )
        asked, references = task.inputs(source)
        talks = [[{"role": "user", "content": mr}] for mr in asked]
        outputs = list(
            generate_completions(
                net, tokenizer, talks, max_new_tokens=96, batch_size=10, **size.beams
            )
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "outputs.txt").write_text(
            "".join(" ".join(text.split()) + "\n" for text in outputs)
        )
        found = dataclasses.asdict(nlg_scores(outputs, references))
        return line | {
            "scores": found,
            "inputs": len(asked),
            "rows": size.rows,
            "example": [asked[0], outputs[0]],
        }

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        out = [f"# {self.name}: {self.about}", ""]
        for model in dict.fromkeys(line["model"] for line in lines):
            rows = []
            for method in dict.fromkeys(line["method"] for line in lines if line["model"] == model):
                own = [line for line in lines if (line["model"], line["method"]) == (model, method)]
                loss = (
                    spread(own, lambda line: line["after"]["loss"], "{:.3f}")
                    if "after" in own[0]
                    else "-"
                )
                scores = [_score(own, name) for name in SCORES]
                rows.append(
                    [
                        method,
                        f"{own[0]['trained']:,}" if "trained" in own[0] else "-",
                        loss,
                        *scores,
                    ]
                )
            head = ["method", "trained", "loss", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
            out += [f"**{model or 'SmolLM2-135M-Instruct'}**", "", table(head, rows), ""]
        for model, printed in PRINTED.items():
            out += [f"Printed in the paper for {model}:", "", table(["method", "trained", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"],
                    [[name, size, b, f"{n:.2f}", m, rouge, f"{c:.2f}"] for name, (size, b, n, m, rouge, c) in printed.items()]), ""]  # fmt: skip
        small = SIZES["scaled"]
        out += [
            f"Scaled: {small.rows} of 42,061 training rows, one epoch, batch 8, {small.inputs} of the 630 test inputs, {small.beams['num_beams']} beams, query and value (the "
            "Lin adapters after each block), rates not tuned, the model's chat template around every input. The loss is that of "
            f"{small.losses} validation rows. Full: the paper's table 10, ten beams, length penalty 0.8; LoRA's settings are its own paper's.", "",
        ]  # fmt: skip
        for line in lines[:1] and lines:
            out += [f"{line['method']}: *{line['example'][0]}* → {line['example'][1]}", ""]
        return "\n".join([*out, measured_on(lines), ""])


def _score(lines: Sequence[Line], name: str) -> str:
    if lines[0]["scores"][name] is None:
        return "needs Java"
    return spread(
        lines,
        lambda line: line["scores"][name],
        "{:.2f}" if name in ("nist", "cider") else "{:.1f}",
    )
