"""TRL's GRPO trainer, on the project's rewards, files and learning rates."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from veratune.tasks.text.grpo import Grpo
from veratune.training.trl_preference import TRLTrainer

ARGUMENTS = GRPOConfig


FLAT_STEPS = 10


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


class VeraGRPOTrainer(TRLTrainer, GRPOTrainer):
    """GRPO: rollouts by transformers, rewards of the task, held-out rewards at each evaluation."""

    def __init__(
        self,
        *args: Any,
        task: Grpo,
        eval_encoded: Dataset | None,
        reference: nn.Module | None,
        **kwargs: Any,
    ) -> None:
        """Build TRL's trainer.

        Args:
            args: As for `TRLTrainer`.
            task: The task.
            eval_encoded: Evaluation examples as the task encoded them; None without.
            reference: The policy of the KL term, which shares the base weights; None for none.
            kwargs: As for `TRLTrainer`.
        """
        self.task, self.eval_encoded = task, eval_encoded
        super().__init__(*args, reward_funcs=list(task.rewards()), **kwargs)
        self.add_callback(FlatRewardWarning())
        if reference is not None:
            # TRL would load a second base model where beta is set when it is built.
            policy = cast(PreTrainedModel, reference)
            add_fused_lm_head(policy, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(policy, evaluation_mode=True)
            self.beta = task.beta

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean held-out rewards of greedy completions; TRL's loss says nothing about them."""
        assert self.eval_encoded is not None
        scores = self.task.score(
            self.adapted,
            self.eval_encoded,
            self.processing_class,
            self.args.per_device_eval_batch_size,
        )
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.adapted.eval()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def options(task: Grpo) -> Mapping[str, Any]:
    """Arguments of GRPOConfig from a task."""
    return {
        "beta": 0.0,  # see VeraGRPOTrainer
        "reward_weights": task.reward_weights,
        "num_generations": task.num_generations,
        "max_completion_length": task.max_completion_length,
        "temperature": task.temperature,
        "disable_dropout": True,
        "logging_steps": 1,
    }
