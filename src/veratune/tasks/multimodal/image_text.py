"""Vision-language models: conversations with images, with the loss on the assistant's turns."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from veratune.errors import ConfigError, DataError
from veratune.loading import load_pretrained
from veratune.tasks.data import pick_columns
from veratune.tasks.multimodal.image_encoding import ImageTextCollator, ImageTextEncoder
from veratune.tasks.multimodal.image_rows import ImageConversation, ImageRowReader
from veratune.tasks.multimodal.media import FOLDER, load_media_examples
from veratune.tasks.multimodal.processors import load_image_text_processor
from veratune.tasks.text.base import OnOverflow
from veratune.tasks.text.conversation import TrainOn
from veratune.tasks.text.language import ConversationTask


class ImageTextToText(ConversationTask):
    """Conversations with images, with the loss on the assistant's turns only.

    The processor's chat template puts the messages together; see
    `veratune.tasks.multimodal.image_rows` for the rows.
    """

    name = "image-text-to-text"
    content_parts = True
    cross_entropy = False  # Trainer's label smoothing does not shift the labels of these models
    roles = {
        "messages": ("messages", "conversations"),
        "image": ("image", "images", "img"),
        "prompt": ("prompt", "instruction", "question"),
        "completion": ("completion", "output", "response", "answer", "caption"),
        "system": ("system",),
        "tools": ("tools",),
        "media_folder": (FOLDER,),
    }
    optional = frozenset(roles)
    accepted_settings = ConversationTask.accepted_settings | {"prompt", "allow_urls"}

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 2048,
        system: str = "",
        on_overflow: OnOverflow = "fail",
        train_on: TrainOn = "all",
        chat_template: str = "",
        prompt: str = "",
        allow_urls: bool = False,
    ) -> None:
        """Bind the task to columns.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest example, in tokens, those of its images included.
            system: System message for conversations without one; "" for none.
            on_overflow: What `encode` does with longer examples. An image is never cut.
            train_on: As for `Instruction`.
            chat_template: As for `Instruction`.
            prompt: The user's message where the data has images and completions alone.
            allow_urls: Fetch images that rows name by an http(s) URL.

        Raises:
            ConfigError: A setting has an invalid value.
        """
        super().__init__(columns, max_length, system, on_overflow, train_on, chat_template)
        self.prompt, self.allow_urls = prompt, allow_urls

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"prompt": self.prompt}

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return load_media_examples(source, split, config)

    def load_processor(self, model: str) -> Any:
        """Load the processor, with its chat template or the task's."""
        processor: Any = load_image_text_processor(model)
        if self.chat_template:
            processor.chat_template = self.chat_template
        template = processor.chat_template or processor.tokenizer.chat_template
        if not template:
            raise ConfigError(
                f"the processor of {model!r} has no chat template; give one with --chat-template"
            )
        processor.chat_template = processor.tokenizer.chat_template = template
        return processor

    def load_base(self, model: str, **options: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForImageTextToText, model, **options)

    def load_model(self, model: str, processor: Any, **options: Any) -> PreTrainedModel:
        return super().load_model(model, processor.tokenizer, **options)

    def used_columns(self, examples: Dataset) -> set[str]:
        return set(self._columns(examples).values())

    def conversations(
        self, examples: Dataset, processor: ProcessorMixin
    ) -> list[ImageConversation]:
        """The conversation and images of every example.

        Raises:
            DataError: A column is missing, or an example is invalid; its row is named.
        """
        reader = self._reader(examples, processor)
        return [reader.read_with_images(number, row) for number, row in enumerate(examples)]

    def encode(
        self, examples: Dataset, processor: ProcessorMixin, training: bool = False
    ) -> Dataset:
        """Token ids, labels and the encoded images, each of which was decoded once.

        Raises:
            DataError: A column or an image is missing, an image is unreadable or too large, or an
                example has too many tokens; its row and column are named.
        """
        encoder = ImageTextEncoder(
            self._reader(examples, processor),
            processor,
            self.train_on,
            self.max_length,
            self.on_overflow,
        )
        encoded = examples.map(
            encoder,
            with_indices=True,
            remove_columns=examples.column_names,
            features=encoder.features(examples[0]),
            load_from_cache_file=False,  # an image file may be another one now
            desc="Reading images",
        )
        lengths = encoded["length"][:]
        kept = [number for number, length in enumerate(lengths) if length <= self.max_length]
        over = len(lengths) - len(kept)
        self.report_overflows(over, len(lengths), self.on_overflow)
        if over and self.on_overflow == "drop":
            encoded = encoded.select(kept)
        return encoded.remove_columns("length")

    def collator(self, processor: Any) -> Any:
        return ImageTextCollator(processor)

    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """The example's text, with each run of image tokens as one of them."""
        images = set(processor.image_token_ids)
        kept = [
            at
            for at, token in enumerate(encoded["input_ids"])
            if at == 0 or token not in images or encoded["input_ids"][at - 1] != token
        ]
        short = {key: [encoded[key][at] for at in kept] for key in ("input_ids", "labels")}
        return super().preview(short, processor.tokenizer)

    def _reader(self, examples: Dataset, processor: Any) -> ImageRowReader:
        tokenizer = processor.tokenizer
        reserved = [*processor.all_special_multimodal_tokens]
        reserved += [getattr(tokenizer, "image_token", None) or ""]
        return ImageRowReader(
            self._columns(examples),
            examples.features,
            self.system,
            self.prompt,
            [token for token in dict.fromkeys(reserved) if token],
            self.allow_urls,
        )

    def _columns(self, examples: Dataset) -> dict[str, str]:
        """The column of each role, with either messages or image, prompt and completion."""
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        if "messages" in columns:
            used = ("messages", "image", "system", "tools", "media_folder")
            return {role: column for role, column in columns.items() if role in used}
        wanted = {"image", "completion"} | ({"prompt"} if not self.prompt else set())
        missing = sorted(wanted - set(columns))
        if missing:
            hint = "" if missing != ["prompt"] else ", or give one text for all rows as --prompt"
            there = [name for name in examples.column_names if name != FOLDER]
            raise DataError(
                f"no column for messages, nor for {' and '.join(missing)}; the data has "
                f"{', '.join(there)}: say which with --columns.{missing[0]} NAME"
                f"{hint}"
            )
        if self.prompt and "prompt" in columns:
            raise DataError(
                f"--prompt is set, but the column {columns['prompt']!r} has the prompts; leave one "
                "of them out"
            )
        return columns
