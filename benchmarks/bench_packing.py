"""Tokens per second of fine-tuning with padded, padding-free and packed batches, on the lengths of Alpaca.

    python benchmarks/bench_packing.py --model FOLDER --data alpaca_9k --rounds 5

Every round draws new examples and runs the ways in turns, so that all share what else the machine does. Counted are
tokens that are no padding, and the processor's seconds (time.process_time) of forward and backward of the whole
model with VeRA. Appends one line a round and way to results/packing.jsonl; --beside says what ran on the same cores.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import veratune as vt
from veratune.analysis.machine import describe_machine
from veratune.tasks.text.language import Instruction
from veratune.training.packing import PackedDataset, PackingCollator, best_fit, check_packing

LINES = Path(__file__).parent / "results" / "packing.jsonl"
BATCH, MAX_LENGTH = 16, 512


def batches(way: str, examples: Any, task: Instruction, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The batches of one way, of about as many tokens each."""
    if way == "packed":
        rows, collate = PackedDataset(examples, MAX_LENGTH), PackingCollator(tokenizer.pad_token_id)
        step = max(1, round(len(rows) / (len(examples) / BATCH)))
        order = list(range(len(rows)))
    else:
        rows = examples
        step, order = BATCH, list(range(len(examples)))
        collate = (
            PackingCollator(tokenizer.pad_token_id)
            if way == "padding-free"
            else task.collator(tokenizer)
        )
    for start in range(0, len(order), step):
        yield collate([rows[i] for i in order[start : start + step]])


def measure(
    model: Any, way: str, examples: Any, task: Instruction, tokenizer: Any
) -> dict[str, Any]:
    found = list(batches(way, examples, task, tokenizer))
    cells, loss, losses = sum(batch["input_ids"].numel() for batch in found), 0.0, 0
    start = time.process_time()
    for batch in found:
        count = int((batch["labels"][:, 1:] != -100).sum())
        out = model(**batch)
        out.loss.backward()
        loss += out.loss.item() * count
        losses += count
        model.zero_grad()
    seconds = time.process_time() - start
    tokens = sum(len(ids) for ids in examples["input_ids"])
    return {
        "way": way, "batches": len(found), "tokens": tokens, "cells": cells, "cpu_seconds": round(seconds, 3),
        "tokens_per_cpu_second": round(tokens / seconds, 2), "loss": round(loss / losses, 6),
    }  # fmt: skip


def simulate(lengths: list[int]) -> list[dict[str, Any]]:
    """Cells of the batches of many examples, for each way: no model is run."""
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    shuffled = [lengths[i] for i in order]
    batches = [shuffled[i : i + BATCH] for i in range(0, len(shuffled), BATCH)]
    bins = best_fit(lengths, MAX_LENGTH)
    cells = {
        "padded": sum(len(batch) * max(batch) for batch in batches),
        "padding-free": sum(len(best_fit(batch, max(batch))) * max(batch) for batch in batches),
        "packed": len(bins) * MAX_LENGTH,
    }
    tokens = sum(lengths)
    return [
        {"way": way, "rows": len(lengths), "tokens": tokens, "cells": found, "cells_per_token": round(found / tokens, 4)}
        for way, found in cells.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument(
        "--lengths-only", action="store_true", help="count the cells of 1,900 rows, run no model"
    )
    parser.add_argument("--beside", default="nothing")
    flags = parser.parse_args()
    task = Instruction(max_length=MAX_LENGTH)
    tokenizer = task.load_processor(flags.model)
    rows = task.load_examples(flags.data)
    if flags.lengths_only:
        rows = rows.shuffle(seed=0).select(range(min(len(rows), 1900)))
        lengths = [len(ids) for ids in task.encode(rows, tokenizer)["input_ids"]]
        about = {
            "lengths_only": True,
            "batch": BATCH,
            "max_length": MAX_LENGTH,
            "data": "alpaca_9k",
        }
        with LINES.open("a") as file:
            file.writelines(json.dumps(line | about) + "\n" for line in simulate(lengths))
        return
    model: Any = task.load_model(flags.model, tokenizer)
    vt.attach(model, vt.VeraConfig(rank=256, targets=("query", "value")), name="a")
    model.train()
    model.config.use_cache = False
    check_packing(model)
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    done = len({line["round"] for line in lines if "round" in line})
    for number in range(done, flags.rounds):
        draw = random.Random(number).sample(range(len(rows)), flags.examples)
        examples = task.encode(rows.select(draw), tokenizer)
        ways = ["padded", "padding-free", "packed"]
        random.Random(number).shuffle(ways)
        lines = [measure(model, way, examples, task, tokenizer) for way in ways]
        about = {
            "round": number, "seed": number, "batch": BATCH, "max_length": MAX_LENGTH, "examples": len(examples),
            "model": "SmolLM2-135M-Instruct", "data": "alpaca_9k", "rank": 256, "targets": "query, value",
            "beside": flags.beside, **describe_machine(),
        }  # fmt: skip
        with LINES.open("a") as file:
            file.writelines(json.dumps(line | about) + "\n" for line in lines)
        print(lines, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
