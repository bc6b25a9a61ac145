"""Language modelling: instruction and chat tuning with the loss on the answers, and plain text."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veratune.errors import ConfigError, DataError
from veratune.loading import load_pretrained
from veratune.tasks.data import pick_columns
from veratune.tasks.text.base import OnOverflow, TextTask

IGNORED = -100  # the label that torch's cross entropy leaves out

# For tokenizers without a chat template, such as GPT-2's.
PLAIN_TEMPLATE = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{{ eos_token if m.role == "
    "'assistant' else '' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}### assistant:{{ '\n' }}{% endif %}"
)

Message = dict[str, str]


class LanguageTask(TextTask):
    """Base of language-modelling tasks: a causal model, padded batches, the loss as the score."""

    loss_per_token = True
    cross_entropy = True

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForCausalLM, model, **options)

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED, padding=True)

    def preview(
        self, encoded: Mapping[str, Any], processor: PreTrainedTokenizerBase
    ) -> list[tuple[str, bool]]:
        pieces: list[tuple[list[int], bool]] = []
        for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
            on = label != IGNORED
            if not pieces or pieces[-1][1] != on:
                pieces.append(([], on))
            pieces[-1][0].append(token)
        return [(str(processor.decode(tokens)), on) for tokens, on in pieces]


class Instruction(LanguageTask):
    """A question and its answer, or a whole conversation; the loss is on the assistant's words
    only.

    Rows have `messages` (a list of {role, content}), or a prompt (with an optional input behind it)
    and a completion. The tokenizer's chat template puts them together.
    """

    name = "instruction"
    roles = {
        "messages": ("messages", "conversations"),
        "prompt": ("prompt", "instruction", "question"),
        "input": ("input", "context"),
        "completion": ("completion", "output", "response", "answer"),
    }
    optional = frozenset(roles)
    accepted_settings = LanguageTask.accepted_settings | {"system", "on_overflow"}

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        system: str = "",
        on_overflow: OnOverflow = "drop",
    ) -> None:
        """Bind the task to columns.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest example, in tokens.
            system: System message for conversations without one; "" for none.
            on_overflow: What `encode` does with longer examples. A truncated completion has no
                end-of-sequence token, since it did not end.

        Raises:
            ConfigError: `max_length` or `on_overflow` has an invalid value.
        """
        super().__init__(columns, max_length, on_overflow)
        self.system = system

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"system": self.system}

    def used_columns(self, examples: Dataset) -> set[str]:
        columns = self._columns(examples)
        return {columns["messages"]} if "messages" in columns else set(columns.values())

    def messages(self, examples: Dataset) -> list[list[Message]]:
        """The conversation of every example.

        Raises:
            DataError: A column is missing, or an example is invalid; its row is named.
        """
        columns = self._columns(examples)
        conversations = []
        for number, row in enumerate(examples):
            if "messages" in columns:
                conversation = _check_conversation(number, row[columns["messages"]])
            else:
                prompt, answer = row[columns["prompt"]], row[columns["completion"]]
                if not isinstance(prompt, str) or not isinstance(answer, str):
                    raise DataError(
                        f"row {number}: prompt and completion must be text, not {prompt!r} and "
                        f"{answer!r}"
                    )
                more = row.get(columns.get("input", "")) or ""
                content = f"{prompt}\n\n{more}" if more else prompt
                conversation = [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": answer},
                ]
            conversations.append(self.with_system(conversation))
        return conversations

    def _columns(self, examples: Dataset) -> dict[str, str]:
        """The column of each role, with either messages or prompt and completion."""
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
            raise DataError(
                "no column for messages, nor a pair of prompt and completion; the data has "
                f"{', '.join(examples.column_names)}: say which with --columns.prompt NAME "
                "--columns.completion NAME"
            )
        return columns

    def with_system(self, conversation: list[Message]) -> list[Message]:
        """A conversation with the task's system message, unless it has one of its own."""
        if self.system and conversation[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *conversation]
        return conversation

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        overflows = 0
        for number, conversation in enumerate(self.messages(examples)):
            tokens, labels = self._encode_conversation(conversation, processor)
            if len(tokens) > self.max_length:
                overflows += 1
                if self.on_overflow == "fail":
                    raise self.overflow_error(number, len(tokens))
                if self.on_overflow == "drop":
                    continue
                tokens, labels = tokens[: self.max_length], labels[: self.max_length]
            if all(label == IGNORED for label in labels):
                raise DataError(
                    f"row {number}: no token of the answer is within max_length = "
                    f"{self.max_length}; raise it or shorten the prompt"
                )
            out["input_ids"].append(tokens)
            out["attention_mask"].append([1] * len(tokens))
            out["labels"].append(labels)
        self.report_overflows(overflows, len(examples), self.on_overflow)
        return Dataset.from_dict(out)

    @staticmethod
    def _encode_conversation(
        conversation: list[Message], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels; the labels of all but the assistant's turns are IGNORED."""
        text, at = "", 0
        tokens: list[int] = []
        labels: list[int] = []
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            prompt = render(conversation[:turn], tokenizer, add_generation_prompt=True)
            whole = render(conversation[: turn + 1], tokenizer)
            if not whole.startswith(prompt) or not prompt.startswith(text):
                raise ConfigError(
                    "the tokenizer's chat template rewrites earlier turns when later ones come, so "
                    "the answers cannot be "
                    "told from the rest; give each answer as a row of its own"
                )
            # Prompt and answer are tokenized apart, as they are when the model answers.
            for piece, on in ((prompt[at:], False), (whole[len(prompt) :], True)):
                ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
                tokens += ids
                labels += ids if on else [IGNORED] * len(ids)
            text, at = whole, len(whole)
        return tokens, labels


class CausalLM(LanguageTask):
    """Plain text, row after row, cut into blocks of max_length tokens; the loss is on every
    token.
    """

    name = "causal-lm"
    roles = {"text": ("text", "content")}

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        column = pick_columns(examples, self.roles, self.columns)["text"]
        end = [processor.eos_token_id] if processor.eos_token_id is not None else []
        texts = [text for text in examples[column] if text]
        if not texts:
            raise DataError(f"column {column!r} holds no text at all")
        stream = list(chain.from_iterable(ids + end for ids in processor(texts)["input_ids"]))
        blocks = [stream[i : i + self.max_length] for i in range(0, len(stream), self.max_length)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise DataError(
                f"column {column!r} holds less than two tokens; there is nothing to predict"
            )
        return Dataset.from_dict(
            {
                "input_ids": blocks,
                "attention_mask": [[1] * len(b) for b in blocks],
                "labels": blocks,
            }
        )


def render(
    conversation: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as the text that the model sees; add_generation_prompt: up to where its next
    answer starts.
    """
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    return str(
        tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def _check_conversation(number: int, conversation: Any) -> list[Message]:
    if not isinstance(conversation, list) or not conversation:
        raise DataError(
            f"row {number}: messages is {conversation!r}; a list of {{role, content}} is wanted"
        )
    for message in conversation:
        if (
            not isinstance(message, dict)
            or not {"role", "content"} <= set(message)
            or not isinstance(message["content"], str)
        ):
            raise DataError(
                f"row {number}: a message is {message!r}; {{role, content}} with text is wanted"
            )
    if not any(message["role"] == "assistant" for message in conversation):
        raise DataError(
            f"row {number}: the conversation has no turn of the assistant; there is nothing to "
            "learn"
        )
    return [{"role": message["role"], "content": message["content"]} for message in conversation]
