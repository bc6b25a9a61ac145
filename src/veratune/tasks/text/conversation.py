"""Conversations from rows of data: every field of a row is converted, or refused by name.

| format              | columns                                                                  |
|---------------------|--------------------------------------------------------------------------|
| messages            | messages: {role, content, ...} as chat templates take them; tools; system |
| ShareGPT            | conversations: {from, value}; tools; system                              |
| Alpaca              | instruction, input, output; history; system                              |
| prompt, completion  | as text, or as messages; tools; system                                   |
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, cast

from datasets import Features, LargeList, List

from veratune.errors import DataError, near

Message = dict[str, Any]
TrainOn = Literal["all", "last", "weights"]
Refuse = Callable[[str], NoReturn]

# The role of a message by its name in the data.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# The role of a ShareGPT turn by its "from".
_SHAREGPT_ROLES = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS = {
    "system": {"name"},
    "user": {"name"},
    "assistant": {"name", "tool_calls", "weight", *_REASONING},
    "tool": {"name", "tool_call_id"},
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One training example as a chat template takes it.

    Attributes:
        messages: The messages: role, content as text, and where given name, tool_calls (arguments
            as objects), tool_call_id and reasoning_content.
        tools: The tools that the assistant may call, as JSON schemas.
        weights: The weight of each message, 0 or 1; None where the data has none.
        prompt: Number of messages that belong to the prompt and never carry the loss.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    weights: list[int | None]
    prompt: int = 0

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages behind the prompt.

        Raises:
            ValueError: There are none.
        """
        turns = [
            turn
            for turn, message in enumerate(self.messages)
            if message["role"] == "assistant" and turn >= self.prompt
        ]
        if not turns:
            raise ValueError(
                "the conversation has no turn of the assistant; there is nothing to learn"
            )
        return turns

    def trained_turns(self, train_on: TrainOn) -> list[int]:
        """Indices of the messages that carry the loss.

        Args:
            train_on: "all" assistant turns, the "last" one, or those whose weight is not 0.

        Raises:
            ValueError: There is none, or the data has weights that `train_on` does not read.
        """
        if train_on != "weights" and any(weight is not None for weight in self.weights):
            raise ValueError(
                f"messages have weights, which --train-on {train_on} does not read; use "
                "--train-on weights"
            )
        turns = self.assistant_turns
        if train_on == "last":
            return turns[-1:]
        turns = [turn for turn in turns if self.weights[turn] != 0]
        if not turns:
            raise ValueError("every turn of the assistant has weight 0; there is nothing to learn")
        return turns

    def trains_empty(self, train_on: TrainOn) -> bool:
        """Whether a message that carries the loss says nothing: no content, calls or reasoning."""
        said = ("content", "tool_calls", "reasoning_content")
        return any(
            not any(str(self.messages[turn].get(field) or "").strip() for field in said)
            for turn in self.trained_turns(train_on)
        )


class RowReader:
    """Converts rows of one data set to conversations."""

    def __init__(self, columns: Mapping[str, str], features: Features, system: str = "") -> None:
        """Bind the reader to a data set.

        Args:
            columns: The column of each role.
            features: The data set's features.
            system: System message for conversations without one; "" for none.
        """
        self.columns, self.features, self.system = dict(columns), dict(features), system

    def read(self, number: int, row: Mapping[str, Any]) -> Conversation:
        """Convert one row.

        Args:
            number: Its number, for messages of errors.
            row: Its values by column.

        Raises:
            DataError: A field is invalid or unknown; names the row, the column and the message.
        """
        values = self.values(row)
        prompt = 0
        if "messages" in values:
            messages = self._messages(number, "messages", values["messages"])
        else:
            messages, prompt = self._prompt_and_completion(number, values)
        tools = self._tools(number, values.get("tools"))
        system = self._system(number, messages, values.get("system"))
        if system:
            messages = [{"role": "system", "content": system}, *messages]
            prompt += bool(prompt)
        weights = [message.pop("weight", None) for message in messages]
        self._check_call_ids(number, messages)
        return Conversation(messages, tools, weights, prompt)

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each role in one row."""
        return {
            role: _without_absent(row[column], self.features.get(column))
            for role, column in self.columns.items()
        }

    def content(self, role: str, value: Any, refuse: Refuse) -> Any:
        """The content of a message as text: of parts, their texts joined; "" for null.

        Args:
            role: The message's role.
            value: Its content in the data.
            refuse: Raises DataError about it.
        """
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, list):
            refuse(f"content is {short(value)}; text or a list of parts is wanted")
        return "".join(_part_text(part, refuse) for part in value)

    def refuse(self, number: int, role: str, problem: str) -> NoReturn:
        """Raise DataError about one column of one row."""
        raise DataError(f"row {number}, column {self.columns.get(role, role)!r}: {problem}")

    def _messages(self, number: int, role: str, value: Any) -> list[Message]:
        if not isinstance(value, list) or not value:
            self.refuse(number, role, f"{short(value)}; a list of {{role, content}} is wanted")
        return [self._message(number, role, index, message) for index, message in enumerate(value)]

    def _message(self, number: int, role: str, index: int, value: Any) -> Message:
        """One message as chat templates take it."""

        def refuse(problem: str) -> NoReturn:
            self.refuse(number, role, f"message {index}: {problem}")

        if not isinstance(value, Mapping):
            refuse(f"{short(value)}; {{role, content}} is wanted")
        given = {key: item for key, item in value.items() if item is not None}
        if "from" in given:
            return _sharegpt_message(given, refuse)
        name = given.pop("role", None)
        content = given.pop("content", None)
        if not isinstance(name, str) or name not in _ROLES:
            known = ", ".join(_ROLES)
            refuse(f"role is {short(name)}; it must be one of {known}{near(str(name), _ROLES)}")
        speaker = _ROLES[name]
        message: Message = {"role": speaker, "content": self.content(speaker, content, refuse)}
        _add_fields(message, given, refuse)
        if not message["content"] and content is None:
            said = {"tool_calls", "reasoning_content"} & set(message)
            if not said:
                refuse(f"a message of role {name} has neither content nor tool_calls")
        return message

    def _prompt_and_completion(
        self, number: int, values: Mapping[str, Any]
    ) -> tuple[list[Message], int]:
        """The messages of a prompt and its completion, and how many belong to the prompt."""
        prompt, completion = values["prompt"], values["completion"]
        more, history = values.get("input"), values.get("history") or []
        if isinstance(prompt, list):
            for role in ("input", "history"):
                if values.get(role):
                    self.refuse(number, role, "it goes with a prompt of text, not of messages")
            messages = self._messages(number, "prompt", prompt)
        elif isinstance(prompt, str):
            if more is not None and not isinstance(more, str):
                self.refuse(number, "input", f"{short(more)}; text is wanted")
            messages = self._history(number, history)
            text = f"{prompt}\n\n{more}" if more else prompt
            messages.append({"role": "user", "content": text})
        else:
            self.refuse(number, "prompt", f"{short(prompt)}; text or messages are wanted")
        if isinstance(completion, str):
            return [*messages, {"role": "assistant", "content": completion}], len(messages)
        if not isinstance(completion, list):
            self.refuse(number, "completion", f"{short(completion)}; text or messages are wanted")
        turns = self._messages(number, "completion", completion)
        return messages + turns, len(messages)

    def _history(self, number: int, history: Any) -> list[Message]:
        """Alpaca's earlier turns: pairs of an instruction and its response."""
        messages: list[Message] = []
        for pair in history if isinstance(history, list) else [history]:
            texts = isinstance(pair, list) and all(isinstance(text, str) for text in pair)
            if not texts or len(pair) != 2:
                self.refuse(
                    number,
                    "history",
                    f"{short(pair)}; a pair of instruction and response is wanted",
                )
            messages.append({"role": "user", "content": pair[0]})
            messages.append({"role": "assistant", "content": pair[1]})
        return messages

    def _system(self, number: int, messages: list[Message], system: Any) -> str:
        """The system message to put before the messages: the row's, or else the task's."""
        if system is not None and not isinstance(system, str):
            self.refuse(number, "system", f"{short(system)}; text is wanted")
        if messages[0]["role"] == "system":
            if system and system != messages[0]["content"]:
                self.refuse(number, "system", "the messages begin with another system message")
            return ""
        return system or self.system

    def _tools(self, number: int, value: Any) -> list[dict[str, Any]]:
        """The row's tools as JSON schemas, from a list or its JSON text."""

        def refuse(problem: str) -> NoReturn:
            self.refuse(number, "tools", problem)

        if value is None or value == "":
            return []
        entries = _from_json(value, refuse) if isinstance(value, str) else value
        if not isinstance(entries, list):
            refuse(f"{short(entries)}; a list of tools is wanted")
        tools = []
        for entry in entries:
            tool = _from_json(entry, refuse) if isinstance(entry, str) else entry
            if not isinstance(tool, Mapping):
                refuse(f"{short(tool)}; a JSON schema of a function is wanted")
            if "function" not in tool:
                tool = {"type": "function", "function": dict(tool)}
            function = tool["function"]
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                refuse(f"{short(tool)}; a function with a name is wanted")
            tools.append(dict(tool))
        return tools

    def _check_call_ids(self, number: int, messages: Sequence[Message]) -> None:
        """Refuse a tool result for a call that was not made."""
        ids: set[str] = set()
        for index, message in enumerate(messages):
            ids |= {call["id"] for call in message.get("tool_calls", ()) if "id" in call}
            wanted = message.get("tool_call_id")
            if wanted is not None and wanted not in ids:
                self.refuse(
                    number,
                    "messages",
                    f"message {index}: tool_call_id is {wanted!r}, the id of no earlier call",
                )


def _sharegpt_message(given: dict[str, Any], refuse: Refuse) -> Message:
    """A turn {from, value} as a message."""
    name, value = given.pop("from"), given.pop("value", None)
    if name not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        hint = near(str(name), _SHAREGPT_ROLES)
        refuse(f"from is {short(name)}; it must be one of {known}{hint}")
    if not isinstance(value, str):
        refuse(f"value is {short(value)}; text is wanted")
    if name == "function_call":
        called = _from_json(value, lambda problem: refuse(f"function_call: {problem}"))
        calls = called if isinstance(called, list) else [called]
        message: Message = {"role": "assistant", "content": ""}
        message["tool_calls"] = [_tool_call(call, refuse) for call in calls]
    else:
        message = {"role": _SHAREGPT_ROLES[name], "content": value}
    _add_fields(message, given, refuse)
    return message


def _add_fields(message: Message, given: dict[str, Any], refuse: Refuse) -> None:
    """Check the fields beside role and content, and add them to the message."""
    role = message["role"]
    for key, value in given.items():
        if key not in _FIELDS[role]:
            fields = ", ".join(sorted(_FIELDS[role]))
            refuse(
                f"a message of role {role} has the field {key!r}, which is not read (beside "
                f"content, it may have {fields}); remove it"
            )
        if key == "tool_calls":
            if not isinstance(value, list):
                refuse(f"tool_calls is {short(value)}; a list is wanted")
            if value:
                message[key] = [_tool_call(call, refuse) for call in value]
        elif key == "weight":
            if value not in (0, 1):
                refuse(f"weight is {short(value)}; it must be 0 or 1")
            message[key] = int(value)
        elif not isinstance(value, str):
            refuse(f"{key} is {short(value)}; text is wanted")
        elif key in _REASONING:
            if message.setdefault("reasoning_content", value) != value:
                refuse("two different fields of reasoning")
        else:
            message[key] = value


def _tool_call(call: Any, refuse: Refuse) -> dict[str, Any]:
    """A tool call with its arguments as an object."""
    if not isinstance(call, Mapping):
        refuse(f"a tool call is {short(call)}; {{name, arguments}} is wanted")
    given = {key: value for key, value in call.items() if value is not None}
    function = given.pop("function", None)
    if function is None:
        function = {key: given.pop(key) for key in ("name", "arguments") if key in given}
    kind = given.pop("type", "function")
    made: dict[str, Any] = {"type": "function"}
    if isinstance(given.get("id"), str):
        made["id"] = given.pop("id")
    if not isinstance(function, Mapping) or kind != "function" or given:
        refuse(f"a tool call is {short(call)}; {{id, type: function, function}} is wanted")
    unknown = sorted(set(function) - {"name", "arguments"})
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or unknown:
        refuse(f"a tool call's function is {short(function)}; {{name, arguments}} is wanted")
    if isinstance(arguments, str):
        arguments = _from_json(
            arguments, lambda problem: refuse(f"the arguments of the call of {name!r}: {problem}")
        )
    if not isinstance(arguments, Mapping):
        refuse(
            f"the arguments of the call of {name!r} are {short(arguments)}; a JSON object is wanted"
        )
    return made | {"function": {"name": name, "arguments": dict(arguments)}}


def _part_text(part: Any, refuse: Refuse) -> str:
    """The text of a part {type: text, text}."""
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    if given.get("type") != "text" or not isinstance(given.get("text"), str) or len(given) != 2:
        refuse(
            f"a part of the content is {short(part)}; this task reads parts {{type: text, text}} "
            "only"
        )
    return str(given["text"])


def _from_json(text: str, refuse: Refuse) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(f"{short(text)} is no JSON: {error}")


def _without_absent(value: Any, feature: Any) -> Any:
    """A value without the nulls that Arrow puts where a struct of another row has a field."""
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {
            key: _without_absent(item, feature.get(key))
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        inner = cast(Any, feature).feature
        return [_without_absent(item, inner) for item in value]
    return value


def short(value: Any) -> str:
    """A value as Python writes it, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
