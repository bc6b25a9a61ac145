"""Instruction tuning: table 4 (MT-Bench), table 13 (Vicuna questions) and table 12 (time and memory)."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset

from veratune.config import VeraConfig
from veratune.inference.generate import generate_completions
from veratune.scoring.judge import mean_rating, read_questions
from veratune.tasks.text.conversation import Message
from veratune.tasks.text.language import Instruction
from veratune_lab.bench.measure import Timing
from veratune_lab.bench.peers import FROZEN, OURS, Peer
from veratune_lab.bench.steps import step
from veratune_lab.paper.experiment import (
    Cell,
    Experiment,
    Line,
    Place,
    Scale,
    fine_tune,
    load_trained,
    measured_on,
    spread,
    table,
)
from veratune_lab.paper.language_models import smollm2

_COMMON: dict[str, Any] = {
    "warmup_ratio": 0.1,
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "epochs": 1,
    "lr_scheduler": "cosine",
}
TABLE9: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 64, "lr": 4e-4, **_COMMON},
    "VeRA": {"rank": 1024, "lr": 4e-3, **_COMMON},
}
PRINTED4 = {
    ("huggyllama/llama-7b", "LoRA"): 5.03, ("huggyllama/llama-7b", "VeRA"): 4.77, ("huggyllama/llama-13b", "nothing"): 2.61,
    ("huggyllama/llama-13b", "LoRA"): 5.31, ("huggyllama/llama-13b", "VeRA"): 5.22, ("meta-llama/Llama-2-7b-hf", "LoRA"): 5.19,
    ("meta-llama/Llama-2-7b-hf", "VeRA"): 5.08, ("meta-llama/Llama-2-13b-hf", "LoRA"): 5.77, ("meta-llama/Llama-2-13b-hf", "VeRA"): 5.93,
}  # fmt: skip
PRINTED13 = {("huggyllama/llama-7b", "LoRA"): 7.36, ("huggyllama/llama-7b", "VeRA"): 7.48}
# Learning rates of the scaled runs; the ranks are the paper's.
SMALL = {"LoRA": 1e-3, "VeRA": 2e-2}


class Alpaca(Instruction):
    """Rows [0, train) of a shuffle are trained on, the `held` ones behind them are for the loss."""

    def __init__(
        self, train: int | None, held: int, max_length: int = 512, longest: int | None = None
    ) -> None:
        """longest: characters of a row; None: any."""
        super().__init__(max_length=max_length)
        self.train, self.held, self.longest = train, held, longest

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        rows = super().load_examples(source, "train", config)
        if self.longest is not None:
            longest = self.longest
            rows = rows.filter(lambda row: sum(map(len, row.values())) < longest)
        rows = rows.shuffle(seed=0)
        if split != "train":
            return rows.select(range(len(rows) - self.held, len(rows)))
        return rows.select(range(min(self.train or len(rows), len(rows) - self.held)))

    def has_split(self, source: str, split: str) -> bool:
        return True


class Table4(Experiment):
    name = "table4"
    about = "instruction tuning on Alpaca, LoRA rank 64 beside VeRA rank 1024 on all linear layers, rated on MT-Bench (VeRA, table 4)"
    seeds = {"quick": 1, "scaled": 1, "full": 1}
    questions: ClassVar[str] = "mt_bench"
    printed: ClassVar[Mapping[tuple[str, str], float]] = PRINTED4
    rank: ClassVar[int] = 1024
    rows: ClassVar[Mapping[Scale, int | None]] = {"quick": 16, "scaled": 160, "full": None}

    def cells(self, scale: Scale) -> list[Cell]:
        runs = (
            list(self.printed) if scale == "full" else [("", "nothing"), ("", "LoRA"), ("", "VeRA")]
        )
        return [
            Cell(
                name=f"{model.rpartition('/')[2]} {method}".strip(), shown={"model": model, "method": method},
                run=functools.partial(self._run, scale, model, method),
            )
            for model, method in runs
        ]  # fmt: skip

    def _run(
        self, scale: Scale, model: str, method: str, place: Place, seed: int, folder: Path
    ) -> Line:
        full = scale == "full"
        source = (
            place.dataset("alpaca-cleaned", "yahma/alpaca-cleaned")
            if full
            else place.dataset("alpaca_9k")
        )
        task = Alpaca(
            self.rows[scale],
            64 if full else 16 if scale == "quick" else 64,
            512 if full else 128,
            None if full else 360,
        )
        own = dict(TABLE9.get(method, {}))
        rank = self.rank if method == "VeRA" else int(own.get("rank", 1))
        own.pop("rank", None)
        settings: dict[str, Any] = {
            "data": source,
            "keep": "last",
            "save_steps": 10**6,
            **own,
        }
        if full:
            local = place.model(model.rpartition("/")[2], model)
            settings |= {
                "model": local,
                "quantize": "4bit",
                "base_dtype": "bfloat16",
                "gradient_checkpointing": True,
            }
        else:
            settings |= {
                "model": smollm2(place.out.parent / "smollm2"),
                "mixed_precision": "bf16",
                "group_by_length": True,
            }
            settings |= {"lr": SMALL.get(method, 0), "gradient_accumulation_steps": 2}
        if method == "LoRA":
            settings |= {"method": "peft:lora", "options": {"r": 64, "lora_alpha": 16}}
        elif method == "nothing":
            settings |= {"method": "head", "lr": 0}
        vera = VeraConfig(rank=rank, targets=("all-linear",))
        line: Line = (
            {} if method == "nothing" else fine_tune(settings, vera, task, place, seed, folder)
        )
        net, tokenizer = load_trained(
            settings, vera, task, place, None if method == "nothing" else folder
        )
        told = read_questions(Path(place.dataset("mt_bench")), self.questions)
        numbers = sorted(told.turns) if full or place.judge is not None else sorted(told.turns)[:2]
        answers = answer_turns(
            net, tokenizer, [told.turns[n] for n in numbers], 512 if full else 96
        )
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"question_id": n, "turns": turns} for n, turns in zip(numbers, answers, strict=True)
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        if place.judge is not None:
            line["rating"] = mean_rating(
                place.judge, told, dict(zip(numbers, answers, strict=True))
            )
            line["judge"] = place.judge.model
        return line | {
            "sample": [told.turns[numbers[0]][0], answers[0][0]],
            "rows": self.rows[scale],
        }

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [
                line["model"] or "SmolLM2-135M-Instruct", line["method"], f"{line['trained']:,}" if "trained" in line else "-",
                f"{line['before']['loss']:.4f}" if "before" in line else "-", spread([line], lambda x: x["after"]["loss"], "{:.4f}") if "after" in line else "-",
                f"{line['rating']:.2f}" if "rating" in line else "-",
            ]
            for line in lines
        ]  # fmt: skip
        printed = [[model, method, value] for (model, method), value in self.printed.items()]
        out = [
            f"# {self.name}: {self.about}", "", table(["model", "method", "trained", "held-out loss before", "after", "rating"], rows),
            "Printed in the paper, rated by GPT-4:", "", table(["model", "method", "rating"], printed),
            f"Scaled: {self.rows['scaled']} short rows of Alpaca, one epoch, batch 4 x 2, 128 tokens, table 9's warmup and cosine, rates not tuned; the loss is that of 64 rows held out. "
            "A rating wants a judge (`--judge-url`, `--judge-model`); with none, the first answer is shown. Full: the paper's table 9, "
            "4-bit base.", "",
        ]  # fmt: skip
        for line in lines:
            out += [
                f"**{line['method']}**, to *{line['sample'][0]}*:",
                "",
                "> " + line["sample"][1].replace("\n", "\n> "),
                "",
            ]
        return "\n".join([*out, measured_on(lines), ""])


class Table13(Table4):
    name = "table13"
    about = "as table 4 with 10,000 rows and VeRA rank 256, rated on the Vicuna questions (VeRA, table 13)"
    questions = "vicuna"
    printed = PRINTED13
    rank = 256
    rows = {"quick": 16, "scaled": 200, "full": 10_000}


class Table12(Experiment):
    name = "table12"
    about = "time and memory of a training step, LoRA and VeRA at rank 64 on all linear layers (VeRA, table 12)"
    peers: ClassVar[tuple[Peer, ...]] = (
        Peer(FROZEN),
        Peer("lora", 64),
        Peer("peft-vera", 64),
        Peer(OURS, 64),
    )

    def cells(self, scale: Scale) -> list[Cell]:
        """One cell: the contestants take turns."""
        shape = "llama-1024" if scale == "full" else "smollm2-135m"
        return [
            Cell(name=shape, shown={"model": shape}, run=functools.partial(self._run, scale, shape))
        ]

    def _run(self, scale: Scale, shape: str, place: Place, seed: int, folder: Path) -> Line:
        found = step(
            shape,
            rank=64,
            layers=2 if scale == "quick" else 6 if scale == "scaled" else None,
            peers=self.peers,
            timing=Timing(seconds=20 if scale == "quick" else 60),
        )
        return {"steps": found, "threads": torch.get_num_threads()}

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [
                entry["method"],
                entry["rank"] or "-",
                f"{entry['trained']:,}",
                f"{entry['seconds']:.3f}",
                f"{entry['over_frozen']:.2f}",
                f"{entry['peak_bytes'] / 2**20:,.0f}",
            ]
            for line in lines
            for entry in line["steps"]
        ]
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["method", "rank", "trained", "seconds a step", "of frozen", "peak MiB"], rows),
            "Printed for Llama 7B: LoRA 568 min and 23.42 GB, VeRA 578 min and 21.69 GB. Scaled: blocks of SmolLM2's shape with random weights, 4 x 512 tokens, forward and backward in turns. "
            "Weights and activations weigh as much for all; the optimizer's state, which is what VeRA saves, is not in these steps.", "", measured_on(lines), "",
        ])  # fmt: skip


def answer_turns(
    model: Any, tokenizer: Any, questions: Sequence[Sequence[str]], max_new_tokens: int
) -> list[list[str]]:
    """Greedy answers to every turn of each question, the earlier turns and answers before it."""
    talks: list[list[Message]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        asked = [i for i, turns in enumerate(questions) if turn < len(turns)]
        for i in asked:
            talks[i].append({"role": "user", "content": questions[i][turn]})
        said = generate_completions(
            model, tokenizer, [talks[i] for i in asked], max_new_tokens=max_new_tokens, batch_size=8
        )
        for i, text in zip(asked, said, strict=True):
            talks[i].append({"role": "assistant", "content": text})
            answers[i].append(text)
    return answers
