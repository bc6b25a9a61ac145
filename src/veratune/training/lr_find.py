"""find_lr: a learning rate from a range test, in which the rate rises until the loss diverges."""

import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veratune.config import VeraConfig
from veratune.errors import ConfigError, OutputError
from veratune.formats.atomic import write_atomic
from veratune.training.build import MEASURED, build_run
from veratune.training.settings import TrainSettings
from veratune.training.trainer import MethodTrainer

LOWEST, HIGHEST = 1e-5, 1.0
STEPS = 60
HEAD_STEPS = 30  # before them, in which a new head learns alone
LR_FILE = "lr-find.json"
_DIVERGED = 4.0  # times the lowest smoothed loss
_REACH = 100.0  # how far below the rate of the lowest loss the chosen one may be
_FEW = 20  # steps, with which noise is not measured
_SMOOTHING = 0.8  # decay of the loss's moving average


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
        lr: The chosen learning rate.
        rates: The rate of each step.
        losses: The training loss of each step.
        smoothed: Their bias-corrected moving average.
    """

    lr: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def write(self, folder: Path) -> None:
        """Write lr-find.json, and lr-find.png where matplotlib is installed."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_atomic(folder / LR_FILE, text.encode())
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            return
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.semilogx(self.rates, self.losses, ".", color="0.75", label="loss of a step")
        axes.semilogx(self.rates, self.smoothed, label="smoothed")
        axes.axvline(self.lr, color="tab:red", label=f"chosen: {self.lr:.2g}")
        axes.set(xlabel="learning rate of d and b", ylabel="training loss")
        axes.set_ylim(top=min(max(self.losses), 1.5 * self.losses[0]))
        axes.legend()
        figure.savefig(folder / "lr-find.png", dpi=120)


def find_lr(settings: TrainSettings, vera: VeraConfig, steps: int = STEPS) -> RangeTest:
    """Train for some steps at exponentially rising rates, and choose one.

    The chosen rate is where the smoothed loss falls fastest, within a hundredth of the rate of the
    lowest loss. A head learns alone for HEAD_STEPS
    steps before: else its first progress would be taken for that of d and b. Nothing is kept of
    the model.

    Args:
        settings: The run. Its other settings hold, the head's rate among them.
        vera: The adapter's configuration.
        steps: Optimizer steps from LOWEST to HIGHEST.

    Raises:
        ConfigError: The loss falls at no rate.
        VeratuneError: A setting, the data or the model is wrong.

    Source: Smith, Cyclical learning rates for training neural networks (arXiv 1506.01186).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--lr find runs in one process; find it in one, then give it as --lr")
    if settings.task == "grpo":
        raise ConfigError("--lr find, but the loss of task grpo does not tell how well it learns")
    if not settings.lr:
        raise ConfigError("--lr find, but the run trains nothing beside the head")
    recorder = _Recorder()
    scale = HIGHEST / settings.lr
    with tempfile.TemporaryDirectory() as folder:
        tried = dataclasses.replace(
            settings,
            out=folder,
            resume=False,
            lr=HIGHEST,
            b_lr=None if settings.b_lr is None else settings.b_lr * scale,
            max_steps=steps,
            ema=0.0,
            report_to=[],
        )
        run = build_run(
            tried,
            vera,
            mixin=_RangeTrainer,
            **MEASURED,
        )
        head = any(True for _ in run.trainer.method.head(run.trainer.adapted))
        recorder.skipped = HEAD_STEPS if head else 0
        run.trainer.args.max_steps = steps + recorder.skipped
        run.trainer.recorder = recorder  # type: ignore[attr-defined]
        run.trainer.add_callback(recorder)
        run.trainer.train()
    return choose_lr(recorder.rates, recorder.losses)


def stored_lr(folder: Path) -> float:
    """The rate that a range test chose for a run.

    Raises:
        OutputError: The run's folder has no readable lr-find.json.
    """
    try:
        return float(json.loads((folder / LR_FILE).read_text())["lr"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{folder}: no readable {LR_FILE}, which the run to resume chose its rate by; resume "
            "with the rate in run.yaml as --lr"
        ) from None


def choose_lr(rates: list[float], losses: list[float]) -> RangeTest:
    """Choose the rate at which the smoothed loss falls fastest.

    Args:
        rates: The rate of each step, rising.
        losses: The loss of each step.

    Raises:
        ConfigError: The loss falls at no rate, or by less than its noise.
    """
    smoothed, average = [], 0.0
    for step, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING**step))
    lowest = int(np.argmin(smoothed))
    falling = _slopes(np.log(rates), np.array(smoothed))[: lowest + 1]
    if len(rates) < 3 or not falling.min() < 0:
        raise ConfigError(
            f"the range test found no learning rate between {LOWEST:g} and {HIGHEST:g} at which "
            "the loss falls; set --lr, or look at the data"
        )
    noise = float(np.median(np.abs(np.diff(losses)))) if len(losses) > _FEW else 0.0
    fall = float(np.mean(losses[: max(1, len(rates) // 5)])) - smoothed[lowest]
    if fall < 1.5 * noise:  # the lowest of many smoothed values is below the mean by chance
        raise ConfigError(
            f"the range test's loss falls by {fall:.2g}, and from step to step it changes by "
            f"{noise:.2g}: that is noise; set --lr, or give a larger --batch-size"
        )
    # Far below the rate of the lowest loss d and b hardly move: a fall there is noise.
    falling[np.array(rates[: lowest + 1]) < rates[lowest] / _REACH] = 0.0
    best = float(f"{rates[int(np.argmin(falling))]:.2g}")
    return RangeTest(best, rates, losses, smoothed)


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The slope at every point: that of the line through the points around it."""
    reach = max(1, len(x) // 10)
    windows = [slice(max(0, i - reach), i + reach + 1) for i in range(len(x))]
    return np.array([np.polyfit(x[w], y[w], 1)[0] if len(x[w]) > 1 else 0.0 for w in windows])


class _Recorder(TrainerCallback):
    """Collects rates and losses, and stops when the loss diverges."""

    def __init__(self) -> None:
        self.skipped = 0  # steps before the range test
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.pending: list[float] = []
        self.lowest = math.inf

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = sum(self.pending)
        self.pending = []
        if not math.isfinite(loss):
            control.should_training_stop = True
            return
        step = state.global_step - 1 - self.skipped
        if step < 0:
            return
        self.rates.append(_rate(step, state.max_steps - self.skipped))
        self.losses.append(loss)
        self.lowest = min(self.lowest, loss)
        if loss > _DIVERGED * self.lowest:
            control.should_training_stop = True


class _RangeTrainer(MethodTrainer):
    """Trainer whose adapter learning rates rise from LOWEST to HIGHEST; the head's stays."""

    recorder: _Recorder
    stops_when_diverged = False  # the recorder ends the range test there

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        head = {id(p) for p in self.method.head(self.adapted)}

        skipped = self.recorder.skipped

        def rising(step: int) -> float:
            if step < skipped:
                return 0.0
            return _rate(step - skipped, num_training_steps - skipped) / HIGHEST

        factors = [
            (lambda step: 1.0) if id(group["params"][0]) in head else rising
            for group in optimizer.param_groups
        ]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.recorder.pending.append(loss.item())
        return loss


def _rate(step: int, steps: int) -> float:
    return LOWEST * (HIGHEST / LOWEST) ** (step / max(steps - 1, 1))
