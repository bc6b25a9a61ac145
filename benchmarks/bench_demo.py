"""The demo's task by several methods: rates chosen on one half of the held-out sentences, scores on the other.

    python -m benchmarks.bench_demo --model SMOLLM2 [--only METHOD] [--beside WHAT]

SmolLM2-135M learns the commands of demo/train.jsonl, 3 epochs in batches of 8. Every method has three learning
rates on seed 0; the best by the loss of the even held-out sentences runs on seeds 1 and 2. Appends one line a run to
results/demo_methods.jsonl and goes on where it stopped.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import run as demo

from veratune import VeraConfig, use
from veratune.analysis.machine import describe_machine
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.training.methods import build_method
from veratune.training.run import train

LINES = Path(__file__).parent / "results" / "demo_methods.jsonl"
LINEAR, QV = ("all-linear",), ("query", "value")
METHODS: dict[str, tuple[VeraConfig | None, tuple[float, float, float]]] = {
    "VeRA, d on 64 principal directions, all linear layers": (
        VeraConfig(rank=64, targets=LINEAR, vectors="d", basis="principal"),
        (2e-2, 5e-2, 1e-1),
    ),
    "LoRA r=8, query and value": (None, (1e-3, 2e-3, 5e-3)),
    "VeRA, d on 64 random directions, all linear layers": (
        VeraConfig(rank=64, targets=LINEAR, vectors="d"),
        (2e-2, 5e-2, 1e-1),
    ),
    "VeRA r=256, query and value": (VeraConfig(rank=256, targets=QV), (2e-2, 4e-2, 8e-2)),
    "VeRA r=576, monarch, query and value": (
        VeraConfig(rank=576, targets=QV, basis="monarch"),
        (2e-2, 4e-2, 8e-2),
    ),
}


def load(folder: Path, config: VeraConfig | None, path: Path) -> Any:
    """The base model with what a run left in its folder."""
    with contextlib.redirect_stderr(io.StringIO()):
        if config is not None:
            loaded = load_with_adapter(str(demo.MODEL), path, device="cpu")
            use(loaded.model, "default")
            return loaded
        loaded = load_with_adapter(str(demo.MODEL), None, task="instruction", device="cpu")
    method = build_method("peft:lora", VeraConfig(), demo.LORA)
    method.prepare(loaded.model, (), {})
    method.read(loaded.model, folder)
    loaded.model.eval()
    return loaded


def run(name: str, rate: float, seed: int, halves: dict[str, Path], out: Path) -> dict[str, Any]:
    """Train and score one run."""
    config = METHODS[name][0]
    start = time.process_time()
    if config is None:
        own = {"method": "peft:lora", "options": demo.LORA}
        settings = demo.settings_for(out, lr=rate, seed=seed, preview=0, **own)
    else:
        settings = demo.settings_for(out, lr=rate, seed=seed, preview=0)
    result = train(settings, config or VeraConfig())
    seconds = time.process_time() - start
    loaded = load(out, config, result.path)
    scores = {
        half: evaluate(loaded, str(file), generate=True, max_new_tokens=40, batch_size=32)
        for half, file in halves.items()
    }
    return {
        "method": name,
        "lr": rate,
        "seed": seed,
        "values": result.trained,
        "bytes": result.bytes,
        "cpu_seconds": round(seconds, 1),
        **scores,
        **describe_machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", help="one method")
    parser.add_argument("--beside", default="nothing", help="what else the machine does")
    flags = parser.parse_args()
    demo.MODEL = flags.model
    texts = LINES.read_text().splitlines() if LINES.exists() else []
    lines = [json.loads(text) for text in texts]

    def once(name: str, rate: float, seed: int) -> None:
        if any((x["method"], x["lr"], x["seed"]) == (name, rate, seed) for x in lines):
            return
        with tempfile.TemporaryDirectory() as folder:
            held_out = demo.HELD_OUT.read_text().splitlines(keepends=True)
            halves = {"choose": Path(folder) / "even.jsonl", "score": Path(folder) / "odd.jsonl"}
            for i, file in enumerate(halves.values()):
                file.write_text("".join(held_out[i::2]))
            line = run(name, rate, seed, halves, Path(folder) / "run")
        lines.append(line | {"beside": flags.beside})
        with LINES.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")

    for name in [flags.only] if flags.only else METHODS:
        for rate in METHODS[name][1]:
            once(name, rate, 0)
        tried = [x for x in lines if x["method"] == name and x["seed"] == 0]
        best = min(tried, key=lambda x: x["choose"]["loss"])["lr"]
        for seed in (1, 2):
            once(name, best, seed)


if __name__ == "__main__":
    main()
