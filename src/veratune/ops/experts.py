"""Linear layers of a mixture of experts: each token goes through the matrix of its own expert."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def routed_linear(
    x: Float[Tensor, "S n"],
    counts: list[int],
    apply: Callable[[int, Tensor], Tensor],
    out_features: int,
) -> Float[Tensor, "S m"]:
    """Apply one linear function per expert: y[i] = f_e(x[i]) for the expert e of token i.

    Args:
        x: Tokens sorted by expert, shape (S, n).
        counts: Tokens of each expert, S in sum.
        apply: Called with an expert and its tokens (k, n); returns (k, m). Not called for k = 0.
        out_features: m, for a batch without tokens.

    Returns:
        The outputs, shape (S, m), in the order of x.
    """
    pieces = [apply(expert, tokens) for expert, tokens in enumerate(x.split(counts)) if len(tokens)]
    return torch.cat(pieces) if pieces else x.new_zeros(0, out_features)


def sort_by_expert(
    expert_index: Integer[Tensor, "T k"], experts: int
) -> tuple[Integer[Tensor, " S"], Integer[Tensor, " S"], list[int]]:
    """Order the (token, choice) pairs of a router by expert.

    Args:
        expert_index: Experts chosen for each token, shape (T, k); values of `experts` or more are
            dropped (routers mask a choice that way).
        experts: Number of experts.

    Returns:
        (tokens, pairs, counts): the token of each sorted pair, its position in the flattened index,
        and the pairs of each expert.
    """
    flat = expert_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    pairs = order[: sum(counts)]
    return torch.div(pairs, expert_index.shape[1], rounding_mode="floor"), pairs, counts


def combine_experts(
    y: Float[Tensor, "S m"],
    pairs: Integer[Tensor, " S"],
    expert_weights: Float[Tensor, "T k"],
) -> Float[Tensor, "T m"]:
    """Sum the outputs of each token's experts with the router's weights.

    Args:
        y: Outputs sorted by expert, shape (S, m).
        pairs: Position of each output in the flattened router index, shape (S,).
        expert_weights: Weights of each token's experts, shape (T, k).

    Returns:
        The sum over experts, shape (T, m).
    """
    weighted = y * expert_weights.reshape(-1)[pairs].unsqueeze(-1)
    slots = weighted.new_zeros(expert_weights.numel(), y.shape[1]).index_copy(0, pairs, weighted)
    return slots.view(*expert_weights.shape, y.shape[1]).sum(1)
