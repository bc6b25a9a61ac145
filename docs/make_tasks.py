"""Fill the measured blocks of the tasks' pages from benchmarks/results: python docs/make_tasks.py (a test compares them)."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from veratune_lab.pages import fill
from veratune_lab.paper.experiment import spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Line = dict[str, Any]


def read(name: str) -> list[Line]:
    """The lines of one benchmark."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def by(lines: Iterable[Line], key: str) -> dict[Any, list[Line]]:
    """The lines of each value of a key, in the order in which the values come."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return groups


def table(head: Sequence[str], rows: Iterable[Sequence[object]], note: str, line: Line) -> str:
    """A Markdown table, and below it a note with the machine of a line."""
    texts = [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]
    where = f"{line['machine']}, torch {line['torch']}, beside {line['beside']}."
    return "\n".join([*texts, "", f"{note} {where}"])


def packing() -> str:
    """Tokens per CPU second of padded, padding-free and packed batches."""
    lines = [line for line in read("packing") if not line.get("lengths_only")]
    ways = ("padded", "padding-free", "packed")
    rows, most = [], 0.0
    for number, measured in by(lines, "round").items():
        speed = {line["way"]: line["tokens_per_cpu_second"] for line in measured}
        ratios = [f"{speed[way] / speed['padded']:.2f}x" for way in ways[1:]]
        rows.append([number + 1, *(f"{speed[way]:.0f}" for way in ways), *ratios])
        losses = [line["loss"] for line in measured]
        most = max(most, max(losses) - min(losses))
    head = ["round", *(f"{way}: tokens/s" for way in ways), "padding-free", "packed"]
    note = (
        "Tokens that are no padding, for each CPU second of forward and backward. "
        f"The losses of the three ways differ by at most {most:.0e}."
    )
    return table(head, rows, note, lines[0])


def preference() -> str:
    """Held-out win rates of DPO."""
    lines, rows = read("preference"), []
    for method, runs in by(lines, "method").items():
        tried = by(runs, "seed")[0]
        best = max(tried, key=lambda line: line["tuning"]["win_rate"])["lr"]
        chosen = by(runs, "lr")[best]
        rates = ", ".join(f"{line['lr']:g}" for line in tried)
        before = f"{100 * chosen[0]['before']['win_rate']:.1f}"
        after = spread(chosen, lambda line: 100 * line["after"]["win_rate"])
        rows.append(
            [method, f"{runs[0]['trained']:,}", rates, f"{best:g}", before, after, len(chosen)]
        )
    head = ["", "values", "learning rates tried", "chosen", "win rate before", "after", "seeds"]
    first = lines[0]
    note = (
        f"{first['train_pairs']} pairs, one epoch of batches of 4; {first['held_out_pairs']} held-out pairs score, "
        "as many others choose the rate."
    )
    return table(head, rows, note, first)


def grpo() -> str:
    """Held-out rewards of GRPO by number of trained values."""
    lines, rows = read("grpo"), []
    parts = list(lines[0]["after"])  # the sum, then each reward
    names = [part.rpartition("/")[2].rpartition(":")[2].replace("_", " ") for part in parts]
    for method, runs in by(lines, "method").items():
        before = spread(runs, lambda line: line["before"][parts[0]], "{:.2f}")
        after = [
            spread(runs, lambda line, part=part: line["after"][part], "{:.2f}") for part in parts
        ]
        best = spread(
            runs, lambda line: max(value for _, value in line["held_out_curve"]), "{:.2f}"
        )
        sizes = [f"{runs[0]['trained']:,}", f"{runs[0]['bytes']:,}"]
        rows.append([method, *sizes, before, *after, best, len(runs)])
    head = [
        "",
        "values",
        "bytes",
        f"{names[0]}: before",
        *(f"{name}: after" for name in names),
        "best reward",
        "seeds",
    ]
    first = lines[0]
    note = (
        f"{first['steps']} steps of 8 completions; rewards of greedy completions of 8 held-out sums, after the last step, and the best of the evaluations "
        f"at steps {' and '.join(str(step) for step, _ in first['held_out_curve'])}. The rates were not tuned."
    )
    return table(head, rows, note, first)


def embedding() -> str:
    """Spearman of STS-B and NDCG of QNLI."""
    lines, rows = read("embedding"), []
    for data, measured in by(lines, "data").items():
        for method, runs in by(measured, "method").items():
            score = next(iter(runs[0]["after"]))
            before = f"{100 * runs[0]['before'][score]:.1f}"
            after = spread(runs, lambda line, score=score: 100 * line["after"][score], "{:.2f}")
            name = {"stsb": "STS-B", "qnli": "QNLI"}[data]
            rows.append(
                [
                    name,
                    method,
                    f"{runs[0]['trained']:,}",
                    f"{runs[0]['lr']:g}",
                    score,
                    before,
                    after,
                    len(runs),
                ]
            )
    head = ["data", "", "values", "learning rate", "score", "before", "after", "seeds"]
    first = lines[0]
    note = f"One epoch of {first['train_rows']:,} rows, {first['held_out_rows']} held-out ones; scores times 100."
    return table(head, rows, note, first)


def tool_calls() -> str:
    """Held-out loss of conversations with tool calls."""
    lines, rows = read("tool_calls"), []
    for method, runs in by(lines, "method").items():
        after = spread(runs, lambda line: line["loss_after"], "{:.3f}")
        exact = spread(runs, lambda line: 100 * line["exact_match_after"])
        rows.append(
            [
                method,
                f"{runs[0]['trained']:,}",
                f"{runs[0]['lr']:g}",
                f"{runs[0]['loss_before']:.3f}",
                after,
                f"{exact}%",
                len(runs),
            ]
        )
    head = ["", "values", "learning rate", "loss before", "after", "exact calls after", "seeds"]
    first = lines[0]
    note = (
        f"{first['train_rows']} conversations, {first['epochs']:g} epochs of batches of {first['batch']}; {first['held_out_rows']} held out. "
        "The rates were not tuned."
    )
    return table(head, rows, note, first)


FORMS = {"instruction": "instruction and input", "bare": "input alone"}
EMBEDS = {"base": "SmolLM2, the base", "encoder": "MiniLM, the encoder"}


def routing() -> str:
    """How often "auto" chooses the adapter that was trained on an input's task."""
    lines, rows = [line for line in read("routing") if line["what"] == "route"], []
    for embeds, measured in by(lines, "embeds").items():
        name = EMBEDS[embeds]
        for form, title in FORMS.items():
            pairs = [
                (choice, line["task"])
                for line in measured
                if line["form"] == form
                for choice in line["chosen"]
            ]
            right = sum(choice == task for choice, task in pairs)
            fell = sum(choice is None for choice, _ in pairs)
            rows.append(
                [name, title, len(pairs), *(_percent(n, len(pairs)) for n in (right, fell))]
            )
        (strange,) = (line["chosen"] for line in measured if line["task"] == "mt_bench")
        rejected = _percent(sum(choice is None for choice in strange), len(strange))
        rows.append([name, "MT-Bench, no task of these", len(strange), "", rejected])
    cost = {
        embeds: statistics.mean(line["cpu_ms"] for line in measured if line["form"])
        for embeds, measured in by(lines, "embeds").items()
    }
    times = " and ".join(f"{ms:.0f} ms ({EMBEDS[embeds]})" for embeds, ms in cost.items())
    head = ["embedded by", "prompts", "inputs", "right adapter", "fell back to the base"]
    first = lines[0]
    note = (
        f"{len({line['task'] for line in lines}) - 1} tasks, {first['train_rows']} training inputs each, half of them "
        f"with the instruction. A choice takes {times} of CPU time."
    )
    return table(head, rows, note, first)


def routed_scores() -> str:
    """Scores of the adapter that "auto" chooses, beside the base, the right and a wrong one."""
    scores = [line for line in read("routing") if line["what"] == "score"]
    rows: list[list[object]] = []
    for form, title in FORMS.items():
        for line in (line for line in scores if line["form"] == form):
            loss = [sum(values) / sum(line["tokens"]) for values in line["losses"].values()]
            exact = [_percent(sum(values), len(values)) for values in line["exact"].values()]
            words = line["task"] not in ("restaurants", "alpaca")
            cells = exact if words else [""] * len(exact)
            rows.append([line["task"], title, *(f"{x:.2f}" for x in loss), *cells])
        own = [line for line in scores if line["form"] == form]
        kinds = list(own[0]["losses"])
        loss = [
            statistics.mean(sum(line["losses"][k]) / sum(line["tokens"]) for line in own)
            for k in kinds
        ]
        words = [line for line in own if line["task"] not in ("restaurants", "alpaca")]
        exact = [
            f"{100 * statistics.mean(x for line in words for x in line['exact'][k]):.1f}%"
            for k in kinds
        ]
        rows.append(["mean", title, *(f"{x:.2f}" for x in loss), *exact])
    names = ("base", "auto", "right adapter", "wrong adapter")
    head = ["task", "prompts", *(f"loss: {n}" for n in names), *(f"exact: {n}" for n in names)]
    note = (
        "Held-out loss of an answer's token and, for answers of one word, greedy answers that are "
        f"exact; {len(scores[0]['tokens'])} inputs a row, auto by the encoder's embedding. The wrong "
        "adapter is another task's, the same for all inputs of a row."
    )
    return table(head, rows, note, scores[0])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def demo_methods() -> str:
    """The demo's task by method: the best rate of those that were tried."""
    lines, rows = read("demo_methods"), []
    for method, runs in by(lines, "method").items():
        tried = [line for line in runs if line["seed"] == 0]
        best = min(tried, key=lambda line: line["choose"]["loss"])["lr"]
        chosen = [line for line in runs if line["lr"] == best]
        rows.append([
            method,
            f"{chosen[0]['values']:,}",
            f"{chosen[0]['bytes']:,}",
            ", ".join(f"{line['lr']:g}" for line in tried),
            f"{best:g}",
            spread(chosen, lambda line: line["score"]["loss"], "{:.3f}"),
            spread(chosen, lambda line: 100 * line["score"]["exact_match"]),
            len(chosen),
        ])  # fmt: skip
    head = ["method", "values", "bytes", "rates tried", "best", "loss", "exact match", "seeds"]
    note = (
        "SmolLM2-135M, 160 sentences, 3 epochs in batches of 8. The even ones of 32 held-out sentences choose the "
        "rate, the odd ones are scored."
    )
    return table(head, rows, note, lines[0])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "throughput": {"packing": packing},
    "preferences": {"preference": preference},
    "rl": {"grpo": grpo},
    "embeddings": {"embedding": embedding},
    "conversations": {"tool calls": tool_calls},
    "serving": {"routing": routing, "routed scores": routed_scores},
    "recipes": {"commands": demo_methods},
}


def pages() -> dict[Path, str]:
    """Each page with its blocks filled."""
    return {
        ROOT / "docs" / f"{name}.md": fill(ROOT / "docs" / f"{name}.md", blocks)
        for name, blocks in PAGES.items()
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
