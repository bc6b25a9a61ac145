"""Tool calls: from a model's text to calls, whole or as a stream, for the formats of three
families.

    Hermes, Qwen     <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them
    Mistral          [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    Llama 3 (JSON)   {"name": ..., "parameters": {...}}; {...}

A call streams as one delta once its JSON is complete. Text that only looks like a call (no JSON, or
a tool that the client did not offer) stays content.
"""

import abc
import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Literal

Family = Literal["hermes", "mistral", "llama3_json"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL, _PYTHON_TAG = "[TOOL_CALLS]", "<|python_tag|>"


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How a family writes calls.

    Attributes:
        begin: Before a call's object.
        end: After it.
        arguments: The key of the arguments.
        separator: Between calls.
        opening: Before the first call.
        closing: After the last call.
    """

    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    separator: str = ""
    opening: str = ""
    closing: str = ""

    def around(self, name: str) -> tuple[str, str]:
        """The text before and after the arguments of a call."""
        begin = f'{self.begin}{{"name": {json.dumps(name)}, "{self.arguments}": '
        return begin, "}" + self.end


CALL_FORMATS: dict[Family, CallFormat] = {
    "hermes": CallFormat(f"{_OPEN}\n", f"\n{_CLOSE}", separator="\n"),
    "mistral": CallFormat(separator=", ", opening="[", closing="]"),
    "llama3_json": CallFormat(arguments="parameters", separator="; "),
}


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: The tool.
        arguments: Its arguments as a JSON object.
        id: The call's id.
    """

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclasses.dataclass(frozen=True)
class ToolOutput:
    """Parse new text: return its content and the tool calls that it completed."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


def family_of(chat_template: str | None) -> Family | None:
    """The format that a chat template teaches; None for a template without tools."""
    template = chat_template or ""
    if "tools" not in template:
        return None
    if _OPEN in template:
        return "hermes"
    if _MISTRAL in template:
        return "mistral"
    if _PYTHON_TAG in template or '"parameters"' in template:
        return "llama3_json"
    return None


class ToolParser(abc.ABC):
    """Parses one completion, as it comes."""

    def __init__(self, names: Sequence[str]) -> None:
        """Begin a completion.

        Args:
            names: The tools that the client offers.
        """
        self.names = frozenset(names)

    @abc.abstractmethod
    def feed(self, text: str) -> ToolOutput:
        """Take new text."""

    @abc.abstractmethod
    def finish(self) -> ToolOutput:
        """Take the end of the completion."""

    def calls_in(self, text: str) -> tuple[ToolCall, ...]:
        """The calls that a text of JSON consists of; () if it is anything else."""
        found = [self._call(value) for value in _json_values(text)]
        calls = [call for call in found if call is not None]
        return tuple(calls) if len(calls) == len(found) else ()

    def _call(self, value: object) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


class HermesParser(ToolParser):
    """Calls between tags, with content around them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._text, self._inside = "", False

    def feed(self, text: str) -> ToolOutput:
        self._text += text
        content = ""
        calls: list[ToolCall] = []
        while True:
            if not self._inside:
                before, tag, rest = self._text.partition(_OPEN)
                if not tag:
                    kept = _overlap(self._text, _OPEN)
                    content += self._text[: len(self._text) - kept]
                    self._text = self._text[len(self._text) - kept :]
                    break
                content += before.rstrip("\n") if not before.strip() else before
                self._text, self._inside = rest, True
            body, tag, rest = self._text.partition(_CLOSE)
            if not tag:
                break
            found = self.calls_in(body)
            calls += found
            content += "" if found else _OPEN + body + _CLOSE
            self._text, self._inside = rest.lstrip("\n"), False
        return ToolOutput(content, tuple(calls))

    def finish(self) -> ToolOutput:
        if not self._inside:
            return ToolOutput(self._text)
        calls = self.calls_in(self._text)  # a model may end without the closing tag
        return ToolOutput("", calls) if calls else ToolOutput(_OPEN + self._text)


class JsonParser(ToolParser):
    """The whole completion is calls as JSON, or it is content: Mistral and Llama 3."""

    def __init__(self, names: Sequence[str], marker: str) -> None:
        """Begin a completion.

        Args:
            names: The tools that the client offers.
            marker: May stand before the JSON.
        """
        super().__init__(names)
        self.marker = marker
        self._text, self._content = "", False

    def feed(self, text: str) -> ToolOutput:
        if self._content:
            return ToolOutput(text)
        self._text += text
        start = self._text.lstrip()
        undecided = not start or self.marker.startswith(start[: len(self.marker)])
        if undecided or start.startswith(("{", "[")):
            return ToolOutput()
        self._content = True
        return ToolOutput(self._text)

    def finish(self) -> ToolOutput:
        if self._content:
            return ToolOutput()
        calls = self.calls_in(self._text.strip().removeprefix(self.marker))
        return ToolOutput("", calls) if calls else ToolOutput(self._text)


def make_parser(family: Family, names: Sequence[str]) -> ToolParser:
    """A parser for one completion.

    Args:
        family: The format that the chat template teaches.
        names: The tools that the client offers.
    """
    if family == "hermes":
        return HermesParser(names)
    return JsonParser(names, _MISTRAL if family == "mistral" else _PYTHON_TAG)


def _json_values(text: str) -> list[object]:
    """The JSON values in a text, separated by ";" or white space; lists are opened. [] for
    others.
    """
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        if text[at] in "; \n\r\t,":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
    return values


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-size:]):
            return size
    return 0
