"""Sequence to sequence: a text and what is written from it, with an encoder-decoder such as T5."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veratune.errors import DataError
from veratune.loading import load_pretrained
from veratune.tasks.data import pick_columns
from veratune.tasks.text.base import OnOverflow, TextTask
from veratune.tasks.text.language import IGNORED


class Seq2Seq(TextTask):
    """Translation, summaries, rewriting: the loss is on every token of the target."""

    name = "seq2seq"
    roles = {
        "text": ("text", "source", "input", "prompt", "article", "document"),
        "target": ("target", "summary", "output", "completion", "answer"),
    }
    accepted_settings = TextTask.accepted_settings | {"on_overflow"}

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        on_overflow: OnOverflow = "drop",
    ) -> None:
        """Bind the task to columns.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest text and longest target, in tokens each.
            on_overflow: What `encode` does with longer examples.

        Raises:
            ConfigError: `max_length` or `on_overflow` has an invalid value.
        """
        super().__init__(columns, max_length, on_overflow)

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForSeq2SeqLM, model, **options)

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        """Token ids of texts and targets: columns input_ids, attention_mask, labels.

        Raises:
            DataError: A text or target is empty or no text; its row is named.
        """
        columns = pick_columns(examples, self.roles, self.columns)
        out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        overflows = 0
        for number, row in enumerate(examples):
            sides = [
                _tokens(number, role, row[columns[role]], processor) for role in ("text", "target")
            ]
            longest = max(map(len, sides))
            if longest > self.max_length:
                overflows += 1
                if self.on_overflow == "fail":
                    raise self.overflow_error(number, longest)
                if self.on_overflow == "drop":
                    continue
            text, target = (side[: self.max_length] for side in sides)
            out["input_ids"].append(text)
            out["attention_mask"].append([1] * len(text))
            out["labels"].append(target)
        self.report_overflows(overflows, len(examples), self.on_overflow)
        return Dataset.from_dict(out)

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED, padding=True)

    def preview(
        self, encoded: Mapping[str, Any], processor: PreTrainedTokenizerBase
    ) -> list[tuple[str, bool]]:
        text, target = processor.decode(encoded["input_ids"]), processor.decode(encoded["labels"])
        return [(f"{text}\n", False), (str(target), True)]


def write_targets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_new_tokens: int = 128,
) -> list[str]:
    """The target that a model writes for each text, greedily.

    Args:
        model: The encoder-decoder.
        tokenizer: Its tokenizer.
        texts: The texts, as one batch.
        max_new_tokens: Longest target, in tokens.
    """
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = cast(Any, model).generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out]


def _tokens(number: int, role: str, text: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one side, with the end-of-sequence token; an empty text is refused."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"row {number}: {role} is {text!r}; text is wanted")
    given = {"text": text} if role == "text" else {"text_target": text}
    ids = list(tokenizer(**given)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
