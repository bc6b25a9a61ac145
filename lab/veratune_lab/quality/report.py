"""The page of the comparison: tables, paired intervals, and score against stored bytes."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from veratune_lab.paper.experiment import Line, Tuned, measured_on, spread, table
from veratune_lab.paper.glue import GLUE
from veratune_lab.quality.methods import CONTESTANTS
from veratune_lab.quality.protocol import TASKS

RATES = 3  # trials of each method; a group with fewer is unfinished
BESIDE = "LoRA r=8, q,v"  # what the paired differences are taken from
CLEAR = 2.0  # points over the best constant prediction, without which a task is empty

# Colour and mark of families of methods, by the start of their names.
STYLES = {
    "principal d and b": ("tab:red", "D"),
    "principal d": ("tab:red", "o"),
    "random d": ("tab:blue", "o"),
    "VeRA": ("tab:purple", "o"),
    "LoRA": ("tab:orange", "o"),
}
# Where a label stands beside its point, in points, if right of it is no room.
LEFT = ((-7, 3), "right")
PLACES: dict[str, tuple[tuple[int, int], str]] = {
    "principal d, r=24": LEFT,
    "principal d, r=64": LEFT,
    "principal d, r=192": LEFT,
    "random d, r=64": ((8, -11), "left"),
    "IA3": LEFT,
    "principal d and b, r=192": ((-6, 28), "left"),
}

NOTE = (
    "Test scores times 100: Pearson for STS-B, Matthews for CoLA, accuracy else. Mean ± standard "
    "deviation over seeds; one number without a deviation is one seed. Bytes are those of the "
    "stored file, with its head and names."
)
PROTOCOL = """# Accuracy per byte

How good is an adapter for the bytes that it takes? This page compares methods by one protocol.
`python -m veratune_lab quality --data DATA` runs it, one JSON line a run, and goes on where it stopped. So far only
the small cell, "STS-B, first 1,500", is run; [the rest](#not-run-yet) wants days of two cores.

## Protocol

- The model is all-MiniLM-L6-v2 (22.7 million values), on the full training sets of GLUE tasks (SST-2: 20,000 rows, QNLI: 10,000).
- Some training rows are set aside. They stop a run early and choose the learning rate. The scored validation rows choose nothing.
- Every method has three learning rates on seed 0. The best one runs on seeds 1 and 2.
- A regression head starts at the mean of the targets, a classification head at the log of the class frequencies.
- "STS-B, first 1,500" is a small cell: 141 steps of 16 pairs, and the first 500 validation rows.
- A task where no method beats the best constant prediction by two points counts as empty.
"""
TRIED = """## What was tried

- **A head that starts at the mean of standardised targets, with ten times the rate.** It brought more than any change of the adapter: compare the rows of the search at rank 192.
- **An exact singular value decomposition.** The prototype behind "exact principal d" uses it; the shipped `basis="principal"` takes six steps of subspace iteration.
- **A principal basis at rank 192 of 384**: level with random matrices in the search, 0.9 points better on three seeds.
- **b beside d on the principal basis**: four times the values for 0.1 points.
- **A rate of 5e-2 at rank 64**: it lost points to 2e-2.
- Not tried yet: ranks by layer at a fixed total, d shared through an index, rates by layer, d from the first gradient, int8 storage under this protocol, and language models.
"""


def final_score(line: Line) -> float:
    """The score of a line on the scored rows, times 100."""
    return 100 * float(line["scored"][GLUE[TASKS[line["task"]].glue].score])


def finished(experiment: Tuned, lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines of the chosen rate by (task, method), of methods that had all their trials."""
    chosen = experiment.chosen(lines)
    out = {}
    for group, found in chosen.items():
        trials = {line["rate"] for line in lines if line["group"] == group and line["seed"] == 0}
        if len(trials) == RATES:
            out[found[0]["task"], found[0]["method"]] = found
    return out


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95% interval by Student's t; (mean, low, high)."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean, mean - half, mean + half


def document(
    experiment: Tuned, lines: Sequence[Line], recipes: Sequence[Line], search: Sequence[Line]
) -> str:
    """docs/quality.md: the protocol, the recipes, all tables, and what was tried."""
    return "\n".join([
        PROTOCOL, "## Recipes", "", recipe_table(recipes), "", page(experiment, lines),
        "## Search", "", search_table(search), "", TRIED,
    ])  # fmt: skip


def recipe_table(lines: Sequence[Line]) -> str:
    """What `veratune train --recipe NAME` gives without any other flag, in Markdown."""
    rows = []
    for name in dict.fromkeys(line["recipe"] for line in lines):
        own = [line for line in lines if line["recipe"] == name]
        scores = spread(own, lambda line: 100 * line["pearson"])
        each = ", ".join(f"{100 * line['pearson']:.1f}" for line in own)
        rows.append([f"`{name}`", f"{own[0]['values']:,}", f"{own[0]['bytes']:,}", scores, each])
    return table(["recipe", "values", "bytes", "Pearson", "by seed"], rows) + (
        "\n`veratune train --recipe NAME --keep last` with 141 steps of 16 on the first 1,500 rows of "
        "STS-B, and no other setting of the training. Scored on the first 500 validation rows."
    )


def search_table(lines: Sequence[Line]) -> str:
    """Single runs that chose the defaults, in Markdown."""
    rows = [
        [line["tag"], f"{line['values']:,}", f"{line['lr']:g}", f"{line['head_lr']:g}", f"{line['pearson']:.1f}"]
        for line in lines
    ]  # fmt: skip
    return table(["adapter", "values", "lr", "head lr", "Pearson"], rows) + (
        "\nOne run each on STS-B, first 1,500, seed 0, scored on the first 500 validation rows, which also "
        "compare the rates here: a search, not a result."
    )


def page(experiment: Tuned, lines: Sequence[Line]) -> str:
    """The tables of the comparison, in Markdown."""
    cells = finished(experiment, lines)
    tasks = [task for task in TASKS if any(key[0] == task for key in cells)]
    names = [name for name in CONTESTANTS if any(key[1] == name for key in cells)]
    rows = []
    for name in names:
        first = next(found[0] for key, found in cells.items() if key[1] == name)
        scores = [spread(cells.get((task, name), []), final_score) for task in tasks]
        rows.append([name, f"{first['trained']:,}", f"{first['bytes']:,}", *scores])
    head = ["method", "values", "bytes", *(TASKS[task].title for task in tasks)]
    scores_of_all = (
        table(head, rows) + "\n" + NOTE if rows else "No method has had all its trials yet."
    )
    return "\n".join([
        "## Scores", "", scores_of_all, "", measured_on(lines), "",
        "## Differences from LoRA r=8 on query and value", "", _paired(cells, tasks, names), "",
        "## Principal directions against random ones", "", _principal(cells, tasks), "",
        "## Rates at the edge", "", _edges(cells), "",
        "## Constant predictions", "", _empty(cells, tasks), "",
        "## Not run yet", "", _missing(cells, lines), "",
    ])  # fmt: skip


def _edges(cells: Mapping[tuple[str, str], list[Line]]) -> str:
    """The cells whose chosen rate is the least or the largest of the three."""
    out = []
    for (task, name), found in cells.items():
        rates, rate = CONTESTANTS[name].rates, found[0]["rate"]
        if rate in (rates[0], rates[-1]):
            kind = "least" if rate == rates[0] else "largest"
            out.append(f"- {TASKS[task].title}: {name} was best at the {kind} rate, {rate:g}.")
    said = "A method whose best rate is the least or the largest of its three may do better yet."
    return "\n".join([said, "", *out]) if out else "No method was best at the edge of its rates."


def _missing(cells: Mapping[tuple[str, str], list[Line]], lines: Sequence[Line]) -> str:
    out = []
    for task in TASKS:
        left = [name for name in CONTESTANTS if (task, name) not in cells]
        begun = [
            name for name in left if any((task, name) == (x["task"], x["method"]) for x in lines)
        ]
        if len(left) == len(CONTESTANTS) and not begun:
            out.append(f"- {TASKS[task].title}: no method.")
        elif left:
            said = f" Begun: {', '.join(begun)}." if begun else ""
            out.append(f"- {TASKS[task].title}: {'; '.join(left)}.{said}")
    return "\n".join(out) or "Every cell is run."


def _paired(
    cells: Mapping[tuple[str, str], list[Line]], tasks: Sequence[str], names: Sequence[str]
) -> str:
    rows = []
    for name in names:
        row = [name]
        for task in tasks:
            ours = {line["seed"]: final_score(line) for line in cells.get((task, name), [])}
            theirs = {line["seed"]: final_score(line) for line in cells.get((task, BESIDE), [])}
            pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            row.append("-" if name == BESIDE else _difference(pairs))
        if any(text != "-" for text in row[1:]):
            rows.append(row)
    if not rows:
        return "LoRA r=8 is not run yet."
    return table(["method", *(TASKS[task].title for task in tasks)], rows) + (
        "\nMean difference over equal seeds, with its 95% interval (Student's t) where there are two seeds or more."
    )


def _principal(cells: Mapping[tuple[str, str], list[Line]], tasks: Sequence[str]) -> str:
    """Principal directions against random ones at equal ranks, d alone."""
    rows = []
    for rank in (24, 64, 192):
        row = [str(rank)]
        for task in tasks:
            scores = [
                {line["seed"]: final_score(line) for line in cells.get((task, name), [])}
                for name in (f"principal d, r={rank}", f"random d, r={rank}")
            ]
            seeds = sorted(scores[0].keys() & scores[1].keys())
            row.append(_difference([scores[0][seed] - scores[1][seed] for seed in seeds]))
        if any(text != "-" for text in row[1:]):
            rows.append(row)
    said = (
        "Paired differences of d alone on principal and on random directions, with intervals.\n\n"
    )
    return said + table(["rank", *(TASKS[task].title for task in tasks)], rows)


def _difference(pairs: Sequence[float]) -> str:
    """The mean of paired differences with its interval, as a cell; "-" for none."""
    if not pairs:
        return "-"
    mean, low, high = interval(pairs)
    return f"{mean:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def _empty(cells: Mapping[tuple[str, str], list[Line]], tasks: Sequence[str]) -> str:
    out = []
    for task in tasks:
        found = [line for key, lines in cells.items() if key[0] == task for line in lines]
        constant = float(found[0]["constant"])
        best = max(map(final_score, found))
        said = (
            "no method clearly beats it: the task is empty" if best < constant + CLEAR else "passed"
        )
        out.append(
            f"- {TASKS[task].title}: the best constant prediction scores {constant:.1f}, the best run {best:.1f}: {said}."
        )
    return "\n".join(out) or "Nothing to compare yet."


def draw(experiment: Tuned, lines: Sequence[Line], folder: Path) -> list[Path]:
    """bytes.png: score against the bytes of the file, the mean of the tasks that all methods have.

    Ranks of d alone are joined by a line. Bars are standard deviations over seeds. A head
    alone is left out: it would squeeze the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = finished(experiment, lines)
    names = [name for name in CONTESTANTS if any(key[1] == name for key in cells)]
    tasks = [task for task in TASKS if all((task, name) in cells for name in names)]
    names = [name for name in names if name != "head alone"]
    if not tasks or not names:
        return []
    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for name in names:
        by_seed = zip(*(map(final_score, cells[task, name]) for task in tasks), strict=False)
        means = [statistics.mean(scores) for scores in by_seed]
        error = statistics.stdev(means) if len(means) > 1 else 0.0
        size = cells[tasks[0], name][0]["bytes"]
        points.setdefault(family(name), []).append((size, statistics.mean(means), error, name))
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for kind, found in points.items():
        found.sort()
        sizes, scores, errors, labels = zip(*found, strict=True)
        color, marker = STYLES.get(kind, ("tab:gray", "s"))
        axes.errorbar(
            sizes,
            scores,
            errors,
            color=color,
            marker=marker,
            capsize=2,
            markersize=6,
            linestyle="-" if kind.endswith(" d") else "",
        )
        for size, score, label in zip(sizes, scores, labels, strict=True):
            offset, side = PLACES.get(label, ((7, -3), "left"))
            axes.annotate(
                label,
                (size, score),
                xytext=offset,
                textcoords="offset points",
                horizontalalignment=side,
                color=color,
                fontsize=8,
            )
    axes.set_xscale("log")
    axes.margins(x=0.18)
    axes.grid(alpha=0.3)
    axes.set_xlabel("bytes of the stored file")
    mean = "mean of " if len(tasks) > 1 else ""
    axes.set_ylabel(f"score, {mean}{', '.join(TASKS[task].title for task in tasks)}")
    path = folder / "bytes.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def family(name: str) -> str:
    """The group of methods that share a colour: those that differ in rank or targets only."""
    for kind in STYLES:
        if name.startswith(kind):
            return kind
    return name.partition(",")[0].partition(" ")[0]
