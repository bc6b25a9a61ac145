"""Language modelling: instruction and chat tuning with the loss on the answers, and plain text."""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, get_args

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veratune.errors import ConfigError, DataError
from veratune.loading import load_pretrained
from veratune.tasks.base import TEMPLATE_HASH
from veratune.tasks.data import CACHED_FROM, Stream, pick_columns, small_dataset
from veratune.tasks.text.base import OnOverflow, TextTask
from veratune.tasks.text.chat_template import (
    ConversationRenderer,
    check_turn,
    read_chat_template,
    template_hash,
)
from veratune.tasks.text.conversation import Conversation, Message, RowReader, TrainOn

IGNORED = -100  # the label that torch's cross entropy leaves out


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


class ChatTask(LanguageTask):
    """Base of tasks on conversations, which may begin with a system message."""

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
            on_overflow: What `encode` does with longer examples.

        Raises:
            ConfigError: `max_length` or `on_overflow` has an invalid value.
        """
        super().__init__(columns, max_length, on_overflow)
        self.system = system
        self._template_hash = ""  # of the tokenizer that was loaded

    def load_processor(self, model: str) -> PreTrainedTokenizerBase:
        tokenizer = super().load_processor(model)
        self._template_hash = template_hash(tokenizer.chat_template)
        return tokenizer

    def to_metadata(self) -> dict[str, Any]:
        seen = {TEMPLATE_HASH: self._template_hash} if self._template_hash else {}
        return super().to_metadata() | {"system": self.system} | seen

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Messages with the task's system message, unless they begin with another."""
        if self.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        return messages


class ConversationTask(ChatTask):
    """Base of tasks on conversations with the loss on turns of the assistant.

    Attributes:
        content_parts: Whether chat templates take contents as lists of parts.
    """

    content_parts: ClassVar[bool] = False
    accepted_settings = ChatTask.accepted_settings | {"train_on", "chat_template"}

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        system: str = "",
        on_overflow: OnOverflow = "drop",
        train_on: TrainOn = "all",
        chat_template: str = "",
    ) -> None:
        """Bind the task to columns.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest example, in tokens.
            system: System message for conversations without one; "" for none.
            on_overflow: What `encode` does with longer examples. A truncated completion has no
                end-of-sequence token, since it did not end.
            train_on: The turns of the assistant with the loss: "all", the "last" one of each
                conversation, or those whose message has no weight of 0 ("weights").
            chat_template: A chat template instead of the tokenizer's: its text, a Jinja file, or
                the name of one that TRL ships; "" for the tokenizer's own.

        Raises:
            ConfigError: `max_length`, `on_overflow`, `train_on` or `chat_template` is invalid.
        """
        super().__init__(columns, max_length, system, on_overflow)
        if train_on not in get_args(TrainOn):
            raise ConfigError(
                f"train_on is {train_on!r}; it must be one of {', '.join(get_args(TrainOn))}"
            )
        self.train_on = train_on
        self.chat_template = read_chat_template(chat_template) if chat_template else ""

    def to_metadata(self) -> dict[str, Any]:
        found = super().to_metadata()
        if self.chat_template:
            found.pop(TEMPLATE_HASH, None)
            found["chat_template"] = self.chat_template
        return found

    def last_completions(
        self, conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """The last turn of the assistant as generation decodes it, calls of tools included."""
        renderer, texts = ConversationRenderer(tokenizer, self.content_parts), []
        for conversation in conversations:
            last = conversation.assistant_turns[-1]
            text = next(p.text for p in renderer.pieces(conversation) if p.turn == last)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            texts.append(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip())
        return texts


class Instruction(ConversationTask):
    """Conversations, with the loss on the assistant's turns only.

    Rows hold messages (OpenAI's or ShareGPT's), or a prompt and a completion (Alpaca's, or TRL's);
    see `veratune.tasks.text.conversation`. The tokenizer's chat template puts them together.
    """

    name = "instruction"
    packs = True
    streams = True
    roles = {
        "messages": ("messages", "conversations"),
        "prompt": ("prompt", "instruction", "question"),
        "input": ("input", "context"),
        "completion": ("completion", "output", "response", "answer"),
        "history": ("history",),
        "system": ("system",),
        "tools": ("tools",),
    }
    optional = frozenset(roles)

    def load_processor(self, model: str) -> PreTrainedTokenizerBase:
        tokenizer = super().load_processor(model)
        if self.chat_template:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def used_columns(self, examples: Dataset) -> set[str]:
        return set(self._columns(examples).values())

    def conversations(self, examples: Dataset) -> list[Conversation]:
        """The conversation of every example.

        Raises:
            DataError: A column is missing, or an example is invalid; its row is named.
        """
        reader = self._reader(examples)
        return [reader.read(number, row) for number, row in enumerate(examples)]

    def encode(
        self, examples: Dataset, processor: PreTrainedTokenizerBase, training: bool = False
    ) -> Dataset:
        limit = self.max_length if self.on_overflow == "truncate" else None
        encoder = _ConversationEncoder(
            self._reader(examples), processor, self.train_on, limit, _SOURCE
        )
        if len(examples) < CACHED_FROM:
            rows = [encoder(row, number) for number, row in enumerate(examples)]
            encoded = small_dataset({k: [row[k] for row in rows] for k in _ENCODED}, _ENCODED)
        else:
            encoded = examples.map(
                encoder,
                with_indices=True,
                remove_columns=examples.column_names,
                features=_ENCODED,
                desc="Encoding",
            )
        _warn_empty(encoded["empty"][:])
        lengths = encoded["length"][:]
        over = [number for number, length in enumerate(lengths) if length > self.max_length]
        if over and self.on_overflow == "fail":
            raise self.overflow_error(over[0], lengths[over[0]])
        self.report_overflows(len(over), len(examples), self.on_overflow)
        if over and self.on_overflow == "drop":
            kept = [n for n, length in enumerate(lengths) if length <= self.max_length]
            encoded = encoded.select(kept)
        return encoded.remove_columns(["length", "empty"])

    def encode_stream(self, stream: Stream, processor: PreTrainedTokenizerBase) -> IterableDataset:
        limit = self.max_length if self.on_overflow == "truncate" else None
        encoder = _ConversationEncoder(
            self._reader(stream.head), processor, self.train_on, limit, _SOURCE
        )
        encoded = stream.rows.map(
            encoder,
            with_indices=True,
            remove_columns=stream.head.column_names,
            features=_ENCODED,
        )
        keep = _StreamFilter(self)
        return encoded.filter(keep, with_indices=True).remove_columns(["length", "empty"])

    def _reader(self, examples: Dataset) -> RowReader:
        return RowReader(self._columns(examples), examples.features, self.system)

    def _columns(self, examples: Dataset) -> dict[str, str]:
        """The column of each role, with either messages or prompt and completion."""
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        if "messages" in columns:
            return {
                role: column
                for role, column in columns.items()
                if role in ("messages", "system", "tools")
            }
        if not {"prompt", "completion"} <= set(columns):
            raise DataError(
                "no column for messages, nor a pair of prompt and completion; the data has "
                f"{', '.join(examples.column_names)}: say which with --columns.prompt NAME "
                "--columns.completion NAME"
            )
        return columns


@dataclasses.dataclass
class _ConversationEncoder:
    """Encodes rows for Dataset.map, which keys its cache by this object's values."""

    reader: RowReader
    tokenizer: PreTrainedTokenizerBase
    train_on: TrainOn
    max_length: int | None  # tokens to cut at; None: nothing is cut
    source: str  # digest of the code, so that the cache of another version is not read

    def __post_init__(self) -> None:
        self.renderer = ConversationRenderer(self.tokenizer)

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        conversation = self.reader.read(number, row)
        try:
            tokens, labels = self._encode(conversation)
        except ValueError as error:
            raise DataError(f"row {number}: {error}") from error
        length = len(tokens)
        if self.max_length is not None:
            tokens, labels = tokens[: self.max_length], labels[: self.max_length]
            if all(label == IGNORED for label in labels):
                raise DataError(
                    f"row {number}: no token of the answer is within max_length = "
                    f"{self.max_length}; raise it or shorten the prompt"
                )
        return {
            "input_ids": tokens,
            "attention_mask": [1] * len(tokens),
            "labels": labels,
            "length": length,
            "empty": conversation.trains_empty(self.train_on),
        }

    def _encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and labels; the labels of all but the trained turns are IGNORED."""
        trained = set(conversation.trained_turns(self.train_on))
        tokens: list[int] = []
        labels: list[int] = []
        for piece in self.renderer.pieces(conversation):
            # Prompt and answer are tokenized apart, as they are when the model answers.
            ids = self.tokenizer(piece.text, add_special_tokens=False)["input_ids"]
            on = piece.turn in trained
            if piece.turn is not None and on:
                check_turn(conversation.messages[piece.turn], piece.text)
            tokens += ids
            labels += ids if on else [IGNORED] * len(ids)
        return tokens, labels


_EMPTY = (
    "{rows} on an empty answer, the first is row {first}: the model learns to answer nothing "
    "there; remove them if that is not meant"
)


@dataclasses.dataclass
class _StreamFilter:
    """Leaves out or refuses examples that are too long, and reports them now and then; reports the
    first empty answer.
    """

    task: ChatTask
    over: int = 0
    empty: bool = False

    def __call__(self, row: Mapping[str, Any], number: int) -> bool:
        if row["empty"] and not self.empty:
            self.empty = True
            warnings.warn(_EMPTY.format(rows="a row trains", first=number), stacklevel=2)
        limit, action = self.task.max_length, self.task.on_overflow
        if row["length"] <= limit:
            return True
        if action == "fail":
            raise self.task.overflow_error(number, row["length"])
        self.over += 1
        if self.over in (10**digits for digits in range(10)):
            done = "dropped" if action == "drop" else "truncated"
            warnings.warn(
                f"{self.over:,} of {number + 1:,} examples so far have more than max_length = "
                f"{limit} tokens and were {done}",
                stacklevel=2,
            )
        return action == "truncate"


_ENCODED = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": List(Value("int64")),
        "length": Value("int64"),
        "empty": Value("bool"),
    }
)
_SOURCE = hashlib.sha256(
    b"".join(
        Path(__file__).with_name(f"{module}.py").read_bytes()
        for module in ("language", "chat_template", "conversation")
    )
).hexdigest()


def _warn_empty(empty: Sequence[bool]) -> None:
    """Warn of rows that teach the model to answer nothing."""
    if any(empty):
        rows = f"{sum(empty):,} of {len(empty):,} rows train"
        warnings.warn(_EMPTY.format(rows=rows, first=list(empty).index(True)), stacklevel=3)


class CausalLM(LanguageTask):
    """Plain text, row after row, cut into blocks of max_length tokens; the loss is on every
    token.
    """

    name = "causal-lm"
    streams = True
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

    def encode_stream(self, stream: Stream, processor: PreTrainedTokenizerBase) -> IterableDataset:
        column = pick_columns(stream.head, self.roles, self.columns)["text"]
        return stream.rows.map(
            _BlockCutter(processor, column, self.max_length),
            batched=True,
            remove_columns=stream.head.column_names,
        )


@dataclasses.dataclass
class _BlockCutter:
    """Cuts texts into blocks as they come; what is left over begins the next block."""

    tokenizer: PreTrainedTokenizerBase
    column: str
    max_length: int
    rest: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        texts = [text for text in batch[self.column] if text]
        for ids in self.tokenizer(texts)["input_ids"] if texts else []:
            self.rest += ids + end
        whole = len(self.rest) // self.max_length * self.max_length
        blocks = [self.rest[i : i + self.max_length] for i in range(0, whole, self.max_length)]
        self.rest = self.rest[whole:]
        masks = [[1] * self.max_length for _ in blocks]
        return {"input_ids": blocks, "attention_mask": masks, "labels": blocks}
