"""From request bodies to token ids: bounds on the size first, then the chat template and the
tokenizer in a thread.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from veratune.serving.engine.engine import Engine
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.chat import Message, Tool
from veratune.serving.http.tool_prompt import plain_conversation
from veratune.serving.http.tools import family_of
from veratune.tasks.text.chat_template import PLAIN_TEMPLATE


@dataclasses.dataclass
class PromptEncoder:
    """Turns conversations and texts into token ids for one engine."""

    engine: Engine

    def check_size(self, characters: int, param: str) -> None:
        """Raise ApiError for a text that cannot fit, before any work is done on it."""
        if characters > self.engine.max_characters:
            raise ApiError(
                400,
                f"{param}: {characters} characters cannot fit into the "
                f"{self.engine.max_model_len} tokens of this model; shorten it",
                code="context_length_exceeded",
                param=param,
            )

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins.

        Args:
            messages: The conversation.
            tools: What the model may call.
            template_kwargs: Variables of the chat template.
            add_generation_prompt: Whether the assistant's message begins.

        Raises:
            ApiError: The chat template refuses the messages.
        """
        conversation = [_template_message(message) for message in messages]
        tokenizer = self.engine.tokenizer
        listed: list[Any] = [tool.model_dump(exclude_none=True) for tool in tools]
        if family_of(tokenizer.chat_template) is None:
            conversation, listed = plain_conversation(conversation, listed), []
        kwargs = _checked_kwargs(tokenizer, template_kwargs or {})
        try:
            text = tokenizer.apply_chat_template(
                conversation,  # type: ignore[arg-type]  # messages may hold lists and None
                tools=listed or None,
                chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ApiError(
                400,
                f"messages: the model's chat template refuses them: {reason}",
                param="messages",
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        encoded = self.engine.tokenizer(text, add_special_tokens=add_special_tokens)
        return list(encoded["input_ids"])

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises ApiError for ids that the tokenizer does not have."""
        size = len(self.engine.tokenizer)
        if any(not 0 <= token < size for token in tokens):
            raise ApiError(
                400, f"tokens: an id is outside 0 to {size - 1}, the vocabulary", param="tokens"
            )
        return str(
            self.engine.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        )


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Messages with a system message before them, unless they begin with one of their own."""
    if not system or (messages and messages[0].role in ("system", "developer")):
        return list(messages)
    return [Message(role="system", content=system), *messages]


def _checked_kwargs(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Raise ApiError for variables that are arguments of the tokenizer itself."""
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in kwargs:
        if name in taken or name in ("messages", "tokenizer_kwargs"):
            raise ApiError(
                400,
                f"chat_template_kwargs: {name!r} is no variable of a template",
                param="chat_template_kwargs",
            )
    return dict(kwargs)


def _template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates read it: arguments of calls are objects, not JSON text."""
    # Templates know "system", which "developer" was called before.
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    calls: list[dict[str, object]] = []
    for call in message.tool_calls:
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            raise ApiError(
                400,
                f"messages: the arguments of the call of {call.function.name!r} are no JSON",
                param="messages",
            ) from None
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    if calls:
        found["tool_calls"] = calls
    return found
