"""TRL's GRPO trainer, on the project's rewards, files and learning rates."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from veratune.tasks.text.grpo import Grpo
from veratune.training.callbacks import FlatRewardWarning
from veratune.training.trainer import TaskScores
from veratune.training.trl_preference import TRLTrainer

ARGUMENTS = GRPOConfig


class VeraGRPOTrainer(TaskScores, TRLTrainer, GRPOTrainer):
    """GRPO: rollouts by transformers, rewards of the task, held-out rewards at each evaluation."""

    def __init__(
        self,
        *args: Any,
        task: Grpo,
        reference: nn.Module | None,
        **kwargs: Any,
    ) -> None:
        """Build TRL's trainer.

        Args:
            args: As for `TRLTrainer`.
            task: The task; TRL's loss says nothing about its held-out rewards.
            reference: The policy of the KL term, which shares the base weights; None for none.
            kwargs: As for `TaskScores` and `TRLTrainer`.
        """
        super().__init__(*args, task=task, reward_funcs=list(task.rewards()), **kwargs)
        self.add_callback(FlatRewardWarning())
        if reference is not None:
            # TRL would load a second base model where beta is set when it is built.
            policy = cast(PreTrainedModel, reference)
            add_fused_lm_head(policy, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(policy, evaluation_mode=True)
            self.beta = task.beta


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
