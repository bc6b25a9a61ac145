"""Bodies of /tokenize and /detokenize."""

from typing import Any

from pydantic import Field

from veratune.serving.http.schemas.base import ApiBody
from veratune.serving.http.schemas.chat import MAX_TOOLS, Message, Tool


class TokenizeBody(ApiBody):
    """POST /tokenize."""

    model: str
    prompt: str | None = None
    messages: list[Message] = []
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=32)


class DetokenizeBody(ApiBody):
    """POST /detokenize."""

    model: str
    tokens: list[int] = Field(max_length=2**20)
