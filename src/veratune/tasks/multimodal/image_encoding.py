"""Rows with images as tokens, labels and pixels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Features, List, Value
from PIL.Image import Image
from torch import Tensor

from veratune.errors import DataError
from veratune.tasks.multimodal.image_rows import ImageConversation, ImageRowReader, count_images
from veratune.tasks.multimodal.media import Media
from veratune.tasks.text.base import OnOverflow
from veratune.tasks.text.chat_template import ConversationRenderer, check_turn
from veratune.tasks.text.conversation import TrainOn
from veratune.tasks.text.language import IGNORED
from veratune.tasks.vision.images import read_image

MAX_PIXELS = 50_000_000  # of a decoded image
# What a processor returns for each token; all else belongs to the images.
TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclasses.dataclass
class ImageTextEncoder:
    """Encodes rows for Dataset.map.

    Attributes:
        reader: Converts rows.
        processor: The model's processor.
        train_on: The turns with the loss.
        max_length: Longest example, in tokens.
        on_overflow: What is done with longer ones.
    """

    reader: ImageRowReader
    processor: Any
    train_on: TrainOn
    max_length: int
    on_overflow: OnOverflow

    def __post_init__(self) -> None:
        self.renderer = ConversationRenderer(self.processor.tokenizer, parts=True)

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Encode one row.

        Args:
            row: Its values by column.
            number: Its number.

        Raises:
            DataError: Names the row and, where one is at fault, the column.
        """
        example = self.reader.read_with_images(number, row)
        images = self._open(number, example)
        try:
            encoded, images_end = self._encode(example, images)
        except ValueError as error:
            raise DataError(f"row {number}: {error}") from error
        length = len(encoded["input_ids"])
        if length > self.max_length and self.on_overflow != "drop":
            self._check_length(number, example, encoded, images_end)
            for key in encoded:
                if key != "text":
                    encoded[key] = encoded[key][: self.max_length]
        return encoded | {"images": example.images, "length": length}

    def features(self, row: Mapping[str, Any]) -> Features:
        """The columns of encoded rows, some of which only some processors have."""
        image = {"bytes": Value("large_binary"), "path": Value("string")}
        features: dict[str, Any] = {
            key: List(Value("int32")) for key in self(row, 0) if key in (*TOKEN_KEYS, "labels")
        }
        return Features(
            features | {"text": Value("string"), "images": List(image), "length": Value("int64")}
        )

    def _open(self, number: int, example: ImageConversation) -> list[Image]:
        images = []
        for index, media in enumerate(example.images):
            try:
                images.append(read_image(media, MAX_PIXELS))
            except ValueError as error:
                name = f" ({media['path']})" if media["path"] else ""
                self.reader.refuse(number, example.role, f"image {index}{name}: {error}")
        return images

    def _encode(
        self, example: ImageConversation, images: Sequence[Image]
    ) -> tuple[dict[str, Any], int]:
        """Tokens, labels and text of an example, and the tokens up to its last image's message."""
        conversation = example.conversation
        trained = set(conversation.trained_turns(self.train_on))
        pieces = self.renderer.pieces(conversation)
        turns = [piece.turn for piece in pieces if piece.turn is not None]
        encoded: dict[str, Any] = {"input_ids": [], "labels": []}
        start, used, images_end = 0, 0, 0
        for piece in pieces:
            if piece.turn is None:
                end = next((turn for turn in turns if turn >= start), len(conversation.messages))
                count = count_images(conversation.messages[start:end])
                start = end + 1
            else:
                count = 0
                if piece.turn in trained:
                    check_turn(conversation.messages[piece.turn], piece.text)
            if not piece.text:
                continue
            tokens = self._tokens(piece.text, images[used : used + count])
            used += count
            length = len(tokens["input_ids"])
            on = piece.turn in trained
            tokens["labels"] = tokens["input_ids"] if on else [IGNORED] * length
            before = len(encoded["input_ids"])
            for key in encoded.keys() | tokens.keys():
                # Text without an image may have no types of tokens; they are zeros.
                encoded[key] = encoded.get(key, [0] * before) + tokens.get(key, [0] * length)
            images_end = len(encoded["input_ids"]) if count else images_end
        return encoded | {"text": "".join(piece.text for piece in pieces)}, images_end

    def _tokens(self, text: str, images: Sequence[Image]) -> dict[str, list[int]]:
        """What the processor makes of a piece of text and its images, for each token."""
        out = self.processor(images=list(images) or None, text=[text], add_special_tokens=False)
        return {key: [int(i) for i in out[key][0]] for key in TOKEN_KEYS if key in out}

    def _check_length(
        self, number: int, example: ImageConversation, encoded: Mapping[str, Any], images_end: int
    ) -> None:
        """Refuse an example that is too long, or that cannot be cut."""
        ids = set(self.processor.image_token_ids)
        count = sum(token in ids for token in encoded["input_ids"])
        limit = f"max_length = {self.max_length:,}"
        if self.on_overflow == "fail":
            self.reader.refuse(
                number,
                example.role,
                f"{len(encoded['input_ids']):,} tokens, {count:,} of them of its images, more than "
                f"{limit}; raise --max-length, shrink the image, or choose --on-overflow drop",
            )
        if images_end > self.max_length:
            self.reader.refuse(
                number,
                example.role,
                f"the message with the last image ends at token {images_end:,}, behind {limit}; an "
                "image is never cut: raise --max-length, or choose --on-overflow drop",
            )
        if all(label == IGNORED for label in encoded["labels"][: self.max_length]):
            self.reader.refuse(
                number,
                "completion",
                f"no token of the answer is within {limit}; raise it or shorten the prompt",
            )


@dataclasses.dataclass
class ImageTextCollator:
    """Makes a batch: padded tokens, and what the processor makes of the images.

    Images are decoded and resized here, so that they are never all in memory, and by the loader's
    processes where there are any.

    Attributes:
        processor: The model's processor.
    """

    processor: Any

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [[_open_again(media) for media in row["images"]] for row in features]
        pixels = self.processor(
            images=images,
            text=[row["text"] for row in features],
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        batch = {key: value for key, value in pixels.items() if key not in TOKEN_KEYS}
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED}
        for key in (*TOKEN_KEYS, "labels"):
            if key in features[0]:
                rows = [torch.tensor(row[key], dtype=torch.long) for row in features]
                batch[key] = torch.nn.utils.rnn.pad_sequence(
                    rows, batch_first=True, padding_value=fill.get(key, 0)
                )
        return batch


def _open_again(media: Media) -> Image:
    try:
        return read_image(media, MAX_PIXELS)
    except ValueError as error:
        name = media["path"] or "an image"
        raise DataError(f"{name}: {error}; it was readable when the run began") from None
