"""LLM-as-a-judge: rate answers through an OpenAI-compatible API, with a cache of all replies.

An interrupted run continues from the cache, and a finished one needs no judge.
"""

import dataclasses
import hashlib
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veratune.errors import ConfigError, DataError, JudgeError

RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
# Categories that MT-Bench rates beside a reference answer.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
MAX_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge model behind an OpenAI-compatible API.

    Args:
        url: Base URL, such as https://api.openai.com/v1. None: only cached replies are used.
        model: The judge's model name.
        cache: File of replies, as JSON lines.
        key: Environment variable that holds the API key.
    """

    url: str | None
    model: str
    cache: Path
    key: str = "OPENAI_API_KEY"

    def rate(self, messages: Sequence[Mapping[str, str]]) -> float:
        """Return the judge's rating, the last [[number]] of its reply.

        Args:
            messages: The prompt, as chat messages.

        Returns:
            A number from 1 to 10. A reply without one is requested again, three times in all.

        Raises:
            JudgeError: No reply has a rating, the judge cannot be reached, or there is no URL and
                the reply is not in the cache.
            ConfigError: The environment variable of the key is not set.
        """
        request = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0.0,
            "max_tokens": 2048,
        }
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        cached = self._read_cache().get(digest)
        if cached is not None:
            return float(RATING.findall(cached)[-1])
        reply = ""
        for _ in range(MAX_ATTEMPTS):
            reply = self._request(request)
            ratings = RATING.findall(reply)
            if ratings and 1 <= float(ratings[-1]) <= 10:
                self._append_cache({"request": digest, "model": self.model, "reply": reply})
                return float(ratings[-1])
        shown = " ".join(reply.split())[:120]
        raise JudgeError(
            f"{self.model} gave no rating from 1 to 10 as [[5]] in {MAX_ATTEMPTS} replies, the "
            f"last one {shown!r}; earlier ratings are kept in {self.cache}, so run again, or use "
            "another judge"
        )

    def _read_cache(self) -> dict[str, str]:
        """Replies by the digest of their request."""
        if not self.cache.is_file():
            return {}
        replies = {}
        for number, text in enumerate(self.cache.read_text("utf-8").splitlines()):
            try:
                line = json.loads(text)
                replies[line["request"]] = line["reply"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.cache}: line {number + 1} is no reply of a judge; remove it"
                ) from None
        return replies

    def _append_cache(self, line: Mapping[str, str]) -> None:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _request(self, request: Mapping[str, Any]) -> str:
        """Send a chat completion request and return the text of the reply."""
        if self.url is None:
            raise JudgeError(
                f"a rating is not in {self.cache}, and no judge to ask was given; give --judge-url"
            )
        if self.key not in os.environ:
            raise ConfigError(
                f"no key for the judge: set the environment variable {self.key}, or name another "
                "with --judge-key"
            )
        import openai

        try:
            with openai.OpenAI(
                base_url=self.url, api_key=os.environ[self.key], timeout=120, max_retries=4
            ) as client:
                reply = client.chat.completions.create(**request)
            return reply.choices[0].message.content or ""
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())[:200]
            raise JudgeError(f"{self.url}: the judge could not be asked: {reason}") from error
        except (AttributeError, IndexError, TypeError) as error:
            raise JudgeError(f"{self.url}: the reply is no chat completion: {error}") from error


@dataclasses.dataclass(frozen=True)
class Questions:
    """A question set in FastChat's format, by question id.

    Args:
        turns: The user's messages.
        categories: The category, such as math.
        references: Reference answers, one a turn, where there are any.
        prompts: FastChat's judge prompts, by name.
    """

    turns: dict[int, list[str]]
    categories: dict[int, str]
    references: dict[int, list[str]]
    prompts: dict[str, dict[str, str]]


def read_questions(folder: Path, name: str) -> Questions:
    """Read a FastChat question set.

    Args:
        folder: Holds NAME_questions.jsonl, NAME_reference_gpt4.jsonl and judge_prompts.jsonl.
        name: mt_bench or vicuna.

    Raises:
        DataError: A file is missing.
    """

    def lines(file: str) -> list[dict[str, Any]]:
        path = folder / file
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; FastChat's data of {name} are wanted (docs/data.md)"
            )
        return [json.loads(text) for text in path.read_text("utf-8").splitlines() if text]

    questions = lines(f"{name}_questions.jsonl")
    references = lines(f"{name}_reference_gpt4.jsonl")
    return Questions(
        {line["question_id"]: line["turns"] for line in questions},
        {line["question_id"]: line["category"] for line in questions},
        {line["question_id"]: line["choices"][0]["turns"] for line in references},
        {line["name"]: line for line in lines("judge_prompts.jsonl")},
    )


def read_answers(path: Path) -> dict[int, list[str]]:
    """Read answers by question id, from lines of {"question_id", "turns"}.

    Raises:
        DataError: The file is missing or a line has another form; names the line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    answers = {}
    for number, text in enumerate(path.read_text("utf-8").splitlines()):
        try:
            line = json.loads(text)
            answers[int(line["question_id"])] = [str(turn) for turn in line["turns"]]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{path}: line {number + 1} is not {{"question_id": 81, "turns": ["...", "..."]}}'
            ) from None
    return answers


def mean_rating(
    judge: Judge,
    questions: Questions,
    answers: Mapping[int, Sequence[str]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Average the judge's ratings over all questions and turns (single-answer grading).

    Args:
        judge: Rates the answers.
        questions: The question set.
        answers: One text a turn, by question id.
        on_progress: Called with the number of rated answers and the number of all.

    Raises:
        DataError: A question has no answer.
        JudgeError: A rating could not be had.

    Source: Zheng et al., "Judging LLM-as-a-judge with MT-bench and chatbot arena", 2023.
    """
    missing = [
        str(question)
        for question, turns in questions.turns.items()
        if len(answers.get(question, ())) < len(turns)
    ]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise DataError(f"no answer to question {shown}; every turn wants one")
    pairs = [(q, turn) for q, turns in questions.turns.items() for turn in range(len(turns))]
    ratings = []
    for done, (question, turn) in enumerate(pairs, start=1):
        ratings.append(judge.rate(prompt(questions, question, answers[question], turn)))
        on_progress(done, len(pairs))
    return statistics.mean(ratings)


def prompt(
    questions: Questions, question: int, answers: Sequence[str], turn: int
) -> list[dict[str, str]]:
    """Build the judge's prompt for one turn of one question, as chat messages.

    The prompt of the second turn shows the whole conversation.
    """
    references = questions.references.get(question)
    if questions.categories[question] not in REFERENCE_CATEGORIES:
        references = None
    name = f"single-{'' if references is None else 'math-'}v1{'-multi-turn' if turn else ''}"
    template = questions.prompts[name]
    asked = questions.turns[question]
    values = {"question": asked[0], "answer": answers[0]}
    if turn:
        values = {
            "question_1": asked[0],
            "question_2": asked[1],
            "answer_1": answers[0],
            "answer_2": answers[1],
        }
    values |= {f"ref_answer_{i}": text for i, text in enumerate(references or (), start=1)}
    return [
        {"role": "system", "content": template["system_prompt"]},
        {"role": "user", "content": template["prompt_template"].format(**values)},
    ]
