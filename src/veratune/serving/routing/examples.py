"""From conversations and files of examples to the texts that routing embeds."""

import json
from collections.abc import Mapping, Sequence

from veratune.errors import DataError

MAX_MESSAGES = 4  # of a conversation, that may decide


def user_texts(messages: Sequence[Mapping[str, object]]) -> list[str]:
    """The texts of a conversation that tell which adapter it is for.

    They are what the user wrote. The assistant's words and tools' results come from an adapter
    already, and the system message belongs to an adapter.

    Args:
        messages: Each with "role" and "content": a text, or a list of parts with "text".

    Returns:
        The newest 4 of the user's messages that have a text, newest first.
    """
    texts = [_content(m.get("content")) for m in messages if m.get("role") == "user"]
    return [text for text in reversed(texts) if text.strip()][:MAX_MESSAGES]


def parse_examples(data: bytes) -> list[str]:
    """Read example inputs.

    Args:
        data: A JSON list of examples, or one example a line. An example is a text, an object with
            "prompt" (a text or a conversation), or one with "messages". The last text of the user
            in a conversation counts.

    Returns:
        The text of each example.

    Raises:
        DataError: Names the first example that has no text.
    """
    texts = []
    for number, entry in enumerate(_entries(data), 1):
        text = _example_text(entry)
        if not text.strip():
            raise DataError(
                f"example {number} has no text; a text, an object with prompt, or one with "
                "messages of the user is wanted"
            )
        texts.append(text)
    return texts


def training_texts(data: bytes) -> list[str]:
    """The texts of the rows of a training file, one JSON object a line; rows without are left out.

    Args:
        data: Rows as `parse_examples` reads them.
    """
    texts = [_example_text(json.loads(line)) for line in data.split(b"\n") if line.strip()]
    return [text for text in texts if text.strip()]


def _entries(data: bytes) -> list[object]:
    stripped = data.strip()
    listed = stripped.startswith(b"[")
    parts = [stripped] if listed else [line for line in stripped.split(b"\n") if line.strip()]
    try:
        entries = [json.loads(part) for part in parts]
        json.dumps(entries, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise DataError(
            "the body is no JSON in Unicode; a JSON list of examples, or one example a line is "
            "wanted"
        ) from None
    return entries[0] if listed else entries


def _example_text(entry: object) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        return ""
    prompt = entry.get("prompt", entry.get("messages"))
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return next(iter(user_texts(prompt)), "")
    return ""


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(part for part in parts if isinstance(part, str))
