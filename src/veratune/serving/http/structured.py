"""Structured output: from the fields of a body to the grammar of its completions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from openai.types.shared import ResponseFormatJSONObject, ResponseFormatJSONSchema

from veratune.errors import VeratuneError
from veratune.serving.engine.grammar import JSON_STYLE, Grammar, GrammarCompiler, GrammarKind
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.chat import Tool
from veratune.serving.http.schemas.generation import (
    GenerationBody,
    OutputFormat,
    StructuredOutputs,
)
from veratune.serving.http.tools import CALL_FORMATS, Family


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a completion must match.

    Attributes:
        kind: What `source` is.
        source: A JSON schema, a regular expression, choices, or a Lark grammar.
        param: The field that asks for it.
    """

    kind: GrammarKind
    source: str | list[str]
    param: str

    @property
    def schema(self) -> str | None:
        """Its JSON schema; None for a constraint that is none."""
        if self.kind == "json_object":
            return '{"type": "object"}'
        return self.source if self.kind == "json_schema" and isinstance(self.source, str) else None


def constraint_of(body: GenerationBody) -> Constraint | None:
    """The constraint that a body asks for. Raises ApiError for several, or a broken one."""
    found = [
        of_format(body.response_format, "response_format"),
        _of_structured(body.structured_outputs),
        schema_constraint("guided_json", body.guided_json),
        _given("regex", body.guided_regex, "guided_regex"),
        _given("choice", body.guided_choice, "guided_choice"),
        _given("lark", body.guided_grammar, "guided_grammar"),
    ]
    given = [constraint for constraint in found if constraint is not None]
    if len(given) > 1:
        raise ApiError(
            400,
            f"{given[0].param} and {given[1].param} both constrain the completion; give one",
            param=given[1].param,
        )
    return given[0] if given else None


def of_format(output: OutputFormat | None, param: str) -> Constraint | None:
    """The constraint of a response_format. Raises ApiError for one without a schema."""
    if isinstance(output, ResponseFormatJSONObject):
        return Constraint("json_object", "", param)
    if isinstance(output, ResponseFormatJSONSchema):
        schema = output.json_schema.schema_
        if schema is None:
            raise ApiError(400, f"{param}: json_schema has no schema", param=param)
        return schema_constraint(param, schema)
    return None


def schema_constraint(param: str, schema: str | dict[str, Any] | None) -> Constraint | None:
    """The constraint of a JSON schema, as text or as an object."""
    if schema is None:
        return None
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Constraint("json_schema", text, param)


def compile_constraint(compiler: GrammarCompiler, constraint: Constraint) -> Grammar:
    """Compile a constraint; call it in a thread.

    Args:
        compiler: Of the model's tokenizer.
        constraint: What completions must match.

    Raises:
        ApiError: The grammar is wrong, too large, or too complex.
    """
    try:
        grammar = compiler.compile(constraint.kind, constraint.source)
        grammar.matcher()
    except VeratuneError as error:
        raise ApiError(
            400, f"{constraint.param}: {error}", code="invalid_grammar", param=constraint.param
        ) from error
    return grammar


def tool_constraint(
    family: Family, tools: Sequence[Tool], most: int, other: Constraint | None = None
) -> Constraint:
    """Completions that are calls of tools, with arguments that match the tools' schemas.

    Args:
        family: How the model writes calls.
        tools: The tools that may be called.
        most: The most calls.
        other: What a completion without calls must match; None where a call is required.

    Raises:
        ApiError: A tool's parameters are no object, or `other` is no JSON.
    """
    style = CALL_FORMATS[family]
    names = " | ".join(f"call_{i}" for i in range(len(tools)))
    more = f" ({json.dumps(style.separator)} call){{0,{most - 1}}}" if most > 1 else ""
    calls = "call" + more
    start = f"{_literal(style.opening)} {calls} {_literal(style.closing)}".strip()
    rules = [f"calls: {start}", f"call: {names}"]
    for i, tool in enumerate(tools):
        begin, end = style.around(tool.function.name)
        rules.append(f"call_{i}: {_literal(begin)} arguments_{i} {_literal(end)}")
        rules.append(f"arguments_{i}: %json {_styled(_parameters(tool))}")
    if other is None:
        return Constraint("lark", "\n".join(["start: calls", *rules]), "tools")
    if other.schema is None:
        raise ApiError(
            400,
            f"{other.param}: only JSON may be combined with tools; leave one of them out",
            param=other.param,
        )
    schema = json.loads(other.schema)
    rules.append(f"content: %json {_styled(schema)}")
    return Constraint("lark", "\n".join(["start: calls | content", *rules]), other.param)


def _parameters(tool: Tool) -> dict[str, Any]:
    parameters = {"type": "object", **tool.function.parameters}
    if parameters["type"] != "object":
        raise ApiError(
            400,
            f"tools: the parameters of {tool.function.name!r} are of type "
            f"{parameters['type']!r}; an object is wanted",
            param="tools",
        )
    return parameters


def _styled(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": JSON_STYLE})


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def _given(kind: GrammarKind, source: str | list[str] | None, param: str) -> Constraint | None:
    return None if source is None else Constraint(kind, source, param)


def _of_structured(given: StructuredOutputs | None) -> Constraint | None:
    if given is None:
        return None
    param = "structured_outputs"
    found = [
        schema_constraint(param, given.json_),
        _given("regex", given.regex, param),
        _given("choice", given.choice, param),
        _given("lark", given.grammar, param),
        Constraint("json_object", "", param) if given.json_object else None,
    ]
    chosen = [constraint for constraint in found if constraint is not None]
    if len(chosen) != 1:
        raise ApiError(
            400,
            f"{param}: {len(chosen)} of json, regex, choice, grammar and json_object are given; "
            "one is wanted",
            param=param,
        )
    return chosen[0]
