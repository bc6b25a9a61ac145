"""Score of one adapter stored in float32, bfloat16 and int8: the demo, STS-B and SST-2.

    python benchmarks/bench_storage.py --data FOLDER --work out/storage

FOLDER holds glue_stsb and glue_sst2, each with train.parquet and validation.parquet. The demo's
adapter is that of `make demo`. Each adapter is trained once; runs and scores that are in --work are
not repeated. Replaces the lines of this measure in results/exits.jsonl.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from exits_results import ROOT, record

STORAGES = ("float32", "bfloat16", "int8")
DEMO = ROOT / "out" / "demo"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose adapter is stored.

    Attributes:
        title: Model and task.
        score: The name of its score.
        model: The base model's folder.
        adapter: The adapter's file.
        data: What the score is computed on.
        generate: Whether the score needs completions.
    """

    title: str
    score: str
    model: str
    adapter: Path
    data: str
    generate: bool = False


def glue(name: str, kind: str, length: int, data: Path, work: Path) -> Path:
    """Train MiniLM on a GLUE task, unless it was: VeRA on query and value."""
    from veratune.config import VeraConfig
    from veratune.training.run import train
    from veratune.training.run_folder import RUN
    from veratune.training.settings import TrainSettings
    from veratune_lab.paper.language_models import minilm

    out = work / name
    file = out / "adapter.safetensors"
    if not file.is_file():
        settings = TrainSettings(
            model=minilm(), task=kind, data=str(data), out=str(out), max_length=length, lr=2e-2,
            max_steps=200, keep="last", device="cpu", preview=0, resume=(out / RUN).is_file(),
        )  # fmt: skip
        train(settings, VeraConfig(rank=192, targets=("query", "value")))
    return file


def tasks(data: Path, work: Path) -> dict[str, Task]:
    """The three tasks, their adapters trained."""
    from veratune_lab.paper.language_models import minilm

    made = {
        "demo": Task(
            "SmolLM2-135M, the demo's commands",
            "exact_match",
            str(DEMO / "smollm2"),
            DEMO / "run" / "adapter.safetensors",
            str(ROOT / "demo" / "heldout.jsonl"),
            generate=True,
        )
    }
    for name, kind, title, score, length in (
        ("stsb", "text-regression", "MiniLM, STS-B", "pearson", 96),
        ("sst2", "text-classification", "MiniLM, SST-2", "accuracy", 64),
    ):
        folder = data / f"glue_{name}"
        made[name] = Task(
            title, score, minilm(), glue(name, kind, length, folder, work), str(folder)
        )
    return made


def measure(task: Task, storage: str) -> dict[str, Any]:
    """Store a task's adapter, load the file and score it."""
    from veratune.formats import native
    from veratune.inference.adapted import load_with_adapter
    from veratune.inference.evaluate import evaluate

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        adapter = native.read(task.adapter)
        size = native.write(adapter, file, storage)  # type: ignore[arg-type]
        loaded = load_with_adapter(task.model, str(file), device="cpu")
        scores = evaluate(loaded, task.data, generate=task.generate, max_new_tokens=40)
    return {
        "title": task.title,
        "storage": storage,
        "bytes": size,
        "values": adapter.trained_values,
        "head": sum(tensor.numel() for tensor in adapter.head.values()),
        "score": task.score,
        task.score: scores[task.score],
        "loss": scores["loss"],
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", type=Path, required=True, help="folder of the GLUE tasks")
    flags.add_argument("--work", type=Path, default=Path("out/storage"), help="folder of the runs")
    flags.add_argument("--beside", default="nothing", help="other work on the machine")
    options = flags.parse_args()
    lines = []
    for name, task in tasks(options.data, options.work).items():
        for storage in STORAGES:
            kept = options.work / f"{name}-{storage}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(measure(task, storage)))
            lines.append({"task": name, **json.loads(kept.read_text())})
            print(json.dumps(lines[-1]), flush=True)
    record("storage", lines, options.beside)


if __name__ == "__main__":
    main()
