"""Request bodies. Generation and embedding bodies follow the OpenAI API and vLLM's additions to it.

Null means not given, as OpenAI's clients have it. Bodies of the OpenAI API ignore unknown fields,
because its clients send new ones every few months; the context logs each name once. Bodies of this
server's own calls refuse them.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictBody(BaseModel):
    """A JSON body without unknown fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Drop null fields, and refuse text that cannot be encoded."""
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "half of a surrogate pair is no text; valid Unicode is wanted"
            ) from None
        except RecursionError:
            raise ValueError("too many levels") from None
        return {key: value for key, value in data.items() if value is not None}


class ApiBody(StrictBody):
    """A JSON body of the OpenAI API: unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")


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
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
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


class StreamOptions(ApiBody):
    """Options of a streamed response."""

    include_usage: bool = False


class TextFormat(ApiBody):
    """Unconstrained text."""

    type: Literal["text"]


class GenerationBody(ApiBody):
    """Fields that chat completions and completions share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31)  # -1 is vLLM's word for all
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=128)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    user: str | None = None

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


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice = "auto"
    parallel_tool_calls: bool = True


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if single or not prompt else prompt


class EmbeddingBody(ApiBody):
    """POST /v1/embeddings."""

    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs as a list."""
        given: Any = self.input
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if single else given


class ClassifyBody(ApiBody):
    """POST /v1/classify."""

    model: str
    input: str | list[str]
    pair: str | list[str] | None = None

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def pairs(self) -> list[str]:
        """The second texts as a list."""
        if self.pair is None:
            return []
        return [self.pair] if isinstance(self.pair, str) else self.pair


class LoadAdapterBody(ApiBody):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

    lora_name: str
    lora_path: str = ""
    lora_int_id: int | None = None


class RollBackBody(StrictBody):
    """POST /v1/adapters/{name}/rollback."""

    version: Annotated[int, Field(ge=1, lt=2**31)]


Auto = Literal["auto"]


class Hyperparameters(StrictBody):
    """OpenAI's hyperparameters of a job."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(StrictBody):
    """Settings of the method "supervised"."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(StrictBody):
    """How a job trains."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class VeraSettings(StrictBody):
    """Flags of `veratune train` that OpenAI's API has no word for."""

    rank: int | None = Field(default=None, ge=1, le=16384)
    targets: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        default=None, min_length=1, max_length=100
    )
    lr: float | None = Field(default=None, gt=0, le=100)
    max_length: int | None = Field(default=None, ge=2, le=32768)
    max_steps: int | None = Field(default=None, ge=1, le=10**7)
    mixed_precision: Literal["auto", "no", "bf16"] | None = None


class JobBody(StrictBody):
    """POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(default=None, max_length=128)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    vera: VeraSettings = VeraSettings()

    def settings(self, base_lr: float) -> dict[str, Any]:
        """The flags of `veratune train`.

        Args:
            base_lr: The learning rate that a multiplier of 1 stands for.
        """
        given = self.hyperparameters or (self.method or Method()).supervised.hyperparameters
        flags: dict[str, Any] = {
            "epochs": given.n_epochs,
            "batch_size": given.batch_size,
            "seed": self.seed,
        }
        if given.learning_rate_multiplier != "auto":
            flags["lr"] = base_lr * given.learning_rate_multiplier
        flags |= self.vera.model_dump(exclude_none=True)
        return {key: value for key, value in flags.items() if value not in (None, "auto")}
