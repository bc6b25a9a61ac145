"""Fill the measured blocks of README.md from benchmarks/results: python docs/make_readme.py (a test compares them)."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veratune_lab.pages import fill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def demo() -> str:
    """The demo's table: one run of each method."""
    (line,) = read("demo")
    base, vera, lora = (line["rows"][name] for name in ("base", "vera", "lora"))
    rows = [
        ("held-out exact match", [f"{r['scores']['exact_match']:.1%}" for r in (base, vera, lora)]),
        ("held-out loss", [f"{r['scores']['loss']:.3f}" for r in (base, vera, lora)]),
        ("trained values", ["", f"{vera['trained']:,}", f"{lora['trained']:,}"]),
        ("adapter file, bytes", ["", f"{vera['bytes']:,}", f"{lora['bytes']:,}"]),
        ("training, seconds", ["", f"{vera['seconds']:.0f}", f"{lora['seconds']:.0f}"]),
    ]
    table = [
        "| SmolLM2-135M: sentence -> JSON command | base | VeRA, d alone, r=64 | LoRA r=8 (PEFT) |"
    ]
    table += ["|---|---|---|---|"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    seconds, memory = line["demo_seconds"], line["peak_memory"] / 2**30
    return "\n".join(
        [
            *table,
            "",
            f"{line['threads']} CPU cores, {seconds} s in all, {memory:.2f} GiB at most. One seed; learning rates "
            f"{line['lr']:g} and {line['lora']['lr']:g}, each the best that was tried "
            "([more methods](docs/recipes.md#commands-the-demos-task)).",
        ]
    )


def speed() -> str:
    """A training step over the frozen model's, for the models of the benchmark."""
    runs: dict[tuple[str, int], dict[tuple[str, str], dict[str, Any]]] = {}
    current: dict[tuple[str, str], dict[str, Any]] = {}
    for line in read("steps"):
        if line["method"] == "frozen":
            current = {}
        current[line["method"], f"{line['basis']} {line['rank']}"] = line
        if line["method"] == "veratune":
            runs[line["model"], line["rank"]] = current
    rows = []
    for (model, rank), lines in runs.items():
        cells = []
        for method, kind in (
            ("veratune", f"random {rank}"),
            ("veratune", f"monarch {rank}"),
            ("peft-vera", f"random {rank}"),
            ("lora", "random 8"),
        ):
            found = lines.get((method, kind))
            cells.append(f"{found['over_frozen']:.2f}" if found else "")
        rows.append(f"| {model}, rank {rank} | {' | '.join(cells)} |")
    head = [
        "| training step over the frozen model's | veratune | monarch basis | PEFT VeRA | LoRA r=8 |"
    ]
    return "\n".join([*head, "|---|---|---|---|---|", *rows])


def results() -> str:
    """Quality and serving, one line each, with the page that has the whole table."""
    rows = [
        ("[GLUE MRPC](docs/mrpc.md), MiniLM, three seeds", _mrpc()),
        (
            "[1,500 rows of STS-B](docs/quality.md), MiniLM, three rates each, three seeds",
            _quality(),
        ),
        ("[A DDPM of digits adapted to clothes](docs/vision.md), epsilon MSE", _ddpm()),
        ("[1,000 tenants in one run](docs/fleet.md), MiniLM, 32 sentences each", _fleet()),
        ("[GRPO](docs/rl.md) on sums of two digits, SmolLM2-135M, reward of 2 at most", _grpo()),
        ("[Serving](docs/benchmarks.md#serving) SmolLM2-135M on two cores", _serving()),
    ]
    return "\n".join(
        ["| measured | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    )


def _fleet() -> str:
    lines = {line["way"]: line for line in read("fleet") if "way" in line}
    fleet = lines["fleet"]
    faster = ", ".join(
        f"{lines[way]['fleet_is_faster_by']:.1f} times {name}"
        for way, name in (
            ("command", "`veratune train` for each"),
            ("vera", "one by one in one process"),
            ("lora", "PEFT LoRA one by one"),
        )
    )
    scores = f"accuracy {100 * fleet['before']:.1f} before, {100 * fleet['after']:.1f} after"
    return f"{fleet['adapters_per_cpu_hour']:,.0f} adapters per CPU hour: {faster}; {scores}"


def _grpo() -> str:
    """The best held-out reward, by number of values."""
    best: dict[int, list[float]] = {}
    for line in read("grpo"):
        reward = max(value for _, value in line["held_out_curve"])
        best.setdefault(line["trained"], []).append(reward)
    names = {max(best): "LoRA r=8"}
    texts = [
        f"{names.get(values, 'VeRA')} with {values:,} values {statistics.mean(found):.2f}"
        for values, found in sorted(best.items())
    ]
    seeds = max(map(len, best.values()))
    runs = "one seed" if seeds == 1 else f"{seeds} seeds"
    return f"best held-out reward, {runs}: " + ", ".join(texts)


def _mrpc() -> str:
    scores: dict[str, list[float]] = {}
    for line in read("mrpc_vera_against_head"):
        scores.setdefault(line["method"], []).append(100 * line["after"]["accuracy"])
    texts = [
        f"{name} {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        for name, values in sorted(scores.items(), reverse=True)
    ]
    return "accuracy: " + ", ".join(texts)


def _quality() -> str:
    """Mean ± deviation over seeds on the small STS-B cell, of methods that had all their trials."""
    from veratune_lab.paper.experiment import spread
    from veratune_lab.quality.experiment import Quality
    from veratune_lab.quality.report import final_score, finished

    cells = finished(Quality(), read("reproduce/quality"))
    names = {
        "head alone": "head alone",
        "VeRA, d on 64 principal directions": "principal d, r=64",
        "VeRA, d on 192 principal directions": "principal d, r=192",
        "IA3": "IA3",
        "LoRA r=8 q,v": "LoRA r=8, q,v",
        "LoRA r=1 on all linear layers": "LoRA r=1, all-linear",
        "LoRA r=8 on all linear layers": "LoRA r=8, all-linear",
    }
    texts = []
    for shown, name in names.items():
        lines = cells["stsb-1500", name]
        size = f"{lines[0]['trained']:,} values, {lines[0]['bytes'] / 1000:.0f} kB"
        texts.append(f"{shown} {spread(lines, final_score)} ({size})")
    return "Pearson: " + ", ".join(texts)


def cost() -> str:
    """What VeRA gives and costs beside LoRA, of two measurements."""
    from veratune_lab.paper.experiment import spread
    from veratune_lab.quality.experiment import Quality
    from veratune_lab.quality.report import final_score, finished

    cells = finished(Quality(), read("reproduce/quality"))
    names = ("principal d, r=192", "LoRA r=8, q,v", "LoRA r=8, all-linear")
    ours, narrow, wide = (cells["stsb-1500", name] for name in names)
    scores = [spread(lines, final_score) for lines in (ours, narrow, wide)]
    sizes = [f"{lines[0]['bytes'] / 1000:,.0f} kB" for lines in (ours, narrow, wide)]
    times: dict[tuple[str, int, str], float] = {}
    for line in read("steps"):
        if line["model"] == "llama-1024":
            # LoRA of the run with the rank of the monarch basis, which comes first.
            times.setdefault((line["method"], line["rank"], line["basis"]), line["over_frozen"])
    return (
        f"What it gives: on 1,500 rows of STS-B, VeRA (d alone, 192 principal directions of every linear layer) scores "
        f"{scores[0]} with {sizes[0]}, LoRA r=8 {scores[1]} with {sizes[1]} on query and value and {scores[2]} with {sizes[2]} "
        f"on all linear layers. What it costs: on a Llama 1024 wide, all linear layers, a training step of VeRA at rank 1024 "
        f'(`basis="monarch"`, d and b) takes {times["veratune", 1024, "monarch"]:.2f} times the frozen model\'s, one of '
        f"LoRA r=8 {times['lora', 8, 'random']:.2f} times."
    )


def _ddpm() -> str:
    lines = {line["method"]: line for line in read("reproduce/ddpm")}
    names = {"VeRA": "VeRA, rank 64", "LoRA": "LoRA, rank 1", "full": "full"}
    cells = [
        f"{shown} {lines[name]['after']['loss']:.3f} ({lines[name]['trained']:,} values)"
        for shown, name in names.items()
    ]
    return f"before {lines['full']['before']['loss']:.3f}, " + ", ".join(cells)


def _serving() -> str:
    lines = [line for line in read("serving") if line["dtype"] == "float32"]
    by = {line.get("workload", line["what"]): line for line in lines}
    pool, many = by["adapters in memory"], by["32 tenants"]
    turns = zip(many["turns"], by["one after the other"]["turns"], strict=True)
    times = statistics.median(a / b for a, b in turns)
    return (
        f"32 tenants in one batch: {many['of_one_tenant']:.2f} of one tenant's speed, {times:.1f} times "
        f"one after the other; {pool['adapters']:,} adapters in {pool['process_bytes'] / 2**20:,.0f} MiB"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "cost": cost,
    "demo": demo,
    "speed": speed,
    "results": results,
}


def page() -> str:
    """README.md with its blocks filled."""
    return fill(PAGE, BLOCKS)


if __name__ == "__main__":
    PAGE.write_text(page())
