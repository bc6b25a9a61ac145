"""Tools for chat templates without tools: described in the system message, in Hermes' tags."""

import json
from collections.abc import Sequence
from typing import Any

Conversation = list[dict[str, Any]]
_INTRODUCTION = """You may call tools. They are, one JSON object a line:
<tools>
{tools}
</tools>
To call a tool, write its name and arguments as JSON between tags:
<tool_call>
{{"name": "TOOL", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>"""


def plain_conversation(conversation: Conversation, tools: Sequence[dict[str, Any]]) -> Conversation:
    """Write tools, calls and results as text.

    Args:
        conversation: Messages in the OpenAI API's shape, with arguments as objects.
        tools: Tools in the OpenAI API's shape.

    Returns:
        Messages that have a role and a content only.
    """
    plain: Conversation = []
    for message in conversation:
        role, content = message["role"], message["content"] or ""
        calls = [call["function"] for call in message.get("tool_calls", ())]
        if role == "tool":
            content, role = f"<tool_response>\n{content}\n</tool_response>", "user"
        written = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
        content = "\n".join([*([content] if content or not written else []), *written])
        if plain and message["role"] == "tool" and plain[-1]["role"] == "user":
            plain[-1]["content"] += "\n" + content
        else:
            plain.append({"role": role, "content": content})
    if tools:
        listed = "\n".join(json.dumps(tool["function"]) for tool in tools)
        text = _INTRODUCTION.format(tools=listed)
        if plain[0]["role"] == "system":
            plain[0]["content"] += "\n\n" + text
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain
