"""Which trainer runs a task: our own, or one of TRL's or sentence-transformers'."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from veratune.errors import ConfigError
from veratune.selection import reference
from veratune.tasks.base import Task
from veratune.tasks.multimodal.speech import SpeechRecognition
from veratune.tasks.text.embedding import SentenceTask
from veratune.tasks.text.grpo import ROLLOUTS, Grpo
from veratune.tasks.text.preference import WITHOUT_REFERENCE, PairTask, Preference
from veratune.training.prepare import EncodedData
from veratune.training.settings import TrainSettings
from veratune.training.trainer import MethodTrainer, ScoredTrainer, VeraTrainer

Extras = Callable[[nn.Module, EncodedData], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class TrainerKind:
    """A trainer and what it wants.

    Attributes:
        trainer: Its class.
        arguments: The class of its arguments.
        extras: Its own keyword arguments, from the model and the data.
        options: Arguments of `arguments` that no other trainer has.
    """

    trainer: type[MethodTrainer]
    arguments: type[TrainingArguments]
    extras: Extras
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def trainer_kind(settings: TrainSettings, task: Task) -> TrainerKind:
    """The trainer of a run.

    Args:
        settings: The run.
        task: Its task.

    Raises:
        ConfigError: The trainer's package is not installed, or a setting does not fit.
    """
    if isinstance(task, Preference):
        return _preference(settings, task)
    if isinstance(task, PairTask):
        return _reward(settings, task)
    if isinstance(task, Grpo):
        return _grpo(settings, task)
    if isinstance(task, SentenceTask):
        return _sentence(task)
    scored = isinstance(task, SpeechRecognition)

    def extras(model: nn.Module, data: EncodedData) -> dict[str, Any]:
        scores = {"task": task, "eval_encoded": data.evaluation} if scored else {}
        return {
            "data_collator": task.collator(data.processor),
            "compute_metrics": task.metrics(),
            "loss_per_token": task.loss_per_token,
            "outputs": task.outputs,
            **scores,
        }

    return TrainerKind(ScoredTrainer if scored else VeraTrainer, TrainingArguments, extras)


def _preference(settings: TrainSettings, task: Preference) -> TrainerKind:
    """TRL's trainer of a preference loss.

    The reference policy shares the base weights. As the base model it is a module of its own;
    else its log probabilities are computed before the first step, where the policy is that
    reference: a new LoRA is the base model, and a starting adapter is itself.
    """
    trl = _trainers("trl_preference", "trl", "post", task.name)
    shared = task.reference == "base" and settings.method == "vera"
    trainer, arguments = trl.TRAINERS[task.loss]
    options: dict[str, Any] = {
        "beta": task.beta,
        "max_length": task.max_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    if task.loss == "simpo":
        options |= {"loss_type": "simpo", "simpo_gamma": task.simpo_gamma, "cpo_alpha": 0.0}
    if task.loss not in WITHOUT_REFERENCE:
        options["precompute_ref_log_probs"] = not shared
    if task.loss == "ipo":
        options["loss_type"] = ["ipo"]
    if task.loss == "kto":
        _check_kto(settings)
        options["train_sampling_strategy"] = "sequential"  # batches share their KL term

    def extras(model: nn.Module, data: EncodedData) -> dict[str, Any]:
        found: dict[str, Any] = {"task": task, "eval_encoded": data.evaluation}
        if task.loss not in WITHOUT_REFERENCE and shared:
            found["ref_model"] = reference(model)
        return found

    return TrainerKind(trainer, arguments, extras, options)


def _check_kto(settings: TrainSettings) -> None:
    if settings.batch_size < 2:
        raise ConfigError(
            f"batch_size is {settings.batch_size}; KTO estimates its KL term from the other "
            "examples of a batch, so at least 2 is wanted"
        )
    if settings.group_by_length:
        raise ConfigError("group_by_length is set, but KTO fixes its batches; leave it out")


def _reward(settings: TrainSettings, task: PairTask) -> TrainerKind:
    trl = _trainers("trl_preference", "trl", "post", task.name)
    trainer, arguments = trl.TRAINERS["reward"]
    return TrainerKind(
        trainer,
        arguments,
        lambda model, data: {"task": task, "eval_encoded": data.evaluation},
        {"max_length": None, "gradient_checkpointing": settings.gradient_checkpointing},
    )


def _grpo(settings: TrainSettings, task: Grpo) -> TrainerKind:
    task.rewards()  # before a model is loaded
    trl = _trainers("trl_grpo", "trl", "post", task.name)
    size = settings.batch_size * settings.gradient_accumulation_steps
    if size % task.num_generations:
        raise ConfigError(
            f"batch_size {settings.batch_size} x gradient_accumulation_steps "
            f"{settings.gradient_accumulation_steps} is {size} completions a step; a multiple of "
            f"num_generations = {task.num_generations} is wanted"
        )
    if task.beta and settings.method != "vera":
        raise ConfigError(
            f"beta is {task.beta}, but method {settings.method!r} has no reference policy beside "
            "it; leave beta out"
        )
    if settings.group_by_length:
        raise ConfigError("group_by_length is set, but GRPO groups by prompt; leave it out")
    if task.rollouts != "transformers" and settings.method != "vera":
        raise ConfigError(
            f"rollouts is {task.rollouts!r}, but the engine serves adapters of method 'vera', not "
            f"{settings.method!r}; leave --rollouts out"
        )

    def extras(model: nn.Module, data: EncodedData) -> dict[str, Any]:
        found: dict[str, Any] = {"task": task, "eval_encoded": data.evaluation}
        found["reference"] = reference(model) if task.beta else None
        if task.rollouts != "transformers":
            rollouts = ROLLOUTS[task.rollouts]()
            rollouts.bind(model, data.processor, task)
            found["rollout_func"] = rollouts
        return found

    recompute = {"gradient_checkpointing": settings.gradient_checkpointing}
    return TrainerKind(trl.VeraGRPOTrainer, trl.ARGUMENTS, extras, trl.options(task) | recompute)


def _sentence(task: SentenceTask) -> TrainerKind:
    library = _trainers("sentence_trainers", "sentence_transformers", "sentence", task.name)
    trainer, arguments = library.trainer_of(task)

    def extras(model: nn.Module, data: EncodedData) -> dict[str, Any]:
        loss = library.loss_of(task, model)
        return {"task": task, "eval_encoded": data.evaluation, "loss": loss}

    return TrainerKind(trainer, arguments, extras, library.options(task))


def _trainers(module: str, package: str, extra: str, task: str) -> Any:
    """A module of this room that imports an optional package."""
    try:
        return importlib.import_module(f"veratune.training.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ConfigError(
            f"task {task!r} needs the package {package}: pip install 'veratune[{extra}]'"
        ) from None
