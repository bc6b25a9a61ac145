"""search: trials of Optuna over settings, with median pruning, in a study that can be resumed."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.formats.atomic import write_atomic
from veratune.tasks.registry import task_class
from veratune.training.result import TrainResult
from veratune.training.run import PreviewCallback, train
from veratune.training.run_folder import RESULTS
from veratune.training.settings import Range, TrainSettings
from veratune.training.sweep import check_names

STUDY = "study.db"


def search(
    settings: TrainSettings,
    vera: VeraConfig,
    space: Mapping[str, list[Any] | Range],
    trials: int,
    on_preview: PreviewCallback | None = None,
) -> list[tuple[dict[str, Any], TrainResult]]:
    """Train with settings that Optuna chooses; the best adapter is copied to `settings.out`.

    A trial that is worse than the median of the others at the same evaluation is stopped. The study
    is a SQLite file in `settings.out`; a search that was ended goes on from it.

    Args:
        settings: The run.
        vera: Its adapter.
        space: Values or a range, by the name of a field of TrainSettings or VeraConfig.
        trials: Trials in all, with those of the study.
        on_preview: As for `train`; called in the first trial alone.

    Returns:
        The values and results of the trials that were not stopped, best first.

    Raises:
        ConfigError: The space names no setting, there is no evaluation data, or Optuna is missing.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError(
            "--sweep-trials wants Optuna; install it with pip install 'veratune[search]'"
        ) from None
    check_names(settings, space)
    kind, out = task_class(settings.task), Path(settings.out)
    (out / "sweep").mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = json.dumps(
        {key: dataclasses.asdict(v) if isinstance(v, Range) else v for key, v in space.items()}
    )
    study: Any = optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{(out / 'sweep' / STUDY).resolve()}",
        direction="maximize" if kind.greater_is_better else "minimize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    # A resumed study goes on, instead of drawing its first trials again.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))

    def objective(trial: Any) -> float:
        chosen = {key: _suggest(trial, key, values) for key, values in space.items()}
        folder = out / "sweep" / f"trial-{trial.number}"
        own = {k: v for k, v in chosen.items() if k in settings.to_dict()}
        run = dataclasses.replace(settings, out=str(folder), **own)
        other = dataclasses.replace(vera, **{k: v for k, v in chosen.items() if k not in own})
        pruning = PruningCallback(trial, kind.metric)
        result = train(run, other, None if trial.number else on_preview, callbacks=[pruning])
        if pruning.pruned:
            raise optuna.TrialPruned
        score = result.after[kind.metric]
        if not math.isfinite(score):
            raise optuna.TrialPruned
        return score

    ended = [trial for trial in study.trials if trial.state.is_finished()]
    study.optimize(objective, n_trials=max(0, trials - len(ended)))
    results = _results(study, out, kind.greater_is_better)
    if not results:
        raise ConfigError(f"none of {trials} trials ended with a finite {kind.metric}")
    best = Path(results[0][1].path)
    write_atomic(out / best.name, best.read_bytes())
    return results


class PruningCallback(TrainerCallback):
    """Reports each evaluation to Optuna and stops a trial that it prunes."""

    def __init__(self, trial: Any, metric: str) -> None:
        """Bind the callback to a trial; metric: the score that ranks."""
        self.trial, self.metric, self.pruned = trial, metric, False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        score = (metrics or {}).get(f"eval_{self.metric}")
        # The evaluations before training and after it are no part of the curve.
        if score is None or not 0 < state.global_step < state.max_steps:
            return
        self.trial.report(score, state.global_step)
        if self.trial.should_prune():
            self.pruned = control.should_training_stop = True


def _suggest(trial: Any, name: str, values: list[Any] | Range) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high)
    return trial.suggest_float(name, values.low, values.high, log=values.low > 0)


def _results(study: Any, out: Path, greater: bool) -> list[tuple[dict[str, Any], TrainResult]]:
    """The finished trials with their results, best first."""
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    done.sort(key=lambda trial: trial.value, reverse=greater)
    found = []
    for trial in done:
        text = (out / "sweep" / f"trial-{trial.number}" / RESULTS).read_text()
        found.append((dict(trial.params), TrainResult(**json.loads(text))))
    return found
