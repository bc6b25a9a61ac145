"""TenantRun: where one tenant stands in its training, apart from its numbers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

Example = dict[str, Any]


@dataclasses.dataclass
class TenantRun:
    """One tenant that is being trained.

    Attributes:
        name: The tenant.
        slot: Its row in the stacked tensors.
        examples: Encoded training examples.
        held_out: Encoded evaluation examples; empty for none.
        batch_size: Examples per step.
        total_steps: Steps until it is done.
        seed: Of the data order.
        step: Steps done.
        lengths: Tokens of each training example (1 for images).
        before: Scores before training.
        best: The best score so far, in `score`'s direction; None before the first evaluation.
        best_step: The step of that score.
        bad_evaluations: Evaluations since then.
        after: Scores of the last, or the best, evaluation.
        loss_sum: Sum of the training loss over its steps.
        target_scale: Spread of its regression targets; 1 for other tasks.
        seconds: Its share of the time of its steps.
    """

    name: str
    slot: int
    examples: Sequence[Example]
    held_out: Sequence[Example]
    batch_size: int
    total_steps: int
    seed: int
    step: int = 0
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    bad_evaluations: int = 0
    after: dict[str, float] = dataclasses.field(default_factory=dict)
    loss_sum: float = 0.0
    seconds: float = 0.0
    target_scale: float = 1.0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.done

    def next_batch(self) -> list[Example]:
        """The examples of the next step: a shuffled pass per epoch, in the order that `veratune
        train` takes.
        """
        epoch, at = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        chosen = order[at * self.batch_size : (at + 1) * self.batch_size]
        return [self.examples[i] for i in chosen]

    def state(self) -> dict[str, Any]:
        """The run's counters and scores for a checkpoint, as JSON types."""
        kept = ("name", "step", "before", "best", "best_step", "bad_evaluations", "after")
        return {key: getattr(self, key) for key in kept} | {"loss_sum": self.loss_sum}


def total_steps(examples: int, batch_size: int, epochs: float, max_steps: int) -> int:
    """Steps of a tenant with so many examples, as transformers counts them."""
    return max_steps or max(1, math.ceil(epochs * math.ceil(examples / batch_size)))


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of similar length into batches whose padded size is at most `max_tokens`.

    Args:
        lengths: Tokens of each row.
        max_tokens: Bound on rows x longest row; a single longer row is a batch of its own.

    Returns:
        Positions by batch, longest rows first. Every position is in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for position in order:
        if batches:
            longest = lengths[batches[-1][0]]
            if (len(batches[-1]) + 1) * longest <= max_tokens:
                batches[-1].append(position)
                continue
        batches.append([position])
    return batches


def pass_size(device: str, *, text: bool) -> int:
    """Padded tokens, or images, of a forward pass that this kind of device computes fastest.

    A processor's caches hold the activations of about 512 tokens; on MiniLM a step with passes of
    4,096 tokens takes nearly twice as long. A GPU wants large products.
    """
    if device == "cpu":
        return 512 if text else 8
    return 16384 if text else 128
