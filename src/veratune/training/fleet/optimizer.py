"""AdamW over stacked rows: every row is a tenant with its own step count and learning rate.

The update is that of `torch.optim.AdamW`, row by row:

    w <- (1 - lr wd) w        m <- m + (1 - β1)(g - m)        v <- β2 v + (1 - β2) g²
    w <- w - lr / (1 - β1^t) * m / (sqrt(v) / sqrt(1 - β2^t) + ε)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class StackedAdamW:
    """Optimizer state of many tenants; only the rows of one step are touched.

    Args:
        slots: Tenants whose state is held.
        size: Values per tenant.
        weight_decay: Decoupled weight decay.
        device: Where the state lives.
    """

    def __init__(
        self, slots: int, size: int, weight_decay: float = 0.0, device: torch.device | None = None
    ) -> None:
        self.exp_avg = torch.zeros(slots, size, device=device)
        self.exp_avg_sq = torch.zeros(slots, size, device=device)
        self.weight_decay = weight_decay

    def reset(self, slot: int) -> None:
        """Clear the state of one slot, for a tenant that enters."""
        self.exp_avg[slot].zero_()
        self.exp_avg_sq[slot].zero_()

    @torch.no_grad()
    def step(
        self, values: Tensor, slots: Tensor, grads: Tensor, steps: Tensor, rates: Tensor
    ) -> None:
        """Update some rows of `values` in place.

        Args:
            values: All rows, shape (slots, size).
            slots: The rows to update, shape (k,), distinct.
            grads: Their gradients, shape (k, size).
            steps: The number of each row's update, from 1, shape (k,).
            rates: Learning rates, shape (k, size) or broadcastable to it.
        """
        rows = values.index_select(0, slots)
        if self.weight_decay:
            rows.mul_(1 - rates * self.weight_decay)
        mean = self.exp_avg.index_select(0, slots).lerp_(grads, 1 - BETA1)
        square = self.exp_avg_sq.index_select(0, slots)
        square.mul_(BETA2).addcmul_(grads, grads, value=1 - BETA2)
        count = steps.to(torch.float64).unsqueeze(1)
        first = (1 - BETA1**count).to(rows.dtype)
        second = (1 - BETA2**count).sqrt().to(rows.dtype)
        rows.sub_(rates / first * mean / ((square.sqrt() / second).add_(EPSILON)))
        values.index_copy_(0, slots, rows)
        self.exp_avg.index_copy_(0, slots, mean)
        self.exp_avg_sq.index_copy_(0, slots, square)


def clip_rows(grads: Tensor, max_norm: float) -> Tensor:
    """Scale each row to a norm of at most `max_norm` (0: no limit), in place. Returns the norms
    before, shape (k,).
    """
    norms = torch.linalg.vector_norm(grads, dim=1)
    if max_norm:
        grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1))
    return norms


def schedule(name: str, warmup: float) -> Callable[[int, int], float]:
    """The factor on the peak learning rate at (finished steps, total steps), as transformers
    schedules it.

    Args:
        name: "linear", "cosine" or "constant_with_warmup".
        warmup: Steps from 1 on, or a share of the total below 1.
    """

    def factor(step: int, total: int) -> float:
        rising = math.ceil(total * warmup) if warmup < 1 else int(warmup)
        rising = min(rising, max(total - 1, 0))  # a single step would train nothing
        if step < rising:
            return step / max(1, rising)
        if name == "constant_with_warmup":
            return 1.0
        progress = (step - rising) / max(1, total - rising)
        if name == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return max(0.0, 1.0 - progress)

    return factor
