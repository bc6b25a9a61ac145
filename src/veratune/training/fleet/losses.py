"""The loss of every row of a batch, so that each tenant's gradient comes from its own rows
alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veratune.errors import UnsupportedError
from veratune.tasks.base import Task
from veratune.tasks.text.language import IGNORED

RowLosses = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor | None]]


def row_losses_of(task: Task, model: nn.Module) -> RowLosses:
    """A function from (model, inputs) to the summed loss of each row, and the row outputs for
    metrics.

    A tenant's loss is the sum over its rows divided by its items: examples, or labelled tokens for
    language models. That is the loss which `veratune train` minimises on the same batch.

    Raises:
        UnsupportedError: for a task whose loss does not fall apart into rows.
    """
    if task.loss_per_token and task.cross_entropy:  # images have no rows to take losses of
        return _causal(model)
    if task.cross_entropy:
        return lambda model, inputs: _classes(model, inputs)
    if task.name == "text-regression":
        return lambda model, inputs: _numbers(model, inputs)
    raise UnsupportedError(
        f"task {task.name!r} cannot be trained as a fleet; there are text and image "
        "classification, "
        "text regression, instruction and causal-lm"
    )


def items_of(task: Task, labels: Any) -> int:
    """How many items one example counts in its tenant's mean: 1, or its labelled tokens."""
    if not task.loss_per_token:
        return 1
    return sum(label != IGNORED for label in labels[1:])


def _split(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    rest = dict(inputs)
    return rest, rest.pop("labels")


def _classes(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    rest, labels = _split(inputs)
    logits: Tensor = model(**rest).logits
    return F.cross_entropy(logits.float(), labels, reduction="none"), logits.detach()


def _numbers(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    rest, labels = _split(inputs)
    logits: Tensor = model(**rest).logits
    losses = F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="none")
    return losses, logits.detach()


def _causal(model: nn.Module) -> RowLosses:
    """The language-model loss; the vocabulary product is computed for labelled positions alone
    where that is exact.
    """
    exact: bool | None = None

    def losses(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, None]:
        nonlocal exact
        rest, labels = _split(inputs)
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        wanted = shifted != IGNORED
        if exact is None:
            exact = _head_alone_is_exact(model, rest, wanted)
        if exact:
            hidden = _backbone(model)(**rest, use_cache=False).last_hidden_state
            logits = _head(model)(hidden[wanted])
        else:
            logits = model(**rest, use_cache=False).logits[wanted]
        tokens = F.cross_entropy(logits.float(), shifted[wanted], reduction="none")
        rows = wanted.nonzero()[:, 0]
        return tokens.new_zeros(len(labels)).index_add(0, rows, tokens), None

    return losses


def _backbone(model: nn.Module) -> nn.Module:
    return model.base_model  # type: ignore[return-value]


def _head(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[operator, no-any-return]


@torch.no_grad()
def _head_alone_is_exact(model: nn.Module, inputs: dict[str, Tensor], wanted: Tensor) -> bool:
    """Whether logits = head(hidden), without scaling or capping; checked on the first batch."""
    training = model.training
    model.eval()
    try:
        if not hasattr(model, "base_model") or _head(model) is None:
            return False
        whole = model(**inputs, use_cache=False).logits[wanted]
        hidden = getattr(_backbone(model)(**inputs, use_cache=False), "last_hidden_state", None)
        return hidden is not None and torch.allclose(
            _head(model)(hidden[wanted]), whole, rtol=1e-4, atol=1e-5
        )
    finally:
        model.train(training)
