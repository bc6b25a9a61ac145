"""From a conversation with tools and a constraint to a prompt, a grammar and a reader of calls.

Chat completions and the Responses API share it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from veratune.serving.engine.grammar import Grammar
from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError
from veratune.serving.http.prompts import with_system
from veratune.serving.http.requests import grammar_for
from veratune.serving.http.schemas.chat import (
    AllowedToolChoice,
    Message,
    NamedToolChoice,
    Tool,
    ToolChoice,
)
from veratune.serving.http.structured import Constraint, tool_constraint
from veratune.serving.http.tool_reader import ToolReader
from veratune.serving.http.tools import family_of, make_parser
from veratune.serving.keys import Caller
from veratune.serving.targets import Target

MAX_CALLS = 8  # of a constrained completion; small models would call for ever
_DEFAULT_TOKENS = 256  # of a chat completion without max_tokens


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What a client asks of a conversation."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    constraint: Constraint | None = None
    max_tokens: int | None = None
    template_kwargs: Mapping[str, object] | None = None


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """What the engine and the response's builder need."""

    prompt: list[int]
    max_tokens: int
    grammar: Grammar | None
    tools: ToolReader | None


async def prepare_chat(
    context: Context, caller: Caller, target: Target, settings: ChatSettings
) -> PreparedChat:
    """Tokenize a conversation and compile its grammar.

    Args:
        context: The application's context.
        caller: Who calls.
        target: The model; its system message begins a conversation without one.
        settings: What the client asks.

    Raises:
        ApiError: Names the field that cannot be honoured.
    """
    engine, encoder = context.service.require_engine(), context.prompt_encoder()
    shown, callable_, required = _choose(settings)
    family = family_of(engine.tokenizer.chat_template) or "hermes"
    constraint = settings.constraint
    if required and constraint is not None:
        raise ApiError(
            400,
            f"{constraint.param}: a tool must be called, so the completion cannot match it too; "
            "leave it out, or set tool_choice to auto",
            param=constraint.param,
        )
    if callable_ and (required or constraint is not None):
        named = isinstance(settings.tool_choice, NamedToolChoice)
        most = MAX_CALLS if settings.parallel_tool_calls and not named else 1
        constraint = tool_constraint(family, callable_, most, constraint)
    schemas = sum(len(tool.model_dump_json()) for tool in shown)
    messages = with_system(settings.messages, target.system)
    encoder.check_size(sum(m.characters for m in messages) + schemas, "messages")
    grammar = await grammar_for(context, caller, constraint)
    prompt = await context.pools.tokenize.run(
        encoder.encode_chat, messages, shown, settings.template_kwargs
    )
    room = max(1, min(_DEFAULT_TOKENS, engine.max_model_len - len(prompt)))
    reader = None
    if callable_:
        names = [tool.function.name for tool in callable_]
        parser = functools.partial(make_parser, family, names)
        reader = ToolReader(parser, settings.parallel_tool_calls)
    return PreparedChat(prompt, settings.max_tokens or room, grammar, reader)


def _choose(settings: ChatSettings) -> tuple[Sequence[Tool], Sequence[Tool], bool]:
    """The tools that the prompt shows, those that may be called, and whether one must be."""
    tools, choice = settings.tools, settings.tool_choice
    if choice == "none" or (choice == "auto" and not tools):
        return (), (), False
    if not tools:
        raise ApiError(
            400, "tool_choice: there are no tools to call; give tools", param="tool_choice"
        )
    if isinstance(choice, NamedToolChoice):
        return tools, _named(tools, [choice.function.name]), True
    if isinstance(choice, AllowedToolChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return tools, _named(tools, names), choice.allowed_tools.mode == "required"
    return tools, tools, choice == "required"


def _named(tools: Sequence[Tool], names: Sequence[str]) -> list[Tool]:
    known = {tool.function.name for tool in tools}
    for name in names:
        if name not in known:
            raise ApiError(
                400,
                f"tool_choice: {name[:100]!r} is none of the tools",
                param="tool_choice",
            )
    return [tool for tool in tools if tool.function.name in names]
