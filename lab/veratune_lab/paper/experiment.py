"""Experiment: one table or figure, as cells that are run one by one, and a page that is made of their lines."""

import abc
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset

from veratune.analysis.machine import describe_machine
from veratune.config import VeraConfig
from veratune.errors import ConfigError, DataError
from veratune.scoring.judge import Judge
from veratune.tasks.base import Task
from veratune.training.methods import Method, build_method
from veratune.training.prepare import fields_used
from veratune.training.run import train
from veratune.training.run_folder import RESULTS, RUN
from veratune.training.settings import TrainSettings

Scale = Literal["quick", "scaled", "full"]
Line = dict[str, Any]
LINES = "results.jsonl"
PAGE = "README.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where an experiment finds and leaves things.

    data, models: folders of data sets and of checkpoints, by their names in docs/data.md; None: what the hub has. out: its own
    folder. device: as in TrainSettings. judge: who rates answers; None: they are not rated.
    """

    out: Path
    data: Path | None = None
    models: Path | None = None
    device: Literal["auto", "cpu"] = "auto"
    judge: Judge | None = None

    def dataset(self, name: str, hub: str | None = None) -> str:
        """The folder of a data set; where there is none, its id on the hub. Raises DataError, saying how to give it."""
        return _inside(self.data, name, "--data", "data sets", hub)

    def model(self, name: str, hub: str | None = None) -> str:
        """The folder of a checkpoint; where there is none, its id on the hub. Raises DataError, saying how to give it."""
        return _inside(self.models, name, "--models", "checkpoints", hub)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table: what is run once for each seed.

    name: unique in its experiment; shown: what the line says of it beside the results (data, method, printed value); run: from
    a place, a seed and a folder of its own to the measured values.
    """

    name: str
    shown: Mapping[str, Any]
    run: Callable[[Place, int, Path], Line]


class Experiment(abc.ABC):
    """name: as users type it; about: one line; seeds: how many at each scale."""

    name: ClassVar[str]
    about: ClassVar[str]
    seeds: ClassVar[Mapping[Scale, int]] = {"quick": 1, "scaled": 1, "full": 5}

    @abc.abstractmethod
    def cells(self, scale: Scale) -> list[Cell]:
        """What is run."""

    @abc.abstractmethod
    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        """The table, in Markdown, with what was reduced and what is claimed elsewhere."""

    def wanted(self, cell: Cell, seed: int, lines: Sequence[Line]) -> bool:
        """Whether a cell is run with a seed, after the lines so far: those of smaller seeds are all there."""
        return True

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """Pictures, as PNG files in the experiment's folder."""
        return []


def reproduce(
    experiment: Experiment, place: Place, scale: Scale = "scaled", seeds: int | None = None, only: str = "",
    show: Callable[[str], None] = lambda text: None,
) -> list[Line]:  # fmt: skip
    """Run an experiment's cells, those that are done already apart, and write its lines, page and pictures.

    seeds: of each cell, from 0; default the scale's. only: cells whose names hold this word. show: called with one line of text
    for each cell. Returns the lines of this scale. Raises VeratuneError; what was finished stays.
    """
    cells = [cell for cell in experiment.cells(scale) if only in cell.name]
    if not cells:
        raise ConfigError(
            f"--only {only!r} is in no cell's name; {experiment.name} has {', '.join(c.name for c in experiment.cells(scale))}"
        )
    file = place.out / LINES
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []
    wanted = [(cell, seed) for seed in range(seeds or experiment.seeds[scale]) for cell in cells]
    for i, (cell, seed) in enumerate(wanted):
        own = [line for line in lines if line["scale"] == scale]
        if any(
            (line["cell"], line["seed"]) == (cell.name, seed) for line in own
        ) or not experiment.wanted(cell, seed, own):
            continue
        show(f"{experiment.name} {i + 1}/{len(wanted)}: {cell.name}, seed {seed}")
        start = time.perf_counter()
        found = cell.run(place, seed, run_folder(place, scale, cell.name, seed))
        line = {"scale": scale, "cell": cell.name, "seed": seed, **cell.shown, **found}
        line |= {"wall_seconds": round(time.perf_counter() - start, 1), **describe_machine()}
        lines.append(line)
        place.out.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
    own = [line for line in lines if line["scale"] == scale]
    (place.out / PAGE).write_text(experiment.page(own, scale))
    experiment.draw(own, place)
    return own


def fine_tune(
    settings: Mapping[str, Any],
    vera: VeraConfig,
    task: Task,
    place: Place,
    seed: int,
    folder: Path,
    method: Method | None = None,
) -> Line:
    """One run of `veratune.training.run.train` in a folder, resumed where it was cut off; its results and learning rates."""
    own = {
        "out": str(folder),
        "seed": seed,
        "device": place.device,
        "preview": 0,
        "task": task.name,
        **settings,
    }
    if method is None:  # a table gives every method the same configuration
        used = fields_used(own.get("method", TrainSettings.method))
        vera = VeraConfig(**{name: getattr(vera, name) for name in used})
    result = train_once(own, vera, task, method)
    result.pop("path")
    return result | {
        key: own[key] for key in ("lr", "b_lr", "head_lr", "epochs", "batch_size") if key in own
    }


def train_once(
    settings: Mapping[str, Any],
    vera: VeraConfig,
    task: Task | None = None,
    method: Method | None = None,
) -> Line:
    """The results of the run in the folder `out`: made now, resumed, or read where it is finished."""
    folder = Path(settings["out"])
    run = TrainSettings(**settings, resume=(folder / RUN).is_file())
    if not (folder / RESULTS).is_file():
        train(run, vera, task=task, method=method)
    result: Line = json.loads((folder / RESULTS).read_text())
    return result


def load_trained(
    settings: Mapping[str, Any],
    vera: VeraConfig,
    task: Task,
    place: Place,
    folder: Path | None,
    method: Method | None = None,
) -> tuple[Any, Any]:
    """The model of a run that `fine_tune` made in a folder, in evaluation mode, and its processor.

    folder None: the bare model. method: another than the settings name.
    """
    run = TrainSettings(
        **{"out": str(folder), "device": place.device, "task": task.name, **settings}
    )
    processor = task.load_processor(run.model)
    model: Any = task.load_model(run.model, processor, dtype=run.base_dtype, quantize=run.quantize)
    if folder is not None:
        method = method or build_method(
            run.method, dataclasses.replace(vera, seed=run.basis_seed), run.options
        )
        method.prepare(model, task.heads(model), task.to_metadata())
        method.read(model, folder)
    if place.device == "auto" and torch.cuda.is_available() and run.quantize is None:
        model.cuda()
    return model.eval(), processor


def shared_folder(place: Place, settings: Mapping[str, Any], vera: VeraConfig, seed: int) -> Path:
    """The folder of a run that several tables have in common: equal settings, equal folder."""
    text = json.dumps([settings, vera.to_dict(), seed], sort_keys=True, default=str)
    return place.out.parent / "shared-runs" / hashlib.sha256(text.encode()).hexdigest()[:16]


def run_folder(place: Place, scale: str, cell: str, seed: int = 0) -> Path:
    """The folder of one run."""
    return place.out / "runs" / scale / f"{cell.replace('/', '_').replace(' ', '-')}-{seed}"


def some(rows: Dataset, count: int | None) -> Dataset:
    """`count` rows at random, the same ones for every seed; all of them, as they come, where there are no more (or count is None)."""
    return (
        rows if count is None or count >= len(rows) else rows.shuffle(seed=0).select(range(count))
    )


class Tuned(Experiment):
    """Every cell of a group is tried on seed 0, and the best one goes on to the other seeds.

    A cell's group is `shown["group"]`: one method on one task, with as many trials of its learning rates as every other method has.
    """

    @abc.abstractmethod
    def score(self, line: Line) -> float:
        """What is compared, more is better."""

    def best(self, group: str, lines: Sequence[Line]) -> str | None:
        """The name of a group's best cell on seed 0; None where nothing was run."""
        tried = [line for line in lines if line["group"] == group and line["seed"] == 0]
        return max(tried, key=self.score)["cell"] if tried else None

    def chosen(self, lines: Sequence[Line]) -> dict[str, list[Line]]:
        """The lines of each group's best cell, a line a seed."""
        groups = dict.fromkeys(line["group"] for line in lines)
        return {
            group: [line for line in lines if line["cell"] == self.best(group, lines)]
            for group in groups
        }

    def wanted(self, cell: Cell, seed: int, lines: Sequence[Line]) -> bool:
        return seed == 0 or cell.name == self.best(cell.shown["group"], lines)


def spread(
    lines: Sequence[Line],
    value: Callable[[Line], float],
    form: str = "{:.1f}",
    center: Callable[[list[float]], float] = statistics.mean,
) -> str:
    """Mean (or another centre) ± standard deviation over lines, or the one value."""
    values = [value(line) for line in lines]
    if not values:
        return "not run"
    text = form.format(center(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    return (
        "\n".join(
            "| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)
        )
        + "\n"
    )


def measured_on(lines: Sequence[Line]) -> str:
    """The sentence under a table that says where its figures come from."""
    if not lines:
        return "Nothing was run yet."
    last = lines[-1]
    spent = sum(line["wall_seconds"] for line in lines) / 60
    return (
        f"Measured: {len(lines)} runs, {spent:.0f} minutes in all, on {last.get('machine') or last['device']} with {last['threads']} threads, torch {last['torch']}, "
        f"transformers {last['transformers']}."
    )


def _inside(folder: Path | None, name: str, flag: str, what: str, hub: str | None) -> str:
    if hub is not None and (folder is None or not (folder / name).is_dir()):
        return hub
    if folder is None:
        raise DataError(
            f"{name} is wanted: give {flag} FOLDER, a folder of {what} that holds {name}/ (docs/data.md says in which form)"
        )
    if not (folder / name).is_dir():
        raise DataError(
            f"{folder}: no folder {name}/ in it; {flag} is a folder of {what} that holds it (docs/data.md says in which form)"
        )
    return str(folder / name)
