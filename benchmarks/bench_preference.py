"""DPO on SmolLM2-135M: does the held-out win rate rise, with VeRA and with LoRA r=8?

    python benchmarks/bench_preference.py --model SMOLLM2 --data alpaca_9k/train.parquet --work out/preference

A pair is an Alpaca instruction, its answer in lower case without the last full stop, as in a chat
(chosen), and the answer as it is (rejected). Held-out pairs come from other instructions. Each
method tries three learning rates on seed 0; the one with the best win rate on pairs for tuning runs
on the other seeds. Finished runs in --work are not repeated. Writes results/preference.jsonl, one
line a run.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LINES = HERE / "results" / "preference.jsonl"
COMMON = {
    "task": "preference",
    "batch_size": 4,
    "epochs": 1,
    "max_length": 96,
    "system": "Answer.",
    "device": "cpu",
    "preview": 0,
    "keep": "last",
}
TARGETS = ("query", "value")
# What is trained -> its settings, its adapter, its learning rates.
METHODS = {
    "VeRA": ({}, {"rank": 256, "targets": TARGETS}, (4e-2, 1e-1, 2e-1)),
    "LoRA r=8": (
        {"method": "peft:lora", "options": {"r": 8, "lora_alpha": 16}},
        {"targets": TARGETS},
        (5e-4, 2e-3, 5e-3),
    ),
}


def make_pairs(source: str, work: Path, train: int, held_out: int) -> None:
    """Write train.jsonl and validation.jsonl."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=source, split="train").to_list()
    random.Random(0).shuffle(rows)
    pairs = []
    for row in rows:
        words = row["output"].split()
        prompt = f"{row['instruction']}\n\n{row['input']}".strip()
        if 12 <= len(words) <= 24 and len(prompt.split()) <= 16:
            chosen = row["output"].lower().removesuffix(".")
            if chosen == row["output"]:
                continue
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": row["output"]})
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    parts = {"train": pairs[:train], "validation": pairs[-held_out:]}
    parts["tuning"] = pairs[-2 * held_out : -held_out]
    for name, part in parts.items():
        text = "".join(json.dumps(pair) + "\n" for pair in part)
        (data / f"{name}.jsonl").write_text(text)


def scores(method: str, seed: int, path: str, options: argparse.Namespace) -> dict[str, object]:
    """Win rates of the base model and of what was trained, on held-out pairs and on those for tuning."""
    from veratune.config import VeraConfig
    from veratune.tasks.registry import task_class
    from veratune.training.methods import build_method

    changes, adapter, _ = METHODS[method]
    task = task_class("preference")(max_length=COMMON["max_length"], system=COMMON["system"])
    tokenizer = task.load_processor(options.model)
    model = task.load_model(options.model, tokenizer, dtype="float32").eval()
    data = Path(options.work) / "data"
    encoded, tuning = (
        task.encode(task.load_examples(str(data / f"{part}.jsonl")), tokenizer)
        for part in ("validation", "tuning")
    )
    before = task.score(model, encoded, tokenizer, 1)
    own = build_method(
        changes.get("method", "vera"),
        VeraConfig(**(adapter | {"seed": seed})),
        changes.get("options", {}),
    )
    own.prepare(model, (), task.to_metadata())
    own.read(model, Path(path).parent)
    model.eval()
    return {
        "before": before,
        "after": task.score(model, encoded, tokenizer, 1),
        "tuning": task.score(model, tuning, tokenizer, 1),
    }


def run(
    method: str, lr: float, seed: int, loss: str, options: argparse.Namespace
) -> dict[str, object]:
    """Train once, or read a finished run."""
    from veratune.analysis.machine import describe_machine
    from veratune.config import VeraConfig
    from veratune_lab.paper.experiment import train_once

    changes, adapter, _ = METHODS[method]
    folder = Path(options.work) / f"{method.replace(' ', '_')}-{loss}-{lr}-{seed}"
    settings = dict(
        model=options.model, data=str(Path(options.work) / "data" / "train.jsonl"), out=str(folder), seed=seed, **({} if "method" in changes else {"basis_seed": seed}),
        save_steps=20, loss=loss, lr=lr, **COMMON, **changes,
    )  # fmt: skip
    result = train_once(settings, VeraConfig(**adapter))
    result |= scores(method, seed, result.pop("path"), options)
    return {
        "loss_name": loss,
        "seed": seed,
        "train_pairs": options.train,
        "held_out_pairs": options.held_out,
        "beside": "other work on the same two cores",
        **describe_machine(),
        **changes,
        **result,
        "method": method,
        "lr": lr,
    }


def measure_memory(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Peak memory of a step of SFT on 8 completions, or of DPO on the 4 pairs of them."""
    from veratune.analysis.machine import describe_machine
    from veratune.config import VeraConfig
    from veratune.training.run import train
    from veratune.training.settings import TrainSettings

    work = Path(options.work)
    pairs = [json.loads(line) for line in (work / "data" / "train.jsonl").open()]
    pairs = sorted(pairs, key=lambda p: -len(p["prompt"]) - len(p["chosen"]))[:4]
    rows = [
        {"prompt": p["prompt"], "completion": p[s]} for p in pairs for s in ("chosen", "rejected")
    ]
    for name, part in (("pairs", pairs), ("rows", rows)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    own: dict[str, object] = {
        "task": "instruction",
        "data": str(work / "rows.jsonl"),
        "batch_size": 8,
    }
    if kind == "dpo":
        own = {"task": "preference", "data": str(work / "pairs.jsonl"), "batch_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            model=options.model, out=f"{folder}/run", max_steps=1, max_length=160, device="cpu", preview=0,
            keep="last", **own,
        )  # fmt: skip
        result = train(settings, VeraConfig(rank=256, targets=TARGETS))
    return {
        "measured": f"peak memory of {kind}",
        "peak_memory": result.peak_memory,
        "loss": result.loss,
        "beside": "other work on the same two cores",
        **describe_machine(),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    flags.add_argument("--data", required=True, help="Alpaca's parquet file")
    flags.add_argument("--work", default="out/preference", help="folder for the runs")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--train", type=int, default=64)
    flags.add_argument("--held-out", type=int, default=48)
    flags.add_argument("--memory", choices=["sft", "dpo"], help="measure that alone, and print it")
    options = flags.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    make_pairs(options.data, Path(options.work), options.train, options.held_out)
    if options.memory:
        print(json.dumps(measure_memory(options.memory, options)))
        return
    lines: list[dict] = []

    def note(method: str, lr: float, seed: int) -> float:
        lines.append(run(method, lr, seed, "dpo", options))
        print(f"{method}, lr {lr}, seed {seed}: {lines[-1]['after']}", file=sys.stderr)
        LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return lines[-1]["tuning"]["win_rate"]

    for method, (_, _, rates) in METHODS.items():
        tuned = {lr: note(method, lr, 0) for lr in rates}
        for seed in range(1, options.seeds):
            note(method, max(tuned, key=lambda lr: tuned[lr]), seed)


if __name__ == "__main__":
    main()
