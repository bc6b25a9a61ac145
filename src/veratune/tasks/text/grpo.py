"""GRPO data: prompts, and the columns that rewards read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, get_args

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from veratune.errors import ConfigError, DataError
from veratune.scoring.rewards import REWARDS, CheckedReward, OnError, columns_of, find_reward
from veratune.tasks.data import pick_columns
from veratune.tasks.text.base import OnOverflow
from veratune.tasks.text.chat_template import PLAIN_TEMPLATE, render
from veratune.tasks.text.language import ChatTask
from veratune.tasks.text.pairs import Messages, read_prompt


class Rollouts(Protocol):
    """Generates completions of prompts with the model in training."""

    def bind(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: "Grpo") -> None:
        """Prepare for a run, before its trainer is built."""

    def __call__(self, prompts: list[Messages], trainer: Any) -> dict[str, Any]:
        """TRL's rollout function: prompt_ids, completion_ids and logprobs of the prompts."""


# Makers of rollouts by name, beside transformers'; veratune.fleet.rollouts.register adds "engine".
ROLLOUTS: dict[str, Callable[[], Rollouts]] = {}


class Grpo(ChatTask):
    """Reinforcement learning with verifiable rewards: GRPO (arXiv 2402.03300)."""

    name = "grpo"
    roles = {"prompt": ("prompt", "question", "instruction", "problem", "messages")}
    accepted_settings = ChatTask.accepted_settings | {
        "beta",
        "reward",
        "reward_weights",
        "reward_options",
        "on_reward_error",
        "num_generations",
        "max_completion_length",
        "temperature",
        "rollouts",
    }
    metric = "reward"
    greater_is_better = True
    loss_per_token = False
    cross_entropy = False

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        system: str = "",
        on_overflow: OnOverflow = "drop",
        beta: float = 0.0,
        reward: Sequence[str] = (),
        reward_weights: Sequence[float] = (),
        reward_options: Mapping[str, Any] | None = None,
        on_reward_error: OnError = "stop",
        num_generations: int = 8,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        rollouts: str = "transformers",
    ) -> None:
        """Bind the task to columns, rewards and the settings of rollouts.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest prompt, in tokens.
            system: System message for prompts without one; "" for none.
            on_overflow: What `encode` does with longer prompts: "drop" or "fail".
            beta: Weight of the KL term to the base model; 0 for none.
            reward: Names of rewards, or module:function.
            reward_weights: Their weights; () for 1 each.
            reward_options: Values of columns that are the same for all examples.
            on_reward_error: "stop" at a sample on which a reward fails, or "skip" its reward.
            num_generations: Completions of one prompt that are compared with each other.
            max_completion_length: Longest completion, in tokens.
            temperature: Sampling temperature of rollouts.
            rollouts: What generates them: "transformers", or a name in `ROLLOUTS`.

        Raises:
            ConfigError: A value is invalid.
        """
        super().__init__(columns, max_length, system, on_overflow)
        if on_overflow == "truncate":
            raise ConfigError("on_overflow is 'truncate', but a cut prompt asks nothing; use drop")
        if reward_weights and len(reward_weights) != len(reward):
            raise ConfigError(
                f"reward_weights has {len(reward_weights)} values for {len(reward)} rewards; one "
                "each is wanted"
            )
        if on_reward_error not in get_args(OnError):
            raise ConfigError(f"on_reward_error is {on_reward_error!r}; stop or skip is wanted")
        least = {"num_generations": 2, "max_completion_length": 1}
        for field, value in (
            ("num_generations", num_generations),
            ("max_completion_length", max_completion_length),
        ):
            if value < least[field]:
                raise ConfigError(f"{field} is {value}; it must be at least {least[field]}")
        if not temperature > 0 or beta < 0:
            raise ConfigError(
                f"temperature is {temperature} and beta is {beta}; temperature must be over 0, and "
                "beta at least 0"
            )
        if rollouts != "transformers" and rollouts not in ROLLOUTS:
            raise ConfigError(
                f"rollouts is {rollouts!r}; transformers is wanted, or engine after a call of "
                "veratune.fleet.rollouts.register"
            )
        self.rollouts = rollouts
        self.beta, self.temperature = beta, temperature
        self.reward = list(reward)
        self.reward_weights = list(reward_weights) or [1.0] * len(self.reward)
        self.reward_options = dict(reward_options or {})
        self.on_reward_error: OnError = on_reward_error
        self.num_generations = num_generations
        self.max_completion_length = max_completion_length

    def to_metadata(self) -> dict[str, Any]:
        """The task for an adapter file.

        A reward module:function is left out: reading a file must never import code that it names.
        """
        shipped = [i for i, name in enumerate(self.reward) if name in REWARDS]
        return super().to_metadata() | {
            "reward": [self.reward[i] for i in shipped],
            "reward_weights": [self.reward_weights[i] for i in shipped],
            "reward_options": self.reward_options,
            "max_completion_length": self.max_completion_length,
        }

    def rewards(self) -> list[CheckedReward]:
        """The reward functions, in the order of `reward_weights`.

        Raises:
            ConfigError: There are none, or one cannot be imported.
        """
        if not self.reward:
            raise ConfigError(
                f"task grpo has no reward; give --reward, one of {', '.join(REWARDS)} or "
                "module:function. An adapter file never names the latter: reading a file must not "
                "import code"
            )
        return [CheckedReward(n, find_reward(n), self.on_reward_error) for n in self.reward]

    def used_columns(self, examples: Dataset) -> set[str]:
        prompt = pick_columns(examples, self.roles, self.columns)["prompt"]
        return {prompt, *self._reward_columns(examples, prompt)}

    def _reward_columns(self, examples: Dataset, prompt: str) -> set[str]:
        """The columns of the data that a reward reads, all of which must be there."""
        there, used = set(examples.column_names) - {prompt}, set()
        for reward in self.rewards():
            wanted = columns_of(reward.reward)
            if wanted is None:
                used |= there
                continue
            missing = sorted(wanted - there - set(self.reward_options))
            if missing:
                raise DataError(
                    f"reward {reward.name!r} reads the column {missing[0]!r}; the data has "
                    f"{', '.join(examples.column_names)}: add it, or give one value for all rows "
                    f"with --reward-options.{missing[0]} VALUE"
                )
            used |= wanted & there
        both = sorted(used & set(self.reward_options))
        if both:
            raise DataError(
                f"reward_options sets {both[0]!r}, which is a column of the data too; leave one out"
            )
        return used

    def load_processor(self, model: str) -> PreTrainedTokenizerBase:
        """Load the tokenizer; without a chat template it gets the plain one."""
        tokenizer = super().load_processor(model)
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        return tokenizer

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        """Prompts as messages in the column prompt, and the columns that the rewards read."""
        column = pick_columns(examples, self.roles, self.columns)["prompt"]
        used = sorted(self._reward_columns(examples, column))
        rows: list[dict[str, Any]] = []
        overflows = 0
        for number, row in enumerate(examples):
            prompt = self.with_system(read_prompt(number, row[column]))
            text = render(prompt, processor, add_generation_prompt=True)
            length = len(processor(text, add_special_tokens=False)["input_ids"])
            if length > self.max_length:
                overflows += 1
                if self.on_overflow == "fail":
                    raise self.overflow_error(number, length)
                continue
            rows.append({"prompt": prompt, **{name: row[name] for name in used}})
        self.report_overflows(overflows, len(examples), "drop")
        return Dataset.from_list([row | self.reward_options for row in rows])

    def collator(self, processor: PreTrainedTokenizerBase) -> Any:
        """None: TRL's trainer brings its own."""
        return None

    def preview(
        self, encoded: Mapping[str, Any], processor: PreTrainedTokenizerBase
    ) -> list[tuple[str, bool]]:
        text = render(encoded["prompt"], processor, add_generation_prompt=True)
        columns = "".join(f"\n[{k}] {v}" for k, v in encoded.items() if k != "prompt")
        return [(text, False), ("[the model's completions]", True), (columns, False)]

    def score(
        self, model: nn.Module, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float]:
        """Mean held-out rewards of greedy completions: each reward, and their weighted sum."""
        completions: list[Messages] = []
        for batch in encoded.iter(batch_size=batch_size):
            texts = generate_greedily(model, processor, batch["prompt"], self.max_completion_length)
            completions += [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: list(encoded[name]) for name in encoded.column_names if name != "prompt"}
        prompts = list(encoded["prompt"])
        found = {
            reward.name: [value or 0.0 for value in reward(prompts, completions, **columns)]
            for reward in self.rewards()
        }
        means = {name: sum(values) / len(values) for name, values in found.items()}
        total = sum(w * m for w, m in zip(self.reward_weights, means.values(), strict=True))
        return {"reward": total} | {f"rewards/{name}": mean for name, mean in means.items()}


def generate_greedily(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[Messages], length: int
) -> list[str]:
    """The most likely completion of each prompt, token by token, as one batch.

    Args:
        model: The causal model.
        tokenizer: Its tokenizer; prompts are padded on the left.
        prompts: The prompts, as messages.
        length: Longest completion, in tokens.
    """
    texts = [render(prompt, tokenizer, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(
        texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = cast(Any, model).generate(
            **inputs,
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    start = inputs["input_ids"].shape[1]
    return [str(tokenizer.decode(row[start:], skip_special_tokens=True)) for row in out]
