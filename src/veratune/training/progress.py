"""ProgressFileCallback: how far a run is, as JSON lines, for the program that started it."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PROGRESS_FILE = "VERATUNE_PROGRESS_FILE"  # the environment variable that names the file


class ProgressFileCallback(TrainerCallback):
    """Append {"step": done, "steps": in all, "epoch": ..., "loss": ...} to a file at each log."""

    def __init__(self, path: Path) -> None:
        """Name the file. A run that is resumed appends to it."""
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell how many steps there are."""
        self._append(state, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the numbers of the log."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self._append(state, numbers)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the step."""
        self._append(state, {})

    def _append(self, state: TrainerState, numbers: dict[str, float]) -> None:
        if state.is_world_process_zero:
            line = numbers | {"step": state.global_step, "steps": state.max_steps}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
