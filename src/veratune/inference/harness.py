"""EleutherAI's evaluation harness (lm-eval) on a loaded model with its adapter."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veratune.errors import ConfigError, DataError, UnsupportedError
from veratune.inference.adapted import LoadedModel
from veratune.tasks.text.language import LanguageTask


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int = 0,
    apply_chat_template: bool = False,
) -> dict[str, float]:
    """Score a model on tasks of lm-eval.

    Args:
        loaded: The model, with its adapter on or off.
        tasks: Names of tasks that lm-eval ships, or YAML files of tasks.
        batch_size: Requests in one forward pass.
        limit: Examples of each task; 0 for all.
        apply_chat_template: Format prompts with the tokenizer's chat template.

    Returns:
        The scores, by "TASK METRIC", without standard errors.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown.
        DataError: A task's data cannot be loaded.
        UnsupportedError: The model is no language model.
    """
    if not isinstance(loaded.task, LanguageTask):
        raise UnsupportedError(
            f"the harness scores language models; the adapter's task is {loaded.task.name!r}"
        )
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--harness wants {error.name!r}; install it with pip install 'veratune[harness]'"
        ) from None
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"--harness names {file}: no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own, about its defaults
        manager = TaskManager(include_defaults=len(files) < len(tasks))
        known = set(manager.all_tasks)
        for task in tasks:
            if task not in files and task not in known:
                raise ConfigError(f"--harness names {task!r}, no task of lm-eval and no YAML file")
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.processor, batch_size=batch_size)
        try:
            found: Any = simple_evaluate(
                model=model,
                tasks=[str(Path(task).absolute()) if task in files else task for task in tasks],
                task_manager=manager,
                limit=limit or None,
                apply_chat_template=apply_chat_template,
                log_samples=False,
                bootstrap_iters=0,
            )
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the harness could not run {', '.join(tasks)}: {reason}") from error
    scores = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                name = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
                scores[name] = float(value)
    return scores
