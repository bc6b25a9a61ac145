"""ToolReader: content and tool calls of the choices of one call."""

import dataclasses
from collections.abc import Callable

from veratune.serving.engine.requests import OutputDelta
from veratune.serving.http.tools import ToolOutput, ToolParser


class ToolReader:
    """Parses the deltas of every choice as they come."""

    def __init__(self, make_parser: Callable[[], ToolParser] | None, parallel: bool = True) -> None:
        """Begin a call.

        Args:
            make_parser: Makes a parser for each choice; None for a call without tools.
            parallel: Whether a choice may have more than one tool call.
        """
        self._make_parser, self._parallel = make_parser, parallel
        self._parsers: dict[int, ToolParser] = {}
        self.calls: dict[int, int] = {}  # so far, by choice

    def read(self, index: int, delta: OutputDelta) -> tuple[ToolOutput, str | None]:
        """Return the content and the calls of a delta, and its finish reason."""
        if self._make_parser is None:
            return ToolOutput(delta.text), delta.finish_reason
        if index not in self._parsers:
            self._parsers[index] = self._make_parser()
        output = self._parsers[index].feed(delta.text)
        if delta.finish_reason is not None:
            end = self._parsers[index].finish()
            output = ToolOutput(output.content + end.content, output.calls + end.calls)
        before = self.calls.get(index, 0)
        if not self._parallel:
            output = dataclasses.replace(output, calls=output.calls[: max(0, 1 - before)])
        self.calls[index] = before + len(output.calls)
        if delta.finish_reason == "stop" and self.calls[index]:
            return output, "tool_calls"
        return output, delta.finish_reason
