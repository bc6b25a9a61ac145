"""GRPO on short sums: how few trained values does SmolLM2-135M need? VeRA beside LoRA r=8.

    python benchmarks/bench_grpo.py --model SMOLLM2 --work out/grpo

The prompt is a sum of two digits whose answer has two digits. The reward of a completion of two
tokens is the share of digits in it, and 1 more for the right sum. Held-out sums are none of the
training sums. Finished runs in --work are not repeated. Writes results/grpo.jsonl, one line a run,
and docs/pictures/grpo.png.
"""

import argparse
import json
import os
import random
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
LINES = HERE / "results" / "grpo.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "grpo.png"
COMMON = {
    "task": "grpo",
    "reward": ["bench_grpo:digit_share", "exact-match"],
    "system": "Answer with the sum, as digits only.",
    "num_generations": 8,
    "max_completion_length": 2,
    "batch_size": 8,
    "save_steps": 20,
    "lr_scheduler": "constant_with_warmup",
    "warmup_steps": 1,
    "warmup_ratio": 0.0,
    "keep": "last",
    "device": "cpu",
    "preview": 0,
}
TARGETS = ("query", "value")
PRINCIPAL = {"targets": TARGETS, "vectors": "d", "basis": "principal"}
# What is trained -> its settings.
METHODS = {
    "LoRA r=8": (
        {"lr": 1e-3, "method": "peft:lora", "options": {"r": 8, "lora_alpha": 16}},
        {"targets": TARGETS},
    ),
    "VeRA, 10 blocks": ({"lr": 2e-2}, {"rank": 64, "targets": TARGETS, "layers": tuple(range(10, 20))}),
    "VeRA, d, principal, r=16": ({"lr": 5e-2}, {"rank": 16, **PRINCIPAL}),
    "VeRA, d, principal, r=1": ({"lr": 5e-2}, {"rank": 1, **PRINCIPAL}),
}  # fmt: skip


def digit_share(completions: list[list[dict[str, str]]], **kwargs: object) -> list[float]:
    """The share of a completion's characters that are digits."""
    texts = [completion[-1]["content"].strip() for completion in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def make_sums(work: Path) -> None:
    """Write train.jsonl and validation.jsonl."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10) if a + b >= 10]
    random.Random(0).shuffle(sums)
    (work / "data").mkdir(parents=True, exist_ok=True)
    for name, part in (("train", sums[:37]), ("validation", sums[-8:])):
        rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in part]
        (work / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(method: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Train once, or read a finished run."""
    from veratune.analysis.machine import describe_machine
    from veratune.config import VeraConfig
    from veratune_lab.paper.experiment import train_once

    changes, adapter = METHODS[method]
    folder = Path(options.work) / f"{method.replace(' ', '_').replace(',', '')}-{seed}"
    settings = dict(
        model=options.model, data=str(Path(options.work) / "data"), out=str(folder), seed=seed, **({} if "method" in changes else {"basis_seed": seed}),
        max_steps=options.steps, **COMMON, **changes,
    )  # fmt: skip
    result = train_once(settings, VeraConfig(**adapter))
    result.pop("path")
    state = folder / "checkpoints" / f"checkpoint-{options.steps}" / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    return {
        "seed": seed,
        "curve": [[e["step"], round(e["reward"], 4)] for e in log if "reward" in e],
        "held_out_curve": [[e["step"], e["eval_reward"]] for e in log if "eval_reward" in e],
        "beside": "other work on the same two cores",
        **describe_machine(),
        **changes,
        **result,
        "method": method,
    }


def draw(lines: list[dict]) -> None:
    """The mean reward of rollouts, over five steps, for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        if not own:
            continue
        curves = [[value for _, value in line["curve"]] for line in own]
        means = [statistics.mean(values) for values in zip(*curves, strict=False)]
        smooth = [statistics.mean(means[max(0, i - 4) : i + 1]) for i in range(len(means))]
        axes.plot(
            range(1, len(smooth) + 1), smooth, label=f"{method}: {own[0]['trained']:,} values"
        )
    axes.set(xlabel="optimizer steps", ylabel="mean reward of rollouts (5 steps)", ylim=(0, 2.05))
    axes.axhline(2.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_title("GRPO: sums of two digits, SmolLM2-135M-Instruct")
    axes.legend(loc="lower right", fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    flags.add_argument("--work", default="out/grpo", help="folder for the runs")
    flags.add_argument("--seeds", type=int, default=1)
    flags.add_argument("--steps", type=int, default=40)
    options = flags.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    make_sums(Path(options.work))
    lines = []
    for seed in range(options.seeds):
        for method in METHODS:
            lines.append(run(method, seed, options))
            print(f"{method}, seed {seed}: {lines[-1]['after']}", file=sys.stderr)
            LINES.parent.mkdir(exist_ok=True)
            LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))
            draw(lines)


if __name__ == "__main__":
    main()
