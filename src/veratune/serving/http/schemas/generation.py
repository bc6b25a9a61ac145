"""Bodies of chat completions and completions: the OpenAI API and vLLM's additions to it."""

from typing import Annotated, Any, Literal

from openai.types.shared import (
    ResponseFormatJSONObject,
    ResponseFormatJSONSchema,
    ResponseFormatText,
)
from pydantic import Field, model_validator

from veratune.serving.http.schemas.base import ApiBody
from veratune.serving.http.schemas.chat import MAX_TOOLS, Message, Tool, ToolChoice

OutputFormat = Annotated[
    ResponseFormatText | ResponseFormatJSONObject | ResponseFormatJSONSchema,
    Field(discriminator="type"),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(ApiBody):
    """Options of a streamed response."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(ApiBody):
    """Constraint of a completion, as vLLM has it; one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationBody(ApiBody):
    """Fields that chat completions and completions share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31)  # -1 is vLLM's word for all
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] = Field([], max_length=64)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=2**31)
    n: int = Field(1, ge=1, le=128)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    user: str | None = None
    response_format: OutputFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=32)
    add_special_tokens: Literal[False] = False


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1)
    add_special_tokens: Literal[True] = True

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: completions are not ranked; leave it out, or n={self.n}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if single or not prompt else prompt
