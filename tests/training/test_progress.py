"""A run's progress file has the last step and the last loss."""

import json

from transformers import TrainerControl, TrainerState, TrainingArguments

from veratune.training.progress import ProgressFileCallback


def test_lines_tell_steps_and_numbers(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state, control = TrainerState(global_step=0, max_steps=20), TrainerControl()
    made = ProgressFileCallback(tmp_path / "progress.jsonl")
    made.on_train_begin(args, state, control)
    state.global_step = 3
    made.on_step_end(args, state, control)
    made.on_log(args, state, control, logs={"loss": 0.5, "note": "x"})
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "steps": 20},
        {"step": 3, "steps": 20},
        {"loss": 0.5, "step": 3, "steps": 20},
    ]
    state.is_world_process_zero = False
    made.on_step_end(args, state, control)
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 3
