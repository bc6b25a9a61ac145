"""Verifiable rewards for GRPO, under TRL's contract: completions and columns in, numbers out.

    def reward(completions, **columns) -> list[float | None]

Completions are lists of messages, or text. Each column of the data is a list with one value a
completion. `find_reward` looks a function up by its name here, or as module:function.
"""

import importlib
import inspect
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import re2

from veratune.errors import ConfigError, DataError, RewardError, near
from veratune.scoring.sandbox import run_tests

Reward = Callable[..., Sequence[float | None]]
OnError = Literal["stop", "skip"]

_FENCE = re.compile(r"```[a-zA-Z0-9_+-]*\n(.*?)```", re.S)
# Arguments that TRL passes beside the columns of the data.
_PASSED = frozenset(
    {
        "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
        "environments",
    }
)  # fmt: skip


def text_of(completion: Any) -> str:
    """A completion's text: of messages, the last one's content."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"] or "")


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 for a completion that equals the column `answer`, spaces at the ends aside; else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(c).strip() == str(a).strip()) for c, a in pairs]


def regex(completions: Sequence[Any], pattern: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion that matches the whole of the column `pattern` (RE2 syntax); else 0.

    RE2 takes time linear in the text, so no pattern and no completion makes it hang.

    Raises:
        DataError: A pattern is no RE2 expression.
    """
    scores = []
    for completion, one in zip(completions, pattern, strict=True):
        try:
            scores.append(float(re2.fullmatch(one, text_of(completion).strip()) is not None))
        except re2.error as error:
            raise DataError(f"pattern {one!r} is no RE2 expression: {error}") from None
    return scores


def json_schema(completions: Sequence[Any], schema: Sequence[Any], **_: Any) -> list[float]:
    """1 for a completion that is JSON and valid under the column `schema`; 0.2 for other JSON.

    The schema is an object or its JSON text. A fenced code block counts as its content.

    Raises:
        DataError: A schema is none.
    """
    import jsonschema

    scores = []
    for completion, one in zip(completions, schema, strict=True):
        try:
            kind = json.loads(one) if isinstance(one, str) else one
            jsonschema.Draft202012Validator.check_schema(kind)
        except (ValueError, jsonschema.SchemaError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"schema {str(one)[:60]!r} is no JSON schema: {reason}") from None
        try:
            value = json.loads(code_of(text_of(completion)))
            valid = jsonschema.Draft202012Validator(kind).is_valid(value)
            scores.append(1.0 if valid else 0.2)
        except (ValueError, RecursionError):
            scores.append(0.0)
    return scores


def code_tests(completions: Sequence[Any], tests: Sequence[Any], **_: Any) -> list[float]:
    """The share of the column `tests` that a completion's Python code passes, in a subprocess.

    Tests are a list of statements, such as "assert add(1, 2) == 3", or one text of them. The code
    is the last fenced block, or the whole completion. `run_tests` says what bounds it.
    """
    return [
        run_tests(code_of(text_of(c)), [t] if isinstance(t, str) else list(t))
        for c, t in zip(completions, tests, strict=True)
    ]


def math_equal(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 for a completion whose last expression equals the column `answer` as mathematics; else 0.

    math-verify reads LaTeX and plain numbers: 1/2, 0.5 and \\frac{1}{2} are equal.
    """
    from math_verify import parse, verify

    scores = []
    for completion, one in zip(completions, answer, strict=True):
        gold, found = parse(str(one)), parse(text_of(completion))
        scores.append(float(bool(gold) and bool(found) and bool(verify(gold, found))))
    return scores


REWARDS: dict[str, Reward] = {
    "exact-match": exact_match,
    "regex": regex,
    "json-schema": json_schema,
    "code-tests": code_tests,
    "math": math_equal,
}


def code_of(text: str) -> str:
    """The last fenced block of a text, or the whole text."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def find_reward(name: str) -> Reward:
    """The reward of a name.

    Args:
        name: One of `REWARDS`, or module:function; the module is looked up in the current folder
            and on the path.

    Raises:
        ConfigError: There is none, or it is not callable.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"unknown reward {name!r}; there are {', '.join(REWARDS)} and "
            f"module:function{near(name, REWARDS)}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ConfigError(f"reward {name!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def columns_of(reward: Reward) -> frozenset[str] | None:
    """The columns of the data that a reward reads; None where it takes all of them."""
    parameters = inspect.signature(reward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_all = any(p.kind == p.VAR_KEYWORD and p.name != "_" for p in parameters)
    return None if takes_all else frozenset(named - _PASSED)


class CheckedReward:
    """A reward whose mistakes are named with their sample, and stop the run or count as none."""

    def __init__(self, name: str, reward: Reward, on_error: OnError = "stop") -> None:
        """Wrap a reward.

        Args:
            name: Its name, for messages and logs.
            reward: The function.
            on_error: "stop" raises at a sample on which it raises or returns no finite number;
                "skip" warns, and the sample gets nothing from this reward.
        """
        self.name, self.reward, self.on_error = name, reward, on_error
        self.__name__ = name  # TRL logs rewards/NAME/mean

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Rewards of a batch, None for skipped samples.

        Raises:
            DataError: A column is wrong.
            RewardError: A sample failed and `on_error` is "stop".
        """
        given = {"prompts": list(prompts), "completions": list(completions), **columns}
        try:
            values = list(self._call(given))
        except DataError:
            raise
        except Exception:  # the function is the user's: which sample it is shows one at a time
            return [self._one(given, place) for place in range(len(completions))]
        if len(values) != len(completions):
            raise RewardError(
                f"reward {self.name!r} returned {len(values)} values for {len(completions)} "
                "completions; one each is wanted"
            )
        triples = zip(prompts, completions, values, strict=True)
        return [self._checked(prompt, completion, value) for prompt, completion, value in triples]

    def _call(self, given: Mapping[str, Any]) -> Sequence[float | None]:
        """Call the function with the arguments that it takes."""
        if columns_of(self.reward) is None:
            return self.reward(**given)
        known = inspect.signature(self.reward).parameters
        return self.reward(**{name: value for name, value in given.items() if name in known})

    def _one(self, given: Mapping[str, Any], place: int) -> float | None:
        """The reward of one sample, where the batch failed."""
        own = {k: [v[place]] if isinstance(v, list) else v for k, v in given.items()}
        prompt, completion = given["prompts"][place], given["completions"][place]
        try:
            (value,) = self._call(own)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return self._failed(prompt, completion, f"raised {reason}")
        return self._checked(prompt, completion, value)

    def _checked(self, prompt: Any, completion: Any, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            return self._failed(prompt, completion, f"returned {value!r}")
        if not math.isfinite(number):
            return self._failed(prompt, completion, f"returned {number}")
        return number

    def _failed(self, prompt: Any, completion: Any, what: str) -> float | None:
        """Raise, or warn and give no reward."""
        message = (
            f"reward {self.name!r} {what} for the completion {_short(text_of(completion))} of the "
            f"prompt {_short(text_of(prompt))}"
        )
        if self.on_error == "stop":
            raise RewardError(f"{message}; mend it, or go on with --on-reward-error skip")
        warnings.warn(f"{message}; it counts as no reward", stacklevel=2)
        return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
