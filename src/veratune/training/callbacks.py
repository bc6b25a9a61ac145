"""Trainer callbacks of a run: moving average, samples, progress lines, signals, flat
rewards.
"""

import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from veratune.errors import InterruptedRunError
from veratune.formats.atomic import write_atomic
from veratune.tasks.base import Task

_EMA_FILE = "average.safetensors"
FLAT_STEPS = 10  # without two different rewards, before it is reported


class EMACallback(TrainerCallback):
    """Exponential moving average of the trained parameters: a <- decay * a + (1 - decay) * p.

    The average is updated after every optimizer step, saved in checkpoints, and copied into the
    parameters when training ends.
    """

    def __init__(self, model: nn.Module, decay: float, checkpoint: Path | None = None) -> None:
        """Start the average at the current parameters, or at a checkpoint's average.

        Args:
            model: The model; parameters with requires_grad are averaged.
            decay: The decay, in (0, 1).
            checkpoint: Checkpoint to resume from.
        """
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in self._trained.items()
        }
        if checkpoint is not None and (checkpoint / _EMA_FILE).is_file():
            self._average = safetensors.torch.load_file(checkpoint / _EMA_FILE)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with torch.no_grad():
            for name, p in self._trained.items():
                self._average[name] = self._average[name].to(p.device).lerp_(p, 1 - self.decay)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            tensors = {name: value.cpu().contiguous() for name, value in self._average.items()}
            write_atomic(folder / _EMA_FILE, safetensors.torch.save(tensors))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with torch.no_grad():
            for name, p in self._trained.items():
                p.copy_(self._average[name])


class SampleCallback(TrainerCallback):
    """Draw samples of the model beside every checkpoint: samples/STEP.png in the run's folder."""

    def __init__(self, task: Task, model: nn.Module, processor: Any, folder: Path) -> None:
        """Bind the callback to a run.

        Args:
            task: Its `sample` draws.
            model: The model in training.
            processor: Its tokenizer or image processor.
            folder: The run's folder.
        """
        self.task, self.model, self.processor, self.folder = task, model, processor, folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.on_save(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            path = self.folder / "samples" / f"{state.global_step:06d}.png"
            with torch.random.fork_rng():
                self.task.sample(self.model, self.processor, path)


class ProgressLogger(ProgressCallback):
    """Trainer's progress bar with log lines on standard error; standard output is for results."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        shown = {
            name: value
            for name, value in (logs or {}).items()
            if (name in ("epoch", "loss", "reward") or name.startswith("eval_"))
            and not name.endswith(("_second", "_time", "_runtime"))
        }
        if "loss" in shown or "eval_loss" in shown:
            line = "  ".join(
                f"{name if name == 'eval_loss' else name.removeprefix('eval_')} {value:.4g}"
                for name, value in shown.items()
            )
            tqdm.write(line, file=sys.stderr)


class SignalCallback(TrainerCallback):
    """Write a checkpoint on SIGTERM or Ctrl-C, and stop after the current optimizer step.

    A second signal acts as it would without this class. Use it as a context manager: the signals'
    former handlers come back at the end. Python delivers signals to the main thread alone, so in
    other threads nothing is installed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        """Build the callback; no handler is installed yet."""
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalCallback":
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._on_signal) for s in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def raise_if_received(self, step: int) -> None:
        """Raise InterruptedRunError if a signal ended the run after `step` optimizer steps."""
        if self.received is not None:
            raise InterruptedRunError(
                f"{self.received.name} ended the run; a checkpoint of step {step} is written: "
                "go on with --resume"
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        tqdm.write(
            f"{self.received.name}: writing a checkpoint after this step; once more stops at once",
            file=sys.stderr,
        )

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class FlatRewardWarning(TrainerCallback):
    """Warns when no prompt has had two different rewards for some steps: nothing is learned."""

    def __init__(self) -> None:
        """Start counting."""
        self.flat = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "frac_reward_zero_std" not in logs:
            return
        self.flat = self.flat + 1 if logs["frac_reward_zero_std"] == 1 else 0
        if self.flat == FLAT_STEPS and state.is_world_process_zero:
            warnings.warn(
                f"in {FLAT_STEPS} steps in a row, all completions of each prompt had the same "
                f"reward (the last mean is {logs.get('reward', 0.0):.3g}), so nothing is learned: "
                "give a reward that tells them apart, easier prompts or more --num-generations",
                stacklevel=2,
            )
