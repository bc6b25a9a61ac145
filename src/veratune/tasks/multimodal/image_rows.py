"""Conversations with images from rows of data.

| format            | columns                                                               |
|-------------------|-----------------------------------------------------------------------|
| messages          | messages with parts {type: image, image} and {type: text, text}       |
| messages, images  | messages with parts {type: image}, or "<image>" in texts; image(s)    |
| prompt            | image(s), prompt, completion                                          |
| caption           | image(s), completion; every prompt is the setting `prompt`            |
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Features

from veratune.tasks.multimodal.media import Media, media_of
from veratune.tasks.text.conversation import (
    Conversation,
    Message,
    Refuse,
    RowReader,
    short,
)

MAX_BYTES = 2**25  # of an encoded image
MARKER = "<image>"  # stands for the next image of the row in texts, as in LLaVA's data
_KINDS = ("image", "image_url")
_SOURCES = ("image", "image_url", "url", "path", "base64", "bytes")


@dataclasses.dataclass(frozen=True)
class ImageConversation:
    """One training example: a conversation and its images.

    Attributes:
        conversation: Messages; the content of one with images is a list of parts.
        images: The images, in the order of their parts.
        role: The role of the column that holds them, for messages of errors.
    """

    conversation: Conversation
    images: list[Media]
    role: str


class ImageRowReader(RowReader):
    """Converts rows of one data set to conversations with images."""

    def __init__(
        self,
        columns: Mapping[str, str],
        features: Features,
        system: str = "",
        prompt: str = "",
        reserved: Sequence[str] = (),
        allow_urls: bool = False,
    ) -> None:
        """Bind the reader to a data set.

        Args:
            columns: The column of each role.
            features: The data set's features.
            system: System message for conversations without one; "" for none.
            prompt: The user's message where the data has no column of prompts.
            reserved: Tokens that stand for images, which no text may hold.
            allow_urls: Fetch images from web addresses.
        """
        super().__init__(columns, features, system)
        self.prompt, self.reserved, self.allow_urls = prompt, tuple(reserved), allow_urls

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = super().values(row)
        if "messages" not in values and "prompt" not in values:
            values["prompt"] = self.prompt
        return values

    def content(self, role: str, value: Any, refuse: Refuse) -> Any:
        if role != "user" or not isinstance(value, list):
            return super().content(role, value, refuse)
        parts = [self._part(part, refuse) for part in value]
        if any(part["type"] == "image" for part in parts):
            return parts
        return "".join(part["text"] for part in parts)

    def read_with_images(self, number: int, row: Mapping[str, Any]) -> ImageConversation:
        """Convert one row.

        Args:
            number: Its number, for messages of errors.
            row: Its values by column.

        Raises:
            DataError: A field is invalid, or an image is missing; names the row and the column.
        """
        conversation = self.read(number, row)
        given = self.values(row).get("image")
        listed = given if isinstance(given, list) else [given] * (given is not None)
        role = "image" if listed or "messages" not in self.columns else "messages"
        messages = self._placed(number, conversation.messages, listed)
        folder = row[self.columns["media_folder"]] if "media_folder" in self.columns else ""
        sources = _take_sources(messages)
        if not sources:
            self.refuse(number, role, "no image; rows without one are for task instruction")
        images = []
        for index, source in enumerate(sources):
            try:
                images.append(media_of(source, folder, MAX_BYTES, self.allow_urls))
            except ValueError as error:
                self.refuse(number, role, f"image {index}: {error}")
        self._check_texts(number, messages)
        conversation = dataclasses.replace(conversation, messages=messages)
        if count_images(messages[conversation.assistant_turns[-1] :]):
            self.refuse(number, role, "an image behind the last turn of the assistant")
        return ImageConversation(conversation, images, role)

    def _part(self, part: Any, refuse: Refuse) -> dict[str, Any]:
        """A part {type: text, text} or {type: image, image}; the image may be in a column."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _KINDS:
            return {"type": "text", "text": super().content("user", [part], refuse)}
        given = {k: v for k, v in part.items() if v is not None and k != "type"}
        if len(given) > 1 or not set(given) <= set(_SOURCES):
            refuse(
                f"a part of the content is {short(part)}; {{type: image, image}} with a path, "
                "bytes or a data: URL is wanted"
            )
        source = next(iter(given.values()), None)
        if isinstance(source, Mapping) and set(source) >= {"url"}:
            more = set(source) - {"url", "detail"}
            if more or source.get("detail") not in (None, "auto"):
                refuse(f"image_url is {short(source)}; {{url}} is wanted")
            source = source["url"]
        if "base64" in given:
            source = f"data:;base64,{source}"
        return {"type": "image"} if source is None else {"type": "image", "image": source}

    def _placed(self, number: int, messages: Sequence[Message], images: list[Any]) -> list[Message]:
        """The messages with the images of the row's column at their places."""
        if images:
            messages = [
                message | {"content": _split_markers(message["content"])}
                if message["role"] == "user"
                else message
                for message in messages
            ]
        open_parts = [part for part in _image_parts(messages) if "image" not in part]
        if images and not count_images(messages):
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                self.refuse(number, "image", "no message of the user that could hold the image")
            open_parts = [{"type": "image"} for _ in images]
            first["content"] = [*open_parts, *first["content"]]
        if len(open_parts) != len(images):
            self.refuse(
                number,
                "image",
                f"{len(images)} images, but the messages have {len(open_parts)} places for them",
            )
        for part, image in zip(open_parts, images, strict=True):
            part["image"] = image
        return list(messages)

    def _check_texts(self, number: int, messages: Sequence[Message]) -> None:
        """Refuse texts that hold a token that stands for an image."""
        for index, message in enumerate(messages):
            content = message["content"]
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text", "") for part in parts]
            texts.append(message.get("reasoning_content", ""))
            token = next((t for t in self.reserved if any(t in text for text in texts)), None)
            if token is not None:
                role = "messages" if "messages" in self.columns else "prompt"
                self.refuse(
                    number,
                    role,
                    f"message {index}: its text holds {token!r}, which stands for an image",
                )


def count_images(messages: Sequence[Message]) -> int:
    """The number of images in messages."""
    return sum(1 for _ in _image_parts(messages))


def _image_parts(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if isinstance(message["content"], list):
            yield from (part for part in message["content"] if part["type"] == "image")


def _take_sources(messages: Sequence[Message]) -> list[Any]:
    """The sources of all images; the parts become the placeholders that templates know."""
    return [part.pop("image", None) for part in _image_parts(messages)]


def _split_markers(content: Any) -> list[dict[str, Any]]:
    """A user's content as parts, with an image at each "<image>"."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    out: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            out.append(part)
            continue
        for index, text in enumerate(part["text"].split(MARKER)):
            if index:
                out.append({"type": "image"})
            if text:
                out.append({"type": "text", "text": text})
    return out
