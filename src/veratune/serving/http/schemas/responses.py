"""Body of POST /v1/responses."""

from typing import Annotated, Any, Literal

from openai.types.shared import ResponseFormatJSONObject, ResponseFormatText
from pydantic import Discriminator, Field, Tag

from veratune.serving.http.schemas.base import ApiBody
from veratune.serving.http.schemas.chat import MAX_TOOLS, NO_PARAMETERS
from veratune.serving.http.schemas.generation import GenerationBody


class Part(ApiBody):
    """A part of a message's content."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(ApiBody):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class FunctionCallItem(ApiBody):
    """A tool call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = "{}"


class FunctionOutputItem(ApiBody):
    """What a tool returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class ResponsesTool(ApiBody):
    """A tool that the model may call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] = NO_PARAMETERS
    strict: bool = False


class NamedTool(ApiBody):
    """A tool_choice that names the tool to call."""

    type: Literal["function"]
    name: str


class AllowedTools(ApiBody):
    """A tool_choice that allows some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class JsonSchemaFormat(ApiBody):
    """Text that matches a JSON schema."""

    type: Literal["json_schema"]
    name: str = "response"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class TextConfig(ApiBody):
    """How the text is formatted."""

    format: Annotated[
        ResponseFormatText | ResponseFormatJSONObject | JsonSchemaFormat | None,
        Field(discriminator="type"),
    ] = None


class ResponsesBody(GenerationBody):
    """POST /v1/responses."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31)
    n: Literal[1] = 1
    tools: list[ResponsesTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    include: list[str] = []
    top_logprobs: int = Field(0, ge=0, le=20)
    metadata: dict[str, str] = {}
