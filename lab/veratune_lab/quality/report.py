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

NOTE = (
    "Test scores times 100: Pearson for STS-B, Matthews for CoLA, accuracy else; mean ± standard deviation "
    "over seeds. Model: all-MiniLM-L6-v2. Each method has three learning rates on seed 0. The rate is "
    "chosen on training rows set aside, which also stop a run early; the scored rows choose nothing. "
    "One seed means that the other seeds are not run yet. Bytes are those of the stored file, its head and names too."
)


def tested(line: Line) -> float:
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


def page(experiment: Tuned, lines: Sequence[Line]) -> str:
    """The tables, in Markdown."""
    cells = finished(experiment, lines)
    tasks = [task for task in TASKS if any(key[0] == task for key in cells)]
    names = [name for name in CONTESTANTS if any(key[1] == name for key in cells)]
    rows = []
    for name in names:
        first = next(found[0] for key, found in cells.items() if key[1] == name)
        scores = [spread(cells.get((task, name), []), tested) for task in tasks]
        rows.append([name, f"{first['trained']:,}", f"{first['bytes']:,}", *scores])
    head = ["method", "values", "bytes", *(TASKS[task].title for task in tasks)]
    missing = [
        f"{TASKS[task].title}: {', '.join(left)}"
        for task in TASKS
        if (left := [name for name in CONTESTANTS if (task, name) not in cells])
    ]
    return "\n".join([
        "## Scores", "", table(head, rows), NOTE, "", measured_on(lines), "",
        "## Differences from LoRA r=8 on query and value", "", _paired(cells, tasks, names), "",
        "## Empty cells", "", _empty(cells, tasks), "",
        "## Not run yet", "", *(f"- {text}" for text in missing), "",
    ])  # fmt: skip


def _paired(
    cells: Mapping[tuple[str, str], list[Line]], tasks: Sequence[str], names: Sequence[str]
) -> str:
    rows = []
    for name in names:
        row = [name]
        for task in tasks:
            ours = {line["seed"]: tested(line) for line in cells.get((task, name), [])}
            theirs = {line["seed"]: tested(line) for line in cells.get((task, BESIDE), [])}
            pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            if name == BESIDE or not pairs:
                row.append("-")
                continue
            mean, low, high = interval(pairs)
            row.append(f"{mean:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})"))
        if any(text != "-" for text in row[1:]):
            rows.append(row)
    if not rows:
        return "LoRA r=8 is not run yet."
    return table(["method", *(TASKS[task].title for task in tasks)], rows) + (
        "\nMean difference over equal seeds, with its 95% interval (Student's t) where there are two seeds or more."
    )


def _empty(cells: Mapping[tuple[str, str], list[Line]], tasks: Sequence[str]) -> str:
    out = []
    for task in tasks:
        found = [line for key, lines in cells.items() if key[0] == task for line in lines]
        constant = float(found[0]["constant"])
        best = max(map(tested, found))
        said = (
            "no method clearly beats it: the task is empty" if best < constant + CLEAR else "passed"
        )
        out.append(
            f"- {TASKS[task].title}: the best constant prediction scores {constant:.1f}, the best run {best:.1f}: {said}."
        )
    return "\n".join(out)


def draw(experiment: Tuned, lines: Sequence[Line], folder: Path) -> list[Path]:
    """bytes.png: the mean score against the bytes of the file, over the tasks that every method has."""
    from veratune.analysis.pictures import draw_against

    cells = finished(experiment, lines)
    names = [name for name in CONTESTANTS if any(key[1] == name for key in cells)]
    tasks = [task for task in TASKS if all((task, name) in cells for name in names)]
    points = {}
    for name in names if tasks else ():
        scores = [statistics.mean(map(tested, cells[task, name])) for task in tasks]
        points[name] = [(cells[tasks[0], name][0]["bytes"], statistics.mean(scores), "")]
    if not points:
        return []
    title = "mean of " + ", ".join(TASKS[task].title for task in tasks)
    return [draw_against(points, folder / "bytes.png", "bytes of the file", "score", title)]
