"""sweep: train once for every combination of values, and rank the runs."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veratune.config import VeraConfig
from veratune.errors import ConfigError, near
from veratune.formats.atomic import write_atomic
from veratune.tasks.registry import task_class
from veratune.training.prepare import build_task
from veratune.training.result import TrainResult
from veratune.training.run import PreviewCallback, train
from veratune.training.run_folder import FREE, RESULTS, RUN
from veratune.training.settings import TrainSettings


def sweep(
    settings: TrainSettings,
    vera: VeraConfig,
    grid: Mapping[str, Sequence[Any]],
    on_preview: PreviewCallback | None = None,
) -> list[tuple[dict[str, Any], TrainResult]]:
    """Train once for every combination of values; the best adapter is copied to `settings.out`.

    Each run has a subfolder of `settings.out`. A run that is finished already is not repeated.

    Args:
        settings: The run.
        vera: Its adapter.
        grid: Values by the name of a field of TrainSettings or VeraConfig.
        on_preview: As for `train`; called in the first run alone.

    Returns:
        The chosen values and the result of each run, best first by the task's score.

    Raises:
        ConfigError: The grid names no setting, or there is no evaluation data.
    """
    kind = task_class(settings.task)
    check_names(settings, grid)
    out = Path(settings.out)
    results = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        folder = out / "sweep" / ",".join(f"{k}={v}" for k, v in chosen.items()).replace("/", "_")
        finished = folder / RESULTS
        if finished.is_file():
            results.append((chosen, TrainResult(**json.loads(finished.read_text()))))
            continue
        own = {k: v for k, v in chosen.items() if k in settings.to_dict()}
        resumed = (folder / RUN).is_file()
        run = dataclasses.replace(settings, out=str(folder), resume=resumed, **own)
        other = dataclasses.replace(vera, **{k: v for k, v in chosen.items() if k not in own})
        results.append((chosen, train(run, other, None if results else on_preview)))
    results.sort(
        key=lambda entry: _score(entry[1], kind.metric),
        reverse=kind.greater_is_better,
    )
    best = Path(results[0][1].path)
    write_atomic(out / best.name, best.read_bytes())
    return results


def check_names(settings: TrainSettings, grid: Mapping[str, Any]) -> None:
    """Refuse names that are no settings, and a sweep without an evaluation score.

    Raises:
        ConfigError: Names the setting and the nearest known one.
    """
    known = {f.name for f in dataclasses.fields(TrainSettings)} - FREE
    known |= {f.name for f in dataclasses.fields(VeraConfig)}
    for name in grid:
        if name not in known:
            raise ConfigError(f"sweep names {name!r}, which is no setting{near(name, known)}")
    evaluates = build_task(settings).has_split(settings.data, settings.eval_split)
    if settings.eval_data is None and not evaluates:
        raise ConfigError("a sweep ranks by an evaluation score; give --eval-data")


def _score(result: TrainResult, metric: str) -> float:
    """The score that ranks a run: the task's, or the first where the data decide which it is."""
    return result.after.get(metric, next(iter(result.after.values()), float("nan")))
