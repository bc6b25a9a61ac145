"""Fill the measured blocks of the tasks' pages from benchmarks/results: python docs/make_tasks.py (a test compares them)."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veratune_lab.pages import fill

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Line = dict[str, Any]


def read(name: str) -> list[Line]:
    """The lines of one benchmark."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def methods(lines: list[Line]) -> list[str]:
    """The methods, in the order of the lines."""
    return list(dict.fromkeys(line["method"] for line in lines))


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; a single value alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def machine(line: Line) -> str:
    """Where a line was measured."""
    return f"{line['machine']}, torch {line['torch']}, beside {line['beside']}"


def packing() -> str:
    """Tokens per CPU second of padded, padding-free and packed batches."""
    lines = [line for line in read("packing") if not line.get("lengths_only")]
    ways = ("padded", "padding-free", "packed")
    rounds = [
        [line for line in lines if line["round"] == n]
        for n in range(max(line["round"] for line in lines) + 1)
    ]
    out = [
        row("round", *(f"{way}: tokens/s" for way in ways), "padding-free", "packed"),
        "|" + "---|" * 6,
    ]
    for number, own in enumerate(rounds, start=1):
        speed = {line["way"]: line["tokens_per_cpu_second"] for line in own}
        ratios = [f"{speed[way] / speed['padded']:.2f}x" for way in ways[1:]]
        out.append(row(number, *(f"{speed[way]:.0f}" for way in ways), *ratios))
    most = max(abs(a["loss"] - b["loss"]) for own in rounds for a in own for b in own)
    first = lines[0]
    note = (
        f"Tokens that are no padding, for each CPU second of forward and backward. The losses of the three ways differ by at most {most:.0e}. "
        f"{machine(first)}."
    )
    return "\n".join([*out, "", note])


def preference() -> str:
    """Held-out win rates of DPO."""
    lines = read("preference")
    out = [
        row("", "values", "learning rates tried", "chosen", "win rate before", "after", "seeds"),
        "|" + "---|" * 7,
    ]
    for method in methods(lines):
        own = [line for line in lines if line["method"] == method]
        first = [line for line in own if line["seed"] == 0]
        best = max(first, key=lambda line: line["tuning"]["win_rate"])["lr"]
        chosen = [line for line in own if line["lr"] == best]
        after = spread([100 * line["after"]["win_rate"] for line in chosen])
        before = f"{100 * chosen[0]['before']['win_rate']:.1f}"
        rates = ", ".join(f"{line['lr']:g}" for line in first)
        out.append(
            row(method, f"{own[0]['trained']:,}", rates, f"{best:g}", before, after, len(chosen))
        )
    first = lines[0]
    note = (
        f"{first['train_pairs']} pairs, one epoch of batches of 4; {first['held_out_pairs']} held-out pairs score, as many others choose the rate. "
        f"{machine(first)}."
    )
    return "\n".join([*out, "", note])


def grpo() -> str:
    """Held-out rewards of GRPO by number of trained values."""
    lines = read("grpo")
    parts = list(lines[0]["after"])
    names = [part.rpartition("/")[2].rpartition(":")[2].replace("_", " ") for part in parts]
    out = [
        row(
            "",
            "values",
            "bytes",
            *(f"{name}: before" for name in names[:1]),
            *(f"{name}: after" for name in names),
            "best reward",
            "seeds",
        ),
        "|" + "---|" * (len(names) + 6),
    ]
    for method in methods(lines):
        own = [line for line in lines if line["method"] == method]
        before = f"{statistics.mean(line['before'][parts[0]] for line in own):.2f}"
        after = [spread([line["after"][part] for line in own], 2) for part in parts]
        best = spread([max(value for _, value in line["held_out_curve"]) for line in own], 2)
        out.append(
            row(
                method,
                f"{own[0]['trained']:,}",
                f"{own[0]['bytes']:,}",
                before,
                *after,
                best,
                len(own),
            )
        )
    first = lines[0]
    note = (
        f"{first['steps']} steps of 8 completions; rewards of greedy completions of 8 held-out sums, after the last step, and the best of the evaluations "
        f"at steps {' and '.join(str(step) for step, _ in first['held_out_curve'])}. The rates were not tuned. {machine(first)}."
    )
    return "\n".join([*out, "", note])


def embedding() -> str:
    """Spearman of STS-B and NDCG of QNLI."""
    lines = read("embedding")
    out = [
        row("data", "", "values", "learning rate", "score", "before", "after", "seeds"),
        "|" + "---|" * 8,
    ]
    for data in dict.fromkeys(line["data"] for line in lines):
        for method in methods(lines):
            own = [line for line in lines if (line["data"], line["method"]) == (data, method)]
            if not own:
                continue
            score = next(iter(own[0]["after"]))
            before = f"{100 * own[0]['before'][score]:.1f}"
            after = spread([100 * line["after"][score] for line in own], 2)
            name = {"stsb": "STS-B", "qnli": "QNLI"}[data]
            out.append(
                row(
                    name,
                    method,
                    f"{own[0]['trained']:,}",
                    f"{own[0]['lr']:g}",
                    score,
                    before,
                    after,
                    len(own),
                )
            )
    first = lines[0]
    note = f"One epoch of {first['train_rows']:,} rows, {first['held_out_rows']} held-out ones; scores times 100. {machine(first)}."
    return "\n".join([*out, "", note])


def tool_calls() -> str:
    """Held-out loss of conversations with tool calls."""
    lines = read("tool_calls")
    out = [
        row("", "values", "learning rate", "loss before", "after", "exact calls after", "seeds"),
        "|" + "---|" * 7,
    ]
    for method in methods(lines):
        own = [line for line in lines if line["method"] == method]
        after = spread([line["loss_after"] for line in own], 3)
        exact = spread([100 * line["exact_match_after"] for line in own])
        out.append(
            row(
                method,
                f"{own[0]['trained']:,}",
                f"{own[0]['lr']:g}",
                f"{own[0]['loss_before']:.3f}",
                after,
                f"{exact}%",
                len(own),
            )
        )
    first = lines[0]
    note = f"{first['train_rows']} conversations, {first['epochs']:g} epochs of batches of {first['batch']}; {first['held_out_rows']} held out. The rates were not tuned. {machine(first)}."
    return "\n".join([*out, "", note])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "throughput": {"packing": packing},
    "preferences": {"preference": preference},
    "rl": {"grpo": grpo},
    "embeddings": {"embedding": embedding},
    "conversations": {"tool calls": tool_calls},
}  # fmt: skip


def pages() -> dict[Path, str]:
    """Each page with its blocks filled."""
    return {
        ROOT / "docs" / f"{name}.md": fill(ROOT / "docs" / f"{name}.md", blocks)
        for name, blocks in PAGES.items()
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
