"""Judge: a language model that rates answers, behind any OpenAI-compatible URL, with every reply kept in a file.

A run that was cut off goes on where it was, and a finished one is replayed without the judge.
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
# Categories whose answers are compared with a reference, as MT-Bench does.
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
TRIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Where to ask. url: such as https://api.openai.com/v1, or None to replay the cache alone; model: the judge's name; key: the name of the
    environment variable that holds the key; cache: the file of replies, as JSON lines.
    """

    url: str | None
    model: str
    cache: Path
    key: str = "OPENAI_API_KEY"

    def rate(self, messages: Sequence[Mapping[str, str]]) -> float:
        """The number in the judge's [[...]], from 1 to 10.

        A reply without one is asked for again. Raises JudgeError when none of three has one, when the judge cannot be
        reached, or when there is no URL and the reply is not in the cache.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0.0,
            "max_tokens": 2048,
        }
        name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        known = self._known().get(name)
        if known is not None:
            return float(RATING.findall(known)[-1])
        reply = ""
        for _ in range(TRIES):
            reply = self._ask(body)
            found = RATING.findall(reply)
            if found and 1 <= float(found[-1]) <= 10:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a") as file:
                    file.write(
                        json.dumps({"request": name, "model": self.model, "reply": reply}) + "\n"
                    )
                return float(found[-1])
        shown = " ".join(reply.split())[:120]
        raise JudgeError(
            f"{self.model} gave no rating from 1 to 10 as [[5]] in {TRIES} replies, the last one {shown!r}; ratings so far are kept in {self.cache}, "
            "so ask again, or ask another judge"
        )

    def _known(self) -> dict[str, str]:
        if not self.cache.is_file():
            return {}
        known = {}
        for number, text in enumerate(self.cache.read_text("utf-8").splitlines()):
            try:
                line = json.loads(text)
                known[line["request"]] = line["reply"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.cache}: line {number + 1} is no reply of a judge; remove it"
                ) from None
        return known

    def _ask(self, body: Mapping[str, Any]) -> str:
        if self.url is None:
            raise JudgeError(
                f"a rating is not in {self.cache}, and no judge to ask was given; give --judge-url"
            )
        if self.key not in os.environ:
            raise ConfigError(
                f"no key for the judge: set the environment variable {self.key}, or name another with --judge-key"
            )
        import openai

        try:
            with openai.OpenAI(
                base_url=self.url, api_key=os.environ[self.key], timeout=120, max_retries=4
            ) as client:
                reply = client.chat.completions.create(**body)
            return reply.choices[0].message.content or ""
        except openai.OpenAIError as error:
            raise JudgeError(
                f"{self.url}: the judge could not be asked: {' '.join(str(error).split())[:200]}"
            ) from error
        except (AttributeError, IndexError, TypeError) as error:
            raise JudgeError(f"{self.url}: the reply is no chat completion: {error}") from error


@dataclasses.dataclass(frozen=True)
class Questions:
    """A set of questions as FastChat has them: turns by question, categories, reference answers, and the judge's prompts."""

    turns: dict[int, list[str]]
    categories: dict[int, str]
    references: dict[int, list[str]]
    prompts: dict[str, dict[str, str]]


def read_questions(folder: Path, name: str) -> Questions:
    """Questions `NAME_questions.jsonl`, `NAME_reference_gpt4.jsonl` and `judge_prompts.jsonl` of a folder.

    name: mt_bench or vicuna. Raises DataError for a file that is not there.
    """

    def lines(file: str) -> list[dict[str, Any]]:
        path = folder / file
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; FastChat's data of {name} are wanted (docs/data.md)"
            )
        return [json.loads(text) for text in path.read_text("utf-8").splitlines() if text]

    rows = lines(f"{name}_questions.jsonl")
    return Questions(
        {row["question_id"]: row["turns"] for row in rows},
        {row["question_id"]: row["category"] for row in rows},
        {
            row["question_id"]: row["choices"][0]["turns"]
            for row in lines(f"{name}_reference_gpt4.jsonl")
        },
        {row["name"]: row for row in lines("judge_prompts.jsonl")},
    )


def read_answers(path: Path) -> dict[int, list[str]]:
    """Answers by question, from lines of {"question_id", "turns"}. Raises DataError naming the line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = {}
    for number, text in enumerate(path.read_text("utf-8").splitlines()):
        try:
            line = json.loads(text)
            found[int(line["question_id"])] = [str(turn) for turn in line["turns"]]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{path}: line {number + 1} is not {{"question_id": 81, "turns": ["...", "..."]}}'
            ) from None
    return found


def mean_rating(
    judge: Judge,
    questions: Questions,
    answers: Mapping[int, Sequence[str]],
    show: Callable[[int, int], None] = lambda done, of: None,
) -> float:
    """The mean over all questions and turns of the judge's ratings of single answers.

    answers: a text for each turn, by question. show: called with the number of rated answers, and of all. Raises JudgeError,
    or DataError for a question without an answer.

    Source: Zheng et al., "Judging LLM-as-a-judge with MT-bench and chatbot arena", 2023, single answer grading.
    """
    missing = [
        str(number)
        for number, turns in questions.turns.items()
        if len(answers.get(number, ())) < len(turns)
    ]
    if missing:
        raise DataError(
            f"no answer to question {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; every turn wants one"
        )
    asked = [
        (number, turn) for number, turns in questions.turns.items() for turn in range(len(turns))
    ]
    ratings = []
    for done, (number, turn) in enumerate(asked):
        ratings.append(judge.rate(prompt(questions, number, answers[number], turn)))
        show(done + 1, len(asked))
    return statistics.mean(ratings)


def prompt(
    questions: Questions, number: int, answers: Sequence[str], turn: int
) -> list[dict[str, str]]:
    """What the judge is asked about one turn of one question: of the second turn, the whole conversation is shown."""
    compared = questions.categories[number] in WITH_REFERENCE and number in questions.references
    form = questions.prompts[
        f"single-{'math-' if compared else ''}v1{'-multi-turn' if turn else ''}"
    ]
    asked = questions.turns[number]
    values = {"question": asked[0], "answer": answers[0]}
    if turn:
        values = {
            "question_1": asked[0],
            "question_2": asked[1],
            "answer_1": answers[0],
            "answer_2": answers[1],
        }
    if compared:
        values |= {
            f"ref_answer_{i + 1}": text for i, text in enumerate(questions.references[number])
        }
    return [
        {"role": "system", "content": form["system_prompt"]},
        {"role": "user", "content": form["prompt_template"].format(**values)},
    ]
