"""From a body of the Responses API to a conversation and its tools."""

from veratune.serving.http.schemas.chat import (
    AllowedToolChoice,
    Message,
    NamedToolChoice,
    Tool,
    ToolChoice,
)
from veratune.serving.http.schemas.responses import (
    AllowedTools,
    FunctionCallItem,
    FunctionOutputItem,
    NamedTool,
    Part,
    ResponsesBody,
)
from veratune.serving.http.structured import Constraint, constraint_of, of_format, schema_constraint


def messages_of(body: ResponsesBody) -> list[Message]:
    """The conversation: instructions first; calls belong to the assistant's message before."""
    found: list[dict[str, object]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    items = body.input
    if isinstance(items, str):
        return _checked([*found, {"role": "user", "content": items}])
    for item in items:
        if isinstance(item, FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            calls = found[-1].setdefault("tool_calls", [])
            assert isinstance(calls, list)  # made in the line before
            calls.append(call)
        elif isinstance(item, FunctionOutputItem):
            content = _text(item.output)
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        else:
            found.append({"role": item.role, "content": _text(item.content)})
    return _checked(found)


def tools_of(body: ResponsesBody) -> tuple[list[Tool], ToolChoice]:
    """The tools and the choice, in the shape of chat completions."""
    tools = [
        Tool.model_validate(
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        )
        for tool in body.tools
    ]
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return tools, NamedToolChoice.model_validate(_named(choice))
    if isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        return tools, AllowedToolChoice.model_validate(
            {"type": "allowed_tools", "allowed_tools": allowed}
        )
    return tools, choice


def format_of(body: ResponsesBody) -> Constraint | None:
    """The constraint of `text.format`, or of vLLM's fields. Raises ApiError."""
    output = body.text.format
    if output is None or output.type == "text":
        return constraint_of(body)
    if output.type == "json_schema":
        return schema_constraint("text", output.schema_)
    return of_format(output, "text")


def _named(tool: NamedTool) -> dict[str, object]:
    return {"type": "function", "function": {"name": tool.name}}


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _checked(messages: list[dict[str, object]]) -> list[Message]:
    return [Message.model_validate(message) for message in messages]
