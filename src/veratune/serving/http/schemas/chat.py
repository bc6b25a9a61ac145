"""Messages and tools of a conversation."""

from typing import Any, Literal

from pydantic import Field, model_validator

from veratune.serving.http.schemas.base import ApiBody

MAX_TOOLS = 128
NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


class TextPart(ApiBody):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(ApiBody):
    """The function of a tool call, as the assistant made it."""

    name: str
    arguments: str = "{}"


class MessageToolCall(ApiBody):
    """A tool call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(ApiBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[MessageToolCall] = []
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: a text is wanted; only tool_calls may stand without one")
        return self

    @property
    def text(self) -> str:
        """The whole content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @property
    def characters(self) -> int:
        """The size of the content and the tool calls."""
        return len(self.text) + sum(len(call.function.arguments) for call in self.tool_calls)


class Function(ApiBody):
    """A tool that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] = NO_PARAMETERS
    strict: bool = False


class Tool(ApiBody):
    """An entry of tools."""

    type: Literal["function"]
    function: Function


class NamedFunction(ApiBody):
    """The function of a named tool_choice."""

    name: str


class NamedToolChoice(ApiBody):
    """A tool_choice that names the tool to call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(ApiBody):
    """The tools of an allowed_tools choice."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolChoice(ApiBody):
    """A tool_choice that allows some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice
