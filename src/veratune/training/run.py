"""train: from settings to an adapter file."""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from veratune.config import VeraConfig
from veratune.formats.atomic import write_atomic
from veratune.inference.evaluate import clean_metrics
from veratune.tasks.base import Task
from veratune.training.build import build_run
from veratune.training.callbacks import SignalCallback
from veratune.training.lr_find import find_lr, stored_lr
from veratune.training.methods import Method
from veratune.training.result import TrainResult, peak_memory
from veratune.training.run_folder import (
    BEFORE,
    HISTORY,
    RESULTS,
    check_out,
    is_first_process,
    write_settings,
)
from veratune.training.settings import TrainSettings
from veratune.training.trainer import MethodTrainer

PreviewCallback = Callable[[list[tuple[str, bool]]], None]


def train(
    settings: TrainSettings,
    vera: VeraConfig,
    on_preview: PreviewCallback | None = None,
    *,
    task: Task | None = None,
    method: Method | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Fine-tune a base model with VeRA and write the adapter to `settings.out`.

    All mistakes in settings, data and model are found before anything is written.

    Args:
        settings: The run.
        vera: The adapter's configuration; its seed is `settings.basis_seed`.
        on_preview: Called with each previewed training example: pieces of text, and whether the
            loss is on them.
        task: A task object, instead of the one that the settings name.
        method: A method object, instead of the one that the settings name.
        callbacks: Callbacks of Trainer beside those of the settings.

    Returns:
        The result, which is also written to results.json.

    Raises:
        VeratuneError: A setting, the data or the model is wrong, the loss is not finite, or a
            signal ended the run.
    """
    out = Path(settings.out)
    range_test = None
    if settings.find_lr and settings.resume:
        settings = dataclasses.replace(settings, lr=stored_lr(out))
    elif settings.find_lr:
        check_out(settings, vera)
        range_test = find_lr(settings, vera)
        settings = dataclasses.replace(settings, lr=range_test.lr)
        tqdm.write(f"learning rate found by the range test: {range_test.lr:g}", file=sys.stderr)
    run = build_run(settings, vera, task=task, method=method, checks_out=True)
    if is_first_process():
        if range_test is not None:
            range_test.write(out)
        write_settings(settings, dataclasses.replace(vera, seed=settings.basis_seed))
        if on_preview is not None:
            for example in itertools.islice(run.data.train, settings.preview):
                on_preview(run.task.preview(example, run.data.processor))
    for callback in callbacks:
        run.trainer.add_callback(callback)
    result = _run(run.trainer, settings, run.checkpoint)
    if is_first_process():
        write_atomic(out / RESULTS, json.dumps(dataclasses.asdict(result), indent=2).encode())
        history = json.dumps(run.trainer.state.log_history, indent=1)
        write_atomic(out / HISTORY, history.encode())
        if run.data.eval_examples is not None:
            run.task.draw(run.trainer.adapted, run.data.eval_examples, run.data.processor, out)
    return result


def _run(trainer: MethodTrainer, settings: TrainSettings, checkpoint: Path | None) -> TrainResult:
    """Evaluate, train, evaluate again, and write the adapter."""
    out, method, model = Path(settings.out), trainer.method, trainer.adapted
    evaluates = trainer.eval_dataset is not None
    before = _scores_before(trainer, out) if evaluates else {}
    set_seed(settings.seed)  # what was drawn so far must not matter to a resumed run
    start = time.perf_counter()
    with SignalCallback() as signals:
        trainer.add_callback(signals)
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        signals.raise_if_received(trainer.state.global_step)
    seconds = time.perf_counter() - start
    after = clean_metrics(trainer.evaluate()) if evaluates else {}
    return TrainResult(
        path=str(out / method.file),
        bytes=method.write(model, out, is_first_process()),
        trained=sum(p.numel() for p in method.adapter_parameters(model)),
        head=sum(p.numel() for p in method.head(model)),
        before=before,
        after=after,
        loss=trained.training_loss,
        steps=trainer.state.global_step,
        seconds=seconds,
        peak_memory=peak_memory(),
    )


def _scores_before(trainer: MethodTrainer, out: Path) -> dict[str, float]:
    """The scores before training; a resumed run reads them from its folder."""
    stored = out / BEFORE
    if stored.is_file():
        return json.loads(stored.read_text())
    scores = clean_metrics(trainer.evaluate())
    # Evaluation marks the model as prepared; accelerate would then not wrap it for DDP.
    trainer.adapted.__dict__.pop("_is_accelerate_prepared", None)
    if is_first_process():
        write_atomic(stored, json.dumps(scores).encode())
    return scores
