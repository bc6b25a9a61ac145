"""Which adapter is an input for? Routing over eight tasks, and what it does to the tasks' scores.

    python benchmarks/bench_routing.py --model SMOLLM2 --data DATA --work out/routing

Each task has one VeRA adapter. Half of its examples have an instruction before the input, half have
the bare input. Finished adapters in --work are not trained again. Writes results/routing.jsonl.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LINES = Path(__file__).parent / "results" / "routing.jsonl"
FORMS = ("instruction", "bare")
Row = Mapping[str, Any]


def words(*names: str) -> Callable[[Row], str]:
    """The answer word of a row's label."""
    return lambda row: names[row["label"]]


# Task -> its folder, its instruction, its input, and its answer.
TASKS: dict[str, tuple[str, str, Callable[[Row], str], Callable[[Row], str]]] = {
    "restaurants": (
        "e2e_nlg",
        "Write a sentence with these facts:",
        lambda row: row["mr"],
        lambda row: row["ref"],
    ),
    "alpaca": ("alpaca_9k", "", lambda row: row["instruction"], lambda row: row["output"]),
    "sst2": (
        "glue_sst2",
        "Is this film review positive or negative?",
        lambda row: row["sentence"].strip(),
        words("negative", "positive"),
    ),
    "cola": (
        "glue_cola",
        "Is this sentence grammatical? Answer acceptable or unacceptable.",
        lambda row: row["sentence"],
        words("unacceptable", "acceptable"),
    ),
    "qnli": (
        "glue_qnli",
        "Does the text answer the question? Answer yes or no.",
        lambda row: f"{row['question']}\n{row['sentence']}",
        words("yes", "no"),
    ),
    "mrpc": (
        "glue_mrpc",
        "Do both sentences mean the same? Answer equivalent or different.",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        words("different", "equivalent"),
    ),
    "rte": (
        "glue_rte",
        "Does the second sentence follow from the first? Answer true or unknown.",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        words("true", "unknown"),
    ),
    "stsb": (
        "glue_stsb",
        "How similar are both sentences, from 0 to 5?",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        lambda row: str(round(row["label"])),
    ),
}
OPEN_ENDED = ("restaurants", "alpaca")  # no answer word: scored by the loss alone


def prompt_of(task: str, row: Row, form: str) -> str:
    """The user's message."""
    instruction, text = TASKS[task][1], TASKS[task][2](row)
    return f"{instruction}\n{text}" if instruction and form == "instruction" else text


def short_rows(task: str, data: Path, split: str, count: int, skip: int = 0) -> list[Row]:
    """Rows of a task in a fixed random order, without long ones."""
    from veratune.tasks.data import load_examples

    rows = list(load_examples(str(data / TASKS[task][0]), split))
    random.Random(7).shuffle(rows)
    short = [r for r in rows if len(TASKS[task][2](r)) <= 240 and len(TASKS[task][3](r)) <= 160]
    found = short[skip : skip + count]
    assert len(found) == count, (task, split, len(short))
    return found


def examples(task: str, flags: argparse.Namespace, split: str) -> list[dict[str, str]]:
    """Prompts and completions of a task: of a split "train", or of "held_out" in both forms."""
    last = "train" if task == "alpaca" else "validation"
    if split == "train":
        rows = short_rows(task, flags.data, "train", flags.rows)
        pairs = [(row, FORMS[i % 2]) for i, row in enumerate(rows)]
    else:
        skip = flags.rows if last == "train" else 0
        rows = short_rows(task, flags.data, last, flags.held_out, skip)
        pairs = [(row, form) for form in FORMS for row in rows]
    return [
        {"prompt": prompt_of(task, row, form), "completion": TASKS[task][3](row), "form": form}
        for row, form in pairs
    ]


def train_adapter(task: str, flags: argparse.Namespace) -> Path:
    """The adapter's file of a task, trained unless it is there."""
    from veratune.config import VeraConfig
    from veratune.training.run import train
    from veratune.training.settings import TrainSettings

    folder = flags.work / task
    file = folder / "adapter.safetensors"
    if (folder / "results.json").is_file():
        return file
    start = time.process_time()
    rows = folder.with_suffix(".jsonl")
    lines = [{k: e[k] for k in ("prompt", "completion")} for e in examples(task, flags, "train")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = TrainSettings(
        model=flags.model,
        task="instruction",
        data=str(rows),
        out=str(folder),
        lr=flags.lr,
        epochs=flags.epochs,
        batch_size=8,
        padding_free=True,
        max_length=256,
        keep="last",
        device="cpu",
        preview=0,
    )
    train(settings, VeraConfig(rank=256, targets=("query", "value")))
    print(task, "trained", round(time.process_time() - start), "CPU seconds", flush=True)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", type=float, default=4e-2)
    parser.add_argument("--beside", default="nothing")
    parser.add_argument("--only", choices=TASKS, help="train the adapter of this task alone")
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    files = {task: train_adapter(task, flags) for task in TASKS if flags.only in (None, task)}
    print(files)


if __name__ == "__main__":
    main()
