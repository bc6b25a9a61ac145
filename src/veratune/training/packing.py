"""Packing: several examples in one row of a batch, without padding between them.

Position ids restart with every example. From them transformers builds a block-diagonal attention
mask, or the sequence boundaries of FlashAttention, so that no example sees another.
"""

import bisect
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithFlattening

from veratune.errors import ConfigError, UnsupportedError

_IGNORED = -100  # the label that torch's cross entropy leaves out
_PROBE = 8  # tokens of an example that `check_packing` packs
Example = Mapping[str, Any]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into bins by best-fit decreasing.

    Args:
        lengths: Length of each example, in tokens.
        capacity: Most tokens of a bin.

    Returns:
        The indices of the examples of each bin.

    Raises:
        ConfigError: An example is longer than a bin.

    Source: Johnson, Near-optimal bin packing algorithms (1973).
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ConfigError(
                f"example {index} has {length} tokens, but a packed row holds {capacity}"
            )
        at = bisect.bisect_left(spaces, (length, -1))
        if at < len(spaces):
            free, number = spaces.pop(at)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        if free > length:
            bisect.insort(spaces, (free - length, number))
    return bins


class PackedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples packed into rows of at most `max_length` tokens."""

    def __init__(self, examples: Dataset, max_length: int) -> None:
        """Pack a data set.

        Args:
            examples: Encoded examples, with input_ids and labels.
            max_length: Most tokens of a row.
        """
        self.examples = examples
        self.lengths = [len(ids) for ids in examples["input_ids"]]
        self.bins = best_fit(self.lengths, max_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"examples": [self.examples[i] for i in self.bins[index]]}


@dataclasses.dataclass
class PackingCollator:
    """Makes a batch of packed rows.

    Rows of a PackedDataset stay as they are. Single examples are packed within their batch, into
    rows as long as the longest of them. For FlashAttention, all are one row without any padding.

    Args:
        pad_token_id: The token behind the end of shorter rows.
        flatten: Make one row of the whole batch, with the sequence boundaries of FlashAttention.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, features: Sequence[Example]) -> dict[str, Any]:
        rows = self._rows(features)
        if self.flatten:
            collator = DataCollatorWithFlattening(
                return_flash_attn_kwargs=True, return_seq_idx=True
            )
            plain = [
                {key: example[key] for key in ("input_ids", "labels")}
                for row in rows
                for example in row
            ]
            return dict(collator(plain, return_tensors="pt"))
        width = max(sum(len(example["input_ids"]) for example in row) for row in rows)
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, _IGNORED),
            "position_ids": torch.zeros(shape, dtype=torch.long),
        }
        for number, row in enumerate(rows):
            at = 0
            for example in row:
                end = at + len(example["input_ids"])
                batch["input_ids"][number, at:end] = torch.tensor(example["input_ids"])
                # The first token of an example is predicted from nothing.
                batch["labels"][number, at + 1 : end] = torch.tensor(example["labels"][1:])
                batch["position_ids"][number, at:end] = torch.arange(end - at)
                at = end
        return batch

    def _rows(self, features: Sequence[Example]) -> list[list[Example]]:
        if "examples" in features[0]:
            return [list(row["examples"]) for row in features]
        lengths = [len(example["input_ids"]) for example in features]
        return [[features[i] for i in row] for row in best_fit(lengths, max(lengths))]


def uses_flash_attention(model: nn.Module) -> bool:
    """Whether a model's attention is FlashAttention, which takes sequences of any lengths."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    return "flash" in name


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Check on a few tokens that a model keeps packed examples apart.

    An example must have the same logits first and second in a row, and whatever is before it.

    Args:
        model: The causal model.

    Raises:
        UnsupportedError: The model takes no position ids (a state-space model, ALiBi), or packed
            examples change each other's logits.
    """
    kind = type(model).__name__
    advice = "leave out --packing and --padding-free"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(
            f"{kind} takes no position_ids, so packed examples cannot be kept apart; {advice}"
        )
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randint(vocabulary, (2, _PROBE), generator=generator).tolist()
    collator = PackingCollator(0, uses_flash_attention(model))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        logits = []
        for before in (first, other):
            row = {"examples": [{"input_ids": ids, "labels": ids} for ids in (before, first)]}
            batch = collator([row])
            inputs = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
                if key != "labels"
            }
            logits.append(model(**inputs, use_cache=False).logits[0].float())
    finally:
        model.train(training)
    alone, second, behind = logits[0][:_PROBE], logits[0][_PROBE:], logits[1][_PROBE:]
    scale = alone.std()
    # Rounding in the dtype of the weights; what leaks from another example is as large as logits.
    tolerance = 0.1 if next(model.parameters()).dtype != torch.float32 else 1e-3
    worst = max((second - alone).abs().max(), (behind - alone).abs().max()) / scale
    if not worst < tolerance:
        raise UnsupportedError(
            f"{kind} mixes packed examples: logits change by {worst:.2g} of their standard "
            f"deviation with what is packed before; {advice}"
        )
